"""What a capture will take, before it begins: rows, sequences, bytes and time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from statistics import fmean
from time import perf_counter

from capture import schema
from capture.config import CaptureConfig
from capture.decodings import expected_steps
from capture.forward import Forward
from capture.places import Place
from capture.plan import Batch, expected_share
from capture.request import Request, forward_of_request, prepared
from capture.shards import CRC_BYTES
from mdlm_interp.documents import Document, read_documents, text_bytes
from mdlm_interp.errors import StoreError
from mdlm_interp.program import counted
from mdlm_interp.tokenizers import Tokenizer

SAMPLE_DOCUMENTS = 200
"""Documents whose bytes for each token stand for those of all the text."""
DISK_MARGIN = 0.98
"""Share of the free space that a capture may take."""
REMEDY_MARGIN = 0.9
"""Share of it that the number of rows which is proposed takes."""
MANY_SHARDS = 10_000
"""More make each commit slow, since it writes the manifest of them all: 2.9 MB of this many."""
METADATA_BYTES = 1024
"""Of the zarr.json of an array, about."""
PENDING_ENTRY_BYTES = 128
"""Of an array's entry in the header of a pending file, about."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Expected size of a complete store."""

    rows: int
    sequences: int
    layout: schema.Layout
    size: int
    """Bytes of the complete store."""
    present: int = 0
    """Rows of it that are committed already, by all ranks."""
    complete: bool = False
    """Whether nothing is left to do."""
    seconds: float | None = None
    """Time for the rows that are left, by the speed of one forward pass here; none if that was not measured."""

    def __str__(self) -> str:
        if self.complete:
            return f"complete with {self.present:,} rows; nothing is left to do"
        rows, sequences = counted(self.rows, "row"), counted(self.sequences, "sequence")
        expected = f"about {rows} of {sequences}, {bytes_text(self.size)}"
        took = "" if self.seconds is None else f", about {duration(self.seconds / 3600)}"
        if self.present:
            took = f", {self.present:,} rows are there{took and took + ' for the others'}"
        return expected + took + self._advice

    @property
    def _advice(self) -> str:
        """What would make a store of very many shards cheaper to write."""
        given = self.layout.shard_rows
        shards = ceil(self.rows / given)
        if shards <= MANY_SHARDS:
            return ""
        chunks = ceil(self.rows / MANY_SHARDS / schema.CHUNK_ROWS)
        wanted = chunks * schema.CHUNK_ROWS
        return (
            f"; {shards:,} shards of --shard-rows {given} make commits slow: a store made with --shard-rows {wanted} "
            f"has {ceil(self.rows / wanted):,}"
        )


def forecast_capture(config: CaptureConfig, *, timed: bool = False) -> Forecast:
    """What `run_capture` would take; writes nothing, and does not ask whether the disk has room.

    Rows and bytes are those of the whole store, also where several ranks write it or some of it is committed.

    Args:
        timed: Run the first batch twice to forecast the time as well.
    Raises:
        ConfigError, DataError, HookError, CheckpointError: If the request does not fit the model or text.
    """
    request = prepared(config)
    expected = forecast(request.config, request.tokenizer, request.layout)
    return with_time(expected, request, forward_of_request(request)) if timed else expected


def with_time(expected: Forecast, request: Request, forward: Forward) -> Forecast:
    """The forecast with the time that all ranks together need for what is left."""
    speed = rows_per_second(forward, request.first) * request.world_size
    return replace(expected, seconds=max(0, expected.rows - expected.present) / speed)


def rows_per_second(forward: Forward, batch: Batch) -> float:
    """Speed of the forward pass on one batch, the second time: the first one prepares the machine."""
    forward(batch, check=True)
    start = perf_counter()
    forward(batch, check=False)
    return (batch.stop - batch.start) / (perf_counter() - start)


def forecast(config: CaptureConfig, tokenizer: Tokenizer, layout: schema.Layout) -> Forecast:
    """The size that a resolved config will give: exact for a budget that the text fills, else an estimate."""
    assert config.length is not None
    n_times = len(config.time) if config.times == "fixed" else 1
    if config.sampler is not None:
        sequences, lengths = config.sampler.n * expected_steps(config), [config.length]
    else:
        blocks, lengths = _expected_blocks(config, tokenizer)
        sequences = ceil(blocks) * n_times
    rows_each = fmean(length * expected_share(config, length) for length in lengths)
    if config.max_sequences is not None:
        sequences = min(sequences, config.max_sequences)
    if config.max_rows is not None:
        fitting = config.max_rows / max(rows_each, 1)
        # The last sequence is recorded whole or not at all, and here every one has as many rows.
        known = config.positions not in ("masked", "unmasked") and len(set(lengths)) == 1
        sequences = min(sequences, int(fitting) if known else ceil(fitting))
    rows = max(1, round(sequences * rows_each))
    if config.max_rows is not None:
        rows = min(rows, config.max_rows)
    size = shard_bytes(layout, rows) + closing_bytes(layout, sequences)
    return Forecast(rows=rows, sequences=sequences, layout=layout, size=size)


