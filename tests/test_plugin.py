"""A modality of a third party, in one file, without an edit here: pretraining, and every verb on what it trained."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from data2vec_train import (
    ConfigError,
    checkpoints,
    embed,
    export,
    finetune,
    load_pretrained,
    predict,
    pretrain,
    probe,
    save_pretrained,
)
from data2vec_train.config import inputs
from data2vec_train.config.compose import modality_of_weights
from data2vec_train.data.sources.objects import as_source
from data2vec_train.features.embedding import layer_tokens
from data2vec_train.finetune.base import Inputs
from data2vec_train.finetune.speech import SpecAugment, UtteranceClassification
from data2vec_train.testing import check_encoder
from data2vec_train.weights.convert import wrap
from data2vec_train.weights.plugin import Data2VecPluginForSequenceClassification, PluginConfig, preparation_of

PLUGINS = Path(__file__).parent / "plugins"
SIZE = {"channels": 19, "window": 25, "dim": 32, "depth": 2, "num_heads": 4, "ffn_dim": 64, "attention": "sdpa"}
TINY = {"data.num_workers": 0, "precision": "fp32", "strategy.accelerator": "cpu", "report": False}


@pytest.fixture
def eeg(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGINS))
    import eeg as module

    return module


def write_recordings(folder: Path) -> Path:
    """Two kinds of 19-channel oscillations in noise, in folders that name them."""
    rng = np.random.default_rng(0)
    time = np.arange(500) / 250
    for kind, hertz in (("theta", 5), ("beta", 20)):
        (folder / kind).mkdir(parents=True)
        for number in range(20):
            wave = np.sin(2 * np.pi * hertz * time + rng.uniform(0, 6)) * rng.uniform(0.5, 1, (19, 1))
            signal = wave + rng.normal(size=(19, 500))
            np.save(folder / kind / f"{number}.npy", signal.astype(np.float32))
    return folder


@pytest.fixture
def recordings(tmp_path) -> Path:
    return write_recordings(tmp_path / "data")


class Trained:
    """A short run and what follows from it, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_recordings(folder / "data")
        self.run = pretrain(
            modality="eeg", data=self.data, max_steps=2, out=folder / "run", **TINY, size={"dim": 32, "depth": 2}
        )

    @functools.cached_property
    def finetuned(self):
        return finetune(self.run, data=self.data, head="utterance", max_steps=2, out=self.folder / "ft", **TINY)

    @functools.cached_property
    def exported(self) -> Path:
        return export(self.run, self.folder / "exported")

    @functools.cached_property
    def features(self):
        return embed(self.run, self.data, layers="all", **{"data.num_workers": 0}).set_index("key")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    before, loaded = Singleton.get_state(), sys.modules.get("eeg")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLUGINS))
        patch.setenv("DATA2VEC_PLUGINS", "eeg")
        patch.delitem(sys.modules, "eeg", raising=False)
        yield Trained(tmp_path_factory.mktemp("eeg"))
    Singleton.set_state(before)
    sys.modules.pop("eeg", None)
    if loaded is not None:
        sys.modules["eeg"] = loaded


def test_the_plugin_is_one_short_file():
    assert len((PLUGINS / "eeg.py").read_text().splitlines()) <= 80


def test_its_encoder_keeps_the_contract(eeg):
    encoder = eeg.EEGEncoder(**SIZE)
    check_encoder(encoder, torch.randn(3, 19, 1000), mode="drop", variable_length=True)


def test_the_contract_kit_finds_an_encoder_that_peeks(eeg):
    class Peeking(eeg.EEGEncoder):
        def contextualize(self, tokens, attention_mask=None, **options):
            output = super().contextualize(tokens, attention_mask, **options)
            output.tokens.add_(tokens.mean())
            return output

    encoder = Peeking(**SIZE)
    with pytest.raises(AssertionError, match="hidden tokens change"):
        check_encoder(encoder, torch.randn(3, 19, 1000), mode="drop", variable_length=False)


