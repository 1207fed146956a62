"""Small records and small encoders for all heads, and a way to run commands."""

import importlib
import io
import os
import sys
import wave
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

import data2vec_train as ours
from data2vec_train.config import compose as program
from data2vec_train.data.tokenizer import Tokenizer
from data2vec_train.weights.preprocessing import AudioFeatureExtractor, ImageProcessor
from data2vec_train.weights.tokenizers import TextTokenizer

SAMPLES = 16
RATE = 8000
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
WORDS = ["alpha", "beta", "gamma", "delta", "red", "green", "blue", "north", "south", "seven", "eight", "nine"]
# Head -> what its command needs beside data and weights; the score that has to be reached, and in how many steps.
HEADS: dict[str, tuple[list[str], str, float, int]] = {
    "ctc": ([], "wer", 0.0, 400),
    "utterance": (["data.label_column=kind"], "accuracy", 0.95, 200),
    "frame": ([], "accuracy", 0.95, 200),
    "speaker": (["data.label_column=kind", "head.vector_dim=32", "head.tdnn_dim=[32,32,32,32,64]"], "eer", 0.05, 200),
    "sequence": (["data.label_column=kind"], "accuracy", 0.95, 150),
    "token": ([], "f1", 0.95, 150),
    "qa": ([], "f1", 0.95, 300),
    "multiple_choice": ([], "accuracy", 0.95, 300),
    "masked_lm": ([], "accuracy", 0.95, 2000),
    "causal_lm": ([], "accuracy", 0.95, 300),
    "image": (["data.label_column=kind", "head.label_smoothing=0"], "accuracy", 0.95, 200),
    "segmentation": (["head.map_column=map", "head.classes=3", "head.crop_scale=null"], "miou", 0.95, 200),
}
MODALITY = {"ctc": "audio", "utterance": "audio", "frame": "audio", "speaker": "audio", "image": "vision"}
MODALITY |= {"segmentation": "vision"}


def run(command: str, *overrides: str) -> int:
    """`python -m data2vec_train.COMMAND ...` in this process; its exit status."""
    entry = importlib.import_module(f"data2vec_train.{command}.__main__")
    task = entry._export if command == "export" else entry._run
    weights = {"finetune": "init_from", "export": None}.get(command, "checkpoint")
    before, sys.argv = sys.argv, [command, *overrides]
    try:
        program.main(task, config_name=command, weights=weights)
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = before
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Records


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((samples * 20000).astype(np.int16).tobytes())
    return file.getvalue()