def shard_bytes(layout: schema.Layout, rows: int) -> int:
    """Bytes of all that is written before the capture ends, but for what is pending."""
    shards, chunks = ceil(rows / layout.shard_rows), ceil(rows / schema.CHUNK_ROWS)
    shapes = [layout.shard_shape(hook) for hook in layout.shapes]
    acts = sum(chunks * (shape.chunk_bytes + CRC_BYTES) + shards * shape.index_bytes for shape in shapes)
    # A column is one chunk a shard, and a chunk is written whole however few rows it has.
    columns = shards * (layout.shard_rows * layout.column_bytes + len(layout.row_columns) * CRC_BYTES)
    return acts + columns + METADATA_BYTES * (1 + len(shapes) + len(layout.row_columns))


def closing_bytes(layout: schema.Layout, sequences: int) -> int:
    """Bytes of what is written when the capture ends, in whole chunks of sequences."""
    chunks = ceil(sequences / schema.SEQUENCE_CHUNK)
    arrays = len(schema.SEQUENCE_COLUMNS) + len(schema.STATISTICS) * len(layout.shapes)
    return (
        chunks * (schema.SEQUENCE_CHUNK * layout.sequence_bytes + len(schema.SEQUENCE_COLUMNS) * CRC_BYTES)
        + layout.statistics_bytes
        + METADATA_BYTES * arrays
    )


def pending_bytes(layout: schema.Layout, rows: int, sequences: int) -> int:
    """Bytes of what waits for the end of the capture, and is removed then."""
    shards = ceil(rows / layout.shard_rows)
    arrays = len(schema.SEQUENCE_COLUMNS) + len(schema.STATISTICS) * len(layout.shapes)
    each = layout.statistics_bytes + PENDING_ENTRY_BYTES * arrays
    return sequences * layout.sequence_bytes + shards * each


def _expected_blocks(config: CaptureConfig, tokenizer: Tokenizer) -> tuple[float, list[int]]:
    """Blocks of all the text, from the tokens in its first documents and its size; and lengths like theirs."""
    assert config.length is not None
    sample = list(_sample(read_documents(config.files, tokenizer)))
    texts = [document.text for document in sample if document.ids is None]
    coded = [len(ids) for ids in tokenizer.encode_batch(texts)]
    counts = [*coded, *(len(document.ids) for document in sample if document.ids is not None)]
    size = text_bytes(config.files)
    each_byte = (sum(coded) + len(coded)) / max(1, sum(len(text.encode()) for text in texts))
    tokens = size.bytes * each_byte + size.tokens
    around = 2 if config.wrap else 0
    if config.pack == "documents":
        lengths = [min(count + around, config.length) for count in counts if count]
        return tokens * len(lengths) / max(1, sum(counts) + len(counts)), lengths or [config.length]
    return tokens / (config.length - around), [config.length]


def _sample(documents: Iterator[Document]) -> Iterator[Document]:
    """The first SAMPLE_DOCUMENTS with text, and those without that are between them."""
    with_text = 0
    while with_text < SAMPLE_DOCUMENTS and (document := next(documents, None)) is not None:
        with_text += bool(document.text if document.ids is None else len(document.ids))
        yield document


def refuse_full_disk(place: Place, expected: Forecast) -> None:
    """Raise StoreError if the disk has no room for what is missing of the store."""
    free = place.free_bytes()
    missing = max(0, expected.rows - expected.present)
    needed = _peak(expected, expected.rows) - _written(expected, expected.present) if missing else 0
    if free is None or needed <= free * DISK_MARGIN:
        return
    more = "more " if expected.present else ""
    fits = 0 if expected.present else _fitting(expected, free * REMEDY_MARGIN)
    # A sequence is recorded whole or not at all.
    remedy = f"lower --max-rows to {fits}" if fits >= expected.layout.length else "free some space"
    if not expected.present:  # what is begun goes on with the same hooks
        remedy += ", record fewer hooks"
    raise StoreError(
        f"{place.name} needs {bytes_text(needed)} for {missing:,} {more}rows and its disk has {bytes_text(free)} "
        f"free; {remedy}, choose another --out, or start anyway with --any-disk"
    )


def _peak(expected: Forecast, rows: int) -> int:
    """Bytes that a capture of so many rows of the same kind takes when it is about to end."""
    layout, sequences = expected.layout, _sequences(expected, rows)
    return (
        shard_bytes(layout, rows) + closing_bytes(layout, sequences) + pending_bytes(layout, rows, sequences)
    )


def _written(expected: Forecast, rows: int) -> int:
    """Bytes that are there already."""
    if not rows:
        return 0
    waiting = pending_bytes(expected.layout, rows, _sequences(expected, rows))
    return shard_bytes(expected.layout, rows) + waiting


def _sequences(expected: Forecast, rows: int) -> int:
    return ceil(expected.sequences * rows / expected.rows)


def _fitting(expected: Forecast, room: float) -> int:
    """Most rows whose capture takes no more than this at any time."""
    rows = range(1, expected.rows + 1)
    return bisect_right(rows, room, key=lambda count: _peak(expected, count))


def bytes_text(size: int | float) -> str:
    """A size in the unit that suits it.

    >>> bytes_text(1_500_000)
    '1.5 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def duration(hours: int | float) -> str:
    """A time span in the unit that suits it.

    >>> duration(0.001), duration(0.5), duration(30)
    ('4 s', '30.0 min', '30.0 h')
    """
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:.1f} h"
