"""Text: from files and rows to blocks of token ids, tokenized once and memory-mapped.

A *document* is a text file, a line of a .jsonl file or a row of a table. It becomes one sequence of ids, which is cut
into blocks: the token that starts a text, then as many ids as fit. Blocks may end within a sentence.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import shutil
import tempfile
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from data2vec_train.data.files import open_file, read_file, version_of
from data2vec_train.data.identity import content_sample, hash_of, mixed
from data2vec_train.data.sources.files import RawSample, Source, StreamingSource, reason
from data2vec_train.data.tokenizer import LONG, Tokenizer
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.system.outputs import cached_folder

log = logging.getLogger(__name__)

CACHE_FORMAT = 2  # raise it when the cached files change, so that texts are tokenized again
BATCH_CHARACTERS = 1_000_000  # tokenized at once
STREAM_CHARACTERS = 250_000  # tokenized at once by a loader process of a stream
CHUNK_BYTES = 2**20  # of a file, read at once
LONG_BYTES = 4 * 2**20  # larger text files are read in chunks
NUM_EXAMPLES, EXAMPLE_CHARACTERS = 8, 500  # texts stored to compare tokenizers on
TRAINING_CHARACTERS = 200_000_000  # of a stream or a corpus, to train a tokenizer on
MAX_BAG = 8192
HOPELESS_ROWS = 1000  # a table whose first rows, this many, are all broken is given up
OPENERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
BOMS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# Control characters except tabs, line ends, form feeds and vertical tabs. Texts from scanners and converters have a few
# of these; in binary data they are a tenth of the characters.
CONTROL = dict.fromkeys((*range(9), *range(14, 32), 127))
MAX_CONTROL = 0.001
# Exceptions of broken archives; MemoryError, because an archive may request a dictionary of any size.
BROKEN_ARCHIVE = (OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error)

SURROGATE = re.compile("[\ud800-\udfff]")


class LongText:
    """A text decoded in chunks, for files that are too large to hold in memory.

    Args:
        open_raw: opens its bytes.
        encodings: see `decode_text`.

    Raises:
        BadSample: as `decode_text`.
    """

    def __init__(self, open_raw: Callable[[], BinaryIO], encodings: Sequence[str]) -> None:
        self._open = open_raw
        self.encoding = _encoding_of(self._chunks, encodings)

    def __iter__(self) -> Iterator[str]:
        """The text in strings of about a million characters.

        Raises:
            BadSample: it can no longer be read or decoded.
        """
        try:
            yield from _decoded(self._chunks(), self.encoding)
        except (OSError, UnicodeError) as error:
            raise BadSample(f"not readable: {reason(error)}") from error

    def _chunks(self) -> Iterator[bytes]:
        with self._open() as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


Document = tuple[str, int | None, str | LongText | BadSample]  # key, label, text or the error instead of it


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def decode_text(raw: bytes, encodings: Sequence[str]) -> str:
    """The text of a file.

    Args:
        raw: its content.
        encodings: tried in this order, after that of a byte order mark of UTF-16 or UTF-32.

    Raises:
        BadSample: it is not a text in any of them.
    """
    return raw.decode(_encoding_of(lambda: [raw], encodings))


def _encoding_of(chunks: Callable[[], Iterable[bytes]], encodings: Sequence[str]) -> str:
    """The first encoding in which a file, given in chunks, is a text.

    Raises:
        BadSample: there is none.
    """
    start = next(iter(chunks()), b"")
    marked = [name for mark, name in BOMS if start.startswith(mark)][:1]
    if not marked and any(b"\x00" in chunk for chunk in chunks()):
        raise BadSample("a binary file, or UTF-16 or UTF-32 without a byte order mark")
    for encoding in [*marked, *encodings]:
        size = control = 0
        empty = True
        try:
            for text in _decoded(chunks(), encoding):
                size += len(text)
                control += len(text) - len(text.translate(CONTROL))
                empty = empty and (not text or text.isspace())
        except UnicodeError:
            continue
        if control > MAX_CONTROL * size:
            raise BadSample("a binary file: control characters")
        if empty:
            raise BadSample("empty file")
        return encoding
    raise BadSample(f"not a text in {' or '.join(encodings)}")


def _decoded(chunks: Iterable[bytes], encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def is_table(path: Path) -> bool:
    """Whether a file has one text per row, by its name."""
    name = path.name.lower()
    unpacked = name.removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2")
    return name.endswith(".parquet") or unpacked.endswith((".jsonl", ".ndjson"))


def documents(
    sample: RawSample, *, encodings: Sequence[str], column: str, separator: str | None, max_document_bytes: int
) -> Iterator[Document]:
    """The documents of one record; broken ones have a `BadSample` instead of a text.

    Args:
        sample: a text, or a file: .jsonl (also .gz, .xz, .bz2) and .parquet have one document per row, anything else
            is a text file.
        encodings: see `decode_text`.
        column: of the text in tables.
        separator: of documents in a text file; None = a file is one document.
        max_document_bytes: larger text files, and lines of .jsonl, are refused.
    """
    value = sample.value
    if isinstance(value, (str, BadSample)):
        yield sample.key, sample.label, _checked(value) if isinstance(value, str) else value
        return
    try:
        if isinstance(value, Path) and is_table(value):
            is_parquet = value.name.lower().endswith(".parquet")
            rows = _table_rows(sample, column) if is_parquet else _json_lines(sample, column, max_document_bytes)
            yield from _unless_hopeless(rows)
        else:
            text = _file_text(value, encodings, max_document_bytes)
            if separator is None:
                yield sample.key, sample.label, text
                return
            parts = _split([text] if isinstance(text, str) else text, separator)
            before: str | None = None
            for number, part in enumerate(part for part in parts if part and not part.isspace()):
                if number > 0:
                    yield f"{sample.key}#{number - 1}", sample.label, before
                before = part
            if before is not None:
                yield (f"{sample.key}#{number}" if number else sample.key), sample.label, before
    except BadSample as error:
        yield sample.key, None, error
    except BROKEN_ARCHIVE as error:
        yield sample.key, None, BadSample(f"not readable: {reason(error)}")


def _file_text(value: Path | bytes, encodings: Sequence[str], max_bytes: int) -> str | LongText:
    """The text of a file; long files are read later, in chunks."""
    limit = f"modality.max_document_bytes={max_bytes}"
    if isinstance(value, Path):
        with open_file(value) as file:
            size = os.fstat(file.fileno()).st_size
        if LONG_BYTES < size <= max_bytes:
            return LongText(lambda: open_file(value), encodings)
        value = read_file(value, max_bytes=max_bytes, limit=limit)
    if len(value) > max_bytes:
        raise BadSample(f"{len(value)} bytes, more than {limit}")
    if len(value) > LONG_BYTES:
        return LongText(lambda: io.BytesIO(value), encodings)
    return decode_text(bytes(value), encodings)


def _split(pieces: Iterable[str], separator: str) -> Iterator[str]:
    """`str.split` of the joined pieces."""
    held: list[str] = []  # of the part that has not ended yet
    tail, kept = "", len(separator) - 1  # a separator may have started in the last `kept` characters
    for piece in pieces:
        *ended, tail = (tail + piece).split(separator)
        if ended:
            yield "".join([*held, ended[0]])
            yield from ended[1:]
            held = []
        held.append(tail[: max(len(tail) - kept, 0)])
        tail = tail[max(len(tail) - kept, 0) :]
    yield "".join([*held, tail])


def _unless_hopeless(rows: Iterable[Document]) -> Iterator[Document]:
    """The rows of a file; gives up if the first `HOPELESS_ROWS` are all broken, to keep the quarantine list short."""
    good, number = 0, 0
    for number, row in enumerate(rows, start=1):
        yield row
        good += not isinstance(row[2], BadSample)
        if not good and number == HOPELESS_ROWS:
            raise BadSample(f"given up: none of its first {number} rows can be used")
    if not number:
        raise BadSample("empty: no rows")


def _json_lines(sample: RawSample, column: str, max_bytes: int) -> Iterator[Document]:
    path = sample.value
    with open_file(path) as plain, OPENERS.get(path.suffix.lower(), _as_it_is)(plain) as file:
        for number, line in enumerate(_lines(file, max_bytes), start=1):
            if number == 1 and any(line.startswith(mark) for mark, _ in BOMS):
                raise BadSample("UTF-16 or UTF-32; expected UTF-8, as JSON has it")
            if not line.strip():
                continue
            yield f"{sample.key}:{number}", sample.label, _field(line, column, max_bytes)


def _as_it_is(file: BinaryIO) -> BinaryIO:
    return file


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Lines, each cut to `max_bytes` + 1 bytes."""
    while line := file.readline(max_bytes + 1):
        yield line
        while len(line) > max_bytes and not line.endswith(b"\n"):
            line = file.readline(max_bytes + 1)


