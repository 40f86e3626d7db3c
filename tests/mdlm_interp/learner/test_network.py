"""The learner's network: what it computes, against an independent forward pass in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.learner import HookedLearner
from mdlm_interp.learner_config import LearnerConfig
from mdlm_interp.learner_layers import rotary_tables, rotate

SMALL = LearnerConfig(vocab_size=23, model_length=16, hidden_dim=16, n_blocks=2, n_heads=2, dropout=0.0)


def random_learner(config: LearnerConfig = SMALL, seed: int = 0) -> HookedLearner:
    """Every parameter drawn, norms and biases too, so that nothing is multiplied by 1 or added 0."""
    model = HookedLearner(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draws = 0.4 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + draws if "norm" in name else draws)
    return model.eval()


@pytest.fixture
def ids() -> Tensor:
    drawn = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(1))
    drawn[:, 4] = SMALL.mask_id
    return drawn


SIGMA = torch.tensor([0.2, 1.7])


def reference(model: HookedLearner, ids: Tensor, t: Tensor | None) -> Tensor:
    """The network written out plainly in float64: complex rotations, torch's own RMSNorm, a loop over heads."""
    w = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    config = model.config
    d, d_head = config.hidden_dim, config.d_head

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gated(x: Tensor, name: str) -> Tensor:
        value, gate = linear(x, f"{name}.first").chunk(2, -1)
        return linear(value * gate * torch.sigmoid(gate), f"{name}.second")

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, (d,), w[f"{name}.weight"], 1e-6)

    def turned(x: Tensor) -> Tensor:  # [pos d_head]
        angles = torch.tensor(
            [[p * 10_000.0 ** (-2 * j / d_head) for j in range(d_head // 2)] for p in range(x.shape[0])],
            dtype=torch.float64,
        )
        halves = x.chunk(2, -1) if config.rope == "half_split" else (x[:, ::2], x[:, 1::2])
        z = torch.complex(*(half.contiguous() for half in halves)) * torch.polar(
            torch.ones_like(angles), angles
        )
        if config.rope == "half_split":
            return torch.cat((z.real, z.imag), -1)
        return torch.view_as_real(z).flatten(-2)

    def attention(h: Tensor, name: str) -> Tensor:  # [pos d]
        q, k, v = linear(h, f"{name}.attn_qkv").split(d, -1)
        heads = []
        for head in range(config.n_heads):
            mine = slice(head * d_head, (head + 1) * d_head)
            scores = turned(q[:, mine]) @ turned(k[:, mine]).T / math.sqrt(d_head)
            heads.append(scores.softmax(-1) @ v[:, mine])
        return linear(torch.cat(heads, -1), f"{name}.attn_out")

    rows = []
    for row in range(ids.shape[0]):
        x = w["embed.weight"][ids[row]]
        cond = None
        if t is not None and config.time_conditioning:
            steps = [
                1000.0 * float(t[row]) * math.exp(-math.log(1e4) * j / (d / 2 - 1)) for j in range(d // 2)
            ]
            features = [math.sin(a) for a in steps] + [math.cos(a) for a in steps]
            cond = gated(torch.tensor(features, dtype=torch.float64), "time")
        for i in range(config.n_blocks):
            block = f"blocks.{i}"
            film = torch.zeros(4 * d, dtype=torch.float64) if cond is None else gated(cond, f"{block}.film")
            shift_attn, scale_attn, shift_mlp, scale_mlp = film.chunk(4)
            added = attention(norm(x, f"{block}.norm1") * (1 + scale_attn) + shift_attn, block)
            x = x + config.residual_multiplier * added
            added = gated(norm(x, f"{block}.norm2") * (1 + scale_mlp) + shift_mlp, f"{block}.mlp")
            x = x + config.residual_multiplier * added
        logits = norm(x, "norm_final") @ w["embed.weight"].T
        logits[:, config.mask_id] = -math.inf
        rows.append(logits)
    return torch.stack(rows)


@pytest.mark.parametrize("rope", ["interleaved", "half_split"])
@pytest.mark.parametrize("with_time", [True, False])
@pytest.mark.parametrize("multiplier", [1.0, 0.3])
def test_the_forward_pass_is_that_of_an_independent_one(ids, rope, with_time, multiplier):
    """Bounded: 1e-11 in float64, where both round in their own order.

    In float32 5e-5, and ten times that with time: angles reach 1000 radians, whose rounding is 3e-5 by itself.
    """
    model = random_learner(replace(SMALL, rope=rope, residual_multiplier=multiplier)).double()
    sigma = SIGMA.double() if with_time else None
    t = 1 - torch.exp(-SIGMA.double()) if with_time else None
    logits = model(ids, sigma)
    expected = reference(model, ids, t)
    assert bool((logits[..., SMALL.mask_id] == -math.inf).all())
    others = torch.arange(23) != SMALL.mask_id
    torch.testing.assert_close(logits[..., others], expected[..., others], rtol=0, atol=1e-11)
    torch.testing.assert_close(
        model.float()(ids, SIGMA if with_time else None)[..., others],
        expected[..., others].float(),
        rtol=0,
        atol=5e-4 if with_time else 5e-5,
    )


def test_the_defaults_are_the_published_small_model_of_39_65_million_parameters():
    with torch.device("meta"):
        model = HookedLearner(LearnerConfig())
    assert sum(p.numel() for p in model.parameters()) == 39_650_304


def test_the_two_rotary_conventions_are_one_up_to_the_order_of_dimensions():
    """Exact: the same products and sums, in other places."""
    x = torch.randn(2, 7, 3, 10, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(10, 7, x.device, x.dtype)
    evens_first = torch.tensor([0, 2, 4, 6, 8, 1, 3, 5, 7, 9])
    interleaved = rotate(x, cos, sin, "interleaved")
    half_split = rotate(x[..., evens_first], cos, sin, "half_split")
    assert torch.equal(interleaved[..., evens_first], half_split)
    assert not torch.equal(interleaved, rotate(x, cos, sin, "half_split"))


def test_a_model_of_one_convention_becomes_one_of_the_other_by_reordering_its_queries_and_keys(ids):
    """Bounded: 1e-13, as scores sum over the dimensions in another order."""
    interleaved = random_learner().double()
    half_split = HookedLearner(replace(SMALL, rope="half_split")).double()
    d, d_head = SMALL.hidden_dim, SMALL.d_head
    within = torch.cat((torch.arange(0, d_head, 2), torch.arange(1, d_head, 2)))
    heads = torch.cat([head * d_head + within for head in range(SMALL.n_heads)])
    rows = torch.cat((heads, d + heads, 2 * d + torch.arange(d)))
    state = interleaved.state_dict()
    moved = {name: tensor[rows] if "attn_qkv" in name else tensor for name, tensor in state.items()}
    half_split.load_state_dict(moved)
    a, b = (model(ids, SIGMA.double())[..., :-1] for model in (interleaved, half_split))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    half_split.load_state_dict(state)
    assert float((half_split(ids, SIGMA.double())[..., :-1] - a).detach().abs().max()) > 1e-2


def test_rotary_positions_make_scores_depend_on_distance_alone():
    """Behavioural: shifting both positions leaves the score, to rounding."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cos, sin = rotary_tables(8, 30, q.device, q.dtype)

    def score(i: int, j: int) -> float:
        turned_q = rotate(q, cos[i : i + 1], sin[i : i + 1], "interleaved")
        return float((turned_q * rotate(k, cos[j : j + 1], sin[j : j + 1], "interleaved")).sum())

    assert score(5, 2) == pytest.approx(score(25, 22), abs=1e-12)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_time_matters_where_it_is_conditioned_on_and_only_there(ids):
    model = random_learner()
    assert not torch.equal(model(ids, SIGMA), model(ids, SIGMA + 0.5))
    assert not torch.equal(model(ids, SIGMA), model(ids))
    timeless = random_learner(replace(SMALL, time_conditioning=False))
    assert torch.equal(timeless(ids, SIGMA), timeless(ids))
    assert not any("film" in name or "time" in name for name, _ in timeless.named_parameters())


def test_everything_masked_is_t_one_and_has_finite_logits(ids):
    """sigma is infinite there when tokens are masked with probability t."""
    model = random_learner()
    logits = model(ids, torch.full((2,), math.inf))[..., :-1]
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits, model(ids, torch.full((2,), 40.0))[..., :-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("init_std", [0.02, 0.3, None])
def test_initial_weights_are_normal_with_zero_biases_and_a_function_of_seed_and_name(init_std):
    config = replace(SMALL, hidden_dim=64, vocab_size=400, init_std=init_std)
    model, again, other = HookedLearner(config), HookedLearner(config), HookedLearner(config, seed=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
        if "norm" in name:
            assert bool((parameter == 1).all())
        elif parameter.dim() == 1:
            assert bool((parameter == 0).all())
        else:
            assert not torch.equal(parameter, dict(other.named_parameters())[name])
            # Bounded: five standard errors of mean and deviation over the tensor's draws.
            n = parameter.numel()
            std = 1 / math.sqrt(3 * parameter.shape[1]) if init_std is None else init_std
            assert abs(float(parameter.detach().mean())) < 5 * std / math.sqrt(n)
            assert float(parameter.detach().std()) == pytest.approx(std, rel=5 / math.sqrt(2 * n))


def test_without_a_deviation_it_is_that_of_torchs_own_linear_maps():
    """Bounded: five standard errors of a deviation over the draws of a uniform, whose fourth moment is 1.8."""
    config = replace(SMALL, hidden_dim=96, init_std=None)
    ours = dict(HookedLearner(config).named_parameters())["blocks.0.mlp.second.weight"]
    theirs = torch.nn.Linear(ours.shape[1], ours.shape[0]).weight
    assert float(ours.detach().std()) == pytest.approx(
        float(theirs.detach().std()), rel=10 / math.sqrt(2 * ours.numel())
    )


def test_dropout_acts_in_training_mode_only(ids):
    model = random_learner(replace(SMALL, dropout=0.5))
    plain = random_learner()
    assert torch.equal(model(ids, SIGMA), plain(ids, SIGMA))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(ids, SIGMA), plain(ids, SIGMA))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_length": 0}, r"model_length must be at least 1, got 0"),
        ({"hidden_dim": 0}, r"hidden_dim must be at least 1, got 0"),
        ({"n_heads": 0}, r"n_heads must be at least 1, got 0"),
        ({"n_blocks": -1}, r"n_blocks must be at least 0, got -1"),
        ({"vocab_size": 1}, r"vocab_size must leave room for the mask token: at least 2, got 1"),
        ({"hidden_dim": 18}, r"hidden_dim must be n_heads times an even head width .* got hidden_dim 18 and"),
        (
            {"hidden_dim": 2, "n_heads": 1},
            r"hidden_dim must be at least 4 for the features of t, got 2; raise",
        ),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (
            {"init_std": 0.0},
            r"init_std must be positive and finite, got 0.0; none takes 1 / sqrt\(3 fan_in\)",
        ),
        ({"init_std": math.nan}, r"init_std must be positive and finite, got nan"),
        ({"residual_multiplier": 0.0}, r"residual_multiplier must be positive and finite, got 0.0; 1 adds"),
        ({"residual_multiplier": math.inf}, r"residual_multiplier must be positive and finite, got inf"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        replace(SMALL, **change)


def test_wrong_inputs_are_refused(ids, unchecked):
    model = random_learner()
    with pytest.raises(DataError, match=r"token ids must be in \[0, 23\), got 23"):
        model(torch.full((1, 3), 23), SIGMA[:1])
    with pytest.raises(DataError, match=r"timesteps must have shape \[2\], one sigma a sequence, got \[3\]"):
        model(ids, torch.zeros(3))
    with pytest.raises(
        DataError, match=r"runs in torch's arithmetic only, got object; pass NativeArithmetic"
    ):
        HookedLearner(SMALL, object())  # type: ignore[arg-type]
