"""Attacks on what runs and commands write: kills, full disks, damaged files, two at once, clocks, shared state."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import data2vec_train as ours
from data2vec_train import checkpoints
from data2vec_train.__main__ import _pretrain
from data2vec_train.config import compose as config
from data2vec_train.config.isolation import isolated
from data2vec_train.data import audio
from data2vec_train.data.quarantine import Quarantine
from data2vec_train.data.sources.files import FolderSource
from data2vec_train.data.text import TextBlocks, prepare_text
from data2vec_train.embed import run as embedding
from data2vec_train.errors import ConfigError
from data2vec_train.pretrain.sweep import read_members
from data2vec_train.system import outputs
from data2vec_train.system.outputs import cached_folder, sole_writer, take_lock, writing
from data2vec_train.training.callbacks.monitor import CSVLog, wandb_logger
from tests.stress import tiny

STEPS = 4


def program(*overrides: str, command: str = "") -> int:
    """The exit status of a command in this process."""
    if command:
        import importlib

        entry = importlib.import_module(f"data2vec_train.{command}.__main__")
        task = entry._export if command == "export" else entry._run
        options = {"config_name": command, "weights": None if command == "export" else "checkpoint"}
    else:
        task, options = _pretrain, {"config_name": "train"}
    before, sys.argv = sys.argv, ["data2vec_train", *overrides]
    try:
        config.main(task, **options)
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = before
    return 0


def one_line(capsys) -> str:
    """What the command said in its only line of error; there is no stack trace."""
    text = capsys.readouterr().err
    assert "Traceback" not in text, text
    said = [line for line in text.splitlines() if line.startswith(("error", "  "))]
    assert len(said) == 1, text
    return said[0]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Of a run that takes a second."""
    given = tiny.make_data(tmp_path_factory.mktemp("data"))["vision"]
    given = [word for word in given if not word.startswith("trainer.max_steps")]
    quick = [f"trainer.max_steps={STEPS}", "data.num_workers=0", "callbacks.monitor.progress=none"]
    return [*given, *quick, "callbacks.checkpoint.every_n_steps=2", "strategy.accelerator=cpu"]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    assert program(*arguments, f"hydra.run.dir={path}") == 0
    (path / "quarantine.jsonl").write_text('{"key": "a", "reason": "b"}\n')
    (path / "nonfinite.jsonl").write_text('{"step": 1, "samples": []}\n')
    return path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def state_of(run: Path) -> dict[str, object]:
    return dict(tiny_flat(checkpoints.read(checkpoints.resolve(run))))


def tiny_flat(tree: object, name: str = "") -> list[tuple[str, object]]:
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in tiny_flat(value, f"{name}.{key}")]
    if isinstance(tree, (list, tuple)):
        return [pair for place, value in enumerate(tree) for pair in tiny_flat(value, f"{name}.{place}")]
    return [(name, tree)]