def test_it_trains_with_probes_report_and_checkpoints(run_program, recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA2VEC_PLUGINS", "eeg")
    run = tmp_path / "run"
    np.save(recordings / "theta" / "strange.npy", np.zeros((3, 500), np.float32))
    result = run_program(
        "modality=eeg",
        "data=folder",
        f"data.path={recordings}",
        "trainer.max_steps=4",
        "data.num_workers=0",
        "size.dim=32",
        "objective.masks_per_sample=2",
        f"hydra.run.dir={run}",
        python_path=PLUGINS,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["modality"] == "eeg"
    assert set(summary["probe"]["knn"]) == {"raw_input", "untrained", "trained", "teacher"}
    assert summary["broken_samples"] == 1
    assert "3 channels, expected 19" in (run / "quarantine.jsonl").read_text()
    checkpoint = checkpoints.read(checkpoints.resolve(run))
    assert checkpoint["config"]["modality"]["encoder"]["_target_"] == "eeg.EEGEncoder"
    page = (run / "report.html").read_text()
    assert "What the student sees" in page
    assert "mask 1" in page


def test_embed_gives_the_features_of_its_encoder(trained):
    name = "theta/3.npy"
    recording = np.load(trained.data / name)
    normal = (recording - recording.mean(1, keepdims=True)) / (recording.std(1, ddof=1, keepdims=True) + 1e-6)
    with torch.no_grad():
        tokens = trained.run.encoder()(torch.from_numpy(normal)[None]).tokens
    assert list(trained.features.columns) == ["layer_0", "layer_1", "layer_2"]
    assert len(trained.features) == 40
    assert np.abs(trained.features.loc[name, "layer_2"] - tokens.mean(1)[0].numpy()).max() < 1e-5


def test_arrays_of_a_call_are_what_its_files_hold(trained):
    names = ["beta/0.npy", "theta/3.npy"]
    arrays = [np.load(trained.data / name) for name in names]
    found = embed(trained.run, arrays, **{"data.num_workers": 0})
    for row, name in enumerate(names):
        assert np.abs(found["layer_2"][row] - trained.features.loc[name, "layer_2"]).max() < 1e-6
    assert as_source([arrays[0]], kind="any")[0].value is arrays[0]


def test_probe_compares_every_layer_with_random_weights(trained):
    found = probe(trained.run, data=trained.data, out=trained.folder / "probe", device="cpu", **{"data.num_workers": 0})
    assert found.summary["layers"] == [0, 1, 2]
    assert {len(found.summary[which][name]) for which in ("untrained", "trained") for name in ("knn", "linear")} == {3}
    assert found.summary["untrained"] != found.summary["trained"]
    assert found.report.is_file()


def test_it_is_fine_tuned_and_predicts(trained):
    assert trained.finetuned.summary["head"] == "utterance"
    assert trained.finetuned.summary["best"]["accuracy"] >= 0
    model = trained.finetuned.model()
    assert type(model) is Data2VecPluginForSequenceClassification
    assert model.config.id2label == {0: "beta", 1: "theta"}
    found = predict(trained.finetuned, trained.data, **{"data.num_workers": 0})
    assert [row["key"] for row in found] == list(trained.features.index)
    assert {row["prediction"]["label"] for row in found} <= {"beta", "theta"}
    from_export = predict(
        export(trained.finetuned, trained.folder / "exported_head"), trained.data, **{"data.num_workers": 0}
    )
    assert from_export == found


def test_a_folder_stands_for_the_run(trained):
    """Weights, modality and preparation of inputs are in it; nothing else of the run is needed."""
    card = (trained.exported / "README.md").read_text()
    assert "part of a plugin: `eeg`" in card
    assert "| weights | 0.0e+00 |" in card
    assert str(trained.folder) not in (trained.exported / "config.json").read_text()
    assert modality_of_weights([f"checkpoint={trained.exported}"], "checkpoint") == ["modality=eeg"]
    found = embed(trained.exported, trained.data, layers="all", **{"data.num_workers": 0}).set_index("key")
    for layer in found.columns:
        assert np.array_equal(np.stack(found[layer]), np.stack(trained.features[layer]))


def test_a_fresh_process_loads_it_by_the_name_of_the_plugin(trained):
    code = f"""
import torch
from data2vec_train import load_pretrained
model = load_pretrained({str(trained.exported)!r})
print(type(model.get_encoder()).__module__, model(torch.ones(1, 19, 500)).last_hidden_state.abs().sum().item())
"""
    plain = {name: value for name, value in os.environ.items() if name != "DATA2VEC_PLUGINS"}
    paths = os.pathsep.join([str(PLUGINS), str(Path(__file__).parents[1])])
    options = {"capture_output": True, "text": True, "cwd": trained.folder}
    known = plain | {"PYTHONPATH": paths}
    named = subprocess.run([sys.executable, "-c", code], env=known | {"DATA2VEC_PLUGINS": "eeg"}, **options)
    assert named.returncode == 0, named.stderr
    module, total = named.stdout.split()
    expected = trained.run.model()(torch.ones(1, 19, 500)).last_hidden_state.abs().sum().item()
    assert module == "eeg"
    assert float(total) == pytest.approx(expected, rel=1e-5)
    unnamed = subprocess.run([sys.executable, "-c", code], env=known, **options)
    assert "eeg.EEGEncoder is not loaded; import eeg first, or name it in DATA2VEC_PLUGINS" in unnamed.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"head": "ctc"}, "CTC is for modality=audio, and this is modality=eeg"),
        ({"head": "utterance", "head.layer_sum": True}, "head.layer_sum=true is for modality=audio"),
        ({"head": "utterance", "head.masks.time_fraction": 0.1}, "head.masks.time_fraction is for modality=audio"),
        ({"head": "utterance", "head.max_seconds": 2}, "modality=eeg has no sample_rate_hz"),
        ({"head": "utterance", "rates.layer_drop": 0.1}, "plugin encoders like this one have no such rate"),
    ],
)
def test_what_only_speech_has_is_refused(trained, tmp_path, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        finetune(trained.run, data=trained.data, out=tmp_path / "ft", max_steps=1, **TINY, **settings)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("hf", "format=hf: transformers has no class for eeg.EEGEncoder"),
        ("onnx", "format=onnx needs an example of the inputs"),
        ("torch_export", "format=torch_export needs an example of the inputs"),
    ],
)
def test_formats_that_cannot_hold_it_are_refused(trained, tmp_path, kind, sentence):
    with pytest.raises(ConfigError, match=sentence):
        export(trained.run, tmp_path / "out", format=kind)


