"""What training minimises besides penalties: reconstruction, and a term that revives dead features.

Both take activations in normalised units and are means over tokens, so they do not depend on batch size.
"""

# Axes: layer, batch, d_model

from __future__ import annotations

from torch import Tensor

from mdlm_interp.shapes import Float


def layer_nmse(
    y_hat: Float[Tensor, "layer batch d_model"],
    y: Float[Tensor, "layer batch d_model"],
    row_weights: Float[Tensor, "layer batch"] | None = None,
) -> Float[Tensor, " layer"]:
    """Mean squared error of each layer in normalised units: of the variance over the training store.

    It is no FVU, which is of the variance of the rows themselves (`metrics`): here a row's error counts the same in
    any batch, so the mean over batches is that of their rows.

    Args:
        row_weights: Factor on each row's error; the mean is still over all rows.
    """
    return _weighted((y_hat - y).square(), row_weights).mean((1, 2))


def reconstruction_loss(
    y_hat: Float[Tensor, "layer batch d_model"],
    y: Float[Tensor, "layer batch d_model"],
    row_weights: Float[Tensor, "layer batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over layers of the normalised mean squared error."""
    return layer_nmse(y_hat, y, row_weights).mean()


def auxk_loss(
    residual: Float[Tensor, "layer batch d_model"],
    revived: Float[Tensor, "layer batch d_model"],
    row_weights: Float[Tensor, "layer batch"] | None = None,
) -> Float[Tensor, ""]:
    """Share of the reconstruction's error that dead features leave over.

    Args:
        residual: y - y_hat; taken as a constant.
        revived: What the strongest dead features would write, without b_dec.
        row_weights: Factor on each row's squared error.
    Source:
        Gao et al. 2024, arXiv:2406.04093, appendix A.2 (AuxK).
    """
    return share_left(*auxk_errors(residual, revived, row_weights))


def auxk_errors(
    residual: Float[Tensor, "layer batch d_model"],
    revived: Float[Tensor, "layer batch d_model"],
    row_weights: Float[Tensor, "layer batch"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The error that dead features leave over, and all of it; see `auxk_loss`."""
    goal = residual.detach()
    left, whole = (
        _weighted(part.square(), row_weights).mean((1, 2)).sum() for part in (goal - revived, goal)
    )
    return left, whole


def share_left(left: Float[Tensor, ""], whole: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Errors over all of the errors that they are left of."""
    # A layer without error has nothing left to explain; the floor keeps 0 / 0 out.
    return left / whole.clamp(min=1e-12)


def _weighted(squares: Tensor, row_weights: Tensor | None) -> Tensor:
    return squares if row_weights is None else squares * row_weights[..., None]
