"""Parquet and Arrow: columns, row groups, and directories that the `datasets` library saved."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from mdlm_interp.documents import columns, expand_files


@pytest.fixture
def save(tmp_path):
    """Writes a table as one Arrow stream, or as one parquet file."""

    def save(name: str, table: pa.Table):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(table, path, row_group_size=3)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
        return path

    return save


@pytest.fixture
def saved(save, write, tmp_path):
    """A directory as `Dataset.save_to_disk` writes it, its files named so that their order matters."""

    def saved(directory: str, *shards: list[str], state: dict | None = None):
        names = [f"data-{n}-of-{len(shards)}.arrow" for n in reversed(range(len(shards)))]
        for name, texts in zip(names, shards, strict=True):
            save(f"{directory}/{name}", pa.table({"id": list(range(len(texts))), "text": texts}))
        files = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
        write(f"{directory}/state.json", json.dumps(files if state is None else state))
        write(f"{directory}/dataset_info.json", "{}")
        return tmp_path / directory

    return saved


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_any_column_of_strings_is_read(save, texts, name, kind):
    """Exact, in slices smaller and larger than a batch."""
    expected = ["one", "two\n\nstill two", "", "one", *map(str, range(100, 120)), " \n"]
    values = [None, *expected, None]
    column = pa.array(values, kind)
    path = save(name, pa.table({"text": column, "id": list(range(len(values)))}))
    assert texts(path) == expected
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(columns, "BATCH_ROWS", 2)
        assert texts(path) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"texts": ["a"], "id": [1]}, " has no column \"text\"; did you mean 'texts'?"),
        ({"a": [1], "b": [2]}, " has no column \"text\"; known: 'a', 'b'"),
        ({"text": [1]}, ': column "text" holds int64, expected strings; name a file of texts'),
        ({"text": [b"a"]}, ': column "text" holds binary, expected strings; name a file of texts'),
        (
            {"text": [["a"]]},
            ': column "text" holds list<element: string>, expected strings; name a file of texts',
        ),
        ({"text": [None]}, " holds no text; remove it from the list or check how it was written"),
    ],
)
def test_another_column_is_refused(save, refusal, name, table, expected):
    found = refusal(save(name, pa.table(table)))
    assert found.replace("list<item: string>", "list<element: string>") == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_text_that_is_no_utf8_is_named_by_its_row(save, refusal, name):
    values = [b"fine"] * 7 + [b"caf\xe9 noir", b"fine"]
    column = pa.array(values, pa.binary()).view(pa.string())
    assert refusal(save(name, pa.table({"text": column}))) == (
        ", row 7 (from 0) is not UTF-8 (byte 3 of its text: invalid continuation byte); convert it first"
    )


def test_a_damaged_page_of_a_parquet_file_is_refused(tmp_path, refusal):
    """Exact, where the writer kept checksums: the text itself is damaged, its frame is not."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["some text that stands there as it is"]})
    parquet.write_table(
        table,
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    content = path.read_bytes()
    assert content.count(b"text that") == 1
    path.write_bytes(content.replace(b"text that", b"test that"))
    assert "could not verify page integrity, CRC checksum verification failed" in refusal(path)


def test_damaged_offsets_of_an_arrow_file_are_refused(save, refusal):
    """Exact: followed, they would lead outside the text, and end the process."""
    path = save("a.arrow", pa.table({"text": ["0123456789", "abcdef", "xyz"]}))
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 10, 16, 19))
    content = path.read_bytes()
    assert offsets in content
    path.write_bytes(content.replace(offsets, offsets[:8] + (1 << 30).to_bytes(4, "little") + offsets[12:]))
    assert " is truncated or no Arrow file (" in refusal(path)


def test_a_stream_without_its_end_mark_is_refused(save, refusal):
    """Exact: pyarrow itself takes a file that stops between two batches for a whole one."""
    path = save("a.arrow", pa.table({"text": ["one", "two"]}))
    path.write_bytes(path.read_bytes()[:-8])
    with pa.ipc.open_stream(str(path)) as stream:
        assert stream.read_all().num_rows == 2
    assert refusal(path) == " is cut off before its end mark, or no Arrow file; copy or download it again"


# Directories


def test_a_saved_dataset_is_its_files_in_its_own_order(saved, texts):
    directory = saved("set", ["one", "two"], ["three"], ["four"])
    assert [path.name for path in expand_files([directory])] == [
        "data-2-of-3.arrow",
        "data-1-of-3.arrow",
        "data-0-of-3.arrow",
    ]
    assert texts(directory) == ["one", "two", "three", "four"]


def test_a_dataset_with_splits_asks_for_one(saved, write, refusal, texts, tmp_path):
    saved("sets/train", ["one"])
    saved("sets/validation", ["two"])
    write("sets/dataset_dict.json", '{"splits": ["train", "validation"]}')
    assert refusal(tmp_path / "sets") == (
        f" holds several splits (train, validation); name one of them, such as {tmp_path / 'sets' / 'train'}"
    )
    assert texts(tmp_path / "sets" / "validation") == ["two"]


def test_a_dataset_with_an_order_of_its_own_is_refused(saved, refusal):
    state = {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}
    assert refusal(saved("set", ["one"], state=state)) == (
        " keeps the order of its rows apart from them (an old save_to_disk); save it again after flatten_indices()"
    )


def test_a_dataset_without_one_of_its_files_is_refused(saved, refusal):
    directory = saved("set", ["one"], ["two"])
    (directory / "data-0-of-2.arrow").unlink()
    assert refusal(directory) == (
        f"/data-0-of-2.arrow does not exist and {directory / 'state.json'} lists it; copy or download it again"
    )


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("{", " is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "),
        ("[]", " holds list, expected a JSON object; "),
        ('{"_data_files": [3]}', " names no data files; "),
        ("{}", " names no data files; "),
    ],
)
def test_a_damaged_state_is_refused(write, refusal, tmp_path, state, expected):
    write("set/state.json", state)
    assert refusal(tmp_path / "set") == f"/state.json{expected}copy or download it again"


def test_a_directory_that_the_library_itself_saved_is_read(tmp_path, texts):
    """Exact, where the `datasets` library is installed: neither the suite nor the package needs it."""
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    datasets.disable_progress_bars()
    expected = [f"document {n}" for n in range(2500)]
    dataset = datasets.Dataset.from_dict({"text": expected})
    dataset.save_to_disk(tmp_path / "set", num_shards=11)
    assert texts(tmp_path / "set") == expected
    dataset.select(range(100, 0, -1)).save_to_disk(tmp_path / "chosen")
    assert texts(tmp_path / "chosen") == [expected[n] for n in range(100, 0, -1)]
