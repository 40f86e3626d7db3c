"""What a comparison says of the logits."""

import pytest
import torch

from mdlm_interp.errors import DataError
from transcoder.interventions import Ablate, interventions, log_odds, logit_difference


@pytest.fixture(scope="module")
def compared(bundled, state):
    return interventions(bundled, [Ablate(hook="blocks.3.hook_mlp_out")]).compare(state)


def test_probabilities_are_subs(compared, bundled, state):
    with torch.no_grad():
        logits = bundled(state)[0].double()
    masked = state[0] == bundled.config.mask_id
    before = compared.probabilities_before[0]
    torch.testing.assert_close(before[masked][:, :-1], logits[masked][:, :-1].softmax(-1), rtol=1e-12, atol=0)
    assert bool((before[masked][:, -1] == 0).all())
    kept = before[~masked].gather(1, state[0][~masked][:, None])
    assert bool((kept == 1).all())
    assert float((compared.probabilities_after - compared.probabilities_before).abs().max()) > 0.01


def test_changes_are_those_of_the_log_odds_largest_first(compared):
    changes = compared.changes(4)
    sizes = [abs(change.log_odds_change) for change in changes]
    assert sizes == sorted(sizes, reverse=True)
    p, q = compared.probabilities_before, compared.probabilities_after
    for change in changes:
        place = (change.row, change.position, change.token)
        assert (change.before, change.after) == (float(p[place]), float(q[place]))
        odds = [one[place] / (1 - one[place]) for one in (p, q)]
        assert change.log_odds_change == pytest.approx(float((odds[1] / odds[0]).log()), abs=1e-9)
    for position in compared.is_masked[0].nonzero()[:, 0].tolist():
        listed = {change.token for change in changes if change.position == position}
        assert set(p[0, position].topk(4).indices.tolist()) <= listed
        assert set(q[0, position].topk(4).indices.tolist()) <= listed


def test_kl_is_that_of_the_two_distributions_and_zero_where_given(compared):
    p, q = compared.probabilities_before[0], compared.probabilities_after[0]
    masked = compared.is_masked[0]
    expected = torch.nn.functional.kl_div(q[masked].log()[:, :-1], p[masked][:, :-1], reduction="none").sum(
        -1
    )
    torch.testing.assert_close(compared.kl[0, masked], expected, rtol=1e-9, atol=1e-12)
    assert float(compared.kl[0, masked].min()) > 1e-4
    assert bool((compared.kl[0, ~masked] == 0).all())


def test_the_table_and_texts_name_tokens(compared, tokenizer):
    lines = compared.table(tokenizer, k=2).splitlines()
    first = compared.changes(2)[0]
    assert lines[0].split()[:2] == ["row:pos", "token"]
    assert lines[1].startswith(f"0:{first.position} ")
    assert repr(tokenizer.token(first.token)) in lines[1]
    assert f"{first.after:.4f}" in lines[1]
    (before, after), masked = compared.texts(tokenizer)[0], compared.is_masked[0]
    filled = torch.where(masked, compared.logits_before[0, :, :-1].argmax(-1), compared.input_ids[0])
    assert before == tokenizer.decode(filled)
    assert "[MASK]" not in before + after
    with pytest.raises(DataError, match=r"k must be in \[1, 4095\], got 0"):
        compared.changes(0)


def test_metrics_are_of_the_probabilities_without_the_mask(bundled, state):
    with torch.no_grad():
        logits = bundled(state).double()
    p = logits[0, 8, :-1].softmax(-1)
    odds = float((p[40] / (1 - p[40])).log())
    assert float(log_odds(8, 40)(logits)) == pytest.approx(odds, abs=1e-9)
    assert float(logit_difference(8, 40, 7)(logits)) == pytest.approx(float((p[40] / p[7]).log()), abs=1e-9)
    assert float(log_odds(8, 40)(logits + 3)) == pytest.approx(odds, abs=1e-9)
    mask_id, n = bundled.config.mask_id, state.shape[1]
    with pytest.raises(DataError, match=rf"position must be in \[0, {n}\), got {n}"):
        log_odds(n, 0)(logits)
    with pytest.raises(DataError, match=rf"token must be in \[0, {mask_id}\), which leaves out the mask"):
        logit_difference(0, 1, mask_id)(logits)


def test_a_state_without_masks_has_nothing_to_compare(bundled, state, tokenizer):
    found = interventions(bundled, [Ablate(head=(0, 1))]).compare(state[:, :3])
    assert found.changes() == []
    assert found.table(tokenizer) == "no position is a mask, so nothing is predicted"
