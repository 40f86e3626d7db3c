"""What happens to predictions, attention and the residual stream along a denoising trajectory.

    trajectory = sample(model, start, seed=0)
    prediction_stability(model, trajectory).summary()

Every result is a small frozen dataclass with a `table()`: a list of plain mappings. `figures` draws them.
"""

from mdlm_interp.analysis.attribution import LogitAttribution, attribute_commits, attribute_logits
from mdlm_interp.analysis.lens import LogitLens, lens_logits, logit_lens
from mdlm_interp.analysis.replay import Replayed, filled, replay, sigma_at
from mdlm_interp.analysis.sinks import Sinks, attention_sinks
from mdlm_interp.analysis.stability import Stability, prediction_stability
from mdlm_interp.analysis.time_probe import Rows, TimeProbe, probe_states, probe_store, probe_time

__all__ = [
    "logit_lens",
    "lens_logits",
    "LogitLens",
    "attribute_logits",
    "attribute_commits",
    "LogitAttribution",
    "prediction_stability",
    "Stability",
    "attention_sinks",
    "Sinks",
    "probe_time",
    "probe_store",
    "probe_states",
    "Rows",
    "TimeProbe",
    "replay",
    "Replayed",
    "sigma_at",
    "filled",
]
