"""Figures show what the results hold, and are written as PNGs."""

import numpy as np
import pytest
import torch

from mdlm_interp.analysis import (
    Rows,
    attention_sinks,
    attribute_commits,
    figures,
    logit_lens,
    prediction_stability,
    probe_time,
)
from mdlm_interp.errors import DataError


@pytest.fixture
def probe():
    generator = torch.Generator().manual_seed(3)
    sequence = torch.arange(20).repeat_interleave(3)
    t = torch.rand(20, generator=generator).double()[sequence]
    return probe_time([Rows(acts={"a": torch.randn(60, 4, generator=generator)}, t=t, sequence=sequence)])


def test_every_figure_becomes_a_png(exact, trajectory, probe, tmp_path):
    lens = logit_lens(exact, trajectory)
    made = {
        "lens_by_commit": figures.lens_by_commit(lens),
        "lens": figures.lens_heat_maps(lens, row=1),
        "attribution": figures.attribution_bars(attribute_commits(exact, trajectory, heads=True)),
        "stability": figures.stability_map(prediction_stability(exact, trajectory), row=1),
        "sinks": figures.sink_map(attention_sinks(exact, trajectory, queries="unmasked")),
        "probe": figures.probe_bars(probe),
    }
    for name, figure in made.items():
        written = figures.save(figure, tmp_path / f"{name}.png")
        assert written.read_bytes().startswith(b"\x89PNG")


def drawn_in(axes, empty):
    """The values of a panel's image."""
    values = axes.images[0].get_array()
    assert values is not None
    return torch.from_numpy(np.ma.filled(values, empty))


def test_the_lens_shows_masked_positions_only(exact, trajectory):
    lens = logit_lens(exact, trajectory)
    figure = figures.lens_heat_maps(lens, row=1, labels=list("abcdefghi"), steps=[0, 3])
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2
    for axes, step in zip(panels, (0, 3), strict=True):
        drawn = drawn_in(axes, np.nan)
        assert torch.equal(drawn.isnan().all(0), ~lens.is_masked[step, 1])
        masked = lens.is_masked[step, 1]
        assert torch.equal(drawn[:, masked], lens.probability[step, :, 1, masked])
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == [repr(one) for one in "abcdefghi"]


def test_the_stability_map_tells_right_from_wrong(exact, trajectory):
    found = prediction_stability(exact, trajectory)
    cells = drawn_in(figures.stability_map(found).axes[0], -1)
    assert torch.equal(cells == figures.RIGHT, found.agrees[:, 0])
    assert torch.equal(cells == figures.OPEN, found.is_open[:, 0] & ~found.agrees[:, 0])
    assert torch.equal(cells[0] == figures.GIVEN, found.commit[0] < 0)


def test_the_sinks_dots_are_where_the_mean_over_heads_is_largest(exact, trajectory):
    found = attention_sinks(exact, trajectory)
    for layer, axes in enumerate(figures.sink_map(found, row=1).axes[:2]):
        expected = found.received[:, layer, :, 1].mean(1).argmax(-1)
        assert np.asarray(axes.lines[0].get_xdata()).tolist() == expected.tolist()


def test_a_row_that_is_not_there_is_named(exact, trajectory):
    with pytest.raises(DataError, match=r"row must be in \[0, 2\), got 2"):
        figures.lens_heat_maps(logit_lens(exact, trajectory), row=2)
