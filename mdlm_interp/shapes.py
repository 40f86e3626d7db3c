"""Shape annotations that need jaxtyping only where shapes are checked.

With jaxtyping installed these are its types, and the test suite checks every annotated shape at run
time. Without it, `Float[Tensor, "batch pos"]` is just `Tensor`: only annotations differ, no computation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped
    except ModuleNotFoundError:

        class Shaped:
            """Stand-in whose subscript is the array type."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Float32 = Float64 = Int = Int64 = Shaped

__all__ = ["Bool", "Float", "Float32", "Float64", "Int", "Int64", "Shaped"]
