"""The directory of pages: whole, self-contained, and what the command makes of its arguments."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdlm_interp.__main__ import main
from mdlm_interp.decoding import Trajectory
from mdlm_interp.errors import DataError, OutputExistsError
from tests.mdlm_interp.viewer.vocabulary import ATTACK, STORY, written
from tests.transcoder.dashboard.boards import WORDS, commitments, graph_json, made_up
from transcoder.dashboard import collect, write_site
from transcoder.dashboard.pages import PER_PAGE, feature_href


def data_of(page: Path) -> dict[str, Any]:
    (text,) = re.findall('id="page-data">(.*)</script>\n', page.read_text("utf-8"))
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("site") / "pages"
    first = write_site(
        out,
        made_up(),
        WORDS,
        about=[("store", ATTACK)],
        graph=graph_json(ATTACK),
        commitments=commitments(),
        trajectory=written(STORY),
    )
    assert first == out / "index.html"
    return out


def test_every_link_leads_to_a_page_of_the_directory(site):
    pages = sorted(site.rglob("*.html"))
    assert sorted(str(page.relative_to(site)) for page in pages) == [
        "commitments.html",
        "features.html",
        "features/0_0.html",
        "features/0_50.html",
        "features/1_0.html",
        "features/1_50.html",
        "graph.html",
        "index.html",
        "trajectory.html",
    ]
    for page in pages:
        text = page.read_text("utf-8")
        hrefs = [href for href in re.findall(r'href="([^"]*)"', text) if href not in ("", "data:,")]
        assert len(hrefs) == 5
        for href in hrefs:
            assert (page.parent / href).is_file(), (page, href)
        current = re.findall(r'href="([^"]*)" aria-current="page"', text)
        assert current == ([page.name] if page.parent == site else [])
    links = [node["href"] for node in data_of(site / "graph.html")["nodes"]]
    assert links == [
        None,
        None,
        "features/0_0.html#f5",
        "features/0_0.html#f7",
        "features/1_50.html#f52",
        *[None] * 2,
    ]


def test_no_page_names_anything_outside_itself(site):
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        addresses = set(re.findall(r"[a-z]+://[^\"'\s]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, page  # a name, which nothing fetches
        assert ATTACK not in text


def test_every_feature_is_on_the_page_that_its_address_names(site):
    for layer in range(2):
        for number in range(60):
            data = data_of(site / feature_href(layer, number).partition("#")[0])
            assert data["layer"] == layer
            assert 0 <= number - data["first"] < len(data["features"]) <= PER_PAGE


def test_figures_are_those_of_the_dashboards(site):
    boards = made_up()
    found = boards.occurrences
    table, page = data_of(site / "features.html"), data_of(site / "features/1_50.html")
    assert table["active"] == found.active.sum((2, 3)).reshape(-1).tolist()
    assert table["nRows"] == 20000
    assert table["largest"][1] == table["active"][1] == 0  # silent
    shown = page["features"][52 - 50]
    assert shown["active"] == found.active[1, 52].tolist()
    assert shown["norms"] == [1.0]
    assert [token for token, _ in shown["promoted"]] == boards.written.promoted[1, 52].tolist()
    example = shown["examples"][2]
    assert example["start"] == 20 - 12 + 3  # three places lie outside the text
    assert example["clean"] == found.clean[1, 52, 2, 3:].tolist()
    assert np.allclose(example["acts"], found.acts[1, 52, 2, 3:], rtol=1e-3)
    assert example["acts"][20 - example["start"]] == example["value"]
    assert data_of(site / "features/1_0.html")["features"][1]["examples"] == []


def test_nameless_features_of_the_graph_are_called_by_what_they_promote(site):
    nodes = {node["id"]: node["text"] for node in data_of(site / "graph.html")["nodes"]}
    assert nodes["0_5_0"] == f"→{ATTACK},One, day"
    assert nodes["1_52_1"] == ATTACK  # it has a name


def test_commitments_name_their_features_and_lead_to_their_dashboards(site):
    shown = data_of(site / "commitments.html")["commitments"]
    features = [node for one in shown for node in one["graph"]["nodes"] if node["kind"] == "feature"]
    assert [(node["href"], node["text"]) for node in features] == [
        ("features/1_50.html#f52", f"→{ATTACK},One, day"),
        ("features/1_0.html#f7", f"→{ATTACK},One, day"),
    ]
    for node in features:
        assert (site / node["href"].partition("#")[0]).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"commitments": commitments()}, "commitments are shown with the trajectory"),
        (
            {"commitments": commitments(), "trajectory": written(STORY[1:])},
            "the state before step 2 is another in row 0 of this trajectory",
        ),
        (
            {"commitments": commitments(60), "trajectory": written(STORY)},
            "the commitment of step 2 has feature 60 of layer 1, the transcoder has 2 layers of 60",
        ),
        (
            {"commitments": replace(commitments(), row=1), "trajectory": written(STORY)},
            r"row must be in \[0, 1\), got 1",
        ),
        ({"graph": {**graph_json(), "links": 3}}, "a graph needs links, a JSON list, got int"),
        (
            {"boards": made_up(n_features=50)},
            "node 1_52_1 is feature 52 of layer 1, the transcoder has 2 layers",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, arguments, message):
    given = {"boards": made_up(), "tokenizer": WORDS, "graph": graph_json(), **arguments}
    with pytest.raises(DataError, match=message):
        write_site(tmp_path / "site", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OutputExistsError, match="is not empty"):
        write_site(tmp_path, made_up(), WORDS)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["explore", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_what_the_library_collects(
    capsys, trained, trained_directory, model, store, tmp_path, tokenizer
):
    out = tmp_path / "site"
    code, said, _ = run(
        capsys, trained_directory, "--store", store.path, "--out", out, "--examples", 4, "--max-sequences", 10
    )
    assert (code, said) == (0, f"{out / 'index.html'}: open it in a browser\n")
    expected = write_site(
        tmp_path / "other", collect(trained, model, store, n_examples=4, max_sequences=10), tokenizer
    ).parent
    for page in expected.rglob("*.html"):
        if page.name != "index.html":
            assert (out / page.relative_to(expected)).read_text("utf-8") == page.read_text("utf-8"), page.name
    about = dict(data_of(out / "index.html")["about"])
    assert about["model"] == str(store.config["model"])
    assert about["activation"] == "topk, k 8"
    assert about["rows of the store"] == "960 of 960 planned rows (complete)"


def test_the_command_takes_what_explore_graph_wrote(
    capsys, trained_directory, model, model_directory, store, tmp_path
):
    from mdlm_interp.decoding import sample

    start = torch.full((1, 8), model.config.mask_id)
    trajectory = sample(model, start, seed=5)
    trajectory.save(tmp_path / "trajectory")
    position = int((trajectory.revealed_at[0] == trajectory.revealed_at.max()).nonzero()[0, 0])
    graph = ["graph", trained_directory, "--trajectory", tmp_path / "trajectory", "--position", position]
    few = ["--max-tokens", 2, "--node-share", 0.5]
    of = ["--out", tmp_path / "why", "--model", model_directory]
    assert run(capsys, *graph, *few, *of)[0] == 0
    common = [trained_directory, "--store", store.path, "--max-sequences", 2, "--examples", 1, "--nearest", 0]
    common += ["--commitments", tmp_path / "why"]
    code, _, error = run(capsys, *common, "--out", tmp_path / "site", "--trajectory", tmp_path / "trajectory")
    assert (code, error) == (0, "")
    ours = data_of(tmp_path / "site" / "commitments.html")["commitments"]
    theirs = data_of(tmp_path / "why" / "commitments.html")["commitments"]
    assert len(ours) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert [node["id"] for node in one["graph"]["nodes"]] == [
            node["id"] for node in other["graph"]["nodes"]
        ]
        named = [node for node in one["graph"]["nodes"] if node["kind"] == "feature"]
        assert named
        assert all(node["text"].startswith("→") and node["href"].startswith("features/") for node in named)
    for arguments, message in (
        ([], "commitments are shown with the trajectory"),
        (["--trajectory", tmp_path / "trajectory", "--row", 1], "row must be in [0, 1), got 1"),
    ):
        code, _, error = run(capsys, *common, *arguments, "--out", tmp_path / "other")
        assert code == 2
        assert message in error
    for damage in ("{}", '{"metadata": {"pruning_settings": {"node_threshold": 0.5}}}'):
        (tmp_path / "why" / f"step-{ours[1]['step']}-position-{ours[1]['position']}.json").write_text(damage)
        arguments = ["--trajectory", tmp_path / "trajectory", "--out", tmp_path / "other"]
        code, _, error = run(capsys, *common, *arguments)
        assert code == 2
        assert "does not say which share of the graph it keeps" in error
    assert not (tmp_path / "other").exists()


@pytest.fixture
def tokenizer(model_directory):
    from mdlm_interp import load_tokenizer

    return load_tokenizer(str(model_directory))


def test_mistakes_are_one_line_and_found_before_the_work(
    capsys, trained_directory, store, tmp_path, monkeypatch
):
    monkeypatch.setattr("transcoder.dashboard.features.collect", lambda *_, **__: pytest.fail("worked"))
    out = tmp_path / "site"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "no.json").write_text("[]")
    written(STORY).save(tmp_path / "trajectory")
    assert Trajectory.load(tmp_path / "trajectory").mask_id != 289
    common = [trained_directory, "--store", store.path, "--out", out]
    for arguments, message in (
        ([trained_directory, "--out", out], "store"),
        ([*common[:4], tmp_path / "full"], "is not empty"),
        ([*common, "--examples", 0], "examples must be at least 1"),
        ([*common, "--graph", tmp_path / "no.json"], "must hold a JSON object, got list"),
        ([*common, "--graph", tmp_path / "none.json"], "cannot be read"),
        ([*common, "--trajectory", tmp_path], "is it a trajectory?"),
        ([*common, "--trajectory", tmp_path / "trajectory"], "the trajectory's mask is token 11"),
        ([*common, "--model", "bundled"], "another model"),
        ([*common, "--row", 1], "row is the commitments', got 1 and no commitments"),
        (["trajectroy"], "store"),
    ):
        code, said, error = run(capsys, *arguments)
        assert (code, said) == (2, ""), arguments
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()


def test_the_groups_other_commands_are_still_there(capsys):
    assert main(["explore", "trajectory", "--help"]) == 0
    assert "usage: mdlm-interp explore trajectory" in capsys.readouterr().out
    assert main(["explore", "--help"]) == 0
    assert "usage: mdlm-interp explore [CONFIG.yaml] CLT STORE" in capsys.readouterr().out
    assert main(["clt", "--help"]) == 0
    assert "usage: mdlm-interp clt COMMAND" in capsys.readouterr().out
