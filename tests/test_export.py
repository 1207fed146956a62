"""Export as its users meet it: a run, then every format, from the command line and in Python."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from omegaconf import OmegaConf

import data2vec_train as ours
from data2vec_train.errors import ConfigError
from data2vec_train.export import run as module
from data2vec_train.export.run import example_for, export
from data2vec_train.weights.preprocessing import ImageProcessor

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
AUDIO = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4, "vocab_size": 9}
TEXT = {"vocab_size": 60, "max_position_embeddings": 34, "layer_norm_eps": 1e-5}
TDNN = {"tdnn_dim": [16, 8], "tdnn_kernel": [3, 1], "tdnn_dilation": [2, 1]}
VISION = {"image_size": 32, "patch_size": 8, "use_shared_relative_position_bias": True, "num_labels": 3}


def model_of(kind: str):
    torch.manual_seed(0)
    if kind == "audio 2.0":
        from data2vec_train.weights.audio import encoder_arguments

        config = ours.Data2VecAudioConfig(**SIZE, **AUDIO)
        arguments = encoder_arguments(config) | {"alibi": "shared", "mask_token": False, "prenet_depth": 1}
        config.encoder = arguments
        return ours.Data2VecAudioForCTC(config)
    if kind == "vision 2.0":
        from data2vec_train.weights.vision import encoder_arguments

        config = ours.Data2VecVisionConfig(**SIZE, **VISION)
        config.encoder = encoder_arguments(config) | {
            **{"norm_first": False, "final_norm": False, "positions": "sincos", "relative_bias": "none"},
            **{"qkv_bias": "qkv", "layer_scale": None, "init": "bert", "prenet_depth": 1},
        }
        return ours.Data2VecVisionForImageClassification(config)
    name, family, options = {
        "audio": ("ForCTC", "Audio", AUDIO),
        "text": ("ForSequenceClassification", "Text", TEXT),
        "vision": ("ForImageClassification", "Vision", VISION),
        "question answering": ("ForQuestionAnswering", "Text", TEXT),
        "speaker": (
            "ForXVector",
            "Audio",
            AUDIO | {"tdnn_dim": [16, 8], "tdnn_kernel": [3, 1], "tdnn_dilation": [2, 1]},
        ),
    }[kind]
    return getattr(ours, f"Data2Vec{family}{name}")(getattr(ours, f"Data2Vec{family}Config")(**SIZE, **options))


def run(source, out, kind: str, **more) -> dict[str, float]:
    given = {"checkpoint": str(source), "out": str(out), "format": kind, "weights": "student", "num_heads": None}
    return export(OmegaConf.create(given | more))


FOLDERS = ("audio", "text", "vision", "question answering", "speaker", "audio 2.0", "vision 2.0")


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_are_read_back_exactly(kind, tmp_path):
    model = model_of(kind).eval()
    ours.save_pretrained(model, tmp_path / "source")
    fit = {"vision": "cover", "vision 2.0": "stretch"}.get(kind)
    if fit:
        ImageProcessor(size=32, fit=fit).save_pretrained(tmp_path / "source")
    differences = run(tmp_path / "source", tmp_path / "out", "safetensors")
    assert list(differences.values()) == [0.0]
    again = ours.load_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    given = example_for(model).inputs
    assert torch.equal(again(**given)[0], model(**given)[0])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| layer 2 | 0.0e+00 |" in card
    assert type(model).__name__ in card
    assert ("transformers stretches images" in card) == (fit == "cover")
    if "2.0" in kind:
        with pytest.raises(ConfigError, match="transformers has data2vec 1.0 only"):
            run(tmp_path / "source", tmp_path / "hf", "hf")
        assert not (tmp_path / "hf").exists()
    else:
        pytest.importorskip("transformers")
        differences = run(tmp_path / "source", tmp_path / "hf", "hf")
        assert len(differences) == 2
        assert max(differences.values()) < 5e-6


# Each kind in one form; the others are slow.
FAST_GRAPHS = (("onnx", "text"), ("torch_export", "vision"), ("torch_export", "vision 2.0"))


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        pytest.param(form, kind, marks=() if (form, kind) in FAST_GRAPHS else pytest.mark.slow)
        for form in ("onnx", "torch_export")
        for kind in ("audio", "text", "vision", "audio 2.0", "vision 2.0")
    ],
)
def test_graphs_take_other_batches_and_lengths(kind, form, tmp_path):
    pytest.importorskip("onnxruntime")
    ours.save_pretrained(model_of(kind), tmp_path / "source")
    differences = run(tmp_path / "source", tmp_path / "out", form)
    assert max(differences.values()) < 2e-5
    facts = json.loads((tmp_path / "out" / "signature.json").read_text())
    assert facts["output"] == "logits"
    assert "0" in facts["free_axes"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "another shape" in card


def test_preprocessing_stands_beside_the_weights(tmp_path):
    from data2vec_train.weights.preprocessing import ImageProcessor

    ours.save_pretrained(model_of("vision"), tmp_path / "source")
    ImageProcessor(size=32).save_pretrained(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out", "safetensors")
    assert ImageProcessor.from_pretrained(tmp_path / "out").size == (32, 32)


def test_what_reads_back_differently_is_not_handed_over(tmp_path, monkeypatch):
    ours.save_pretrained(model_of("vision"), tmp_path / "source")

    def wrong(model, folder, kind):
        return [module.Comparison("somebody", [("layer 0", 0.5)])]

    monkeypatch.setattr(module, "_write_folder", wrong)
    with pytest.raises(RuntimeError, match=r"somebody differ from .* by 5.0e-01"):
        run(tmp_path / "source", tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        run(tmp_path, tmp_path / "out", "hf")
    assert (tmp_path / "out" / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "checkpoint: not set"),
        (("checkpoint=nowhere", "out=x"), "checkpoint: there is no file or folder nowhere"),
        (
            ("checkpoint=README.md", "out=x", "format=gguf"),
            "format: expected one of hf, timm, safetensors, onnx, torch_export",
        ),
        (("checkpoint=README.md", "out=x", "weights=both"), "weights: expected one of student, teacher, got 'both'"),
        (("checkpoint=README.md", "outt=x"), "no setting called 'outt'; did you mean out?"),
        (("checkpoint=README.md", "out=x"), "README.md is not an intact checkpoint of torch.save"),
    ],
)
def test_commands_that_cannot_work_get_one_line(settings, message, run_program):
    found = run_program(*settings, verb="export")
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_a_run_then_every_weight_for_transformers_and_a_run_from_there(run_program, tmp_path):
    """The whole way round, as in the README."""
    transformers = pytest.importorskip("transformers")
    short = ["trainer.max_steps=3", "callbacks.probe.every_n_steps=3", "report=false", "data.num_workers=0"]
    short += ["data.max_probe_samples=100"]
    first = run_program("modality=vision", "objective=data2vec", *short, f"hydra.run.dir={tmp_path}/run")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "run" / "preprocessing" / "preprocessor_config.json").is_file()
    for weights in ("student", "teacher"):
        differences = run(tmp_path / "run", tmp_path / weights, "hf", weights=weights)
        assert max(differences.values()) < 1e-6
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "student")
    assert theirs.config.image_size == 28
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "student", backend="pil").size["height"] == 28
    again = run_program("modality=vision", f"init_from={tmp_path}/student", *short, f"hydra.run.dir={tmp_path}/again")
    assert again.returncode == 0, again.stderr
    assert "the teacher starts as a copy of the student" in again.stdout