def test_pretraining_does_not_start_from_it(trained, tmp_path):
    with pytest.raises(ConfigError, match="cannot start from the weights of eeg.EEGEncoder"):
        pretrain(modality="eeg", data=trained.data, init_from=trained.run, out=tmp_path / "run", max_steps=1, **TINY)


def test_inputs_are_prepared_as_the_run_did_but_for_what_the_command_says(monkeypatch, caplog):
    modality = {
        "name": "eeg",
        "rate_hz": 250,
        "segment_seconds": 10,
        "decode": {"_target_": "eeg.decode", "rate_hz": "${modality.rate_hz}", "cache_dir": "/mine"},
        "transform": {"low_hz": 1.0, "high_hz": 40.0},
        "pad_value": 0,
    }
    cfg = OmegaConf.create({"modality": modality | {"encoder": None}})
    run = modality | {"rate_hz": 100, "segment_seconds": 3, "encoder": {"dim": 8}, "prepare": {"seconds": 1}}
    run |= {"decode": {"_target_": "eeg.decode", "rate_hz": 100}, "transform": {"low_hz": 3.0, "high_hz": 30.0}}
    kept = preparation_of(run)
    assert next(iter(kept)) == "name"
    assert not {"encoder", "prepare"} & set(kept)
    assert "cache_dir" not in preparation_of(modality)["decode"]
    monkeypatch.setattr(inputs, "given_settings", lambda: {"modality.transform.high_hz"})
    inputs._inherit_from_run(cfg, PluginConfig(encoder={}, modality=kept), "here")
    assert cfg.modality.rate_hz == cfg.modality.decode.rate_hz == 100
    assert cfg.modality.transform == {"low_hz": 3.0, "high_hz": 40.0}
    assert cfg.modality.segment_seconds == 10  # what the records are is the command's
    assert "modality.transform.high_hz=40.0, as you say; here was trained with 30.0" in caplog.text
    with pytest.raises(ConfigError, match="here is a model for ecg; choose modality=ecg"):
        inputs._inherit_from_run(cfg, PluginConfig(encoder={}, modality=kept | {"name": "ecg"}), "here")
    for strange in ({"transform": {"low_hz": "${oc.env:HOME}"}}, {"transform": {"a[0]": 1}}):
        with pytest.raises(ConfigError, match="here holds modality.transform.*, which no run writes"):
            inputs._inherit_from_run(cfg, PluginConfig(encoder={}, modality=kept | strange), "here")