def _field(line: bytes, column: str, max_bytes: int) -> str | BadSample:
    """The text of a row of .jsonl."""
    if len(line) > max_bytes:
        return BadSample(f"a line of more than modality.max_document_bytes={max_bytes}")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return BadSample("not a line of JSON")
    if not isinstance(row, dict):
        return BadSample(f"{_kind(row)} instead of an object")
    return _checked(row[column]) if column in row else BadSample(f"no field {column!r}")


def _table_rows(sample: RawSample, column: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        # With a buffer, pyarrow reads a column page by page.
        with open_file(sample.value) as file, parquet.ParquetFile(file, buffer_size=CHUNK_BYTES) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                raise BadSample(f"no column {column!r}; there are {', '.join(schema.names)}")
            kind = schema.types[schema.names.index(column)]
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view", "null"):
                raise BadSample(f"column {column!r} holds {kind}, not texts")
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=[column]):
                for value in batch.column(0):
                    yield f"{sample.key}:{number}", sample.label, _cell(value)
                    number += 1
    except pyarrow.ArrowException as error:
        raise BadSample(f"not a parquet file: {reason(error)}") from error


def _cell(value: Any) -> str | BadSample:
    """The text of a `pyarrow.Scalar`."""
    try:
        return _checked(value.as_py())
    except UnicodeDecodeError:
        return BadSample("not a text in utf-8")


