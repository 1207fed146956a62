"""`python -m data2vec_train.benchmark` as a user gives it, at the smallest sizes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data2vec_train.benchmark.context import Arithmetic
from data2vec_train.benchmark.published import RECIPES
from data2vec_train.benchmark.run import MEASURES
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ["size=tiny", "rounds=2", "min_seconds=0", "peak.side=64", "peak.repeats=2", "memory=false"]
SIZES = {
    "attention": ["backends.shapes=[[2,2,9,8]]"],
    "ema": ["ema.image_px=32"],
    "encoder": [
        *("encoder.batch_sizes=[2]", "encoder.image_px=32", "encoder.audio_seconds=0.5", "encoder.text_tokens=16"),
        "encoder.vocab_size=100",
    ],
    "step": [
        *("step.image_px=64", "step.audio_seconds=0.5", "step.text_tokens=16"),
        'step.settings="objective.targets.top_k_layers=2 objective.masks_per_sample=1"',
    ],
    "loader": ["loader.workers=[0,1]", "loader.batches=2", "loader.samples=4"],
    "seed_table": [
        "seed_table.training_px=[40,64]",
        "seed_table.inference_px=32",
        "seed_table.inference_batches=[1,2]",
    ],
    "startup": ["startup.packages=3", "rounds=1"],
}


def run(*words, folder):
    command = [sys.executable, "-m", "data2vec_train.benchmark", *TINY, *words, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def results_of(done, folder):
    assert done.returncode == 0, done.stdout + done.stderr
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.width > 500
        assert picture.convert("L").getextrema() != (255, 255)
    return json.loads((folder / "benchmark.json").read_text())


def check_schema(results, kinds):
    assert results["format"] == 1
    assert results["command"].startswith("python -m data2vec_train.benchmark ")
    for name in ("cpu", "cores", "threads", "device_name", "torch", "load_average", "load_average_at_the_end"):
        assert results["machine"][name] is not None, name
    assert results["machine"]["threads"] == 1
    assert len(results["matmul_flops_per_second"]) == 4  # two before, two after
    assert results["settings"]["rounds"] in (1, 2)
    assert {case["kind"] for case in results["cases"]} == set(kinds)
    for case in results["cases"]:
        assert case["reference"] in (None, *(arm["name"] for arm in case["arms"]))
        for arm in case["arms"]:
            if arm["refused"] is not None:
                assert case["kind"] == "attention"
                assert arm["seconds"] == []
                continue
            assert len(arm["seconds"]) == len(arm["cpu_seconds"]) == results["settings"]["rounds"]
            assert arm["wall"]["low"] <= arm["wall"]["median"] <= arm["wall"]["high"]
            assert (arm["flops"] is None) == (arm["share_of_peak"] is None)
            is_compared = case["reference"] not in (None, arm["name"])
            assert (arm["ratio"] is not None) == is_compared
            assert not is_compared or "wall" in arm["ratio"], arm["ratio"]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Most measurements in one command: what takes long is to start."""
    folder = tmp_path_factory.mktemp("several")
    kinds = ["attention", "ema", "encoder", "step", "loader", "seed_table"]
    words = [word for kind in kinds for word in SIZES[kind]]
    done = run(f"what=[{','.join(kinds)}]", "modalities=[vision]", *words, folder=folder)
    return done, results_of(done, folder), kinds


def test_every_measurement_is_written_down_and_drawn(several):
    done, results, kinds = several
    check_schema(results, kinds)
    names = [case["name"] for case in results["cases"]]
    for name in (
        *("2x2x9x8, padded, relative bias, forward and backward", "AdamW on 0.5 M weights"),
        *("vision, training, 2 x 32 px", "vision, inference, 2 x 32 px"),
        *("vision data2vec2, 1 x 64 px", "vision data2vec, 1 x 64 px, parts of our step"),
        *("vision, batches with masks", "vision, parts of a sample"),
        *("training step (of 40 x 64, which patches do not cover), 2 x 32 x 64 px", "inference, 2 x 32 x 32 px"),
    ):
        assert name in names
        assert name in done.stdout


