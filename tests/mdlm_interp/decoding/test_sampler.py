"""The loop: caching, guidance, interventions, rewriting; nothing depends on the batch."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mdlm_interp.decoding import (
    Ancestral,
    Draw,
    Even,
    FirstHitting,
    Fixed,
    Intervention,
    Record,
    ReMDM,
    Rewrite,
    Sampler,
    TakeBack,
    Threshold,
    generate,
    sample,
    start_tokens,
)
from mdlm_interp.errors import DataError, HookError
from tests.mdlm_interp.decoding.chain import MarkovChain

SAMPLERS = {
    "ancestral": Sampler(schedule=Ancestral(steps=24)),
    "analytic": Sampler(schedule=Ancestral(steps=24, noise="log_linear", end=1e-5, joint=True)),
    "first hitting": Sampler(schedule=FirstHitting()),
    "confidence": Sampler(schedule=Fixed(per_step=2)),
    "entropy": Sampler(schedule=Even(steps=5), order="entropy"),
    "threshold": Sampler(schedule=Threshold(probability=0.3), order="margin"),
    "blocks": Sampler(schedule=Even(steps=3), order="random", block_length=4),
    "remdm": Sampler(schedule=ReMDM(grid=Ancestral(steps=24), strategy="cap", eta=0.1)),
    "conf": Sampler(schedule=ReMDM(grid=Ancestral(steps=24), strategy="conf", eta=1.0)),
    "take back": Sampler(schedule=Even(steps=9), take_back=TakeBack()),
    "rewrite": Sampler(schedule=Rewrite(steps=9, per_step=2, threshold=0.9)),
}
EACH = pytest.mark.parametrize("name", SAMPLERS)


@pytest.fixture
def start(small_config) -> Tensor:
    """Three sequences with different given tokens."""
    start = torch.full((3, 10), small_config.mask_id)
    start[0, :2] = torch.tensor([4, 5])
    start[1, 7] = 9
    return start


def uncached(sampler: Sampler) -> Sampler:
    return Sampler(**{**vars(sampler), "cache": False})


@EACH
def test_given_tokens_stay_and_no_mask_is_left(model, start, name):
    trajectory = sample(model, start, SAMPLERS[name], seed=1)
    given = start != model.config.mask_id
    for state in trajectory.states:
        assert torch.equal(state[given], start[given])
    assert not bool((trajectory.final == model.config.mask_id).any())
    assert bool((trajectory.revealed_at[given] == -1).all())


@EACH
def test_cached_predictions_change_nothing(model, start, name):
    """Exact: the same tokens, confidences and entropies with fewer passes where steps leave tokens alone."""
    cached = sample(model, start[:1], SAMPLERS[name], seed=1)
    fresh = sample(model, start[:1], uncached(SAMPLERS[name]), seed=1)
    assert torch.equal(cached.states, fresh.states)
    assert torch.equal(cached.entropy.nan_to_num(nan=-1), fresh.entropy.nan_to_num(nan=-1))
    idle = int((fresh.states[1:-1] == fresh.states[:-2]).all(-1).all(-1).sum())
    assert fresh.n_forwards == fresh.n_steps
    assert cached.n_forwards == fresh.n_steps - idle
    if name == "ancestral":
        assert idle > 5


def test_a_cached_prediction_is_not_used_for_another_time(model, start):
    """This model reads sigma: told the schedule's time, it must run again though no token changed."""
    sampler = Sampler(schedule=Ancestral(steps=40), sigma="time")
    trajectory = sample(model, start[:1], sampler, seed=1)
    assert trajectory.n_forwards == trajectory.n_steps
    assert not torch.equal(
        trajectory.confidence.nan_to_num(nan=-1),
        sample(model, start[:1], SAMPLERS["ancestral"], seed=1).confidence.nan_to_num(nan=-1)[
            : trajectory.n_steps
        ],
    )