def same(run: Path, other: Path) -> list[str]:
    """Names of tensors of the model and its optimizer that differ."""
    ours_, theirs = state_of(run), state_of(other)
    return [
        name for name in ours_ if isinstance(ours_[name], torch.Tensor) and not torch.equal(ours_[name], theirs[name])
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged small files of a run directory

DAMAGES: dict[str, bytes] = {
    "NUL bytes": bytes(64),
    "an empty list": b"[]",
    "half a character": b'{"step": 1, "a": "\xff\xfe',
    "brackets a million deep": b"[" * 1_000_000,
    "nothing": b"",
}
HEALED = ("quarantine.jsonl", "nonfinite.jsonl", "metrics.csv", "summary.json", "checkpoints/last", "checkpoints/best")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_past_small_files_that_all_hold(damage, run, arguments, capsys):
    goes_on(run, arguments, capsys, {file: DAMAGES[damage] for file in HEALED})


@pytest.mark.slow
@pytest.mark.parametrize("file", HEALED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_past_a_damaged(file, damage, run, arguments, capsys):
    goes_on(run, arguments, capsys, {file: DAMAGES[damage]})


def goes_on(run: Path, arguments: list[str], capsys, damages: dict[str, bytes]) -> None:
    (run / "summary.json").unlink()
    for file, content in damages.items():
        (run / file).write_bytes(content)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    started = time.monotonic()
    assert program(*arguments, f"hydra.run.dir={run}") == 0
    assert time.monotonic() - started < 60
    assert "Traceback" not in capsys.readouterr().err
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert checkpoints.step_of(checkpoints.pointed(run / "checkpoints" / "last")) == STEPS


FAST_DAMAGES = {
    "config.yaml": ("NUL bytes", "nothing", "references"),
    ".command.yaml": ("half a character", "brackets a million deep"),
}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param(file, damage, marks=() if damage in fast else pytest.mark.slow)
        for file, fast in FAST_DAMAGES.items()
        for damage in (*DAMAGES, "references")
    ],
)
def test_one_line_names_a_damaged(file, damage, run, arguments, capsys):
    bomb = b"a: &a [1]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (n, n) for n in range(50))
    (run / file).write_bytes(bomb if damage == "references" else DAMAGES[damage])
    command = [f"resume={run}"] if file == ".command.yaml" else [*arguments, f"hydra.run.dir={run}"]
    status = program(*command)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if file == ".command.yaml" and damage == "an empty list":
        return  # a run with the default settings, which are not those of config.yaml
    if file == "config.yaml" and damage == "nothing":
        assert status == 0  # the checkpoint has the settings too
        return
    assert status == 2
    assert file in said or "other settings" in said


def test_resume_changed_writes_a_damaged_config_again(run, arguments, capsys):
    (run / "config.yaml").write_bytes(bytes(64))
    assert program(*arguments, f"hydra.run.dir={run}", "resume=changed") == 0
    assert "modality:" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b"5",
        b'{"hydra": 3}',
        b"hydra: {overrides: {task: 5, hydra: []}}",
        bytes(10),
        b"hydra: {overrides: []}",
    ],
    ids=[
        "a list",
        "nothing",
        "a number",
        "no overrides",
        "a number of overrides",
        "NUL bytes",
        "overrides without names",
    ],
)
def test_one_line_for_a_sweep_to_resume_whose_multirun_has(content, tmp_path, capsys):
    (tmp_path / "multirun.yaml").write_bytes(content)
    assert program(f"resume={tmp_path}") == 2
    assert "multirun.yaml" in one_line(capsys)


@pytest.mark.parametrize("content", ['{"probe": {}}', '{"status": 5, "probe": 7}', '{"status": "finished"}'])
def test_a_summary_with_odd_values_ends_without_a_trace(content, run, arguments, capsys):
    (run / "summary.json").write_text(content)
    assert program(*arguments, f"hydra.run.dir={run}") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_rows_of_metrics_that_are_no_numbers_are_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,train/loss\n1,1.0\n\x00\x00\x00\n2,abc\nx,2\n3,1,2,3\n4,0.5\n9,0.1\n")
    CSVLog(path=path).cut(5)
    assert path.read_text().splitlines() == ["step,train/loss", "1,1.0", "4,0.5"]
    assert "4 damaged rows are left out" in caplog.text


