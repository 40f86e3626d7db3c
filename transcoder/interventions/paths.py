"""Two trajectories of the same random draws, without an intervention and with it."""

# Axes: batch, pos, step

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mdlm_interp.decoding import Trajectory
from mdlm_interp.shapes import Bool
from mdlm_interp.tokenizers import Tokenizer
from transcoder.interventions.tables import text_table, token_text


@dataclass(frozen=True)
class Paths:
    """From the same start, with the same draws."""

    before: Trajectory
    """Without the edits."""
    after: Trajectory
    """With them."""

    @property
    def changed(self) -> Bool[Tensor, "batch pos"]:
        """Where the final tokens differ."""
        return self.before.final != self.after.final

    @property
    def first_difference(self) -> list[int | None]:
        """For each sequence the first step after which its tokens differ; None if they never do."""
        n_steps = min(self.before.n_steps, self.after.n_steps)
        differ = (self.before.states[1 : n_steps + 1] != self.after.states[1 : n_steps + 1]).any(-1)
        found: list[int | None] = []
        for row in range(differ.shape[1]):
            steps = differ[:, row].nonzero()
            # A trajectory may also go on where the other has ended.
            later = n_steps if bool(self.changed[row].any()) else None
            found.append(int(steps[0]) if len(steps) else later)
        return found

    def texts(self, tokenizer: Tokenizer) -> list[tuple[str, str]]:
        """Final texts, before and after."""
        pairs = zip(self.before.final.tolist(), self.after.final.tolist(), strict=True)
        return [(tokenizer.decode(one), tokenizer.decode(two)) for one, two in pairs]

    def table(self, tokenizer: Tokenizer | None = None) -> str:
        """Positions whose final token differs: tokens, the steps that wrote them, and how probable they were."""
        sides = (self.before, self.after)
        rows = []
        for row, position in self.changed.nonzero().tolist():
            cells = [f"{row}:{position}"]
            cells += [token_text(int(side.final[row, position]), tokenizer) for side in sides]
            cells += [str(int(side.revealed_at[row, position])) for side in sides]
            cells += [f"{float(side.commit_confidence[row, position]):.4f}" for side in sides]
            rows.append(cells)
        header = ["row:pos", "before", "after", "step before", "step after", "p before", "p after"]
        return text_table(header, rows, left=3) if rows else "no final token differs"
