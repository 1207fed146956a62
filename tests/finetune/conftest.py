"""Small records and small encoders for all heads, and a way to run commands."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import data2vec_train as ours
from data2vec_train.config import compose as program
from data2vec_train.data.tokenizer import Tokenizer
from data2vec_train.weights.preprocessing import AudioFeatureExtractor, ImageProcessor
from data2vec_train.weights.tokenizers import TextTokenizer
from tests.records import HEADS, RATE, ROWS, modality_of, text_rows, write

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


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
        changed = {word.partition("=")[0] for word in more}
        kept = [word for word in (*given, *HEADS[head][0]) if word.partition("=")[0] not in changed]
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
