"""A Markov chain whose posterior is known: the exact denoiser that samplers are held against."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import torch
from torch import Tensor


class MarkovChain:
    """p(x) = start[x_0] prod_i step[x_i-1, x_i]; called with masked tokens it gives log p(x_i | revealed).

    Args:
        coupling: How much a token depends on the one before; 0 makes all independent.
    """

    def __init__(self, n_tokens: int = 3, length: int = 4, coupling: float = 2.0, seed: int = 6) -> None:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(n_tokens + 1, n_tokens, generator=generator, dtype=torch.float64)
        self.start = (0.5 * draws[0]).softmax(-1)
        self.step = (coupling * draws[1:]).softmax(-1)
        self.length, self.mask_id = length, n_tokens
        self.config = SimpleNamespace(mask_id=n_tokens, vocab_size=n_tokens + 1)
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_i = v | the tokens that are not masks) by forward-backward; the mask's own entry is arbitrary."""
        self.calls += 1
        n = self.mask_id
        seen = torch.nn.functional.one_hot(x, n + 1)[..., :n].double()
        evidence = torch.where((x == n)[..., None], 1.0, seen)
        forward, backward = [self.start * evidence[:, 0]], [torch.ones_like(evidence[:, 0])]
        for i in range(1, x.shape[1]):
            forward.append((forward[-1] @ self.step) * evidence[:, i])
            backward.insert(0, (evidence[:, -i] * backward[0]) @ self.step.T)
        joint = torch.stack(forward, 1) * torch.stack(backward, 1)
        posterior = joint / joint.sum(-1, keepdim=True)
        return torch.cat([posterior.log(), torch.full_like(posterior[..., :1], 3.0)], -1)

    def sequences(self) -> list[tuple[int, ...]]:
        """Every sequence."""
        return list(itertools.product(range(self.mask_id), repeat=self.length))

    def law(self) -> Tensor:
        """Probability of each of `sequences`."""
        chances = [
            float(self.start[x[0]]) * math.prod(float(self.step[a, b]) for a, b in itertools.pairwise(x))
            for x in self.sequences()
        ]
        return torch.tensor(chances, dtype=torch.float64)

    def masks(self, n: int) -> Tensor:
        """n sequences of masks."""
        return torch.full((n, self.length), self.mask_id)


def chi_square(samples: Tensor, law: Tensor, n_tokens: int) -> tuple[float, int]:
    """Statistic and degrees of freedom of sampled sequences against a law over all of them, rare ones together."""
    places = n_tokens ** torch.arange(samples.shape[1] - 1, -1, -1)
    counts = torch.bincount((samples * places).sum(1), minlength=len(law)).double()
    expected = law * len(samples)
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    filled = expected > 0
    statistic = ((observed - expected)[filled] ** 2 / expected[filled]).sum()
    return float(statistic), int(filled.sum()) - 1


def excess(samples: Tensor, law: Tensor, n_tokens: int) -> float:
    """By how many standard deviations the statistic exceeds its mean; below 4.5 for samples of that law."""
    statistic, freedom = chi_square(samples, law, n_tokens)
    return (statistic - freedom) / math.sqrt(2 * freedom)