def _checked(text: object) -> str | BadSample:
    if not isinstance(text, str):
        return BadSample(f"{_kind(text)} instead of a text")
    if "\x00" in text:
        return BadSample("binary data: it has NUL characters")
    half = SURROGATE.search(text)
    if half is not None:
        return BadSample(f"half a character (surrogate U+{ord(half[0]):04X}) at position {half.start()}")
    return text if text and not text.isspace() else BadSample("empty text")


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _documents_of(source: Source, **how: Any) -> Iterator[tuple[int, bool, Document]]:
    """Row, whether the document is the whole record of that row, and the document."""
    for row in range(len(source)):
        try:
            sample = source[row]
        except BadSample as error:
            yield row, True, (f"#{row}", None, error)
            continue
        for document in documents(sample, **how):
            yield row, document[0] == sample.key, document


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def prepare_text(
    source: Source | StreamingSource,
    *,
    tokenizer_path: str | None,
    train_vocab_size: int | None,
    block_tokens: int,
    cross_documents: bool,
    min_tokens: int,
    encodings: Sequence[str],
    column: str,
    separator: str | None,
    max_document_bytes: int,
    cache_dir: str | None,
    tokenizer: Tokenizer | None = None,
) -> Source | StreamingSource:
    """Blocks of token ids, see `TextBlocks` and `StreamedBlocks`; the tokenizer is their attribute `tokenizer`.

    Args:
        source: texts or files of texts.
        tokenizer_path: see `tokenizer_facts`.
        train_vocab_size: train a tokenizer of this size on `source` instead, on its first 200 million characters.
        block_tokens: longest block, including the token that starts it.
        cross_documents: let blocks continue into the next document, after the token that ends a text.
        min_tokens: shorter documents and last blocks of documents are left out.
        encodings: of files, tried in this order.
        column: of the text in .jsonl and .parquet files.
        separator: of documents in a text file.
        max_document_bytes: see `documents`.
        cache_dir: cache of ids and trained tokenizers; None = kept only until this process ends.
        tokenizer: use this one and ignore `tokenizer_path` and `train_vocab_size`.

    Raises:
        ConfigError: there is no such tokenizer.
        DataError: nothing usable was found.
    """
    if separator == "":
        raise ConfigError("modality.separator is empty; null = a file is one document")
    how = {
        "encodings": list(encodings),
        "column": column,
        "separator": separator,
        "max_document_bytes": max_document_bytes,
    }
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    if tokenizer is None and train_vocab_size is not None:
        tokenizer = _trained(source, train_vocab_size, how, cache)
    elif tokenizer is None:
        tokenizer = Tokenizer.load(tokenizer_path)
    options = {
        "tokenizer": tokenizer,
        "block_tokens": block_tokens,
        "cross_documents": cross_documents,
        "min_tokens": min_tokens,
    }
    if isinstance(source, StreamingSource):
        return StreamedBlocks(source, **options, **how)
    return TextBlocks(source, cache_dir=cache, **options, **how)