def test_a_header_that_is_lost_is_kept_aside(tmp_path, caplog):
    (tmp_path / "metrics.csv").write_bytes(bytes(100) + b"\n1,2\n")
    CSVLog(path=tmp_path / "metrics.csv").log_metrics({"train/loss": 1.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,train/loss", "1,1.0"]
    assert (tmp_path / "metrics.csv.damaged").exists()


def test_a_list_of_broken_samples_goes_on_behind_damaged_lines(tmp_path, caplog):
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b'{"key": "a", "reason": "x"}\n' + bytes(50) + b'\n[]\n{"key": 5}\n{"key": "b", "rea')
    found = Quarantine(path=path, num_samples=100, max_bad_fraction=0.5, tolerated=9)
    assert found.written == {"a", "5"}
    found.write([("a", "x"), ("c", "y")])
    assert path.read_bytes().endswith(b'{"key": 5}\n{"key": "c", "reason": "y"}\n')


@pytest.mark.parametrize("content", ["[]", '{"a": ', "\0" * 9, "[" * 100_000, "\udcff", '{"probe": {"knn": []}}'])
def test_the_table_of_a_sweep_is_made_beside_a_damaged_summary(content, tmp_path):
    for member in ("0", "1"):
        (tmp_path / member / ".hydra").mkdir(parents=True)
        (tmp_path / member / "summary.json").write_text('{"steps": 1}')
        (tmp_path / member / ".hydra" / "overrides.yaml").write_text(f"- seed={member}")
    (tmp_path / "0" / "summary.json").write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / "1" / ".hydra" / "overrides.yaml").write_bytes(bytes(20))
    assert [member["directory"] for member in read_members(tmp_path)] == ["0", "1"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks


class Disk:
    """Refuses to take bytes into files below a folder, or whose names contain a text."""

    def __init__(self, monkeypatch, where: str, number: int = errno.ENOSPC) -> None:
        opened, self.refused = io.open, 0
        disk = self

        class Full(io.FileIO):
            def write(self, data):
                disk.refused += 1
                raise OSError(number, os.strerror(number))

        def open_(file, mode="r", *more, **options):
            if where in str(file) and set(mode) & set("wax+"):
                raw = Full(file, mode.replace("b", "").replace("t", "").replace("+", ""))
                return raw if "b" in mode else io.TextIOWrapper(raw, write_through=True)
            return opened(file, mode, *more, **options)

        monkeypatch.setattr(io, "open", open_)
        monkeypatch.setattr("builtins.open", open_)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_the_files_of_hydra_is_one_line(number, arguments, tmp_path, monkeypatch, capsys):
    refused("overrides.yaml", number, arguments, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("file", [".config.yaml.", "summary.json"])
def test_a_disk_that_is_full_when_a_run_writes(file, arguments, tmp_path, monkeypatch, capsys):
    refused(file, errno.ENOSPC, arguments, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["hydra.yaml", "report.html", ".command.yaml", "preprocessor_config.json", "profile.csv"]
)
def test_a_disk_that_is_full_when_a_whole_run_writes(file, arguments, tmp_path, monkeypatch, capsys):
    given = [*(word for word in arguments if not word.startswith("report=")), "callbacks.timing=true"]
    refused(file, errno.ENOSPC, given, tmp_path, monkeypatch, capsys)


def refused(file: str, number: int, arguments: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patched:
        disk = Disk(patched, file, number)
        assert program(*arguments, "trainer.max_steps=1", f"hydra.run.dir={tmp_path}/run") == 2
    assert disk.refused
    assert os.strerror(number) in one_line(capsys)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small vision encoder, and images beside it."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    shape = {"image_size": 32, "patch_size": 8, "use_shared_relative_position_bias": True, "out_indices": [0, 1]}
    ours.Data2VecVisionModel(ours.Data2VecVisionConfig(**size, **shape)).save_pretrained(folder / "model")
    from data2vec_train.weights.preprocessing import ImageProcessor

    ImageProcessor(size=32, fit="cover").save_pretrained(folder / "model")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder


@pytest.fixture
def embed(weights, tmp_path) -> Callable[..., int]:
    def start(*more: str) -> int:
        given = [f"checkpoint={weights}/model", "data=folder", f"data.path={weights}/images", "data.num_workers=0"]
        given += [f"out={tmp_path}/out.parquet", "rows_per_part=2"]
        names = {word.partition("=")[0] for word in more}
        return program(*(word for word in given if word.partition("=")[0] not in names), *more, command="embed")

    return start


@pytest.mark.parametrize("where", ["identity.json", ".part-000001", ".out.parquet."])
def test_a_full_disk_in_embed_is_one_line_and_the_next_start_goes_on(where, embed, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        if where == ".out.parquet.":
            from pyarrow import parquet as module

            def full(*_, **__):
                raise OSError(errno.ENOSPC, "No space left on device")

            patched.setattr(module.ParquetWriter, "write_table", full)
        else:
            Disk(patched, where)
        assert embed() == 2
    assert "No space left on device" in one_line(capsys)
    assert not (tmp_path / "out.parquet").exists()
    assert embed() == 0
    assert len(parquet.read_table(tmp_path / "out.parquet")) == 6
    assert os.listdir(tmp_path) == ["out.parquet"]


@pytest.mark.parametrize("kind", ["safetensors", "hf"])
def test_a_full_disk_in_export_leaves_nothing(kind, weights, tmp_path, monkeypatch, capsys):
    import safetensors.torch

    def full(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        given = [f"checkpoint={weights}/model", f"format={kind}", f"out={tmp_path}/out"]
        assert program(*given, command="export") == 2
    assert "No space left on device" in one_line(capsys)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_really_full_file_system_in_a_cache_of_texts(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not possible here")
    try:
        texts = tmp_path / "texts"
        texts.mkdir()
        rng = random.Random(0)
        for number in range(4):
            (texts / f"{number}.txt").write_text("".join(rng.choice("abcdefg hijk") for _ in range(50_000)))
        given = tiny.make_data(tmp_path / "data")["text"]
        given = [word for word in given if not word.startswith(("cache_dir", "data.path"))]
        assert program(*given, f"data.path={texts}", f"cache_dir={disk}", f"hydra.run.dir={tmp_path}/run") == 2
        assert "No space left on device" in one_line(capsys)
        assert not [name for name in os.listdir(disk / "tokens") if "unfinished" in name]  # its room is given back
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    "out", ["/", ".", "..", "null", "missing/out.parquet", "'a\0b.parquet'", "~nobody/out.parquet"]
)
def test_an_output_that_is_no_place_for_a_file(out, embed, capsys):
    assert embed(f"out={out}") == 2
    assert "out" in one_line(capsys)


def test_an_output_in_a_place_that_is_a_file(embed, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert embed(f"out={tmp_path}/file/out.parquet") == 2
    assert "there is no folder" in one_line(capsys)


def test_an_output_that_is_a_dangling_link_is_not_written_through(embed, tmp_path, capsys):
    (tmp_path / "out.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    assert embed() == 2
    assert "exists already" in one_line(capsys)
    assert not (tmp_path / "elsewhere.parquet").exists()


def test_parts_that_are_a_link_to_elsewhere_do_not_remove_what_is_there(embed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / "out.parquet.parts").symlink_to(tmp_path / "elsewhere")
    assert embed() in (0, 2)
    assert (tmp_path / "elsewhere" / "precious").read_text() == "x"


def test_a_name_of_250_characters_is_one_line(embed, tmp_path, capsys):
    assert embed(f"out={tmp_path}/{'a' * 242}.parquet") == 2
    assert "File name too long" in one_line(capsys)


def test_a_folder_that_may_not_be_written_is_one_line(embed, tmp_path, monkeypatch, capsys):
    def refuse(file, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    with monkeypatch.context() as patched:
        patched.setattr(outputs, "take_lock", refuse)
        assert embed() == 2
    assert "Permission denied" in one_line(capsys)


def test_a_run_directory_below_a_file_is_one_line(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert program(*arguments, f"hydra.run.dir={tmp_path}/file/run") == 2
    assert str(tmp_path / "file") in one_line(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Two at once, kills


def test_a_killed_writer_leaves_a_lock_file_and_halves_that_the_next_one_removes(embed, tmp_path):
    (tmp_path / ".out.parquet.lock").write_text(' {"pid": 1, "host": "x", "since": "y"}')
    (tmp_path / ".out.parquet.0badcafe.unfinished").write_bytes(bytes(100))
    assert embed() == 0
    assert os.listdir(tmp_path) == ["out.parquet"]


@pytest.mark.parametrize("note", [b"", b"\0" * 40, b" []", b' {"pid": 1}', b"\xff\xff", b" " + b"[" * 3000])
def test_a_lock_whose_note_is_damaged_still_keeps_others_out(note, tmp_path):
    handle = take_lock(tmp_path / "lock", "it")
    (tmp_path / "lock").write_bytes(note)
    with pytest.raises(outputs.Locked, match="its id is unknown"):
        take_lock(tmp_path / "lock", "it")
    outputs.release(handle)


def test_a_lock_file_that_is_a_folder_is_one_line(embed, tmp_path, capsys):
    (tmp_path / ".out.parquet.lock").mkdir()
    assert embed() == 2
    assert ".out.parquet.lock" in one_line(capsys)


def test_eight_processes_make_one_folder_of_a_cache_once(tmp_path):
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom data2vec_train.system.outputs import cached_folder\n"
        "def make(folder):\n    (folder / 'a').write_text(str(os.getpid()))\n    print('made', flush=True)\n"
        "cached_folder(Path(sys.argv[1]), make)\n"
    )
    all_ = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE) for _ in range(8)]
    said = b"".join(process.communicate(timeout=60)[0] for process in all_)
    assert said == b"made\n"
    assert not any(process.returncode for process in all_)


def test_a_maker_that_is_killed_lets_the_waiting_one_make_it(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom data2vec_train.system.outputs import cached_folder\n"
        "def make(folder):\n    half = folder / 'half'\n    half.write_text('x')\n"
        "    print('making', flush=True)\n    time.sleep(600)\n"
        "cached_folder(Path(sys.argv[1]), make)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE)
    process.stdout.readline()
    whole = code.replace("time.sleep(600)", "half.rename(folder / 'whole')")
    other = subprocess.Popen([sys.executable, "-c", whole, tmp_path / "a"])
    time.sleep(0.5)
    assert other.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert other.wait(timeout=60) == 0
    assert sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "whole"]
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_in_a_maker_leaves_the_next_one_a_clean_place(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        cached_folder(tmp_path / "a", fail)
    assert not os.listdir(tmp_path)
    cached_folder(tmp_path / "a", lambda folder: (folder / "whole").write_text("x"))


@pytest.fixture
def blocks(tmp_path) -> Callable[[], TextBlocks]:
    """Tokenizes a few texts through a cache."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} " + tiny.WORDS * 3)
    how = {"encodings": ["utf-8"], "column": "text", "separator": None, "max_document_bytes": 10**6}
    how |= {"tokenizer_path": None, "block_tokens": 32, "cross_documents": False, "min_tokens": 2}

    def make() -> TextBlocks:
        source = FolderSource(path=str(tmp_path / "texts"), extensions=[".txt"], class_from_folder=False)
        return prepare_text(source, **how, train_vocab_size=300, cache_dir=str(tmp_path / "cache"))

    return make


@pytest.mark.parametrize("file", ["ids.bin", "ends.npy", "labels.npy", "keys.npy", "facts.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_cache_of_texts_gives_the_same_tokens_when_it_is_damaged(file, damage, blocks, tmp_path, caplog):
    before = [blocks()[row].value.tolist() for row in range(3)]
    [path] = (tmp_path / "cache").glob(f"*/*/{file}")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(content if damage == "flipped" else content[:-3])
    assert [blocks()[row].value.tolist() for row in range(3)] == before
    assert "is damaged" in caplog.text
    assert len(os.listdir(tmp_path / "cache" / "tokens")) == len(os.listdir(tmp_path / "cache" / "tokenizers")) == 1


@pytest.mark.parametrize("content", [b"", bytes(100), b"PK\3\4 nothing"], ids=["nothing", "NUL bytes", "half a zip"])
def test_a_damaged_cache_of_durations_is_measured_anew(content, tmp_path, caplog):
    import soundfile

    (tmp_path / "sounds").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / "sounds" / f"{number}.wav", np.zeros(1600 * (number + 1)), 16_000)
    source = FolderSource(path=str(tmp_path / "sounds"), extensions=[".wav"], class_from_folder=False)
    cached = audio._cache_file(source, 16_000, tmp_path / "cache")
    audio._save(cached, np.array([7.0, 7.0, 7.0]), [])
    assert audio._durations(source, 16_000, tmp_path / "cache")[0].tolist() == [7.0, 7.0, 7.0]
    cached.write_bytes(content)
    assert audio._durations(source, 16_000, tmp_path / "cache")[0].tolist() == [0.1, 0.2, 0.3]
    assert "are damaged" in caplog.text


def test_the_loser_of_two_pretraining_runs_in_one_directory_touches_nothing(run, arguments, capsys):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    (run / "summary.json").unlink()
    before.pop(run / "summary.json")
    handle = take_lock(run / "lock", "it")
    held = outputs._held.pop(handle)  # as if another process had it
    try:
        assert program(*arguments, f"hydra.run.dir={run}") == 2
        assert f"process {os.getpid()} on" in one_line(capsys)
    finally:
        outputs._held[handle] = held
        outputs.release(handle)
    after = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"lock", "train.log"}


def test_parts_vanish_while_they_are_joined(embed, tmp_path, monkeypatch, capsys):
    merge = embedding._merge

    def gone(parts, *more):
        shutil.rmtree(parts[0].parent)
        return merge(parts, *more)

    with monkeypatch.context() as patched:
        patched.setattr(embedding, "_merge", gone)
        assert embed() == 2
    assert "has changed on disk" in one_line(capsys)
    assert embed() == 0


def test_foreign_files_among_the_parts_change_no_row(embed, tmp_path, monkeypatch):
    assert embed(f"out={tmp_path}/whole.parquet") == 0
    write = embedding._write_part

    def stop(parts, number, *more):
        if number == 1:
            raise KeyboardInterrupt
        return write(parts, number, *more)

    with monkeypatch.context() as patched:
        patched.setattr(embedding, "_write_part", stop)
        assert embed() == 130
    for name in ("part-000000.parquet", "part-9999999-x.parquet", f"part-000007-{'0' * 64}.parquet", "part-\udcff"):
        (tmp_path / "out.parquet.parts" / name).write_bytes(b"PAR1 nonsense PAR1")
    assert embed() == 0
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_folder_among_the_parts_with_the_name_of_one(embed, tmp_path, monkeypatch):
    (tmp_path / "out.parquet.parts" / "part-000000-x").mkdir(parents=True)
    assert embed() == 0
    assert len(parquet.read_table(tmp_path / "out.parquet")) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


@pytest.mark.parametrize("clock", ["backward", pytest.param("frozen", marks=pytest.mark.slow)])
def test_no_rate_is_negative_under_a_clock_that_runs(clock, arguments, tmp_path, monkeypatch, capsys):
    begin = time.perf_counter()
    ticks = iter(range(10**9))

    def now() -> float:
        return begin - next(ticks) if clock == "backward" else begin

    with monkeypatch.context() as patched:
        for name in ("perf_counter", "time"):
            patched.setattr(time, name, now)
        assert program(*arguments, "callbacks.timing=true", f"hydra.run.dir={tmp_path}/run") == 0
    import csv

    numbers = [row for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open())]
    cells = [float(row[name]) for row in numbers for name in row if row[name] and ("second" in name or "wait" in name)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    cells += [summary[name] for name in ("seconds", "train_seconds", "samples_per_second")]
    assert all(cell >= 0 for cell in cells)
    profile = csv.DictReader((tmp_path / "run" / "profile.csv").open())
    assert all(float(row["wall_s"]) >= 0 for row in profile)


def test_embed_under_a_clock_that_runs_backward(embed, monkeypatch, capsys):
    begin, ticks = time.perf_counter(), iter(range(10**9))
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: begin - 100 * next(ticks))
        assert embed() == 0
    assert "(-" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What members of a sweep share


def test_members_of_a_sweep_end_in_the_bits_of_runs_of_their_own(arguments, tmp_path):
    swept = ["-m", *arguments, "seed=0,1", "trainer.max_steps=2", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert program(*swept) == 0
    assert program(*arguments, "seed=1", "trainer.max_steps=2", f"hydra.run.dir={tmp_path}/alone") == 0
    assert not same(tmp_path / "sweep" / "1", tmp_path / "alone")
    assert same(tmp_path / "sweep" / "0", tmp_path / "alone")


CHANGES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "deterministic algorithms": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "the precision of products": (
        lambda: torch.set_float32_matmul_precision("high"),
        torch.get_float32_matmul_precision,
    ),
    "the default type": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "benchmarks of cudnn": (
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
        lambda: torch.backends.cudnn.benchmark,
    ),
    "gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "anomaly detection": (lambda: torch.set_anomaly_enabled(True), torch.is_anomaly_enabled),
    "the environment": (lambda: os.environ.update(WANDB_MODE="dryrun"), lambda: dict(os.environ)),
    "a variable that is removed": (lambda: os.environ.pop("HOME"), lambda: dict(os.environ)),
    "filters of warnings": (lambda: warnings.simplefilter("ignore"), lambda: list(warnings.filters)),
    "a handler of a signal": (
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        lambda: signal.getsignal(signal.SIGTERM),
    ),
    "the level of a logger": (
        lambda: logging.getLogger("matplotlib").setLevel(logging.CRITICAL),
        lambda: logging.getLogger("matplotlib").level,
    ),
    "random numbers of Python": (lambda: random.seed(5), random.getstate),
    "random numbers of numpy": (lambda: np.random.seed(5), lambda: np.random.get_state()[1].tolist()),
    "random numbers of torch": (lambda: torch.manual_seed(5), lambda: torch.get_rng_state().tolist()),
}


@pytest.mark.parametrize("error", [None, RuntimeError, SystemExit], ids=["ends", "fails", "exits"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_member_does_not_pass_on(change, error, monkeypatch):
    act, look = CHANGES[change]
    before = look()
    with contextlib.suppress(RuntimeError, SystemExit), isolated():
        act()
        if error is not None:
            raise error
    assert look() == before


class FakeRun:
    def __init__(self, **given: object) -> None:
        self.given, self.rows, self.settings = given, [], {}
        self.config = self

    def log(self, row: dict, **_: object) -> None:
        self.rows.append(row)

    def update(self, settings: dict, **_: object) -> None:
        self.settings |= settings


@pytest.fixture
def wandb(monkeypatch) -> types.ModuleType:
    """A module that keeps what a run of W&B would send."""
    module = types.ModuleType("wandb")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("wandb", None)
    module.run, module.runs, module.ended = None, [], []

    def init(**given: object) -> FakeRun:
        module.run = FakeRun(**given)
        module.runs.append(module.run)
        return module.run

    def finish(exit_code: int = 0) -> None:
        module.ended.append((module.run, exit_code))
        module.run = None

    module.init, module.finish = init, finish
    sdk, lib, run = (types.ModuleType(name) for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run"))
    lib.RunDisabled, run.Run, module.sdk, sdk.lib = type("RunDisabled", (), {}), FakeRun, sdk, lib
    for stub in (module, sdk, lib, run):
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    from lightning.pytorch.loggers import wandb as theirs

    monkeypatch.setattr(theirs, "_WANDB_AVAILABLE", True)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return module


def test_members_of_a_sweep_have_runs_of_their_own_in_wandb(wandb, arguments, tmp_path):
    swept = [
        "-m",
        *arguments,
        "seed=0,1",
        "trainer.max_steps=1",
        "logger=wandb",
        "logger.wandb.tags=[mine]",
        f"hydra.sweep.dir={tmp_path}",
    ]
    assert program(*swept) == 0
    assert len(wandb.runs) == 2
    assert [code for _, code in wandb.ended] == [0, 0]
    names = [(tmp_path / member / "wandb_id").read_text() for member in ("0", "1")]
    assert [wandb_run.given["id"] for wandb_run in wandb.runs] == names
    assert len(set(names)) == 2
    assert all(wandb_run.rows for wandb_run in wandb.runs)
    assert [wandb_run.settings["seed"] for wandb_run in wandb.runs] == [0, 1]
    assert [wandb_run.given["tags"] for wandb_run in wandb.runs] == [["mine"], ["mine"]]
    assert os.environ.get("WANDB_MODE") != "dryrun"


def test_a_member_that_fails_ends_its_run_in_wandb_as_failed(wandb):
    def member() -> None:
        with isolated():
            wandb.init()
            raise ConfigError("no")

    with pytest.raises(ConfigError):
        member()
    assert [code for _, code in wandb.ended] == [1]


@pytest.mark.parametrize("content", [b"", bytes(8), b"[]", b"abc", b"\xff" * 8, b"a" * 10**6, b"../../../x"])
def test_a_damaged_name_of_a_run_in_wandb_is_made_anew(content, wandb, tmp_path):
    (tmp_path / "wandb_id").write_bytes(content)
    logger = wandb_logger(project="p", save_dir=str(tmp_path), step=5)
    assert logger.experiment.given["id"] == (tmp_path / "wandb_id").read_text()
    assert len((tmp_path / "wandb_id").read_text()) == 8


@pytest.mark.slow
def test_a_member_in_tensorboard_closes_its_file(arguments, tmp_path):
    swept = ["-m", *arguments, "seed=0,1", "trainer.max_steps=1", "logger=tensorboard", f"hydra.sweep.dir={tmp_path}"]
    assert program(*swept) == 0
    events = [path for path in tmp_path.glob("*/tensorboard/**/events*")]
    assert sorted(path.relative_to(tmp_path).parts[0] for path in events) == ["0", "1"]
    opened = {
        os.readlink(f"/proc/self/fd/{descriptor}")
        for descriptor in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{descriptor}")
    }
    assert not opened & set(map(str, events))


def test_a_run_that_goes_on_leaves_what_other_commands_write_in_its_directory(tmp_path):
    with sole_writer(tmp_path / "features.parquet"), writing(tmp_path / "features.parquet") as unfinished:
        unfinished.write_text("x")
        (tmp_path / ".metrics.csv.0badcafe.unfinished").write_text("x")
        outputs.sweep(tmp_path)
        assert unfinished.exists()
    assert os.listdir(tmp_path) == ["features.parquet"]


@pytest.mark.parametrize("when", ["hashed", "read"])
def test_a_checkpoint_that_training_removes_while_export_reads_it(when, run, tmp_path, monkeypatch, capsys):
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    load, digest = torch.load, hashlib.file_digest

    def gone(function: Callable) -> Callable:
        def call(*given, **options):
            shutil.rmtree(folder, ignore_errors=True)
            if when == "hashed":
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder / "state.ckpt"))
            return function(*given, **options)

        return call

    owner, name, function = (hashlib, "file_digest", digest) if when == "hashed" else (torch, "load", load)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, gone(function))
        assert program(f"checkpoint={run}", f"out={tmp_path}/out", "format=safetensors", command="export") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_of_an_interrupted_output_is_left(tmp_path):
    def stop() -> None:
        with sole_writer(tmp_path / "out"), writing(tmp_path / "out") as unfinished:
            unfinished.mkdir()
            (unfinished / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert not os.listdir(tmp_path)
