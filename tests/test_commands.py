"""Every command of the documents is run, at tiny size, on files that stand in for the reader's."""

import io
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.documents import COMMANDS, ROOT
from tests.records import ARPA, HEADS, ROWS, write

# A word of a command that cannot be run here -> why; tests/test_readme.py checks that the command is accepted.
NOT_HERE = {
    "strategy.devices=8": "needs eight devices; tests/distributed runs two processes",
    "data.path=ylecun/mnist": "needs the hub; tests/data/test_sources.py reads local files of the same kinds",
    "logger=wandb": "needs an account of W&B; tests/attacks/test_outputs.py has a stand-in for it",
    "against=fairseq": "needs fairseq",
    "what=startup": "takes a minute; tests/benchmark runs it smaller",
    "modality=visoin": "is meant to be refused; tests/test_readme.py compares the answer",
}
LACKING = {"head=ctc_beam": ("flashlight", "kenlm"), "logger=tensorboard": ("tensorboard",)}

SHORT = "trainer.max_steps=2 trainer.log_every_n_steps=1 data.num_workers=0 data.batch_size_per_device=4 report=false"
SMALL = "size.dim=16 size.depth=4 size.num_heads=2 size.ffn_dim=32"
OBJECTIVE = "objective.targets.top_k_layers=1 data.max_probe_samples=40 callbacks.probe.rank_samples=8"
OBJECTIVE += " callbacks.monitor.min_rank_ratio=0"  # of few samples, after two steps
FRONT = "modality.encoder.prenet_depth=0"
OF_MODALITY = {"vision": FRONT, "audio": f"{FRONT} modality.encoder.position_groups=1"}
OF_MODALITY |= {"text": f"{FRONT} modality.tokenizer.train_vocab_size=300"}
AT_ONCE = "trainer.accumulate_grad_batches=1 scheduler.warmup_steps=0"
# What two steps and a few records leave no room for
LONG = {
    "scheduler=tri_stage": "scheduler.hold_steps=0",
    "head=speaker": "data.held_out_fraction=0.5",  # several recordings of a speaker
    "+recipes=vision/base_imagenet_v2": f"{AT_ONCE} objective.decoder.channels=16 objective.masks_per_sample=1",
    "+recipes=vision/finetune_base_imagenet_v2": AT_ONCE,
}
BENCHMARK = "rounds=1 min_seconds=0 peak.side=64 peak.repeats=2 memory=false size=tiny backends.shapes=[[2,2,9,8]]"
BENCHMARK += " encoder.batch_sizes=[1] encoder.image_px=32 encoder.audio_seconds=0.5 encoder.text_tokens=16"
BENCHMARK += " encoder.vocab_size=100 ema.image_px=32"


def modality_of(task: str, words: list[str]) -> str:
    """What the command says, or what stands in for the weights that it names."""
    text = " ".join(words)
    if found := re.search(r"modality=(\w+)|\+recipes=(\w+)/", text):
        return found[1] or found[2]
    names = {"runs/ctc": "audio", "runs/finetune": "audio", "runs/topics": "text"}
    default = "audio" if task == "predict" and "PATH" in text else "vision"
    return next((names[name] for name in names if name in text), default)


def tiny(task: str, words: list[str], modality: str) -> list[str]:
    """The command with what makes it small in place of its own sizes."""
    changes = {"train": SHORT, "finetune": SHORT, "benchmark": BENCHMARK}.get(task, "").split()
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if task == "train" and "resume" not in given:
        changes += OBJECTIVE.split()
        if "init_from" not in given:
            changes += SMALL.split()
            changes += OF_MODALITY.get(modality, "").split()
            changes += ["size.conv_dim=4"] * (modality == "audio" and "modality.encoder.conv_dim" not in given)
    if task in ("train", "finetune"):
        changes += [change for word in words for change in LONG.get(word, "").split()]
    changed = {word.partition("=")[0] for word in changes}
    return [word for word in words if word.partition("=")[0] not in changed] + changes


# ---------------------------------------------------------------------------------------------------------------------
# What stands in for the reader's files


