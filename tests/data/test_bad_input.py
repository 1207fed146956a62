"""Bad images, recordings, texts, tables and archives of all kinds: each is named with a reason, none ends a run.

The tables below are the claim: the name of a file, how it is made, and what its reason says.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from data2vec_train.config.build import build
from data2vec_train.config.resolvers import register_resolvers
from data2vec_train.data.audio import MAX_HEADER_BYTES, AudioSegments, decode_audio
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.image import ImageTransform, decode_image
from data2vec_train.data.sources.files import (
    ArraySource,
    FolderSource,
    ManifestSource,
    RawSample,
    Source,
    UnreadableShard,
)
from data2vec_train.data.sources.hf import HFSource, HFStreamingSource
from data2vec_train.data.sources.metadata import classes_of, read_metadata
from data2vec_train.data.text import HOPELESS_ROWS, documents
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.paths import config_directory, recipes_parent
from data2vec_train.training.assemble import build_data
from data2vec_train.training.records import build_sources

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
NOISE = RNG.uniform(-0.5, 0.5, 16_000)
Content = bytes | Callable[[], bytes] | Callable[[Path], object]
GOOD = 40  # files of each modality beside the bad ones, so that those held out are not all bad


# ---------------------------------------------------------------------------------------------------------------------
# Files


def image(pixels=PIXELS, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def sound(samples=NOISE, kind: str = "WAV", rate: int = 16_000, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


def table(**columns) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def tar(*members: tuple[str, bytes] | tuple[str, bytes, bytes]) -> bytes:
    """An archive of (name, content), or of (name, target, type) for links and devices."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content, *kind in members:
            member = tarfile.TarInfo(name)
            if kind:
                member.type, member.linkname = kind[0], content.decode()
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def hole(data: bytes, size: int) -> bytes:
    """The same with other bytes in its middle."""
    middle = len(data) // 2
    return data[:middle] + np.random.default_rng(1).bytes(size) + data[middle + size :]


def patched(data: bytes, place: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, place, value)
    return bytes(changed)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A grey PNG that claims this size and holds these chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def tiles(side: int) -> bytes:
    """A TIFF of 100x100 pixels in tiles of a size of their own."""
    tags = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: 20}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return start.ljust(200, b"\0") + zlib.compress(bytes(1000))


def restarting() -> bytes:
    return image(kind="JPEG", restart_marker_blocks=4)


def many_scans() -> bytes:
    """A small file that takes minutes: libjpeg goes over the whole image once per scan."""
    data = image(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * 200 + data[-2:]


def sparse(path: Path) -> None:
    path.write_bytes(image())
    os.truncate(path, 2**32)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


SPECIAL: dict[str, tuple[Content, str]] = {
    "dangling": (link("nowhere"), "a link to a file that is missing"),
    "endless": (link("endless"), "not readable: Too many levels of symbolic links"),
    "pipe": (os.mkfifo, "not readable: a pipe, not a file"),
    "socket": (socket, "not readable: a socket, not a file"),
    "device": (link("/dev/zero"), "not readable: a device, not a file"),
}


def special(extension: str) -> dict[str, tuple[Content, str]]:
    found = {f"{name}{extension}": content for name, content in SPECIAL.items()}
    return found | {f"endless{extension}": (link(f"endless{extension}"), SPECIAL["endless"][1])}


IMAGES: dict[str, tuple[Content, str]] = {
    "empty.jpg": (b"", "empty file"),
    "cut.jpg": (lambda: image(kind="JPEG")[:-400], "truncated: image file is truncated"),
    "start.jpg": (lambda: image(kind="JPEG")[:12], "not an image|truncated|broken image file"),
    "marker.jpg": (
        lambda: patched(image(kind="JPEG"), len(image(kind="JPEG")) - 300, ">H", 0xFFC0),
        "broken image file: JPEG marker 0xC0 within the image data",
    ),
    "restarts.jpg": (
        lambda: restarting().replace(b"\xff\xd1", b"\xff\xd5", 1),
        "broken image file: JPEG restart markers out of order",
    ),
    "scans.jpg": (many_scans, "a JPEG of more than 100 scans"),
    "page.jpg": (b"<!DOCTYPE html><html>404 not found</html>", "not an image"),
    "text.png": (b"a caption, not a picture\n", "not an image"),
    "sound.png": (sound, "not an image"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "document.png": (b"%PDF-1.4\n%binary", "not an image"),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "cut.png": (lambda: image()[:-2000], "truncated: image file is truncated"),
    "checksum.png": (lambda: hole(image(), 3), "broken image file: "),
    "no_data.png": (lambda: png(8, 8), "broken image file: "),
    "little_data.png": (lambda: png(8, 8, chunk(b"IDAT", zlib.compress(b"abc"))), "truncated"),
    "no_width.png": (lambda: png(0, 8), "not an image|0x8 pixels"),
    "bomb_12k.png": (lambda: png(12_000, 12_000), "12000x12000 pixels, more than modality.decode.max_pixels=89478485"),
    "bomb_30k.png": (lambda: png(30_000, 30_000), "30000x30000 pixels, more than modality.decode.max_pixels=89478485"),
    "bomb_text.png": (
        lambda: png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(30_000_000)))),
        "broken image file: Decompressed data too large",
    ),
    "sparse.png": (sparse, "a file of 4294967296 bytes, more than .* by modality.decode.max_pixels=89478485"),
    "tiles.tif": (lambda: tiles(60_000), "broken image file: "),
    "cut.tif": (lambda: image(kind="TIFF")[:3000], "truncated"),
    "float.tif": (
        lambda: image(np.ones((4, 4), np.float32), "TIFF"),
        "a TIFF of .* of float32; set modality.max_value",
    ),
    "wide.tif": (lambda: image(np.full((4, 4), 70_000, np.int32), "TIFF"), "a TIFF of .* with values up to 70000; set"),
    "negative.tif": (lambda: image(np.full((4, 4), -5, np.int32), "TIFF"), "a TIFF of .* with values from -5 to -5"),
    "cut.gif": (lambda: image(Image.fromarray(PIXELS).convert("P"), "GIF")[:1500], "truncated"),
    "cut.webp": (lambda: image(kind="WEBP")[:500], "broken image file: "),
    "cut.bmp": (lambda: image(kind="BMP")[:3000], "truncated"),
    "few_numbers.ppm": (b"P2 2 2 255\n1 2 3", "broken image file: not enough image data"),
    **special(".png"),
}


