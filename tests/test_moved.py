"""Runs and files of earlier versions, whose settings and classes had other names."""

import json
import shutil

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from data2vec_train import checkpoints
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.paths import config_directory
from data2vec_train.system.moved import SETTINGS, _node_of, current, with_current_setting, with_current_settings
from data2vec_train.weights.convert import load_pretrained

SMALL = ["size.dim=16", "size.depth=2", "size.ffn_dim=16", "size.num_heads=2", "objective.targets.top_k_layers=1"]
SMALL += ["objective.masks_per_sample=2", "data.num_workers=0", "report=false", "callbacks.monitor.progress=none"]
SMALL += ["callbacks.checkpoint.every_n_steps=1", "trainer.max_steps=2", "data.batch_size_per_device=4"]


def test_every_new_name_is_that_of_a_setting(composed):
    cfg = composed("modality=vision")
    for new in SETTINGS.values():
        assert OmegaConf.select(cfg, new) is not None


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("data2vec_train.encoders.audio.AudioEncoder", "data2vec_train.encoders.waveform.WaveformEncoder"),
        ("data2vec_train.encoders.waveform.AudioEncoder", "data2vec_train.encoders.waveform.WaveformEncoder"),
        ("data2vec_train.encoders.waveform.WaveformEncoder", "data2vec_train.encoders.waveform.WaveformEncoder"),
        ("data2vec_train.encoders.audio.ConvLayer", "data2vec_train.encoders.waveform.ConvLayer"),
        ("data2vec_train.hf.preprocessing.ImageProcessor", "data2vec_train.weights.preprocessing.ImageProcessor"),
        ("data2vec_train.Data2Vec", "data2vec_train.Data2Vec"),
        ("data2vec_train", "data2vec_train"),
        ("masking.SpanMasker", "masking.SpanMasker"),
        ("torch.nn.Linear", "torch.nn.Linear"),
    ],
)
def test_a_class_is_found_where_it_is_today(then, now):
    assert current(then) == now


def test_a_saved_config_gets_the_names_of_today():
    saved = {
        "objective": {"_target_": "data2vec_train.data2vec.Data2Vec", "views": 3},
        "modality": {"views": 1},  # of a plugin
    }
    assert with_current_settings(saved) == {
        "objective": {"_target_": "data2vec_train.objective.data2vec.Data2Vec", "masks_per_sample": 3},
        "modality": {"views": 1},
    }
    assert "views" in saved["objective"]
    assert with_current_settings({}) == {}


@pytest.mark.parametrize(
    ("saved", "today"),
    [
        ("objective.views=2", "objective.masks_per_sample=2"),
        ("++objective.views=2", "++objective.masks_per_sample=2"),
        ("seed=${objective.views}", "seed=${objective.masks_per_sample}"),
        ("~debug", "~debug"),
        ("modality=vision", "modality=vision"),
        ("data.path='a\n=b'", "data.path='a\n=b'"),
    ],
)
def test_a_saved_override_gets_the_name_of_today(saved, today):
    assert with_current_setting(saved) == today


@pytest.mark.parametrize("old", SETTINGS)
def test_an_old_name_in_a_file_is_answered_in_one_line(old, tmp_path):
    """In a recipe, which sets it beside the new one, and in a config that has only the old one."""
    *parents, name = old.split(".")
    inner = {name: 1 if name == "views" else "ffn"}
    recipe: dict = inner
    for parent in reversed(parents):
        recipe = {parent: recipe}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(recipe)}")
    answer = [f"{old} is now called {SETTINGS[old]}"]
    options = {"config_name": "train", "extra_config_dir": tmp_path, "multirun": False}
    assert find_faults(["modality=vision", "+recipes=mine"], **options) == answer

    objective = OmegaConf.load(config_directory() / "objective" / "data2vec2.yaml")
    above = OmegaConf.select(objective, ".".join(parents[1:])) if parents[1:] else objective
    above.pop(SETTINGS[old].rpartition(".")[2])
    above.update(inner)
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text(OmegaConf.to_yaml(objective))
    command = ["modality=vision", "objective=mine", "preset=vision_data2vec2", "data=folder", f"data.path={tmp_path}"]
    assert find_faults(command, **options) == answer


def as_of_an_earlier_version(config: dict) -> dict:
    """A config of today with the old names of settings and of some classes."""
    for old, new in SETTINGS.items():
        above, name = _node_of(config, new)
        above[old.rpartition(".")[2]] = above.pop(name)
    text = yaml.safe_dump(config)
    for module in ("data2vec", "masking", "targets", "decoders"):
        text = text.replace(f"data2vec_train.objective.{module}.", f"data2vec_train.{module}.")
    return yaml.safe_load(text)


def test_a_run_of_an_earlier_version_goes_on(tmp_path, run_program):
    run = tmp_path / "run"
    done = run_program("modality=vision", *SMALL, f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    reached = checkpoints.read(checkpoints.resolve(run))["state_dict"]

    # What an earlier version would have written, and would have been stopped after.
    first = run / checkpoints.FOLDER / checkpoints.name_of(1)
    content = checkpoints.read(first / checkpoints.STATE)
    content["config"] = as_of_an_earlier_version(content["config"])
    assert content["config"]["objective"]["views"] == 2
    [probe] = [state for state in content["callbacks"].values() if "r2" in state]
    probe["explained"] = probe.pop("r2")
    probe["metrics"]["heldout/explained"] = probe["metrics"].pop("heldout/r2")
    shutil.rmtree(run / checkpoints.FOLDER)
    checkpoints.write(content, first, pointers=["last"], keep_last=1)
    (run / "config.yaml").write_text(yaml.safe_dump(content["config"]))
    words = yaml.safe_load((run / ".command.yaml").read_text())
    new_to_old = {new: old for old, new in SETTINGS.items()}
    words = [f"{new_to_old.get(name, name)}={value}" for name, _, value in (word.partition("=") for word in words)]
    assert "objective.views=2" in words
    (run / ".command.yaml").write_text(yaml.safe_dump(words))

    assert load_pretrained(str(run)).encoder.depth == 2
    reached_r2 = json.loads((run / "summary.json").read_text())["r2"]
    (run / "summary.json").unlink()
    done = run_program(f"resume={run}")
    assert done.returncode == 0, done.stderr
    assert "after step 1" in done.stdout
    found = checkpoints.read(checkpoints.resolve(run))["state_dict"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in reached.items())
    assert json.loads((run / "summary.json").read_text())["r2"] == reached_r2