def sounds(folder: Path, *, channels: int = 1, rate: int = 16_000) -> Path:
    rng = np.random.default_rng(0)
    for number in range(20):
        file = folder / "ab"[number % 2] / f"{number}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, rng.normal(scale=0.1, size=(rate + 100 * number, channels)), rate)
    return folder


def transcribed(folder: Path) -> Path:
    sounds(folder)
    lines = [f"{file.relative_to(folder)},A B" for file in sorted(folder.rglob("*.wav"))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    return folder


def manifest(path: Path) -> Path:
    root = sounds(path.with_suffix(""))
    files = sorted(root.rglob("*.wav"))
    lines = [f"{file.relative_to(root)}\t{soundfile.info(file).frames}" for file in files]
    path.write_text("\n".join([str(root), *lines]) + "\n")
    return path


def images(folder: Path, *, classes: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for number in range(40):
        file = folder / f"class{number % classes}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(file)
    return folder


def maps(folder: Path, of: Path) -> Path:
    for file in of.rglob("*.png"):
        path = folder / file.relative_to(of)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 32), int(file.stem) % 21, dtype=np.uint8)).save(path)
    return folder


def shards(folder: Path) -> Path:
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    for part in range(2):
        with tarfile.open(folder / f"train-{part}.tar", "w") as archive:
            for number in range(10):
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(buffer.getvalue())
                archive.addfile(member, io.BytesIO(buffer.getvalue()))
    return folder


def texts(folder: Path) -> Path:
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"{number} It was a day like any other, and nobody knew why. " * 20)
    return folder