def test_padding_changes_no_prediction(eeg):
    plain = SpecAugment(time_fraction=0, time_span=1, channel_fraction=0, channel_span=0)
    task = UtteranceClassification(layer_sum=False, inputs=Inputs(modality="eeg"), masks=plain, max_seconds=None)
    config = PluginConfig(encoder={"_target_": "eeg.EEGEncoder", **SIZE}, num_labels=3)
    model = Data2VecPluginForSequenceClassification(config).eval()
    waves = [torch.randn(19, 500), torch.randn(19, 300)]
    examples = [{"wave": wave, "label": 1, "key": ""} for wave in waves]
    together = task.collate(examples, train=True, rng=np.random.default_rng(0))
    assert together.inputs["attention_mask"].sum(1).tolist() == [500, 300]
    found = model(**together.inputs)
    for row, example in enumerate(examples):
        alone = task.collate([example], train=False, rng=np.random.default_rng(0)).inputs
        assert "attention_mask" not in alone
        assert torch.allclose(model(**alone)["logits"][0], found["logits"][row], atol=1e-5)
    assert found["loss"].isfinite()


def test_an_encoder_without_a_context_gives_the_layers_that_can_be_targets(eeg):
    class Strict(eeg.EEGEncoder):
        def contextualize(self, tokens, attention_mask=None, *, masks=None, mode="replace", target_layer=None, **more):
            return super().contextualize(
                tokens, attention_mask, masks=masks, mode=mode, target_layer=target_layer, **more
            )

    class Closed(Strict):
        def contextualize(
            self, tokens, attention_mask=None, *, masks=None, mode="replace", target_layer=None, top_k_layers=0
        ):
            more = {"target_layer": target_layer, "top_k_layers": top_k_layers}
            return super().contextualize(tokens, attention_mask, masks=masks, mode=mode, **more)

    encoder = Closed(**SIZE).eval()
    open_one = Strict(**SIZE).eval()
    open_one.load_state_dict(encoder.state_dict())
    recording = torch.randn(2, 19, 300)
    found, _ = layer_tokens(encoder, recording, None, [1, 2])
    expected, _ = layer_tokens(open_one, recording, None, [1, 2])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(
        ConfigError, match="layers=0: Closed.contextualize takes no context, and so gives layers 1 to 2"
    ):
        layer_tokens(encoder, recording, None, [0, 2])


def test_a_tensor_under_two_names_is_saved(eeg, monkeypatch, tmp_path):
    class Tied(eeg.EEGEncoder):
        def __init__(self, **size):
            super().__init__(**size)
            self.again = self.embedder

    monkeypatch.setattr(eeg, "Tied", Tied, raising=False)
    model = wrap("eeg.Tied", SIZE, Tied(**SIZE).state_dict(), where="here")
    save_pretrained(model, tmp_path)
    state = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
