"""A model with a transcoder in place of its MLPs, by hooks.

At `blocks.l.mlp.hook_in` layer l's features are encoded from what the MLP would read; at
`blocks.l.hook_mlp_out` the MLP's output is replaced by the reconstruction from the features of the layers
up to l that write to it, of this same pass. With the error terms of a pass without the splice added back
(`error_terms.py`), the result is the model's own, bit for bit. Feature edits leave the MLPs in place and add only
the difference that the edit makes to the reconstruction, so the model's own errors are kept.

All of these are contexts on the model itself and nest with any other hooks.
"""

# Axes: layer, batch, pos, d_model, feature, vocab

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.hooks import HookFunction, HookPoint
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float, Int64
from transcoder.error_terms import ErrorTerm, ErrorTerms
from transcoder.feature_edits import FeatureEdit, changes_of, with_change
from transcoder.identity import check_model
from transcoder.model import CrossLayerTranscoder
from transcoder.normalisation import Normalisation
from transcoder.reconstruction import Reconstruction

Look: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with a layer, its feature activations [batch pos feature], its output and its reconstruction
[batch pos d_model]."""


def outputs_of(clt: CrossLayerTranscoder) -> Normalisation | None:
    """The normalisation of the MLP outputs that a transcoder was trained with; None if it has none."""
    if not bool(clt.out_mean.any()) and bool((clt.out_scale == 1).all()):
        return None
    return Normalisation(clt.out_mean.double(), clt.out_scale.double())


class ReplacementModel:
    """A model and the transcoder that can stand in for its MLPs.

    Args:
        outputs: Normalisation of the MLP outputs, whose mean an ablation takes and whose variance is the unit of
            errors; none takes the transcoder's, of its training store, which an imported one does not have.
        check: Run the model on the transcoder's probe, to be sure that they belong together.
    Raises:
        CheckpointError: If the transcoder was trained on another model.
        DataError: If the two differ in dtype or device, or the model would drop activations at random.
    """

    def __init__(
        self,
        model: HookedMDLM,
        clt: CrossLayerTranscoder,
        *,
        outputs: Normalisation | None = None,
        check: bool = True,
    ) -> None:
        ours, theirs = (clt.b_dec.dtype, clt.b_dec.device), (model.dtype, model.device)
        if ours != theirs:
            raise DataError(
                f"the transcoder is {ours[0]} on {ours[1]}, the model {theirs[0]} on {theirs[1]}; "
                f"move one with .to(...)"
            )
        if check:
            check_model(clt, model)
        self.model, self.clt = model, clt
        self.outputs = outputs or outputs_of(clt)

    def mean_output(self, layer: int) -> Float[Tensor, " d_model"]:
        """What ablation to the mean writes.

        Raises:
            DataError: If it is not known.
        """
        if self.outputs is None:
            raise DataError(
                "the transcoder was imported and keeps no mean of the MLP outputs; hand evaluate() a store, or "
                "ReplacementModel the outputs of store_normalisation(store, clt.config.output_hooks)"
            )
        return self.outputs.mean[layer].to(self.clt.b_dec)

    def __call__(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        timesteps: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
        error_terms: bool = False,
    ) -> Float[Tensor, "batch pos vocab"]:
        """Raw logits of the model with MLPs replaced.

        Args:
            timesteps: sigma, as the model takes it.
            layers: Blocks whose MLP is replaced; all by default.
            error_terms: Add back what the reconstruction misses in a pass without the splice.
        """
        errors = self.error_terms(input_ids, timesteps) if error_terms else None
        with self.spliced(layers, errors):
            logits: Tensor = self.model(input_ids, timesteps)
        return logits

    def error_terms(
        self, input_ids: Int64[Tensor, "batch pos"], timesteps: Tensor | None = None
    ) -> ErrorTerms:
        """What the transcoder misses of each MLP's output, in the model as other hooks leave it."""
        found = ErrorTerms([], [])

        def compare(layer: int, acts: Tensor, y: Tensor, y_hat: Tensor) -> None:
            found.terms.append(ErrorTerm.between(y, y_hat))
            found.y_hat.append(y_hat)

        with self.watched(compare):
            self.model(input_ids, timesteps)
        return found

    @contextmanager
    def watched(self, look: Look) -> Iterator[None]:
        """Reconstruct every MLP's output beside the model, which stays as it is, and call `look` with each."""
        config = self.clt.config
        layers = {name: layer for layer, name in enumerate(config.output_hooks)}
        reconstruction = Reconstruction(self.clt, range(config.n_layers))

        def compare(tensor: Tensor, hook: HookPoint) -> None:
            layer = layers[hook.name]
            look(layer, reconstruction.acts[layer], tensor, reconstruction.take(layer))

        with (
            self._encoding(reconstruction),
            self._hooks(dict.fromkeys(layers, compare), read_only=True),
        ):
            yield

    def activations(
        self, input_ids: Int64[Tensor, "batch pos"], timesteps: Tensor | None = None
    ) -> tuple[Float[Tensor, "layer batch pos d_model"], Float[Tensor, "layer batch pos d_model"]]:
        """What the encoders read, and what the decoders should give."""
        config = self.clt.config
        names = [*config.input_hooks, *config.output_hooks]
        _, cache = self.model.run_with_cache(input_ids, names, timesteps=timesteps, clone=False)
        return (
            torch.stack([cache[name] for name in config.input_hooks]),
            torch.stack([cache[name] for name in config.output_hooks]),
        )

    def feature_acts(
        self, input_ids: Int64[Tensor, "batch pos"], timesteps: Tensor | None = None
    ) -> Float[Tensor, "layer batch pos feature"]:
        """Activations of every feature in the model."""
        x, _ = self.activations(input_ids, timesteps)
        return self.clt.encode(x.flatten(1, 2)).reshape(*x.shape[:3], -1)

    @contextmanager
    def spliced(
        self,
        layers: Sequence[int] | None = None,
        errors: ErrorTerms | None = None,
    ) -> Iterator[None]:
        """Replace the MLPs of some blocks (all by default) for the length of a `with` block.

        A replaced layer is reconstructed from the features of all layers up to it, replaced or not.

        Args:
            errors: Added to the reconstructions; from `error_terms`, on the same input, or on the one sequence that
                all of a batch are.
        """
        reading, writing = self.splice_hooks(layers, errors)
        with self._hooks(reading, read_only=True), self._hooks(writing):
            yield

    def splice_hooks(
        self, layers: Sequence[int] | None = None, errors: ErrorTerms | None = None
    ) -> tuple[dict[str, HookFunction], dict[str, HookFunction]]:
        """What `spliced` installs, for those who install other hooks before and after it.

        Returns:
            Functions by hook point that only read, on the encoders' inputs; and those that write the outputs.
        """
        chosen = self._layers(layers)
        reconstruction = Reconstruction(self.clt, frozenset(chosen))

        def write(target: int) -> HookFunction:
            def replace(tensor: Tensor, hook: HookPoint) -> Tensor:
                y_hat = reconstruction.take(target)
                return y_hat if errors is None else _expanded(errors.terms[target], y_hat).added_to(y_hat)

            return replace

        return self._reads(reconstruction), {
            self.clt.config.output_hooks[layer]: write(layer) for layer in chosen
        }

    @contextmanager
    def ablated(self, kind: Literal["zero", "mean"], layers: Sequence[int] | None = None) -> Iterator[None]:
        """Replace MLP outputs by zero, or by their mean; see `mean_output`."""

        def write(target: int) -> HookFunction:
            value = self.mean_output(target) if kind == "mean" else self.clt.b_dec[target]

            def replace(tensor: Tensor, hook: HookPoint) -> Tensor:
                return (
                    torch.zeros_like(tensor) if kind == "zero" else value.expand_as(tensor).to(tensor.dtype)
                )

            return replace

        with self._writing(self._layers(layers), write):
            yield

    @contextmanager
    def edited(self, edits: Sequence[FeatureEdit]) -> Iterator[None]:
        """Change features, and with them the outputs of their layer and all later ones; the MLPs stay.

        Adds edited reconstruction minus reconstruction. An edited feature that is not active adds
        nothing, and leaves every bit as it was.
        """
        by_layer: dict[int, list[FeatureEdit]] = {}
        for edit in edits:
            if not 0 <= edit.feature < self.clt.config.n_features:
                raise DataError(
                    f"feature must be in [0, {self.clt.config.n_features}), got {edit.feature}; "
                    f"it is the number within its layer"
                )
            by_layer.setdefault(self._layers([edit.layer])[0], []).append(edit)
        changes: dict[int, dict[int, Tensor]] = {}

        def read(layer: int) -> HookFunction:
            def encode(tensor: Tensor, hook: HookPoint) -> None:
                changes[layer] = changes_of(by_layer[layer], self.clt.encode_layer(tensor, layer))

            return encode

        def write(target: int) -> HookFunction:
            def add(tensor: Tensor, hook: HookPoint) -> Tensor | None:
                for source in self.clt.config.sources(target):
                    if source not in changes:
                        continue
                    for feature, change in changes[source].items():
                        row = self.clt.decoder_rows(source, feature)[target - source]
                        tensor = with_change(tensor, change, row)
                return tensor

            return add

        reading = {self.clt.config.input_hooks[layer]: read(layer) for layer in by_layer}
        targets = range(min(by_layer, default=self.clt.config.n_layers), self.clt.config.n_layers)
        with self._hooks(reading, read_only=True), self._writing(list(targets), write):
            yield

    def _layers(self, layers: Sequence[int] | None) -> list[int]:
        n_layers = self.clt.config.n_layers
        chosen = list(range(n_layers)) if layers is None else list(layers)
        for layer in chosen:
            if not 0 <= layer < n_layers:
                raise DataError(f"layer must be in [0, {n_layers}), got {layer}; layers count from 0")
        return chosen

    def _reads(self, reconstruction: Reconstruction) -> dict[str, HookFunction]:
        def read(layer: int) -> HookFunction:
            return lambda tensor, hook: reconstruction.read(layer, tensor)

        return {self.clt.config.input_hooks[layer]: read(layer) for layer in reconstruction.sources}

    @contextmanager
    def _encoding(self, reconstruction: Reconstruction) -> Iterator[None]:
        """Reconstruct from the inputs of each pass."""
        try:
            with self._hooks(self._reads(reconstruction), read_only=True):
                yield
        finally:
            reconstruction.clear()

    @contextmanager
    def _writing(self, layers: Sequence[int], write: Callable[[int], HookFunction]) -> Iterator[None]:
        with self._hooks({self.clt.config.output_hooks[layer]: write(layer) for layer in layers}):
            yield

    @contextmanager
    def _hooks(self, functions: Mapping[str, HookFunction], *, read_only: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            if functions:
                stack.enter_context(self.model.hooks(functions, read_only=read_only))
            yield


def _expanded(term: ErrorTerm, y_hat: Tensor) -> ErrorTerm:
    """The term of one sequence, for a batch of it."""
    if len(term.high) != 1 or len(y_hat) == 1:
        return term
    low = None if term.low is None else term.low.expand_as(y_hat)
    return ErrorTerm(term.high.expand_as(y_hat), low)