def test_encoders_are_those_of_transformers(several):
    if "transformers is not installed: encoder and seed_table without it" in several[1]["left_out"]:
        pytest.skip("transformers is not installed")
    compared = [case for case in several[1]["cases"] if case["kind"] in ("encoder", "seed_table")]
    assert len(compared) == 2 + 3
    for case in compared:
        assert [arm["name"] for arm in case["arms"]] == ["transformers eager", "transformers sdpa", "ours"]
        for arm in case["arms"]:
            kinds = [agreement["what"].split()[0] for agreement in arm["agreements"]]
            assert kinds == ["outputs"] + ["gradients"] * ("training" in case["name"])
            assert all(agreement["largest"] <= agreement["allowed"] for agreement in arm["agreements"])
    assert "encoder: ours against transformers sdpa" in several[1]["geometric_means"]


def test_a_step_says_what_it_is_made_of(several):
    parts = [case for case in several[1]["cases"] if case["kind"] == "step" and "parts" in case["name"]]
    assert len(parts) == 2
    for case in parts:
        assert [arm["name"] for arm in case["arms"]][1:] == ["forward", "backward", "clipping and optimizer", "EMA"]
        assert "the teacher takes" in case["notes"][0]
    whole = next(case for case in several[1]["cases"] if case["name"] == "vision data2vec2, 1 x 64 px")
    assert whole["arms"][-1]["items"] == {"samples": 1, "masks": 1, "tokens": 16}


@pytest.mark.slow
def test_peers_that_are_not_asked_for_are_left_out_and_memory_is_found(tmp_path):
    words = ["what=encoder", "against=[]", "modalities=text", "encoder.modes=[inference]", "memory=true"]
    done = run(*words, *SIZES["encoder"], folder=tmp_path)
    [case] = results_of(done, tmp_path)["cases"]
    [arm] = case["arms"]
    assert (case["reference"], arm["name"], arm["ratio"]) == (None, "ours", None)
    assert 1e8 < arm["idle_bytes"] <= arm["peak_bytes"] < 2e9
    assert "MB" in done.stdout


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("loader", "data=foldr", "data=foldr: there is no data called 'foldr'; did you mean folder?"),
        ("step", "objective.mask=2", "objective.mask=2: there is no setting called 'objective.mask'; did you mean"),
    ],
)
def test_a_mistake_in_settings_for_training_is_one_line(kind, setting, said, composed):
    cfg = composed(f'{kind}.settings="{setting}"', "modalities=vision", config_name="benchmark")
    bench = SimpleNamespace(arithmetic=Arithmetic("cpu", "32-true"))
    with pytest.raises(ConfigError, match=re.escape(said)):
        next(MEASURES[kind](cfg, bench))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_every_command_for_a_gpu_is_a_right_one(composed):
    written = subprocess.run(["make", "-n", "bench-gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = written.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if "data2vec_train.benchmark" in line]
    assert len(commands) == 5
    for _, _, module, *given in commands:
        assert module == "data2vec_train.benchmark"
        assert find_faults(given, config_name="benchmark", multirun=False, on_this_machine=False) == []
        cfg = composed(*given, config_name="benchmark")
        assert cfg.peak.stated_tflops == 790
        settings = [f"attention.backend={cfg.attention.backend}", *cfg.step.settings.split()]
        for modality in ("vision", "audio", "text") if cfg.modalities == "all" else (cfg.modalities,):
            for objective in cfg.step.objectives:
                recipe = [f"+recipes={RECIPES[modality, objective]}", "data.path=.", *settings]
                assert find_faults(recipe, config_name="train", multirun=False, on_this_machine=False) == []


@pytest.mark.slow
def test_the_way_to_the_first_step_is_timed(tmp_path):
    results = results_of(run("what=startup", *SIZES["startup"], folder=tmp_path), tmp_path)
    check_schema(results, ["startup"])
    answers, stages, packages = results["cases"]
    assert [arm["name"] for arm in stages["arms"]] == ["built", "first probe", "first training step"]
    times = [arm["wall"]["median"] for arm in stages["arms"]]
    assert times == sorted(times)
    assert answers["arms"][0]["cpu_seconds"][0] > 0.05
    named = {arm["name"]: arm["wall"]["median"] for arm in packages["arms"]}
    assert "torch" in named
    assert named["all"] == pytest.approx(sum(value for name, value in named.items() if name != "all"))