@EACH
def test_a_sequence_does_not_depend_on_its_batch(name):
    """Exact, with a denoiser whose rows do not mix: alone, or in any company."""
    chain = MarkovChain(n_tokens=4, length=9, coupling=1.5, seed=7)
    start = chain.masks(4)
    start[2, 3] = 1
    together = sample(chain, start, SAMPLERS[name], seed=3, indices=[5, 0, 8, 2])
    alone = sample(chain, start[2:3], SAMPLERS[name], seed=3, indices=[8])
    n = alone.n_steps
    assert torch.equal(together.states[: n + 1, 2], alone.states[:, 0])
    assert torch.equal(together.revealed_at[2], alone.revealed_at[0])
    assert bool((together.states[n:, 2] == alone.final[0]).all())
    assert not torch.equal(together.final[0], together.final[1])
    other = sample(chain, start[2:3], SAMPLERS[name], seed=4, indices=[8])
    assert not torch.equal(other.final, alone.final)


def test_greedy_decoding_is_the_fill_commands(make_model, small_config):
    """Exact: against a loop that commits the most confident token of all."""
    model, x = make_model(), torch.full((1, 8), small_config.mask_id)
    x[0, 3] = 5
    found = sample(model, x, Sampler(schedule=Fixed(), draw=Draw(temperature=0.0)))
    from mdlm_interp.decoding import predict

    for step in range(7):
        confidence, token = predict(model, x)[0].max(-1)
        position = int(confidence.masked_fill(x[0] != small_config.mask_id, -1.0).argmax())
        x[0, position] = token[position]
        assert torch.equal(found.states[step + 1], x)
        assert int(found.revealed_at[0, position]) == step


def test_suppressed_tokens_and_the_mask_are_never_drawn(model, small_config):
    suppress = tuple(range(3, small_config.mask_id))
    for draw in (Draw(suppress=suppress), Draw(suppress=suppress, temperature=0.0)):
        found = sample(model, start_tokens(model, 12, n=4), Sampler(draw=draw, schedule=Even(steps=3))).final
        assert set(found.flatten().tolist()) <= {0, 1, 2}
    with pytest.raises(DataError, match="every token is suppressed; leave at least one"):
        sample(model, start_tokens(model, 3), Sampler(draw=Draw(suppress=tuple(range(41)))))
    with pytest.raises(DataError, match=r"mask and suppressed tokens must be in \[0, 41\), got 41"):
        sample(model, start_tokens(model, 3), Sampler(draw=Draw(suppress=(41,))))


def test_guidance_moves_away_from_what_is_said_without_the_given_tokens(model, start, small_config):
    """Exact: the logits that the first step draws from are un + (w + 1) (cond - un)."""
    sampler = Sampler(schedule=Even(steps=1), guidance=1.5, draw=Draw(temperature=0.0))
    found = sample(model, start, sampler)
    assert found.n_forwards == 2
    hidden = torch.full_like(start, small_config.mask_id)
    from mdlm_interp.diffusion import LogLinearSchedule

    def logits(x: Tensor) -> Tensor:
        share = (x == small_config.mask_id).double().mean(1)
        with torch.no_grad():
            scores: Tensor = model(x, LogLinearSchedule().sigma(share).float())
            return scores

    mixed = logits(hidden) + 2.5 * (logits(start) - logits(hidden))
    best = mixed[..., : small_config.mask_id].argmax(-1)
    assert torch.equal(found.final, torch.where(start == small_config.mask_id, best, start))
    plain = sample(model, start, Sampler(schedule=Even(steps=1), draw=Draw(temperature=0.0)))
    assert not torch.equal(plain.final, found.final)


# Interventions


def test_an_intervention_that_changes_nothing_shifts_nothing(model, start):
    """Exact: each draw has its own random numbers, and the cache is not used where hooks run."""
    same = Intervention("blocks.*.hook_mlp_out", lambda tensor, hook: tensor, steps=(1, 2))
    plain = sample(model, start, SAMPLERS["ancestral"], seed=2)
    touched = sample(model, start, SAMPLERS["ancestral"], seed=2, interventions=[same])
    assert torch.equal(plain.states, touched.states)


def test_a_step_with_hooks_neither_takes_nor_leaves_a_cached_prediction(model, start):
    """Exact: in steps that change no token the hook still runs, and the next step does without it."""
    sampler = Sampler(schedule=Ancestral(steps=400))
    plain = sample(model, start[:1], sampler, seed=1)
    assert torch.equal(plain.states[0], plain.states[3])
    act = Intervention("hook_logits", lambda logits, hook: 2 * logits, steps=(1,))
    found = sample(model, start[:1], sampler, seed=1, interventions=[act])
    same = [
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain.entropy, found.entropy, strict=True)
    ]
    assert same == [step != 1 for step in range(plain.n_steps)]


