"""Text files of many formats to documents, and documents to token blocks.

1. `expand_files` turns globs, directories and lists into files; `text_bytes` says how much is in them.
2. `read_documents` reads each by the end of its name, as a stream, with memory for one document.
3. `token_blocks` and `document_blocks` tokenise in the background and cut, from any block's `start`.

Formats: `.txt` and `.raw` (plain text), `.jsonl` and `.ndjson` (an object with "text" a line) and `.tar` (the
original OpenWebText), each also `.gz`, `.zst` or `.xz`; `.parquet` and `.arrow` with a column "text", so also
directories that the `datasets` library saved; `.bin` of nanoGPT's token ids. A file that is cut off or damaged is an
error.
"""

from mdlm_interp.documents.blocks import (
    BETWEEN,
    GROUP_DOCUMENTS,
    PACKING,
    StreamPosition,
    TokenBlock,
    document_blocks,
    token_blocks,
)
from mdlm_interp.documents.files import expand_files
from mdlm_interp.documents.prefetch import prefetched
from mdlm_interp.documents.reading import Document, read_documents, read_texts
from mdlm_interp.documents.sizes import TextSize, text_bytes

__all__ = [
    "Document",
    "read_documents",
    "read_texts",
    "expand_files",
    "TextSize",
    "text_bytes",
    "TokenBlock",
    "StreamPosition",
    "token_blocks",
    "document_blocks",
    "BETWEEN",
    "GROUP_DOCUMENTS",
    "PACKING",
    "prefetched",
]
