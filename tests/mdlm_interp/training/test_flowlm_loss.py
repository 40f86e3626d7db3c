"""The symmetric KL divergence, and what the published form computes in its place."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mdlm_interp.training.flowlm_loss import symmetric_kl


def random_case(vocab_size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 5, vocab_size, generator=generator)
    return logits, torch.randint(0, vocab_size, (3, 5), generator=generator)


def test_the_corrected_form_is_both_divergences_by_torch():
    """Bounded: 1e-5 of F.kl_div in float64; the second one's target is log p."""
    logits, ids = random_case()
    hot, log_p = F.one_hot(ids, 40).double(), logits.double().log_softmax(-1)
    forward = F.kl_div(log_p, hot, reduction="none").sum(-1)
    backward = F.kl_div((hot + 1e-8).log(), log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(symmetric_kl(logits, ids).double(), forward + backward, rtol=1e-5, atol=0)


def test_the_published_form_is_its_code():
    """Bounded: 1e-6 of the published lines in float64; there the second one's target is p."""
    logits, ids = random_case()
    hot, log_p = F.one_hot(ids, 40).double(), logits.double().log_softmax(-1)
    kl_pq = F.kl_div(log_p, hot, reduction="none")
    kl_qp = F.kl_div((hot + 1e-8).log(), log_p.exp(), reduction="none", log_target=True)
    expected = (kl_pq + kl_qp).sum(-1)
    found = symmetric_kl(logits, ids, as_published=True).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_published_second_term_is_eighteen_thousand_where_nine_was_meant():
    """Exact values at V = 1000, p 0.172 on the token and the rest even: 18,418 and 9.07, as the reference has."""
    p = torch.full((1, 1, 1000), (1 - 0.172) / 999, dtype=torch.float64)
    p[..., 0] = 0.172
    ids = torch.zeros(1, 1, dtype=torch.int64)
    forward = -math.log(0.172)
    assert float(symmetric_kl(p.log().float(), ids)) - forward == pytest.approx(9.07, abs=0.01)
    published = float(symmetric_kl(p.log().float(), ids, as_published=True)) - forward
    assert published == pytest.approx(18_418.5, abs=1.0)


def test_the_published_second_term_barely_knows_what_the_model_says():
    """Right for sure, wrong for sure, or uniform: it differs by two in a thousand, the intended one from 0 to 18.4."""
    vocab_size, ids = 1000, torch.zeros(1, 1, dtype=torch.int64)
    right, wrong, even = (torch.zeros(1, 1, vocab_size) for _ in range(3))
    right[..., 0] = wrong[..., 1] = 60.0
    published, corrected = [], []
    for logits in (right, wrong, even):
        forward = F.cross_entropy(logits[0], ids[0])
        published.append(float(symmetric_kl(logits, ids, as_published=True) - forward))
        corrected.append(float(symmetric_kl(logits, ids) - forward))
    assert max(published) / min(published) < 1.002
    assert corrected == pytest.approx(
        [0.0, -math.log(1e-8), -math.log(1e-8) * 0.999 - math.log(1000)], abs=1e-3
    )


@pytest.mark.parametrize("as_published", [False, True])
def test_the_gradient_is_finite_at_certainty(as_published):
    logits = torch.zeros(1, 1, 8, requires_grad=True)
    hard = logits + torch.tensor([200.0] + [0.0] * 7)
    symmetric_kl(hard, torch.tensor([[3]]), as_published=as_published).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
