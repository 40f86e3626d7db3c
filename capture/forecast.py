"""What a capture will take, before it begins: rows, sequences and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from math import ceil

from capture import schema
from capture.config import CaptureConfig
from capture.places import Place
from capture.plan import expected_share
from mdlm_interp.documents import read_documents, text_bytes
from mdlm_interp.errors import StoreError
from mdlm_interp.tokenizers import Tokenizer

SAMPLE_DOCUMENTS = 200
"""Documents whose bytes for each token stand for those of all the text."""
DISK_MARGIN = 0.98
"""Share of the free space that a capture may take."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Expected size of a complete store."""

    rows: int
    sequences: int
    size: int
    """Bytes."""
    row_size: float
    """Bytes for each row, with its share of the sequences."""

    def __str__(self) -> str:
        return f"about {self.rows:,} rows of {self.sequences:,} sequences, {bytes_text(self.size)}"


def forecast(config: CaptureConfig, tokenizer: Tokenizer, layout: schema.Layout) -> Forecast:
    """The size that a resolved config will give: exact for a budget that the text fills, else an estimate."""
    assert config.length is not None
    n_times = len(config.time) if config.times == "fixed" else 1
    sequences = ceil(_expected_blocks(config, tokenizer)) * n_times
    rows_each = config.length * expected_share(config)
    if config.max_sequences is not None:
        sequences = min(sequences, config.max_sequences)
    if config.max_rows is not None:
        sequences = min(sequences, ceil(config.max_rows / max(rows_each, 1)))
    rows = max(1, round(sequences * rows_each))
    if config.max_rows is not None:
        rows = min(rows, config.max_rows)
    size = rows * layout.row_bytes + sequences * layout.sequence_bytes
    # Columns are written whole shards at a time.
    size += -rows % layout.shard_rows * (layout.row_bytes - _acts_bytes(layout))
    return Forecast(rows=rows, sequences=sequences, size=size, row_size=size / rows)


def _acts_bytes(layout: schema.Layout) -> int:
    return sum(layout.shard_shape(hook).chunk_bytes for hook in layout.shapes) // schema.CHUNK_ROWS


def _expected_blocks(config: CaptureConfig, tokenizer: Tokenizer) -> float:
    """Blocks of all the text, from the tokens in its first documents and its size."""
    assert config.length is not None
    sample = list(islice(read_documents(config.files, tokenizer), SAMPLE_DOCUMENTS))
    texts = [document.text for document in sample if document.ids is None]
    coded = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
    given = [len(document.ids) + 1 for document in sample if document.ids is not None]
    size = text_bytes(config.files)
    each_byte = sum(coded) / max(1, sum(len(text.encode()) for text in texts))
    tokens = size.bytes * each_byte + size.tokens
    if config.pack == "documents":
        return tokens * len(sample) / max(1, sum(coded) + sum(given))
    inner = config.length - 2 if config.wrap else config.length
    return tokens / inner


def refuse_full_disk(place: Place, expected: Forecast, committed_rows: int) -> None:
    """Raise StoreError if the disk has no room for what is missing of the store."""
    free = place.free_bytes()
    missing = max(0, expected.rows - committed_rows)
    needed = int(missing * expected.row_size)
    if free is None or needed <= free * DISK_MARGIN:
        return
    fits = committed_rows + int(free * 0.9 / expected.row_size)
    more = "more " if committed_rows else ""
    remedy = f"lower --max-rows to {fits:,}, " if fits and not committed_rows else "free some space, "
    raise StoreError(
        f"{place.name} needs {bytes_text(needed)} for {missing:,} {more}rows and its disk has {bytes_text(free)} "
        f"free; {remedy}record fewer hooks, choose another --out, or start anyway with --any-disk"
    )


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