def _trained(source: Source | StreamingSource, vocab_size: int, how: dict[str, Any], cache: Path | None) -> Tokenizer:
    identity = None if isinstance(source, StreamingSource) else _identity(source, how)
    kept = None if cache is None or identity is None else cache / "tokenizers" / f"{identity[:24]}-{vocab_size}"

    def texts() -> Iterator[str]:
        characters = 0
        if isinstance(source, StreamingSource):
            place = {"epoch": 0, "seed": 0, "worker": 0, "num_workers": 1, "rank": 0, "world_size": 1}
            found = (document for sample in source.stream(**place) for document in documents(sample, **how))
        else:
            found = (document for _, _, document in _documents_of(source, **how))
        for _, _, text in found:
            for piece in () if isinstance(text, BadSample) else _pieces(text):
                yield piece
                characters += len(piece)
                if characters > TRAINING_CHARACTERS:
                    return

    def train() -> Tokenizer:
        started = time.monotonic()
        tokenizer = Tokenizer.train(texts(), vocab_size=vocab_size)
        log.info("trained a tokenizer of %d entries in %.0f s", vocab_size, time.monotonic() - started)
        return tokenizer

    if kept is None:
        return train()
    cached_folder(kept, lambda folder: train().save(folder))
    log.info("tokenizer of %d entries, from %s", vocab_size, kept)
    return Tokenizer.load(str(kept), trusted=True)


