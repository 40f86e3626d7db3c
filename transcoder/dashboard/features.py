"""Everything that is shown of a transcoder's features."""

from __future__ import annotations

from dataclasses import dataclass

from capture import ActivationStore
from mdlm_interp.model import HookedMDLM
from transcoder.config import TranscoderConfig
from transcoder.dashboard.occurrences import Occurrences, find_occurrences
from transcoder.dashboard.written import Written, read_decoders
from transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class Dashboards:
    """What every feature of a transcoder reads and writes."""

    config: TranscoderConfig
    """Shape of the transcoder."""
    occurrences: Occurrences
    """Where the features are active."""
    written: Written
    """What their decoders write."""


def collect(
    clt: CrossLayerTranscoder,
    model: HookedMDLM,
    store: ActivationStore,
    *,
    n_examples: int = 8,
    context: int = 12,
    max_sequences: int | None = None,
    n_tokens: int = 10,
    n_nearest: int = 8,
    progress: bool = False,
) -> Dashboards:
    """Look at every feature.

    Args:
        model: That the transcoder was trained on, and the store captured from.
        n_examples: Strongest occurrences of a feature, at most one of a sequence.
        context: Tokens shown before and after each.
        max_sequences: Sequences to look at, of all times and of many texts; none looks at all.
        n_tokens: Promoted and suppressed tokens, so many of each.
        n_nearest: Nearest features; 0 leaves out the search.
    Raises:
        DataError: If a number is out of range, or see `find_occurrences` and `read_decoders`.
        StoreError: If the store is another model's, or lacks a hook point.
        CheckpointError: If the model is another.
    """
    writes = read_decoders(clt, model, n_tokens=n_tokens, n_nearest=n_nearest)
    found = find_occurrences(
        clt,
        store,
        n_examples=n_examples,
        before=context,
        after=context,
        max_sequences=max_sequences,
        progress=progress,
    )
    return Dashboards(config=clt.config, occurrences=found, written=writes)