def flac(promised: int) -> bytes:
    """A FLAC file whose header promises so many frames."""
    return patched(sound(kind="FLAC"), 8 + 14, ">I", promised)


RECORDINGS: dict[str, tuple[Content, str]] = {
    "empty.wav": (b"", "empty file"),
    "words.wav": (b"these are words\n" * 50, "not an audio file: Format not recognised"),
    "picture.wav": (image, "not an audio file: "),
    "start.wav": (b"RIFF\x24\x00", "not an audio file: "),
    "header.wav": (lambda: sound()[:44], "no samples"),
    "no_frames.wav": (lambda: sound(np.zeros(0)), "no samples"),
    "cut.wav": (lambda: sound()[:9000], "truncated: 8956 bytes of sound of 32000 that its header promises"),
    "little.wav": (lambda: sound()[:60], "truncated: 16 bytes of sound of 32000 that its header promises"),
    "promise.wav": (lambda: patched(sound(), 40, "<I", 10**8), "truncated: 32000 bytes of sound of 100000000 that"),
    "cut.aif": (lambda: sound(kind="AIFF")[:9000], "truncated: .* that its header promises"),
    "cut.au": (lambda: sound(kind="AU")[:9000], "truncated: .* that its header promises"),
    "cut.flac": (lambda: sound(kind="FLAC")[:9000], "truncated|broken audio file"),
    "hole.flac": (lambda: hole(sound(kind="FLAC"), 2000), "truncated|broken audio file"),
    "promise.flac": (lambda: flac(10**9), "truncated or broken: no end after 1000000000 frames"),
    "hole.ogg": (lambda: hole(sound(np.tile(NOISE, 3), "OGG", subtype="VORBIS"), 3000), "truncated|broken audio file"),
    "cut.mp3": (lambda: sound(np.tile(NOISE, 3), "MP3")[:5000], "truncated|broken audio file"),
    "garbage.mp3": (lambda: np.random.default_rng(2).bytes(9000), "not an audio file: "),
    "silence.wav": (lambda: sound(np.zeros(16_000)), "silence: all samples are equal"),
    "constant.wav": (lambda: sound(np.full(16_000, 0.3)), "silence: all samples are equal"),
    "whisper.wav": (lambda: sound(0.25 + 1e-8 * NOISE, subtype="DOUBLE"), "silence: "),
    "opposite.wav": (lambda: sound(np.stack([NOISE, -NOISE], axis=1)), "its channels cancel each other out"),
    "nan.wav": (lambda: sound(np.append(NOISE, np.nan), subtype="FLOAT"), "values that are not finite"),
    "infinite.wav": (lambda: sound(np.append(NOISE, -np.inf), subtype="FLOAT"), "values that are not finite"),
    "loud.wav": (lambda: sound(1e30 * NOISE, subtype="FLOAT"), "a value of 5e.29, louder than modality.decode.max_lev"),
    "rate_0.wav": (lambda: patched(sound(), 24, "<I", 0), "not an audio file: "),
    "rate_1.wav": (lambda: patched(sound(), 24, "<I", 1), "a sample rate of 1 Hz, for a model of 16000 Hz"),
    "rate_9e8.wav": (lambda: patched(sound(), 24, "<I", 9 * 10**8), "a sample rate of 900000000 Hz|not an audio file"),
    "no_channels.wav": (lambda: patched(sound(), 22, "<H", 0), "not an audio file: "),
    "channels.wav": (lambda: patched(sound(), 22, "<H", 1000), "1000 channels, more than 64"),
    "codec.wav": (lambda: patched(sound(), 20, "<H", 9999), "not an audio file: "),
    "short.wav": (lambda: sound(NOISE[:800]), "0.050 s, shorter than modality.min_seconds=0.2"),
    **special(".wav"),
}