class TextBlocks(Source):
    """Blocks of token ids of another source's documents.

    All documents are tokenized first, in bounded memory, into one flat file of ids with an index, which is
    memory-mapped. A later run with the same data, tokenizer and settings finds the file in `cache_dir`.

    Options as in `prepare_text`.

    Raises:
        DataError: no document can be used.
    """

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Tokenizer,
        block_tokens: int,
        cross_documents: bool,
        min_tokens: int,
        cache_dir: Path | None,
        **how: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.cross_documents = cross_documents
        self.class_names = None if cross_documents else source.class_names
        self._folder = self._tokenized(source, how, cache_dir)
        facts = json.loads((self._folder / "facts.json").read_text())
        self.rejected = (*source.rejected, *(tuple(pair) for pair in facts["rejected"]))
        self.examples: list[str] = facts["examples"]  # the first characters of a few texts
        self._ends = np.load(self._folder / "ends.npy", mmap_mode="r")  # end of each document in the ids
        self._labels = np.load(self._folder / "labels.npy", mmap_mode="r")
        self._keys = np.load(self._folder / "keys.npy", mmap_mode="r")
        rows = np.load(self._folder / "rows.npy")
        self._document_groups = None if source.grouped is None else source.grouped[rows]
        self._document_origins = np.load(self._folder / "origins.npy")
        self._ids: np.ndarray | None = None
        self._content = block_tokens - 1
        self._cut(min_tokens)
        if not len(self):
            first = next(iter(self.rejected), None)
            why = f"the first is {first[0]}: {first[1]}" if first else f"all are shorter than {min_tokens} tokens"
            raise DataError(f"no document of {len(source)} records can be used; {why}. Give other data")
        log.info(
            "%d documents, %.2f M tokens, as %d blocks; %d documents shorter than modality.min_tokens=%d, %d broken",
            len(self._ends),
            (self._ends[-1] if len(self._ends) else 0) / 1e6,
            len(self),
            self.num_short,
            min_tokens,
            len(self.rejected),
        )

    def _tokenized(self, source: Source, how: dict[str, Any], cache_dir: Path | None) -> Path:
        """The folder with the ids, made unless it is cached."""
        identity = _identity(source, how, self.tokenizer.fingerprint)
        if cache_dir is None:
            folder = Path(tempfile.mkdtemp(prefix="data2vec_tokens_"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            _tokenize(source, self.tokenizer, how, folder)
            return folder
        kept = cache_dir / "tokens" / identity[:32]
        # Processes started by torchrun or srun get here at the same time; one of them makes the folder for all.
        return cached_folder(kept, lambda folder: _tokenize(source, self.tokenizer, how, folder))

    def _cut(self, min_tokens: int) -> None:
        """The index: first id, number of ids and document of each block."""
        ends = np.asarray(self._ends, dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        if self.cross_documents:
            total = int(ends[-1]) if len(ends) else 0
            self._first = np.arange(0, total - self._content + 1, self._content, dtype=np.int64)
            self._count = np.full(len(self._first), self._content, dtype=np.int64)
            self._document = np.searchsorted(ends, self._first, side="right")
            self.num_short = 0
        else:
            sizes = ends - starts - 1  # without the id that ends a document
            blocks = -(-sizes // self._content)
            self._document = np.repeat(np.arange(len(ends)), blocks)
            number = np.arange(len(self._document)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
            self._first = starts[self._document] + number * self._content
            self._count = np.minimum(self._content, ends[self._document] - 1 - self._first)
            enough = self._count >= min_tokens
            self._document, self._first, self._count = (
                values[enough] for values in (self._document, self._first, self._count)
            )
            self.num_short = int((sizes < min_tokens).sum())
        self.grouped = None if self._document_groups is None else self._document_groups[self._document]
        self.lengths = self._count + 1

    def __len__(self) -> int:
        return len(self._first)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._ends)

    def __getitem__(self, index: int) -> RawSample:
        if self._ids is None:  # mapped in each process, not pickled
            width = np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32
            self._ids = np.memmap(self._folder / "ids.bin", dtype=width, mode="r")
        first, count, document = int(self._first[index]), int(self._count[index]), int(self._document[index])
        block = np.empty(count + 1, dtype=np.int32)
        block[0] = self.tokenizer.bos_id
        block[1:] = self._ids[first : first + count]
        key = f"{bytes(self._keys[document]).decode('utf-8', 'replace')}@{first - self._start(document)}"
        label = None if self.cross_documents or self._labels[document] < 0 else int(self._labels[document])
        return RawSample(key, block, label)

    def _start(self, document: int) -> int:
        return int(self._ends[document - 1]) if document else 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_ids": None}

    def labels(self) -> np.ndarray | None:
        """Labels of the documents, one for each block; None when blocks cross documents."""
        return None if self.class_names is None else np.asarray(self._labels)[self._document]

    def origins(self) -> np.ndarray:
        """The group of the record, else the document; of blocks that cross documents, the position of their first id.

        A document that shares its file with others is identified by its text, so inserting rows before it changes
        nothing.
        """
        if self.grouped is not None:
            return self.grouped
        origins = self._document_origins[self._document]
        if not self.cross_documents:
            return origins
        starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)
        return mixed(origins, self._first - starts[self._document])


def _identity(source: Source, how: dict[str, Any], *more: str) -> str:
    """A hash of everything that the ids depend on: files by name, size and time, other records by content.

    Files may differ in spite of equal sizes and times, so the content of a few is hashed too.
    """
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, how, *more], sort_keys=True).encode())
    digest.update(content_sample(source, source.hashes()).tobytes())
    for row in range(len(source)):
        try:
            sample = source[row]
        except BadSample as error:
            digest.update(f"{row}:{error}\n".encode("utf-8", "replace"))
            continue
        value = sample.value
        if isinstance(value, Path):
            value = version_of(value)
        digest.update(f"{sample.key}|{sample.label}|".encode("utf-8", "replace"))
        if isinstance(value, (str, BadSample)):
            value = str(value).encode("utf-8", "replace")
        digest.update(value)
    return digest.hexdigest()


