"""Figures of features show what the results hold."""

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from mdlm_interp.analysis.figures import save
from mdlm_interp.errors import DataError
from transcoder.trajectories import feature_courses, feature_lives, feature_overlap
from transcoder.trajectories.figures import course_maps, onset_rates, overlap_bars


def test_the_onset_figure_draws_rates_and_shares(replacement, trajectory, tmp_path):
    lives = feature_lives(replacement, trajectory)
    figure = onset_rates(lives, within=3)
    left, right = figure.axes
    for layer in range(3):
        expected = [row["rate"] for row in lives.rates(layer) if abs(row["to_commit"]) <= 3]
        assert left.lines[layer].get_ydata() == pytest.approx(expected)
    tops = [bar.get_y() + bar.get_height() for bar in right.containers[-1]]
    assert tops == pytest.approx([1.0, 1.0, 1.0])
    assert save(figure, tmp_path / "onsets.png").read_bytes().startswith(b"\x89PNG")


def test_the_overlap_figure_draws_the_summary(replacement, trajectory, tmp_path):
    overlap = feature_overlap(replacement, trajectory)
    figure = overlap_bars(overlap)
    for bars, kind in zip(figure.axes[0].containers, ("masked", "filled", "token"), strict=True):
        expected = [row[kind] for row in overlap.summary()]
        assert [bar.get_height() for bar in bars] == pytest.approx(expected)
    assert save(figure, tmp_path / "overlap.png").read_bytes().startswith(b"\x89PNG")


def test_the_course_figure_draws_what_is_active_and_a_line_at_each_commit(replacement, trajectory, tmp_path):
    lives = feature_lives(replacement, trajectory, rows=[1])
    strongest = int(lives.peak.argmax())
    features = [(int(lives.layer[strongest]), int(lives.feature[strongest])), (0, 1)]
    courses = feature_courses(replacement, trajectory, features)
    figure = course_maps(courses, row=1, labels=list("abcdefghij"))
    panels = [axes for axes in figure.axes if axes.images]
    values = panels[0].images[0].get_array()
    assert values is not None
    drawn = torch.from_numpy(np.ma.filled(values, 0.0))
    assert torch.equal(drawn, courses.acts[:, 0, 1])
    assert float(drawn.max()) > 0
    (lines,) = panels[0].collections
    assert isinstance(lines, LineCollection)
    heights = sorted(float(segment[0][1]) for segment in lines.get_segments())
    commits = courses.commit[1]
    assert heights == sorted((commits[commits >= 0] + 0.5).tolist())
    assert save(figure, tmp_path / "courses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"row must be in \[0, 2\), got 2"):
        course_maps(courses, row=2)
