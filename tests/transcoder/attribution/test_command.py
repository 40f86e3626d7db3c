"""`mdlm-interp explore graph`, from a text and from a trajectory."""

import json
import re

import pytest

from mdlm_interp.__main__ import main
from transcoder.attribution import CommitmentGraph, Graph


@pytest.fixture
def command(model_directory, trained_directory, tmp_path):
    """Runs it into a new directory."""

    def run(*arguments):
        out = tmp_path / "out"
        given = [
            str(trained_directory),
            *map(str, arguments),
            "--out",
            str(out),
            "--model",
            str(model_directory),
        ]
        return main(["explore", "graph", *given]), out

    return run


def page_data(path):
    (text,) = re.findall('id="page-data">(.*)</script>\n', path.read_text("utf-8"))
    return json.loads(text)


def test_a_text_becomes_a_graph_of_its_first_mask(command, capsys):
    code, out = command("the old [MASK] sees a [MASK] river", "--check", 5, "--max-logits", 3)
    assert code == 0
    said = capsys.readouterr().out
    assert "replacement score 0." in said
    assert "5 features ablated in the model: correlation of predicted and measured changes" in said
    graph = Graph.load(out / "graph")
    masks = (graph.input_ids == graph.mask_id).nonzero()[:, 0].tolist()
    assert len(masks) == 2
    assert graph.logits[:, 0].tolist() == [masks[0]] * 3
    written = json.loads((out / "graph.json").read_text())
    assert written["metadata"]["prompt_tokens"][masks[0]] == "[MASK]"
    assert len(written["nodes"]) > 10
    assert json.loads((out / "graph-metadata.json").read_text())["graphs"] == [written["metadata"]]
    assert said.endswith(f"{out / 'graph.html'}: open it in a browser\n")
    shown = page_data(out / "graph.html")
    assert [node["id"] for node in shown["nodes"]] == [node["node_id"] for node in written["nodes"]]


def test_another_mask_can_be_named(command):
    code, out = command("the old [MASK] sees a [MASK]", "--max-features", 20, "--centre", "mean")
    assert code == 0
    first = Graph.load(out / "graph")
    assert first.n_features == 20
    assert first.centre == "mean"


def test_a_trajectory_becomes_the_graphs_of_its_steps(command, trajectory, tmp_path, capsys):
    trajectory.save(tmp_path / "trajectory")
    position = int((trajectory.revealed_at[0] == trajectory.n_steps - 1).nonzero()[0, 0])
    arguments = ["--trajectory", tmp_path / "trajectory", "--position", position, "--max-tokens", 3]
    arguments += ["--node-share", 0.5]  # not the default, which the page's own choice would be
    code, out = command(*arguments)
    assert code == 0
    listed = json.loads((out / "graph-metadata.json").read_text())["graphs"]
    assert len(listed) == 3
    assert listed[0]["slug"] == f"step-{trajectory.n_steps - 1}-position-{position}"
    loaded = CommitmentGraph.load(out / "graphs")
    assert [one.slug for one in loaded.commitments] == [one["slug"] for one in listed]
    said = capsys.readouterr().out
    assert f"at {position}, weight 1.000" in said
    assert said.endswith(f"{out / 'commitments.html'}: open it in a browser\n")
    shown = page_data(out / "commitments.html")["commitments"]
    for one, listed_one in zip(shown, listed, strict=True):
        written = json.loads((out / f"{listed_one['slug']}.json").read_text())
        assert [node["id"] for node in one["graph"]["nodes"]] == [
            node["node_id"] for node in written["nodes"]
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a graph is of a text or of a trajectory, got neither"),
        (["a [MASK]", "--trajectory", "x"], "got both"),
        (["--trajectory", "x"], "a trajectory's graph needs position"),
        (["a [MASK]", "--row", 0], "row is not about a text, got 0; leave it out"),
        (["a [MASK]", "--max-tokens", 3], "max_tokens is not about a text, got 3"),
        (["--trajectory", "x", "--position", 1, "--mass", 0.5], "mass is not about a trajectory, got 0.5"),
        (["--trajectory", "x", "--position", 1, "--max-logits", 2], "max_logits is not about a trajectory"),
        (["no masks"], r"the text has no [MASK]"),
        (["a [MASK]", "--position", 0], "position 0 holds token"),
        (["a [MASK]", "--mass", 0], "mass must be in (0, 1], got 0.0"),
        (["a [MASK]", "--node-share", 2], "node_share must be in [0, 1], got 2.0"),
    ],
)
def test_a_mistake_is_told_in_one_line(command, capsys, arguments, message):
    code, out = command(*arguments)
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_nothing_is_overwritten(command, capsys):
    _, out = command("a [MASK] river", "--max-features", 5)
    before = sorted(out.rglob("*"))
    assert command("a [MASK] river")[0] == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before