def _tokenize(source: Source, tokenizer: Tokenizer, how: dict[str, Any], folder: Path) -> None:
    """Write ids.bin, ends.npy, labels.npy, keys.npy, rows.npy, origins.npy and facts.json into `folder`."""
    width = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    rejected: list[tuple[str, str]] = []
    examples: list[str] = []
    ends, labels, keys, rows, origins = [], [], [], [], []
    names = source.hashes()
    coming: deque[tuple[int, int]] = deque()  # row and origin of the documents that are not encoded yet
    total, reported = 0, time.monotonic()

    def noted() -> Iterator[Document]:
        for row, is_record, (key, label, text) in _documents_of(source, **how):
            itself = text if isinstance(text, str) and not is_record else key
            coming.append((row, int(names[row]) if is_record else hash_of(itself.encode("utf-8", "replace"))))
            if isinstance(text, str) and len(examples) < NUM_EXAMPLES:
                examples.append(text[:EXAMPLE_CHARACTERS])
            yield key, label, text

    with (folder / "ids.bin").open("wb") as file:
        for key, label, parts in _encoded(noted(), tokenizer, BATCH_CHARACTERS):
            size = 0
            row, origin = coming.popleft()
            try:
                for ids in parts:
                    file.write(ids.astype(width).tobytes())
                    size += len(ids)
                    if time.monotonic() - reported > 5:
                        reported = time.monotonic()
                        log.info("tokenized %d documents, %.1f M tokens", len(ends), (total + size) / 1e6)
            except BadSample as error:
                rejected.append((key, str(error)))
                file.seek(total * width().itemsize)
                file.truncate()
                continue
            file.write(width(tokenizer.eos_id).tobytes())
            total += size + 1
            ends.append(total)
            labels.append(-1 if label is None else label)
            keys.append(key.encode("utf-8", "replace")[-200:])
            rows.append(row)
            origins.append(origin)
    np.save(folder / "ends.npy", np.array(ends, dtype=np.int64))
    np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
    np.save(folder / "keys.npy", np.array(keys or [b""], dtype=bytes))
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    np.save(folder / "origins.npy", np.array(origins, dtype=np.uint64))
    (folder / "facts.json").write_text(json.dumps({"rejected": rejected, "examples": examples}))


def _encoded(
    found: Iterable[Document], tokenizer: Tokenizer, characters: int
) -> Iterator[tuple[str, int | None, Iterator[np.ndarray]]]:
    """Documents with their ids in parts (n,); iterating over the parts of a broken document raises `BadSample`.

    Short texts are encoded together, about `characters` at once; a long text gives several parts.
    """
    batch: list[Document] = []
    size = 0
    for key, label, text in found:
        if isinstance(text, LongText) or (isinstance(text, str) and len(text) > LONG):
            yield from _encoded_together(batch, tokenizer)
            batch, size = [], 0
            yield key, label, tokenizer.encode_long(_pieces(text))
            continue
        batch.append((key, label, text))
        size += len(text) if isinstance(text, str) else 1
        if size >= characters:
            yield from _encoded_together(batch, tokenizer)
            batch, size = [], 0
    yield from _encoded_together(batch, tokenizer)


def _encoded_together(
    batch: list[Document], tokenizer: Tokenizer
) -> Iterator[tuple[str, int | None, Iterator[np.ndarray]]]:
    texts = [text for _, _, text in batch if isinstance(text, str)]
    try:
        encoded = iter(tokenizer.encode_batch(texts))
    except BadSample:  # of at least one of them
        encoded = None
    for key, label, text in batch:
        if isinstance(text, BadSample):
            yield key, label, _raising(text)
        elif encoded is not None:
            yield key, label, iter([next(encoded)])
        else:
            yield key, label, (ids for single in [text] for ids in tokenizer.encode_batch([single]))


def _ended(parts: Iterator[np.ndarray], end: int) -> Iterator[np.ndarray]:
    """The parts, with `end` appended to the last one."""
    last = next(parts)
    for ids in parts:
        yield last
        last = ids
    yield np.append(last, end)


def _raising(broken: BadSample) -> Iterator[np.ndarray]:
    yield from ()  # makes this a generator, which raises when it is iterated
    raise broken