ROW = {"text": "some good words to learn from"}
JSONL = lines(*[ROW | {"n": n} for n in range(300)])
UTF8, BINARY = "not a line of JSON", "a binary file"
TEXTS: dict[str, tuple[Content, str]] = {
    "empty.txt": (b"", "empty file"),
    "blank.txt": (b" \n\t\n", "empty file"),
    "mark.txt": (b"\xef\xbb\xbf", "empty file"),
    "utf16_mark.txt": (b"\xff\xfe", "empty file"),
    "utf16.txt": ("no mark at its start".encode("utf-16-le"), f"{BINARY}, or UTF-16"),
    "half_utf16.txt": ("an odd number of bytes".encode("utf-16")[:-1], BINARY),
    "nul.txt": (b"words\x00more words", BINARY),
    "picture.txt": (image, BINARY),
    "control.txt": (b"words \x07\x08 and bells", f"{BINARY}: control characters"),
    "large.txt": (b"words " * 20_000, "a file of 120000 bytes, more than 100000 by modality.max_document_bytes=100000"),
    "empty.jsonl": (b"", "empty: no rows"),
    "list.jsonl:1": (lines([1, 2]), "list instead of an object"),
    "string.jsonl:1": (lines("text"), "str instead of an object"),
    "null.jsonl:1": (lines(None), "null instead of an object"),
    "column.jsonl:1": (lines({"words": "hello"}), "no field 'text'"),
    "null_value.jsonl:1": (lines({"text": None}), "null instead of a text"),
    "number.jsonl:1": (lines({"text": 5}), "int instead of a text"),
    "nested.jsonl:1": (lines({"text": {"en": "hello"}}), "dict instead of a text"),
    "no_words.jsonl:1": (lines({"text": "  "}), "empty text"),
    "surrogate.jsonl:1": (
        b'{"text": "half \\ud800 a character"}\n',
        r"half a character \(surrogate U\+D800\) at position 5",
    ),
    "nul.jsonl:1": (lines({"text": "words\x00more words"}), "binary data: it has NUL characters"),
    "latin.jsonl:1": ('{"text": "café"}\n'.encode("latin-1"), UTF8),
    "utf16.jsonl": ('{"text": "hello"}\n'.encode("utf-16"), "UTF-16 or UTF-32; expected UTF-8"),
    "deep.jsonl:1": (b'{"text": ' + b"[" * 90_000 + b"\n", UTF8),
    "digits.jsonl:1": (b'{"text": ' + b"1" * 5000 + b"}\n", UTF8),
    "cut.jsonl:300": (JSONL[:-9], UTF8),
    "line.jsonl:1": (lines({"text": "words " * 20_000}), "a line of more than modality.max_document_bytes=100000"),
    "cut.jsonl.gz": (lambda: gzip.compress(JSONL)[:-30], "not readable: Compressed file ended"),
    "hole.jsonl.gz": (lambda: hole(gzip.compress(JSONL), 50), "not readable: "),
    "plain.jsonl.gz": (JSONL, "not readable: Not a gzipped file"),
    "bomb.jsonl.gz:1": (
        lambda: gzip.compress(b'{"text": "' + b"a" * 30_000_000),
        "a line of more than modality.max_doc",
    ),
    "cut.jsonl.xz": (lambda: lzma.compress(JSONL)[:-30], "not readable: Compressed file ended"),
    "hole.jsonl.xz": (lambda: hole(lzma.compress(JSONL), 50), "not readable: Corrupt input data"),
    "plain.jsonl.xz": (JSONL, "not readable: Input format not supported"),
    "cut.jsonl.bz2": (lambda: bz2.compress(JSONL)[:-30], "not readable: Compressed file ended"),
    "plain.jsonl.bz2": (JSONL, "not readable: Invalid data stream"),
    "empty.parquet": (b"", "not a parquet file: Parquet file size is 0 bytes"),
    "cut.parquet": (lambda: table(text=["a", "b"])[:-20], "not a parquet file: "),
    "hole.parquet": (
        lambda: hole(table(text=[f"row {n * n}" for n in range(2000)]), 3000),
        "not readable|not a parquet",
    ),
    "plain.parquet": (b"words, not a table", "not a parquet file: "),
    "column.parquet": (lambda: table(words=["hello"]), "no column 'text'; there are words"),
    "number.parquet": (lambda: table(text=[1, 2]), "column 'text' holds int64, not texts"),
    "nested.parquet": (lambda: table(text=[{"en": ["hello"]}]), "column 'text' holds struct<en: list<.*, not texts"),
    "binary.parquet": (lambda: table(text=[b"\xff\xfe"]), "column 'text' holds binary, not texts"),
    "null.parquet:1": (lambda: table(text=["some good words", None]), "null instead of a text"),
    "no_rows.parquet": (lambda: table(text=np.array([], dtype=str)), "empty: no rows"),
    **special(".txt"),
}
KINDS = {"vision": IMAGES, "audio": RECORDINGS, "text": TEXTS}


def file_of(key: str) -> str:
    return key.partition(":")[0]