def test_an_intervention_acts_in_its_steps_layers_and_positions_only(model, start):
    seen: list[tuple[str, int]] = []

    def zero(tensor, hook):
        seen.append((hook.name, tensor.shape[1]))
        return torch.zeros_like(tensor)

    record = Record(hooks=("blocks.*.hook_mlp_out",), steps=(0, 3, 4))
    act = Intervention("blocks.1.hook_mlp_out", zero, steps=range(3, 5), positions=(2, 6))
    sampler = Sampler(schedule=Even(steps=6), order="left_to_right")
    plain = sample(model, start, sampler, seed=2, record=record)
    found = sample(model, start, sampler, seed=2, record=record, interventions=[act])
    assert seen == [("blocks.1.hook_mlp_out", 10)] * 2
    assert found.activation_steps == (0, 3, 4)
    changed = found.activations["blocks.1.hook_mlp_out"]
    assert not changed[1:, :, [2, 6]].any()
    assert changed[0].all()
    assert changed[1:, :, [0, 1, 3, 4, 5, 7, 8, 9]].all()
    assert torch.equal(
        found.activations["blocks.0.hook_mlp_out"][0], plain.activations["blocks.0.hook_mlp_out"][0]
    )
    assert torch.equal(found.states[:4], plain.states[:4])
    assert not torch.equal(found.final, plain.final)


def test_a_single_logit_changes_its_own_position_only(model, start):
    """Exact: with the logits of one position overwritten in one step, every other draw stays."""

    def force(tensor, hook):
        tensor[:, :, 7] = 1e4

    act = Intervention("hook_logits", force, steps=(0,), positions=(5,))
    sampler = Sampler(schedule=Even(steps=1))
    plain, found = (sample(model, start, sampler, seed=2, interventions=some).final for some in ([], [act]))
    assert found[:, 5].tolist() == [7, 7, 7]
    others = [i for i in range(10) if i != 5]
    assert torch.equal(plain[:, others], found[:, others])
    assert not torch.equal(plain, found)


def test_positions_may_follow_the_state(model, start, small_config):
    """Exact: what is recorded is zero at masks, and only there; in attention the axis is that of the queries."""
    record = Record(hooks=("blocks.0.attn.hook_pattern", "blocks.0.hook_resid_mid"))
    masks = Intervention("blocks.0.attn.hook_pattern", lambda t, hook: 0 * t, positions=lambda x: x == 40)
    found = sample(model, start, Sampler(schedule=Even(steps=3)), interventions=[masks], record=record)
    for step in range(3):
        is_mask = found.states[step] == small_config.mask_id
        pattern = found.activations["blocks.0.attn.hook_pattern"][step]  # batch head query key
        assert torch.equal(pattern.abs().sum((1, 3)) == 0, is_mask)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (Intervention("blocks.9.hook_mlp_out", lambda t, hook: t), HookError, "no hook point matches"),
        (
            Intervention("blocks.0.hook_mlp_out", cast(Any, lambda t: t)),
            HookError,
            "is called with two arguments",
        ),
        (
            Intervention("blocks.0.adaln.hook_gate_mlp", lambda t, hook: t, positions=(1,)),
            HookError,
            "is the same at every position; leave positions out",
        ),
        (
            Intervention("hook_embed", lambda t, hook: t, positions=(10,)),
            DataError,
            r"positions must be in \[0, 10\), got \[10\]",
        ),
        (
            Intervention("hook_embed", lambda t, hook: t, positions=lambda x: x),
            DataError,
            r"positions must give a boolean for each token \[3, 10\], got int64 \[3, 10\]",
        ),
        (
            Intervention("hook_embed", lambda t, hook: t[:, :1], positions=(1,)),
            HookError,
            r"returned shape \(3, 1, 24\), expected \(3, 10, 24\)",
        ),
    ],
)
def test_an_intervention_that_cannot_be_is_refused(model, start, listening, act, error, message):
    with pytest.raises(error, match=message):
        sample(model, start, Sampler(schedule=Even(steps=2)), interventions=[act])
    assert listening(model) == 0