def _pieces(text: str | LongText) -> Iterator[str]:
    if isinstance(text, str):
        return (text[first : first + CHUNK_BYTES] for first in range(0, len(text), CHUNK_BYTES))
    return iter(text)


class StreamedBlocks(StreamingSource):
    """`TextBlocks` of a stream: documents are tokenized while streaming. Options as in `prepare_text`."""

    def __init__(
        self,
        source: StreamingSource,
        *,
        tokenizer: Tokenizer,
        block_tokens: int,
        cross_documents: bool,
        min_tokens: int,
        **how: Any,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.class_names = None if cross_documents else source.class_names
        self.cross_documents = cross_documents
        self.min_tokens = min_tokens
        self._content = block_tokens - 1
        self._how = how

    def shards(self) -> list[tuple[str, int]]:
        """Shards of the texts."""
        return self.source.shards()

    def stream(self, **place: int) -> Iterator[RawSample]:
        """Blocks of the documents; a broken document gives its `BadSample`, which `decode_tokens` raises."""
        found = (document for sample in self.source.stream(**place) for document in documents(sample, **self._how))
        encoded = _encoded(found, self.tokenizer, STREAM_CHARACTERS)
        if self.cross_documents:
            yield from self._across(encoded)
            return
        for key, label, parts in encoded:
            try:
                yield from self._within(key, label, parts)
            except BadSample as error:
                yield RawSample(key, error, None)

    def _within(self, key: str, label: int | None, parts: Iterator[np.ndarray]) -> Iterator[RawSample]:
        rest, first = np.empty(0, dtype=np.int32), 0
        for ids in parts:
            rest = np.concatenate([rest, ids])
            while len(rest) > self._content:
                if self._content >= self.min_tokens:
                    yield RawSample(f"{key}@{first}", self._block(rest[: self._content]), label)
                rest, first = rest[self._content :], first + self._content
        if len(rest) and len(rest) >= self.min_tokens:
            yield RawSample(f"{key}@{first}", self._block(rest), label)

    def _across(self, encoded: Iterable[tuple[str, int | None, Iterator[np.ndarray]]]) -> Iterator[RawSample]:
        rest, rest_key = np.empty(0, dtype=np.int32), ""
        for key, _, parts in encoded:
            try:
                for number, ids in enumerate(_ended(parts, self.tokenizer.eos_id)):
                    name = f"{key}~{number}" if number else key
                    rest = np.concatenate([rest, ids]).astype(np.int32)
                    rest_key = name if number else rest_key or key
                    while len(rest) >= self._content:
                        yield RawSample(f"{rest_key}+{len(rest)}", self._block(rest[: self._content]), None)
                        rest, rest_key = rest[self._content :], name
            except BadSample as error:
                yield RawSample(key, error, None)

    def _block(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([[self.tokenizer.bos_id], ids]).astype(np.int32)


def decode_tokens(value: np.ndarray | BadSample) -> np.ndarray:
    """The ids, unchanged.

    Raises:
        BadSample: the document could not be read.
    """
    if isinstance(value, BadSample):
        raise value
    return value


class TokenTransform:
    """Ids (T,) to an int64 tensor, without augmentation."""

    def train(self, ids: np.ndarray) -> Tensor:
        """(T,) int64."""
        return torch.from_numpy(ids.astype(np.int64))

    def evaluate(self, ids: np.ndarray) -> Tensor:
        """(T,) int64."""
        return self.train(ids)


def bag_of_tokens(ids: Tensor, attention_mask: Tensor | None, *, vocab_size: int) -> np.ndarray:
    """log(1 + count) of each token id, (B, min(vocab_size, 8192)) float32; higher ids, which are rarer, are left out.

    Args:
        ids: (B, T) int64.
        attention_mask: (B, T) bool, True = real, or None.
        vocab_size: number of ids.
    """
    size = min(vocab_size, MAX_BAG)
    counted = ids < size if attention_mask is None else (ids < size) & attention_mask
    counts = torch.zeros(len(ids), size).scatter_add_(1, ids.clamp(max=size - 1), counted.float())
    return counts.log1p().numpy()