def oscillations(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(60):
        file = folder / "ab"[number % 2] / f"{number}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rng.normal(size=(19, 500)).astype(np.float32))
    return folder


def rows_of(head: str, path: Path) -> Path:
    """Records with every column that a command of the documents names."""
    modality = {"cifar10_classes": "vision", "vision": "vision", "audio": "audio"}.get(head) or (
        "audio" if head in ("ctc", "utterance", "frame", "speaker") else "text"
    )
    rows = ROWS[modality](head if head in HEADS else {"vision": "image", "audio": "utterance"}.get(modality, head))
    for number, row in enumerate(rows):
        row |= {"speaker": f"speaker {number % 4}", "topic": row["kind"], "digit": number % 2}
        row |= {"transcript": row.get("text", "")} | ({} if "label" in row else {"label": number % 2})
    return write(rows, path)


class Reader:
    """Runs commands in one folder for each document; every run and file that one of them needs is made once."""

    def __init__(self, root: Path, run_program: Callable[..., subprocess.CompletedProcess]) -> None:
        self.root = root
        self.run_program = run_program
        self.ready: dict[str, Path] = {}
        self.ran: dict[tuple[str, ...], Path] = {}

    def made(self, name: str, make: Callable[[Path], object]) -> str:
        if name not in self.ready:
            self.ready[name] = self.root / name
            make(self.root / name)
        return str(self.ready[name])

    def run(self, document: str, task: str, words: list[str]) -> Path:
        """The folder in which it ran."""
        if (document, task, *words) in self.ran:
            return self.ran[document, task, *words]
        modality = modality_of(task, words)
        folder = self.root / "documents" / document.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        command = [self.replaced(document, task, modality, word, words) for word in tiny(task, words, modality)]
        done = self.run_program(
            *command, verb="" if task == "train" else task, cwd=folder, python_path=ROOT / "tests" / "plugins"
        )
        said = f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        assert done.returncode == 0, said
        assert "Traceback" not in done.stderr, said
        self.ran[document, task, *words] = folder
        return folder

    def replaced(self, document: str, task: str, modality: str, word: str, words: list[str]) -> str:
        """A word with what stands in for the place that it names."""
        key, _, value = word.partition("=")
        if value == "N":
            return f"{key}=0"
        if key == "cache_dir" or key == "out":
            return word
        if key in ("init_from", "checkpoint", "resume"):
            return f"{key}={self.weights(document, task, modality, value, words)}"
        place = re.fullmatch(r"(?:\{path:)?([\w.]+)\}?", value)
        if key not in ("data.path", "data.test_source", "data.test_source.path", "head.maps", "head.beam.lm"):
            return word
        return f"{key}={value.replace(place[1], self.files(modality, place[1], words))}"

    def files(self, modality: str, name: str, words: list[str]) -> str:
        head = next((word.partition("=")[2] for word in words if word.startswith("head=")), "").removesuffix("_beam")
        if name == "SIGNALS" or "init_from=runs/signals" in words:
            return self.made("signals", lambda path: sounds(path, channels=12, rate=500))
        if name == "SHARDS":
            return self.made("shards", shards)
        if name == "train.tsv":
            return self.made("train.tsv", manifest)
        if name == "4gram.arpa":
            return self.made(name, lambda path: path.write_text(ARPA))
        if name == "MAPS":
            return self.made("maps", lambda path: maps(path, Path(self.files("vision", "IMAGES", words))))
        if re.fullmatch(r"FILE|\w+\.(parquet|jsonl)", name):
            kind = head or modality
            return self.made(f"{kind}.parquet", lambda path: rows_of(kind, path))
        assert name in ("DIR", "PHOTOS", "LABELLED", "RECORDINGS", "TEXTS", "IMAGES", "TRAIN", "VAL"), name
        if head == "ctc":
            return self.made("transcribed", transcribed)
        folders = {"vision": images, "audio": sounds, "sound": sounds, "text": texts, "eeg": oscillations}
        return self.made(f"files-{modality}", folders[modality])

    def weights(self, document: str, task: str, modality: str, name: str, words: list[str]) -> str:
        """The run that an earlier command of this document leaves, or one that stands in for it."""
        for other, its_task, arguments in COMMANDS:
            if other == document and f"hydra.run.dir={name}" in arguments.split():
                return str(self.run(other, its_task, shlex.split(arguments)) / name)
        assert name == "PATH" or re.fullmatch(r"runs/\w+/DATE", name), f"no command of {document} makes {name}"
        if task == "predict":
            given = [f"modality={modality}", "head=ctc", "init_from=PATH", "data=folder", "data.path=DIR"]
            return self.stand_in("finetune", given)
        # transformers has no data2vec 2.0 for images.
        old = task == "export" or "objective=data2vec" in words
        given = [f"modality={modality}", f"objective={'data2vec' if old else 'data2vec2'}", "data=folder"]
        return self.stand_in("train", [*given, "data.path=DIR"])

    def stand_in(self, task: str, given: list[str]) -> str:
        name = "-".join([task, *given[:2]]).replace("=", "-")
        return str(self.run("PATH", task, [*given, f"hydra.run.dir={name}"]) / name)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def reason(words: list[str]) -> str | None:
    return next((why for word, why in NOT_HERE.items() if word in words), None)


def cases():
    """Each command once; the first of a verb and a modality is fast, unless others have to run before it."""
    # tests/benchmark and tests/finetune have fast ones
    seen, kinds = set(), {("benchmark", "vision"), ("finetune", "text"), ("finetune", "vision")}
    for document, task, arguments in COMMANDS:
        words = shlex.split(arguments)
        if (task, arguments) in seen or reason(words) is not None:
            continue
        seen.add((task, arguments))
        kind = (task, modality_of(task, words))
        is_slow = kind in kinds or re.search(r"=runs/\w+(?!/DATE)\b", arguments)
        marks = [pytest.mark.slow] if is_slow else []
        kinds |= set() if is_slow else {kind}
        yield pytest.param(document, task, words, marks=marks, id=f"{task} {arguments}")


@pytest.fixture(scope="module")
def reader(tmp_path_factory, run_program) -> Reader:
    return Reader(tmp_path_factory.mktemp("reader"), run_program)


@pytest.mark.parametrize(("document", "task", "words"), list(cases()))
def test_a_command_runs(document, task, words, reader, monkeypatch):
    for word, packages in LACKING.items():
        if word in words and (missing := [name for name in packages if find_spec(name) is None]):
            pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.setenv("DATA2VEC_CACHE", str(reader.root / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "modality=eeg" in words:
        monkeypatch.setenv("DATA2VEC_PLUGINS", "eeg")
    reader.run(document, task, words)


def test_what_is_not_run_is_in_the_documents():
    for word in NOT_HERE:
        assert any(word in shlex.split(arguments) for _, _, arguments in COMMANDS), word