def test_hooks_need_a_model_that_has_them(chain):
    with pytest.raises(HookError, match="MarkovChain has no hook points; load it as a HookedMDLM"):
        sample(chain, chain.masks(1), record=Record(hooks=("hook_embed",)))


# Rewriting


def test_least_confident_rewriting_is_the_published_loop(model, start, small_config):
    """Exact: against the loop itself, from the same random start."""
    schedule = Rewrite(steps=12, per_step=2, threshold=0.6, as_published=True)
    sampler = Sampler(schedule=schedule, draw=Draw(temperature=0.0))
    found = sample(model, start[:1], sampler, seed=5)
    x, free = found.states[0].clone(), start[0] == small_config.mask_id
    assert not bool((x == small_config.mask_id).any())
    assert torch.equal(x[0][~free], start[0][~free])
    for step in range(found.n_steps):
        with torch.no_grad():
            probabilities = model(x, torch.zeros(1))[0, :, : small_config.mask_id].double().softmax(-1)
        best, token = probabilities.max(-1)
        candidates = [i for i in range(10) if free[i] and best[i] < 0.6]
        for i in sorted(candidates, key=lambda i: float(best[i]))[:2]:
            x[0, i] = token[i]
        assert torch.equal(found.states[step + 1], x)
    assert found.n_steps > 2


def test_least_confident_rewriting_ends_when_all_are_sure_or_settled():
    """Exact: it starts from all tokens but the mask, and leaves alone what is sure, and what holds its best token."""
    long = MarkovChain(n_tokens=4, length=11, coupling=1.5, seed=7)

    def run(as_published: bool):
        schedule = Rewrite(steps=60, threshold=0.5, as_published=as_published)
        sampler = Sampler(schedule=schedule, draw=Draw(temperature=0.0))
        return sample(leave_one_out(long), long.masks(30), sampler, seed=5)

    found = run(False)
    counts = torch.bincount(found.states[0].flatten(), minlength=5)
    assert counts[long.mask_id] == 0
    assert int(counts[: long.mask_id].min()) > 40
    assert found.n_steps < 60
    for step in range(found.n_steps):
        best = leave_one_out(long)(found.states[step], torch.zeros(30))[..., : long.mask_id].max(-1)
        waiting = (best.values.exp() < 0.5) & (best.indices != found.states[step])
        moved = found.states[step + 1] != found.states[step]
        assert torch.equal(moved.sum(1), waiting.any(1).long())
        assert bool((waiting | ~moved).all())
    published = run(True)
    assert published.n_steps == 60
    assert not torch.equal(published.final, found.final)


def test_most_confident_rewriting_as_published_stands_still():
    """Exact: it keeps writing a position that holds its best token; passing over such ones goes on to the others."""
    long = MarkovChain(n_tokens=4, length=11, coupling=1.5, seed=7)

    def run(as_published: bool):
        schedule = Rewrite(version="most_confident", steps=40, as_published=as_published)
        sampler = Sampler(schedule=schedule, draw=Draw(temperature=0.0))
        return sample(leave_one_out(long), long.masks(1), sampler, seed=5, mask_id=long.mask_id)

    published, corrected = run(True), run(False)
    assert published.n_steps == 40
    assert torch.equal(published.states[2], published.final)  # still since its second step
    assert not torch.equal(corrected.final, published.final)
    settled = leave_one_out(long)(corrected.final, torch.zeros(1))[..., : long.mask_id].argmax(-1)
    assert torch.equal(settled, corrected.final)
    assert corrected.n_steps < 40


def leave_one_out(chain: MarkovChain):
    """A denoiser for random tokens: at each position the chain's posterior given all other tokens."""

    class LeaveOneOut:
        config = chain.config

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            rows = []
            for position in range(x.shape[1]):
                hidden = x.clone()
                hidden[:, position] = chain.mask_id
                rows.append(chain(hidden, sigma)[:, position])
            return torch.stack(rows, 1)

    return LeaveOneOut()


# Ways in