def tone(hertz: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.5 * np.sin(2 * np.pi * hertz * time) + 0.01 * rng.standard_normal(len(time))


def audio_rows(head: str) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(SAMPLES):
        letters = "".join(rng.choice(list("ABC"), 2 + number % 3))
        if head in ("utterance", "speaker"):
            letters = "ABCD"[number % 4] * 3
        hertz = {"A": 300, "B": 900, "C": 2000, "D": 3000}
        sound = np.concatenate([tone(hertz[one], 0.2, rng) for one in letters])
        segments = [{"start": 0.2 * place, "end": 0.2 * (place + 1), "label": one} for place, one in enumerate(letters)]
        row = {"audio": {"bytes": wav(sound), "path": None}, "kind": f"class {letters[0]}"}
        rows.append(row | {"text": " ".join(letters), "segments": segments})
    return rows


def text_rows(head: str) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(SAMPLES):
        words = [str(one) for one in rng.choice(WORDS, 8)]
        if head.endswith("_lm"):  # what stands where has to follow from what stands elsewhere
            words = [WORDS[(number + place) % len(WORDS)] for place in range(20)]
        tags = ["B-col" if one in ("red", "green", "blue") else "O" for one in words]
        text = " ".join(words)
        answer = words[3]
        start = len(" ".join(words[:3])) + 1
        row = {
            "text": text,
            "kind": ["low", "high"][WORDS.index(words[0]) % 2],
            "tokens": words,
            "tags": tags,
            "question": f"after {words[2]} number {number}",
            "context": text,
            "answers": {"text": [answer], "answer_start": [start]},
            "choices": [f"{one} {number}" for one in rng.choice(WORDS, 3, replace=False)],
            "label": int(rng.integers(3)),
        }
        rows.append(row)
    return rows


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def vision_rows(head: str) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(SAMPLES):
        classes = np.zeros((32, 32), dtype=np.uint8)
        classes[8:24, :16] = 1 + number % 2
        classes[:8, 16:] = 2 - number % 2
        colours = np.array([[20, 20, 20], [220, 40, 40], [40, 40, 220]])
        pixels = np.clip(colours[classes] + rng.integers(-15, 15, (32, 32, 3)), 0, 255).astype(np.uint8)
        if head == "image":
            pixels = np.roll(pixels, number, axis=1)
        row = {"image": {"bytes": png(pixels), "path": None}, "kind": ["odd", "even"][number % 2]}
        rows.append(row | {"map": {"bytes": png(classes), "path": None}})
    return rows


def write(rows: list[dict], path: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


ROWS = {"audio": audio_rows, "text": text_rows, "vision": vision_rows}


def modality_of(head: str) -> str:
    return MODALITY.get(head, "text")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Callable[[str], Path]:
    """Folders with small random encoders and what prepares their inputs."""
    made: dict[str, Path] = {}

    def build(modality: str) -> Path:
        if modality in made:
            return made[modality]
        folder = tmp_path_factory.mktemp("weights") / modality
        torch.manual_seed(0)
        if modality == "audio":
            front = {"conv_dim": [32] * 6, "conv_kernel": [10, 3, 3, 3, 3, 2], "conv_stride": [5, 2, 2, 2, 2, 2]}
            quiet = dict.fromkeys(("hidden_dropout", "activation_dropout", "attention_dropout", "layerdrop"), 0.0)
            config = ours.Data2VecAudioConfig(**SIZE, **front, **quiet, num_conv_pos_embedding_groups=4)
            ours.Data2VecAudioModel(config).save_pretrained(folder)
            AudioFeatureExtractor(sampling_rate=RATE).save_pretrained(folder)
        elif modality == "text":
            texts = [row[name] for row in text_rows("") for name in ("text", "question")]
            tokenizer = TextTokenizer.from_json(Tokenizer.train(texts, vocab_size=300).to_json(), model_max_length=64)
            tokenizer.save_pretrained(folder)
            more = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 66, "type_vocab_size": 1}
            ours.Data2VecTextModel(ours.Data2VecTextConfig(**SIZE, **more)).save_pretrained(folder)
        else:
            shape = SIZE | {"num_hidden_layers": 4}
            bias = {"use_shared_relative_position_bias": True, "use_mean_pooling": False, "drop_path_rate": 0.0}
            layers = {"image_size": 32, "patch_size": 4, "out_indices": [0, 1, 2, 3]}
            ours.Data2VecVisionModel(ours.Data2VecVisionConfig(**shape, **bias, **layers)).save_pretrained(folder)
            ImageProcessor(size=32, fit="cover").save_pretrained(folder)
        made[modality] = folder
        return folder

    return build


@pytest.fixture
def command(weights, tmp_path) -> Callable[..., tuple[int, Path]]:
    """Fine-tune a head on its 16 samples, which also test it; gives exit status and run directory."""

    def fine_tune(head: str, *more: str, steps: int, rows: list[dict] | None = None) -> tuple[int, Path]:
        modality = modality_of(head)
        path = write(ROWS[modality](head) if rows is None else rows, tmp_path / f"{head}.parquet")
        run_dir = tmp_path / "run"
        given = [f"modality={modality}", f"head={head}", f"init_from={weights(modality)}", "data=hf"]
        given += [f"data.path={path}", f"data.test_source={{path:{path}}}", f"trainer.max_steps={steps}"]
        given += ["data.num_workers=0", "callbacks.monitor.progress=none", f"cache_dir={tmp_path}/cache"]
        given += [f"hydra.run.dir={run_dir}", "modality.min_tokens=2"] if modality == "text" else []
        given += [f"hydra.run.dir={run_dir}"] if modality != "text" else []
        changed = {one.partition("=")[0] for one in more}
        kept = [one for one in (*given, *HEADS[head][0]) if one.partition("=")[0] not in changed]
        return run("finetune", *kept, *more), run_dir

    return fine_tune


@pytest.fixture(scope="session")
def program_of() -> Callable[..., int]:
    """`python -m data2vec_train.COMMAND ...` in this process; gives the exit status."""
    return run


@pytest.fixture(name="write")
def write_fixture() -> Callable[[list[dict], Path], Path]:
    """Rows to a parquet file."""
    return write


@pytest.fixture
def records() -> Callable[[str, Path], Path]:
    """The 16 samples of a head, as a parquet file."""
    return lambda head, path: write(ROWS[modality_of(head)](head), path)


@pytest.fixture
def rows() -> Callable[[str], list[dict]]:
    """The 16 samples of a head."""
    return lambda head: ROWS[modality_of(head)](head)


@pytest.fixture
def heads() -> dict[str, tuple[list[str], str, float, int]]:
    """What the command of each head needs, and the score that it has to reach."""
    return HEADS