def write(path: Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content in (os.mkfifo, socket, sparse) or content.__qualname__.startswith("link."):
        content(path)
    else:
        path.write_bytes(content())


def good(modality: str, number: int) -> tuple[str, bytes]:
    """Name and content of a sound file."""
    rng = np.random.default_rng(number)
    if modality == "vision":
        return f"good{number:02}.png", image(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    if modality == "audio":
        return f"good{number:02}.wav", sound(rng.uniform(-0.5, 0.5, 16_000))
    return f"good{number:02}.txt", " ".join(f"word{n}" for n in rng.integers(0, 999, 60)).encode()


@cache
def folder(root: Path, modality: str) -> Path:
    """Sound files and one of each bad kind."""
    place = root / modality
    place.mkdir()
    for number in range(GOOD):
        name, content = good(modality, number)
        (place / name).write_bytes(content)
    for key, (content, _) in KINDS[modality].items():
        write(place / file_of(key), content)
    return place


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


SETTINGS = {
    "vision": ("modality.image_px=32", "modality.patch_px=8"),
    "audio": ("size.conv_dim=16", "modality.batch_seconds=12", "modality.max_seconds=4"),
    "text": (
        "modality.max_document_bytes=100000",
        "modality.block_tokens=64",
        "modality.tokenizer.train_vocab_size=300",
    ),
}


def settings(modality: str, data: Path, run: Path) -> tuple[str, ...]:
    tiny = (
        "size.dim=32",
        "size.depth=2",
        "size.num_heads=2",
        "size.ffn_dim=64",
        "callbacks.probe.rank_samples=20",
        "callbacks.probe.every_n_steps=8",
    )
    return (f"modality={modality}", "data=folder", f"data.path={data}", "data.max_bad_fraction=0.9", *tiny,
            "data.batch_size_per_device=12", f"cache_dir={run / 'cache'}", *SETTINGS[modality])  # fmt: skip


def data_module(modality: str, data: Path, run: Path, workers: int) -> DataModule:
    """What a run would read its data with."""
    os.environ.setdefault("DATA2VEC_RECIPES", str(recipes_parent()))
    register_resolvers()
    run.mkdir(exist_ok=True)
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg: DictConfig = compose("train", overrides=[*settings(modality, data, run), f"data.num_workers={workers}"])
    return build_data(cfg, build_sources(cfg.data), encoder=build(cfg.modality.encoder), run_dir=run)


@cache
def quarantined(root: Path, modality: str, workers: int) -> tuple[dict[str, str], list]:
    """quarantine.jsonl of a run over the folder, {key: reason}, and its batches."""
    run = root / f"{modality}-{workers}"
    data = data_module(modality, folder(root, modality), run, workers)
    batches = list(islice(iter(data.train_dataloader()), 12))
    for batch in batches:
        data.on_before_batch_transfer(batch, 0)
    list(data.evaluation_batches(data.held_out_set))
    listed = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert len({entry["key"] for entry in listed}) == len(listed)  # each once
    return {entry["key"]: entry["reason"] for entry in listed}, batches


# ---------------------------------------------------------------------------------------------------------------------
# What a folder can hold


def test_the_tables_hold_more_than_forty_kinds():
    assert sum(map(len, KINDS.values())) > 100


@pytest.mark.timeout(120)  # a pipe would be waited for
@pytest.mark.parametrize(("modality", "key"), [(modality, key) for modality in KINDS for key in KINDS[modality]])
def test_each_bad_file_is_quarantined_with_its_key_and_a_reason(root, modality, key):
    reasons, _ = quarantined(root, modality, 0)
    assert re.match(KINDS[modality][key][1], reasons[key]), reasons[key]
    assert "\n" not in reasons[key]
    assert not re.search(r"0x[0-9a-f]{6}|Traceback", reasons[key])  # nothing that differs from run to run


@pytest.mark.parametrize("modality", KINDS)
def test_nothing_but_the_bad_files_is_quarantined_and_the_others_train(root, modality):
    reasons, batches = quarantined(root, modality, 0)
    assert reasons.keys() == KINDS[modality].keys()
    assert all(len(batch) and batch.inputs.isfinite().all() for batch in batches)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("modality", KINDS)
def test_replacements_are_the_same_for_any_number_of_workers(root, modality):
    (alone, first), (together, second) = quarantined(root, modality, 0), quarantined(root, modality, 2)
    assert alone == together
    for batch, other in zip(first, second, strict=True):
        assert batch.ids.tolist() == other.ids.tolist()
        assert torch.equal(batch.inputs, other.inputs)
        assert torch.equal(batch.masks.masked, other.masks.masked)
        assert batch.rejected == other.rejected


def test_broken_texts_are_a_share_of_the_documents_and_not_of_their_blocks(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.txt").write_text("some good words to learn from " * 3000)
    for number in range(11):
        (data / f"{number}.txt").write_bytes(b"")
    with pytest.raises(DataError, match="11 of 12 samples cannot be used"):
        data_module("text", data, tmp_path / "run", 0)


# `python -m data2vec_train` for each line of arguments, in processes that share the seconds of importing torch.
COMMANDS = """
import json, os, runpy, sys
import data2vec_train.pretrain.run
for name, arguments in json.load(sys.stdin).items():
    child = os.fork()
    if not child:
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT, 0o600), number)
        sys.argv = ["data2vec_train", *arguments]
        runpy.run_module("data2vec_train", run_name="__main__", alter_sys=True)
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(f"{name}.status", "w").write(str(status))
"""


@pytest.fixture(scope="module")
def commands(root, tmp_path_factory) -> Path:
    """Where runs over all bad files left their output and their directories."""
    place = tmp_path_factory.mktemp("runs")
    every = {}
    for modality in KINDS:
        data = settings(modality, folder(root, modality), place)
        every[modality] = [*data, "trainer.max_steps=8", "report=false", "data.num_workers=2"]
    shards = place / "shards"
    shards.mkdir()
    for number in range(2):
        archive = tar(*[(f"{number}{name}", content) for name, content in MEMBERS])
        (shards / f"{number}.tar").write_bytes(archive if number == 0 else archive[: len(archive) * 2 // 3])
    every["stream"] = ["modality=vision", "data=stream", f"data.path={shards}/*.tar", f"data.cache_dir={place / 'hf'}",
                       "trainer.max_steps=20", "report=false", "data.num_workers=1", "data.batch_size_per_device=4",
                       "size=tiny", *SETTINGS["vision"]]  # fmt: skip
    every = {name: [*arguments, f"hydra.run.dir={place / name}"] for name, arguments in every.items()}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"}
    subprocess.run([sys.executable, "-c", COMMANDS], input=json.dumps(every), text=True, cwd=place, env=environment,
                   timeout=400, check=True)  # fmt: skip
    return place


@pytest.mark.timeout(500)
@pytest.mark.parametrize("modality", KINDS)
def test_a_run_from_the_command_line_survives_all_kinds_and_lists_them(root, commands, modality):
    errors = (commands / f"{modality}.err").read_text()
    assert (commands / f"{modality}.status").read_text() == "0", errors
    assert "Traceback" not in errors + (commands / f"{modality}.out").read_text()
    listed = [json.loads(line) for line in (commands / modality / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["key"]: entry["reason"] for entry in listed} == quarantined(root, modality, 0)[0]


def test_a_stream_with_a_broken_shard_ends_the_command_with_one_line(commands):
    assert (commands / "stream.status").read_text() == "2"
    assert re.fullmatch(r"error: cannot read .*: unexpected end of data\n", (commands / "stream.err").read_text())


@contextmanager
def somebody_else(path: Path) -> Iterator[None]:
    """Without the rights of the superuser, who may read everything."""
    mode = path.stat().st_mode
    path.chmod(0)
    superuser = os.geteuid() == 0
    try:
        if superuser:
            os.seteuid(65_534)
        yield
    finally:
        if superuser:
            os.seteuid(0)
        path.chmod(mode)


@pytest.mark.parametrize("modality", KINDS)
def test_a_file_that_may_not_be_read_says_so(tmp_path, modality):
    name, content = good(modality, 0)
    path = tmp_path / name
    path.write_bytes(content)
    decode: dict[str, Callable[[], object]] = {
        "vision": lambda: picture(path),
        "audio": lambda: wave(path),
        "text": lambda: texts(path)[0][1],
    }
    decode[modality]()  # imports what it needs
    with somebody_else(path):
        if modality == "text":
            assert texts(path) == [("key", "not readable: permission denied")]
            return
        with pytest.raises(BadSample, match="^not readable: permission denied$"):
            decode[modality]()


def test_memory_stays_flat_however_often_bad_files_are_met(root):
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("no /proc")
    places = {name: folder(root, name) for name in ("vision", "audio")}

    def meet() -> None:
        for name, decode in (("vision", picture), ("audio", wave)):
            for key in KINDS[name]:
                with pytest.raises(BadSample):
                    decode(places[name] / key)

    meet()
    before = int(resident.read_text().split()[1])
    for _ in range(8):
        meet()
    assert (int(resident.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 16 * 2**20


def test_links_between_folders_end(tmp_path):
    for name, others in {"a": "bc", "b": "ac", "c": "ab"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
        for other in others:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
        (tmp_path / name / "up").symlink_to(tmp_path)
    source = FolderSource(path=str(tmp_path), extensions=[".png"], class_from_folder=False)
    keys = {source[row].key for row in range(len(source))}
    assert {"a/x.png", "a/to_b/x.png", "a/to_b/to_c/x.png"} <= keys
    assert len(keys) == 15  # each way that meets no folder twice


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path):
    (tmp_path / "x.png").mkdir()
    (tmp_path / "x.png" / "y.png").write_bytes(image())
    source = FolderSource(path=str(tmp_path), extensions=[".png"], class_from_folder=False)
    assert [source[row].key for row in range(len(source))] == ["x.png/y.png"]


def test_names_that_are_no_utf8_are_read_all_the_same(tmp_path):
    for name, content in (("wav", sound()), ("png", image()), ("txt", b"words")):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9." + name.encode())).write_bytes(content)

    def only(extension: str) -> Path:
        return FolderSource(path=str(tmp_path), extensions=[extension], class_from_folder=False)[0].value

    assert len(wave(only(".wav"))) == 16_000
    assert picture(only(".png")).size == (64, 48)
    assert texts(only(".txt")) == [("key", "words")]


# ---------------------------------------------------------------------------------------------------------------------
# Odd, and sound


class One(Source):
    class_names = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return RawSample(self.path.name, self.path)

    def labels(self):
        return None


def picture(value, channels: int = 3, max_pixels: int = 89_478_485) -> Image.Image:
    return decode_image(value, channels=channels, max_pixels=max_pixels)


def wave(value, **changes) -> np.ndarray:
    options = {"sample_rate_hz": 16_000, "channels": 1, "min_seconds": 0.2, "min_level": 1e-6, "max_level": 65_536.0}
    if isinstance(value, Path):  # as a run does: headers first
        source = One(value)
        cut = {"sample_rate_hz": 16_000, "min_seconds": 0.2, "segment_seconds": 60.0}
        try:
            value = AudioSegments(source, cache_dir=None, **cut)[0].value
        except DataError as error:
            raise BadSample(str(error).partition(f"{value.name}: ")[2].partition(". Give other data")[0]) from error
    return decode_audio(value, **options | changes)


def texts(path: Path, **changes) -> list[tuple[str, str]]:
    how = {"encodings": ["utf-8-sig", "cp1252"], "column": "text", "separator": None, "max_document_bytes": 10**5}
    return [(key, str(text)) for key, _, text in documents(RawSample("key", path, None), **how | changes)]


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (lambda: image(np.full((4, 4), 0x8080, np.uint16)), (128, 128, 128)),
        (lambda: image(np.full((4, 4), 200, np.int32), "TIFF"), (200, 200, 200)),
        (lambda: image(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (lambda: image(Image.new("P", (4, 4), 1)), None),
        (lambda: image(Image.new("LA", (4, 4), (77, 0))), (77, 77, 77)),
        (lambda: image(Image.new("RGBA", (4, 4), (1, 2, 3, 0))), (1, 2, 3)),
        (lambda: image(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (lambda: image(Image.new("RGB", (1, 1), (4, 5, 6))), (4, 5, 6)),
        (lambda: image(Image.new("RGB", (3000, 1), (4, 5, 6))), (4, 5, 6)),
        (lambda: image(Image.new("RGB", (4, 4), (7, 8, 9)), save_all=True, append_images=[Image.new("RGB", (4, 4))]),
         (7, 8, 9)),
        (lambda: image(kind="JPEG") + b"bytes that somebody added \xff\xc0", None),
        (lambda: image(kind="JPEG", progressive=True), None),
        (restarting, None),
        (lambda: image(kind="JPEG", exif=b"Exif\0\0" + image(Image.new("L", (9, 9)), "JPEG")), None),  # a thumbnail
        (lambda: image(kind="MPO", save_all=True, append_images=[Image.fromarray(PIXELS)]), None),
    ],
    ids=["16 bit", "32 bit", "1 bit", "palette", "grey and alpha", "alpha", "cmyk", "1 pixel", "strip", "animation",
         "trailing bytes", "progressive", "restarts", "thumbnail", "two pictures"],
)  # fmt: skip
def test_odd_images_are_read_with_the_right_values(data, pixel):
    decoded = picture(data())
    assert decoded.mode == "RGB"
    assert pixel is None or np.abs(np.array(decoded.getpixel((0, 0)), int) - pixel).max() <= 1


def test_a_rotated_photo_stands_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert picture(image(kind="JPEG", exif=exif)).size == (48, 64)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 9000), (1, 1)])
def test_a_long_strip_takes_no_more_memory_than_a_photo(size):
    shape = {"image_px": 224, "channels": 3, "crop_scale": None, "crop_ratio": None, "shift_px": 0}
    look = {"horizontal_flip": 0.0, "color_jitter": None, "interpolation": "bicubic", "mean": [0.0], "std": [1.0]}
    transform = ImageTransform(**shape, **look)
    strip = Image.new("RGB", size, (51, 102, 153))
    strip.putpixel((0, 0), (51, 102, 153))
    for made in (transform.evaluate(strip), transform.train(strip)):
        assert made.shape == (3, 224, 224)
        torch.testing.assert_close(made[:, 112, 112], torch.tensor([0.2, 0.4, 0.6]), atol=5e-3, rtol=0)


def test_the_middle_of_a_strip_is_the_same_as_of_all_of_it(monkeypatch):
    import data2vec_train.data.image as module

    options = {"image_px": 16, "channels": 1, "crop_scale": None, "crop_ratio": None, "shift_px": 0}
    options |= {"horizontal_flip": 0.0, "color_jitter": None, "interpolation": "bicubic", "mean": [0.0], "std": [1.0]}
    transform = ImageTransform(**options)
    for shape in ((8, 400), (600, 20), (40, 2000)):
        waves = [np.sin(np.linspace(0, 2 * np.pi * side / min(shape), side)) for side in shape]
        strip = (127 + 60 * waves[0][:, None] + 60 * waves[1]).astype(np.uint8)
        cropped = transform.evaluate(strip)
        with monkeypatch.context() as patch:
            patch.setattr(module, "MAX_COVERED", 10**9)
            whole = transform.evaluate(strip)
        assert cropped.shape == whole.shape == (1, 16, 16)
        torch.testing.assert_close(cropped, whole, atol=0.06, rtol=0)  # places differ by parts of a pixel


@pytest.mark.parametrize(
    ("data", "seconds", "level"),
    [
        (lambda: sound(subtype="PCM_U8"), 1.0, 0.289),
        (lambda: sound(subtype="PCM_24"), 1.0, 0.289),
        (lambda: sound(subtype="DOUBLE"), 1.0, 0.289),
        (lambda: sound(32_768 * NOISE, subtype="FLOAT"), 1.0, 9459),  # 16-bit integers, stored as floats
        (lambda: sound(1e-4 * NOISE, subtype="PCM_24"), 1.0, 2.89e-5),
        (lambda: sound(np.stack([NOISE] * 8, axis=1)), 1.0, 0.289),
        (lambda: sound(np.stack([NOISE, 0 * NOISE], axis=1)), 1.0, 0.144),
        (lambda: patched(sound(), 40, "<I", 0xFFFFFFFF), 1.0, 0.289),  # written into a pipe: its length was not known
        (lambda: patched(sound(), 40, "<I", MAX_HEADER_BYTES), 1.0, 0.289),
        (lambda: sound(rate=200), 80.0, None),
        (lambda: sound(rate=15_999), 1.0, 0.289),
        (lambda: sound(np.tile(NOISE, 8), rate=176_401), 0.7256, None),
    ],
    ids=["8 bit", "24 bit", "double", "integers as floats", "quiet", "8 channels", "one side", "streamed", "streamed 2",
         "slow", "odd rate", "odd and fast"],
)  # fmt: skip
def test_odd_recordings_are_read_with_the_right_values(tmp_path, data, seconds, level):
    path = tmp_path / "odd.wav"
    path.write_bytes(data())
    decoded = wave(data())
    assert len(decoded) == pytest.approx(seconds * 16_000, abs=2)
    assert level is None or decoded.std() == pytest.approx(level, rel=0.02)
    source = FolderSource(path=str(tmp_path), extensions=["wav"], class_from_folder=False)
    cut = AudioSegments(source, cache_dir=None, sample_rate_hz=16_000, min_seconds=0.2, segment_seconds=60.0)
    assert cut.rejected == ()
    assert len(decode_audio(cut[0].value, sample_rate_hz=16_000, channels=1, min_seconds=0.2, min_level=1e-6,
                            max_level=65_536.0)) >= cut.lengths[0]  # fmt: skip


def test_a_rate_without_common_divisor_keeps_pitch_and_loudness():
    rate = 47_999  # its resampling filters would take 3 GiB
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    decoded = wave(sound(tone, rate=rate))
    assert np.abs(np.fft.rfft(decoded)).argmax() == 440
    assert decoded.std() == pytest.approx(0.5 / np.sqrt(2), rel=1e-2)


def test_odd_arrays_of_sound_get_a_reason():
    for array, reason in (
        (np.array(0.5), "an array of shape"),
        (np.zeros((2, 0), np.float32), "no samples"),
        (np.full(9000, 1e300), "not finite"),
        (np.ones(9000, complex), "complex128 array"),
    ):
        with pytest.raises(BadSample, match=reason):
            wave(array, min_seconds=0.0)


def test_odd_texts_are_read_with_the_right_characters(tmp_path):
    for name, raw, wanted in (
        ("latin.txt", "café".encode("latin-1"), ["café"]),
        ("utf16.txt", "café".encode("utf-16"), ["café"]),
        ("mark.txt", "café".encode("utf-8-sig"), ["café"]),
        ("mark.jsonl", b"\xef\xbb\xbf" + lines(ROW), [ROW["text"]]),
        ("no_end.jsonl", lines(ROW).strip(), [ROW["text"]]),
        ("gap.jsonl", b"\n\n" + lines(ROW), [ROW["text"]]),
    ):
        (tmp_path / name).write_bytes(raw)
        assert [text for _, text in texts(tmp_path / name)] == wanted


def test_a_table_of_broken_rows_only_is_given_up(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_bytes(lines(*[{"words": "hello"}] * 3000))
    found = texts(path)
    assert len(found) == HOPELESS_ROWS + 1
    assert found[-1] == ("key", f"given up: none of its first {HOPELESS_ROWS} rows can be used")
    path.write_bytes(lines(ROW, *[{"words": "hello"}] * 3000))
    assert len(texts(path)) == 3001


# ---------------------------------------------------------------------------------------------------------------------
# Tables and archives


@pytest.fixture
def hf(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def _hf(path: Path | str, *, streaming: bool = False, kind: str = "image", **changes):
        options = {"name": None, "split": None, "column": None, "label_column": None, "data_files": None}
        options |= {"revision": None, "cache_dir": str(tmp_path / "hf"), "kind": kind} | changes
        if not streaming:
            return HFSource(path=str(path), **options)
        place = {"epoch": 0, "seed": 0, "worker": 0, "num_workers": 1, "rank": 0, "world_size": 1}
        return HFStreamingSource(path=str(path), shuffle_buffer=1, **options).stream(**place)

    return _hf


def reasons_of(samples) -> dict[str, str]:
    """Why each record cannot be decoded; "" if it can."""
    found = {}
    for sample in samples:
        try:
            picture(sample.value)
            found[sample.key] = ""
        except BadSample as error:
            found[sample.key] = str(error)
    return found


MEMBERS = [(f"{number}.png", image()) for number in range(4)]
ARCHIVES: dict[str, tuple[list, dict[str, str]]] = {
    "empty member": ([("e.png", b"")], {"e": "empty file"}),
    "text as image": ([("t.jpg", b"words")], {"t": "not an image"}),
    "cut image": ([("c.png", image()[:-2000])], {"c": "truncated"}),
    "bomb": ([("b.png", png(30_000, 30_000))], {"b": "30000x30000 pixels, more than"}),
    "outside": ([("../evil.png", image()), ("/tmp/evil.png", image())], {"../evil": "", "/tmp/evil": ""}),
    "links": ([("l.png", b"/etc/passwd", tarfile.SYMTYPE), ("h.png", b"0.png", tarfile.LNKTYPE)], {}),
    "devices": (
        [("d.png", b"", tarfile.CHRTYPE), ("f.png", b"", tarfile.FIFOTYPE), ("g.png", b"", tarfile.DIRTYPE)],
        {},
    ),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["at once", "stream"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_bad_members_of_an_archive_are_named_and_nothing_is_written(tmp_path, hf, kind, streaming):
    members, wanted = ARCHIVES[kind]
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    (inside / "a.tar").write_bytes(tar(*MEMBERS, *members))
    found = reasons_of(hf(inside / "a.tar", streaming=streaming))
    expected = {f"a.tar:{number}": "" for number in range(4)} | {f"a.tar:{name}": why for name, why in wanted.items()}
    assert found.keys() == expected.keys()
    assert all(found[key].startswith(why) and bool(found[key]) == bool(why) for key, why in expected.items())
    assert [path.name for path in tmp_path.rglob("*evil*")] == []
    assert not Path("/tmp/evil.png").exists()


GOOD_TABLE = {"image": [{"bytes": image(), "path": None}] * 4}
CONTAINERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut.tar": (lambda: tar(*MEMBERS)[:20_000], "unexpected end of data"),
    "header.tar": (
        lambda: patched(tar(*MEMBERS), 512 * 20 + 100, ">Q", 0),
        "a damaged header at byte",
    ),
    "plain.tar": (lambda: b"words " * 300, "invalid header"),
    "empty.tar": (lambda: b"", "empty file"),
    "cut.parquet": (lambda: table(**GOOD_TABLE)[:-30], "Parquet magic bytes not found"),
    "hole.parquet": (lambda: table(**GOOD_TABLE)[:4] + b"\xff" * 40 + table(**GOOD_TABLE)[44:], ""),
    "plain.parquet": (lambda: b"words, not a table", "Parquet magic bytes not found|Parquet file size"),
    "no_rows.parquet": (lambda: table(image=np.array([], dtype="S1")), "it has no rows"),
    "twice.json": (lambda: b"words, not JSON", "JSON parse error"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["at once", "stream"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_cannot_be_read_is_one_clear_line(tmp_path, hf, name, streaming, capfd):
    make, reason = CONTAINERS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError, match=f"cannot read .*{name}: .*({reason})") as error:
        list(hf(tmp_path / name, streaming=streaming))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("streaming", [False, True], ids=["at once", "stream"])
def test_bad_cells_of_a_table_are_named(tmp_path, hf, streaming):
    cells = [{"bytes": image(), "path": None}, None, {"bytes": None, "path": None}, {"bytes": b"words", "path": None}]
    cells += [{"bytes": None, "path": path} for path in (f"{tmp_path}/none.png", str(tmp_path), "http://127.0.0.1:9/x")]
    (tmp_path / "t.parquet").write_bytes(table(image=cells))
    found = reasons_of(hf(tmp_path / "t.parquet", streaming=streaming))
    assert list(found.values()) == [
        "",
        "empty file",
        "empty file",
        "not an image",
        "file is missing",
        "not readable: Is a directory",
        "a URL outside the data set's hosts, which is not fetched",
    ]
    assert list(found)[-1] == "http://127.0.0.1:9/x"


@pytest.mark.parametrize("column", [[1, 2], [{"bytes": 5, "path": "a"}], [{"bytes": [[1]], "path": "a"}]])
def test_a_column_that_holds_no_images_is_one_clear_line(tmp_path, hf, column):
    (tmp_path / "t.parquet").write_bytes(table(image=column))
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"t\.parquet.*(holds no images|cast)"):
            list(hf(tmp_path / "t.parquet", streaming=streaming, column="image"))


def test_a_local_table_cannot_make_this_machine_call_another(tmp_path, hf, monkeypatch):
    import socket as network

    def refuse(*_args, **_options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(network.socket, "connect", refuse)
    urls = [{"bytes": None, "path": url} for url in ("http://example.org/x.png", "zip://x.png::https://example.org/a.zip",
                                                     "hf://datasets/a/b/x.png", "ftp://example.org/x.png")]  # fmt: skip
    (tmp_path / "t.parquet").write_bytes(table(image=urls))
    assert all("hosts" in why for why in reasons_of(hf(tmp_path / "t.parquet")).values())


def test_a_data_set_that_is_a_program_is_never_run(tmp_path, hf):
    place = tmp_path / "evil"
    place.mkdir()
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        hf(place)
    with pytest.raises(ConfigError, match="is not a data set"):
        hf(place / "evil.py")
    assert not (tmp_path / "ran").exists()


def test_an_extracted_archive_writes_nothing_outside_of_its_place(tmp_path, hf):
    outside = tmp_path / "outside.png"
    members = [("../" * n + "outside.png", image()) for n in range(1, 9)]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar(("in.png", image()), (str(outside), image()), *members)))
    with suppress(DataError):  # whether such an archive counts as data at all is the library's choice
        hf("imagefolder", data_files=str(tmp_path / "a.tar.gz"))
    assert [path for path in tmp_path.rglob("outside.png") if tmp_path / "hf" not in path.parents] == []


def test_a_shard_that_breaks_within_a_worker_stays_one_line():
    from torch._utils import ExceptionWrapper

    try:
        raise UnreadableShard("cannot read a.tar: unexpected end of data")
    except UnreadableShard:
        wrapped = ExceptionWrapper(sys.exc_info(), where="in DataLoader worker process 0")
    with pytest.raises(DataError) as error:
        wrapped.reraise()
    assert str(error.value) == "cannot read a.tar: unexpected end of data"


# ---------------------------------------------------------------------------------------------------------------------
# Files that describe others


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.csv", b"", "its first line is ''; expected the names of the columns"),
        ("metadata.csv", "file_name\ncafé\n".encode("latin-1"), "cannot be read: 'utf-8' codec"),
        ("metadata.csv", b"name,text\na.wav,hello\n", "its first line is 'name,text'; expected .* file_name"),
        ("metadata.csv", b'file_name,text\na.wav,"' + b"x" * 200_000 + b'"\n', "line 2: not a table"),
        ("metadata.jsonl", b"words\n", "line 1: not a line of JSON"),
        ("metadata.jsonl", b"[" * 90_000 + b"\n", "line 1: not a line of JSON"),
        ("metadata.jsonl", b"[1, 2]\n", "line 1: no file name"),
    ],
)
def test_broken_metadata_is_one_clear_line(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_metadata(tmp_path / name, tmp_path)


def test_a_pipe_for_metadata_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metadata.csv")
    failures = []

    def read() -> None:
        with pytest.raises(DataError, match="a pipe, not a file"):
            read_metadata(tmp_path / "metadata.csv", tmp_path)
        failures.append(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert failures == [None]


def test_classes_that_are_no_names_are_refused():
    with pytest.raises(DataError, match="a class is called"):
        classes_of(["a", {"b": 1}])


def test_odd_names_in_a_manifest_get_a_reason(tmp_path):
    (tmp_path / "a\\b.wav").write_bytes(sound())
    manifest = tmp_path / "train.tsv"
    manifest.write_text(f"{tmp_path}\na\\b.wav\t16000\nnul\0.wav\t5\n{'x' * 400}.wav\t5\n.\t5\n")
    segments = AudioSegments(ManifestSource(path=str(manifest)), cache_dir=tmp_path, sample_rate_hz=16_000,
                             min_seconds=0.2, segment_seconds=9.0)  # fmt: skip
    assert len(segments) == 1
    assert [why for _, why in segments.rejected] == [
        "not readable: a NUL in its name",
        "not readable: File name too long",
        "not readable: Is a directory",
    ]


@pytest.mark.parametrize("damage", ["cut", "hole", "size"])
def test_a_broken_archive_of_arrays_is_one_clear_line(tmp_path, damage):
    file = io.BytesIO()
    np.savez_compressed(file, x=RNG.integers(0, 256, (50, 8, 8), dtype=np.uint8), y=np.arange(50) % 5)
    data = file.getvalue()
    if damage == "size":  # claims more than any memory holds
        stored = io.BytesIO()
        np.lib.format.write_array_header_1_0(stored, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
        import zipfile

        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("x.npy", stored.getvalue())
            archive.writestr("y.npy", stored.getvalue())
        data = packed.getvalue()
    path = tmp_path / "a.npz"
    path.write_bytes({"cut": data[:-60], "hole": hole(data, 300), "size": data}[damage])
    with pytest.raises(DataError, match=r"a\.npz is not an \.npz archive"):
        ArraySource(path=str(path), split="all", held_out=0)
