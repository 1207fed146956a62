"""Callbacks that a command, a recipe or a call adds to the config."""

import sys
from pathlib import Path

import numpy as np
import pytest

from data2vec_train import ConfigError, checkpoints, finetune, pretrain
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.system import plugins
from tests.test_api import LABELS, PIXELS, TINY

EARLY = "lightning.pytorch.callbacks.EarlyStopping"
RUN = {**TINY, "modality": "vision", "modality.image_px": 32, "modality.patch_px": 8}
PLUGIN = """
import lightning as L

class Shout(L.Callback):
    def __init__(self, word):
        self.word = word

    def on_train_end(self, trainer, pl_module):
        print(self.word, trainer.global_step)
"""


def test_early_stopping_ends_a_run_that_does_not_improve(tmp_path: Path) -> None:
    # More than RankMe can rise: every measurement after the first counts as no progress.
    early = {"_target_": EARLY, "monitor": "probe/rankme", "mode": "max", "min_delta": 1e6, "patience": 2}
    run = pretrain(
        data=PIXELS, out=tmp_path / "run", max_steps=20, callbacks={"early": early},
        **RUN, **{"callbacks.probe.every_n_steps": 2, "callbacks.checkpoint.every_n_steps": 7},
    )  # fmt: skip
    assert run.summary["steps"] == 4 + 2  # the first measurement is taken as progress, two more are not
    assert checkpoints.step_of(checkpoints.newest(run.path / checkpoints.FOLDER)) == 6
    assert run.summary["status"] == "finished"


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_misspelt_monitor_is_an_error_that_names_what_is_measured(verb: str, tmp_path: Path) -> None:
    early = {"callbacks": {"early": {"_target_": EARLY, "monitor": "does/not/exist"}}}
    if verb == "pretrain":
        with pytest.raises(ConfigError, match=r"does/not/exist.*probe/rankme"):
            pretrain(data=PIXELS, out=tmp_path / "run", max_steps=2, **RUN, **early)
        assert not (tmp_path / "run" / "checkpoints").exists()
        return
    run = pretrain(data=PIXELS, out=tmp_path / "run", max_steps=1, **RUN)
    few = {name: value for name, value in TINY.items() if not name.startswith("size")}
    with pytest.raises(ConfigError, match=r"does/not/exist.*test/accuracy"):
        finetune(
            run, head="image", data=PIXELS, labels=LABELS, test_data=PIXELS[:6], test_labels=LABELS[:6],
            out=tmp_path / "tuned", max_steps=2, **few, **early,
        )  # fmt: skip


def test_a_callback_of_a_plugin_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "shouting.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DATA2VEC_PLUGINS", "shouting")
    shout = {"mine": {"_target_": "shouting.Shout", "word": "done"}}
    pretrain(data=PIXELS, out=tmp_path / "run", max_steps=1, callbacks=shout, **RUN)
    for known in (sys.modules, plugins.plugin_packages, plugins.plugin_modules):  # for other tests of this process
        known.pop("shouting") if isinstance(known, dict) else known.remove("shouting")
    assert "done 1" in capsys.readouterr().out


REFUSED = {
    f"+callbacks.early._target_={EARLY}": "callbacks.early.monitor",
    f"+callbacks.early={{_target_: {EARLY}, monitr: x}}": "monitr",
    "+callbacks.keep._target_=lightning.pytorch.callbacks.ModelCheckpoint": "may not be called",
    "+callbacks.run._target_=os.system": "there is no setting called 'callbacks.run'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_other_callbacks_are_refused_in_a_line(line: str) -> None:
    faults = find_faults(["modality=vision", line], config_name="train")
    assert any(REFUSED[line] in fault for fault in faults), faults


def test_a_run_without_them_has_none(tmp_path: Path) -> None:
    faults = find_faults(
        ["modality=vision", f"+callbacks.early={{_target_: {EARLY}, monitor: x}}"], config_name="train"
    )
    assert faults == []
    assert np.isfinite(pretrain(data=PIXELS, out=tmp_path / "run", max_steps=1, **RUN).summary["loss_last"])