def test_generate_is_called_as_the_port_is(model, small_config):
    """Exact: a generator gives the seed and goes on; equal generators give equal text."""
    drawn = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, again = (generate(model, 9, num_steps=5, top_k=4, temperature=0.9, generator=g) for g in drawn)
    assert first.shape == (1, 9)
    assert torch.equal(first, again)
    assert not torch.equal(
        first, generate(model, 9, num_steps=5, top_k=4, temperature=0.9, generator=drawn[0])
    )
    prompted = generate(model, 9, 5, generator=drawn[0], prompt_ids=[7, 8])
    assert prompted[0, :2].tolist() == [7, 8]
    best = generate(model, 9, 1, top_k=1, generator=drawn[0])
    greedy = sample(
        model, start_tokens(model, 9), Sampler(schedule=Even(steps=1), draw=Draw(temperature=0.0))
    )
    assert torch.equal(best, greedy.final)
    with pytest.raises(DataError, match="seq_len must be at least 1, got 0"):
        generate(model, 0)


def test_models_of_transformers_are_taken_with_their_mask(small_config):
    """Exact: one that takes timesteps and says its type, and an encoder that does neither."""

    class Config:
        model_type, vocab_size = "bert", 5

    class Encoder(torch.nn.Module):
        config = Config()
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask=None):
            assert attention_mask is None
            scores = torch.zeros(*input_ids.shape, 5)
            scores[..., 2] = 50.0
            return type("Output", (), {"logits": scores})()

    found = sample(Encoder(), torch.tensor([[1, 4, 4]]), Sampler(schedule=Even(steps=1)), mask_id=4)
    assert found.final.tolist() == [[1, 2, 2]]
    with pytest.raises(DataError, match="Encoder does not say which token is the mask; pass mask_id"):
        sample(Encoder(), torch.tensor([[1, 4, 4]]))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        (
            {"sampler": Sampler(schedule=Fixed(), order=())},
            "the order leaves out position 0, which is masked",
        ),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"indices": [1]}, "indices must number each of the 3 sequences, got 1; none for 0, 1"),
        (
            {"sampler": Sampler(schedule=Fixed(), order=(0, 0))},
            r"an order must name positions in \[0, 10\), each once",
        ),
        (
            {"sampler": Sampler(schedule=Fixed(), order=(0, 2, 3, 4, 5, 6, 7, 8, 9))},
            "the order leaves out position 1, which is masked; name every masked one",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(unchecked, model, start, keywords, message):
    with pytest.raises(DataError, match=message):
        sample(model, start, **keywords)


def test_a_denoiser_of_another_shape_is_refused(chain):
    with pytest.raises(DataError, match=r"logits of shape \[4, 4\] for tokens \[1, 4\]"):
        sample(lambda x, sigma: torch.zeros(4, 4), chain.masks(1), mask_id=3)
    with pytest.raises(DataError, match="a model must be callable with tokens and sigma, got int"):
        sample(3, chain.masks(1), mask_id=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_without_probabilities_are_refused(model, start, value):
    """Without this, an order by NaN would fill nothing, for ever."""
    broken = Intervention("hook_logits", lambda tensor, hook: torch.full_like(tensor, value), steps=(1,))
    with pytest.raises(DataError, match="the model's logits give no probabilities"):
        sample(model, start, Sampler(schedule=Fixed()), interventions=[broken])


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(1, 2)])
def test_a_start_that_is_no_batch_of_tokens_is_refused(model, unchecked, bad):
    bad = bad if bad.dim() == 2 and bad.numel() else bad.long()
    with pytest.raises(
        DataError, match=r"start must be int64 \[batch pos\] and not empty, got (int64|float32) \["
    ):
        sample(model, bad)


def test_a_prompt_that_does_not_fit_is_refused(model):
    with pytest.raises(DataError, match="the prompt has 3 tokens, a sample 2; raise length"):
        start_tokens(model, 2, [1, 2, 3])


def test_a_start_without_masks_takes_no_step(model):
    found = sample(model, torch.tensor([[1, 2]]))
    assert found.n_steps == found.n_forwards == 0
    assert found.final.tolist() == [[1, 2]]
    assert found.commit_confidence.isnan().all()
