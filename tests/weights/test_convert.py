"""Files of the original programs and of our runs: loading, strictness, and that nothing in them runs."""

import argparse
import collections
import enum
import json
import os
import pickle
import sys
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import data2vec_train as ours
from data2vec_train.errors import ConfigError, WeightMismatch
from data2vec_train.weights import fairseq
from data2vec_train.weights.names import to_ours
from data2vec_train.weights.pickles import plain, read_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = json.loads((GOLDEN / "checkpoint_names.json").read_text())
RECORDINGS = ["audio_v1", "text_v1", "vision_v1", "audio_v2", "text_v2", "vision_v2"]


class Node(dict):
    """Stands for omegaconf's nodes, whose class is not there when the file is read."""


def settings_of(config: dict, modality: str, version: int) -> dict:
    """The part of an original config that tensors cannot tell."""
    if version == 1:
        found = {"encoder_attention_heads": config["num_heads"], "encoder_embed_dim": config["dim"]}
        if modality == "audio":
            found["conv_feature_layers"] = config["conv_layers"]
        if modality == "text":
            found = {"transformer": {"encoder": {"num_heads": config["num_heads"]}}}
        return found
    found = {"num_heads": config["num_heads"]}
    if modality == "audio":
        found["modalities"] = {"audio": {"feature_encoder_spec": config["conv_layers"]}}
    return found


def original_file(name: str, path: Path, *, prefix: str = "", more: dict | None = None) -> dict:
    """A recording written as the original program writes checkpoints; returns what it holds."""
    recorded = load_file(GOLDEN / f"{name}.safetensors")
    config = json.loads((GOLDEN / f"{name}.json").read_text())["config"]
    modality, version = name.split("_v")[0], int(name[-1])
    student = {key.removeprefix("student/"): tensor for key, tensor in recorded.items() if key.startswith("student/")}
    teacher = {key.removeprefix("teacher/"): tensor for key, tensor in recorded.items() if key.startswith("teacher/")}
    if name == "text_v1":
        student = {f"encoder.{key}": tensor for key, tensor in student.items()}
    student = {prefix + key: tensor for key, tensor in student.items()} | (more or {})
    if name == "vision_v1":
        content = {"model": student, "model_ema": teacher, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    else:
        student["encoder._ema" if name == "text_v1" else "_ema"] = teacher
        content = {"args": None, "cfg": {"model": settings_of(config, modality, version)}, "model": student}
        content["optimizer_history"] = [{"num_updates": 3}]
    torch.save(content, path)
    return recorded


def inputs_of(recorded: dict[str, Tensor]) -> Tensor:
    found = recorded.get("in/source", recorded.get("in/tokens_full"))
    return found[0] if found is None else found


# ---------------------------------------------------------------------------------------------------------------------
# The recordings of the original programs


@pytest.mark.parametrize("name", RECORDINGS)
def test_files_of_the_original_programs_give_their_features(name, tmp_path):
    recorded = original_file(name, tmp_path / "checkpoint.pt")
    model = ours.load_pretrained(tmp_path / "checkpoint.pt")
    with torch.no_grad():
        found = model(inputs_of(recorded)).last_hidden_state
    if "out/features_unmasked" not in recorded:
        assert found.isfinite().all()
        return
    expected = recorded["out/features_unmasked"]
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_teacher_is_what_the_file_says_and_the_students_elsewhere(name, tmp_path):
    recorded = original_file(name, tmp_path / "checkpoint.pt")
    student = ours.load_pretrained(tmp_path / "checkpoint.pt").state_dict()
    teacher = ours.load_pretrained(tmp_path / "checkpoint.pt", weights="teacher").state_dict()
    changed = {key for key, tensor in teacher.items() if not torch.equal(tensor, student[key])}
    assert any("blocks" in key for key in changed)
    if name not in ("vision_v1", "vision_v2"):
        assert not any("embedder.features" in key or "embedder.project" in key for key in changed)
    values = {float(tensor.flatten()[0]) for key, tensor in recorded.items() if key.startswith("teacher/")}
    first = next(key for key in changed if key.endswith("ffn.fc2.weight"))
    assert float(teacher[first].flatten()[0]) in values


@pytest.mark.parametrize("name", RECORDINGS)
def test_what_was_loaded_saves_and_loads_again(name, tmp_path):
    recorded = original_file(name, tmp_path / "checkpoint.pt")
    model = ours.load_pretrained(tmp_path / "checkpoint.pt")
    ours.save_pretrained(model, tmp_path / "folder")
    again = ours.load_pretrained(tmp_path / "folder")
    assert type(again) is type(model)
    assert type(ours.load_pretrained(tmp_path / "folder" / "model.safetensors")) is type(model)
    inputs = inputs_of(recorded)
    assert torch.equal(again(inputs).last_hidden_state, model(inputs).last_hidden_state)
    # transformers reads 1.0, and 2.0 for text, which has the same architecture.
    kind = json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"]
    readable = name.endswith("v1") or name == "text_v2"
    assert kind.startswith("data2vec-" if readable else "data2vec_train-")
    if readable:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "folder").eval()
        expected = theirs(inputs).last_hidden_state
        torch.testing.assert_close(model(inputs).last_hidden_state, expected, atol=2e-6, rtol=1e-5)


def test_fine_tuned_speech(tmp_path):
    for name, prefix in (("audio_v1", "w2v_encoder.w2v_model."), ("audio_v2", "w2v_encoder.w2v_model.")):
        head = {"w2v_encoder.proj.weight": torch.randn(9, 32), "w2v_encoder.proj.bias": torch.randn(9)}
        recorded = original_file(name, tmp_path / "checkpoint.pt", prefix=prefix, more=head)
        model = ours.load_pretrained(tmp_path / "checkpoint.pt")
        assert isinstance(model, ours.Data2VecAudioForCTC)
        features = model.data2vec_audio(inputs_of(recorded)).last_hidden_state
        expected = features @ head["w2v_encoder.proj.weight"].mT + head["w2v_encoder.proj.bias"]
        torch.testing.assert_close(model(inputs_of(recorded)).logits, expected)
        ours.save_pretrained(model, tmp_path / name)
        again = ours.load_pretrained(tmp_path / name)
        assert isinstance(again, ours.Data2VecAudioForCTC)
        assert torch.equal(again(inputs_of(recorded)).logits, model(inputs_of(recorded)).logits)
        with pytest.raises(ConfigError, match="has no teacher"):
            ours.load_pretrained(tmp_path / "checkpoint.pt", weights="teacher")


def test_speech_and_images_come_with_how_they_are_prepared(tmp_path):
    from data2vec_train.weights.preprocessing import AudioFeatureExtractor
    from data2vec_train.weights.tokenizers import CTCTokenizer

    head = {"w2v_encoder.proj.weight": torch.randn(32, 32), "w2v_encoder.proj.bias": torch.randn(32)}
    original_file("audio_v1", tmp_path / "a.pt", prefix="w2v_encoder.w2v_model.", more=head)
    ours.save_pretrained(ours.load_pretrained(tmp_path / "a.pt"), tmp_path / "a")
    assert AudioFeatureExtractor.from_pretrained(tmp_path / "a").return_attention_mask
    assert CTCTokenizer.from_pretrained(tmp_path / "a").decode([5, 5, 0, 6]) == "ET"
    ours.save_pretrained(ours.load_pretrained(tmp_path / "a"), tmp_path / "again")
    assert (tmp_path / "again" / "vocab.json").is_file()


def test_fine_tuned_images(tmp_path):
    head = {"fc_norm.weight": torch.rand(32), "fc_norm.bias": torch.randn(32)}
    head |= {"head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)}
    for prefix in ("", "model."):
        recorded = original_file(
            "vision_v2",
            tmp_path / "checkpoint.pt",
            prefix="model.",
            more={prefix + key: tensor for key, tensor in head.items()},
        )
        model = ours.load_pretrained(tmp_path / "checkpoint.pt")
        assert isinstance(model, ours.Data2VecVisionForImageClassification)
        patches = model.data2vec_vision(inputs_of(recorded)).last_hidden_state[:, 1:]
        pooled = torch.nn.functional.layer_norm(
            patches.mean(1), (32,), head["fc_norm.weight"], head["fc_norm.bias"], eps=1e-6
        )
        expected = pooled @ head["head.weight"].mT + head["head.bias"]
        torch.testing.assert_close(model(inputs_of(recorded)).logits, expected)


def test_fine_tuned_images_of_the_first_version(tmp_path):
    recorded = original_file("vision_v1", tmp_path / "pretrained.pt")
    content = torch.load(tmp_path / "pretrained.pt", weights_only=False)["model"]
    body = {
        key: tensor for key, tensor in content.items() if key.split(".")[0] not in ("mask_token", "lm_head", "norm")
    }
    table = body.pop("rel_pos_bias.relative_position_bias_table")
    body |= {f"blocks.{layer}.attn.relative_position_bias_table": table + layer for layer in range(3)}
    body |= {"blocks.0.attn.relative_position_index": torch.zeros(3, 3, dtype=torch.int64)}
    body |= {"fc_norm.weight": torch.rand(32), "fc_norm.bias": torch.randn(32)}
    body |= {"head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)}
    torch.save({"module": body}, tmp_path / "checkpoint.pt")
    model = ours.load_pretrained(tmp_path / "checkpoint.pt")
    assert isinstance(model, ours.Data2VecVisionForImageClassification)
    assert torch.equal(model.get_encoder().relative_biases[2].table, table + 2)
    ours.save_pretrained(model, tmp_path / "folder")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder")
    images = inputs_of(recorded)
    torch.testing.assert_close(model(images).logits, theirs(images).logits, atol=2e-6, rtol=1e-5)


def test_fine_tuned_text(tmp_path):
    name = "classification_heads.sentence_classification_head"
    shapes = {"dense.weight": (32, 32), "dense.bias": (32,), "out_proj.weight": (4, 32), "out_proj.bias": (4,)}
    for recording, prefix, before in (("text_v2", "model.", "model."), ("text_v1", "", "")):
        head = {f"{before}{name}.{key}": torch.randn(shape) for key, shape in shapes.items()}
        recorded = original_file(recording, tmp_path / "checkpoint.pt", prefix=prefix, more=head)
        model = ours.load_pretrained(tmp_path / "checkpoint.pt")
        assert isinstance(model, ours.Data2VecTextForSequenceClassification)
        assert torch.equal(model.classifier.out_proj.weight, head[f"{before}{name}.out_proj.weight"])
        assert model(inputs_of(recorded)).logits.shape == (len(inputs_of(recorded)), 4)


# ---------------------------------------------------------------------------------------------------------------------
# The published models' names and shapes


def published_file(name: str, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(shape: list[int]) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).half()

    table = NAMES[name]["model_keys"]
    model = {key: made(shape) for key, shape in table.items()}
    before = "blocks." if "text" in name else ""
    model["_ema"] = {key: made(table[before + key]).float() for key in NAMES[name]["ema_keys"]}
    torch.save({"args": None, "cfg": None, "model": model, "extra_state": {"epoch": 1}}, path)


INPUTS = {
    "audio": lambda: torch.randn(1, 4000),
    "image": lambda: torch.randn(1, 3, 224, 224),
    "text": lambda: torch.randint(4, 500, (1, 16)),
}


LARGE = [pytest.param(name, marks=pytest.mark.slow) if "large" in name else name for name in NAMES]


@pytest.mark.parametrize("name", LARGE)
def test_published_models_load_and_run(name, tmp_path):
    published_file(name, tmp_path / "checkpoint.pt")
    modality = name.split("_")[1]
    for weights in ("student",) if "large" in name else ("teacher", "student"):
        model = ours.load_pretrained(tmp_path / "checkpoint.pt", weights=weights)
        with torch.inference_mode():
            features = model(INPUTS[modality]()).last_hidden_state
        assert features.shape[-1] == (1024 if "large" in name else 768)
        assert features.isfinite().all()
    # All of the file is there, the decoder aside: positions and halves of attention are counted once.
    expected = NAMES[name]["params_without_decoder"]
    found = sum(parameter.numel() for parameter in model.encoder.parameters())
    more = {"image": -(197 * 768 if "base" in name else 197 * 1024), "text": 768, "audio": 0}[modality]
    if modality == "image":
        # Random positions are kept as learned ones; theirs do not count, being fixed.
        found, more = found + more, -(196 * (768 if "base" in name else 1024))
    assert found == expected + more


# ---------------------------------------------------------------------------------------------------------------------
# Files that must be refused


def tamper(path: Path, change) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


BLOCK = {
    "audio_v1": "encoder.layers.1.fc1.weight",
    "text_v1": "encoder.sentence_encoder.layers.1.fc1.weight",
    "vision_v1": "blocks.1.mlp.fc1.weight",
    "audio_v2": "blocks.1.mlp.fc1.weight",
    "text_v2": "blocks.1.mlp.fc1.weight",
    "vision_v2": "blocks.1.mlp.fc1.weight",
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_name_a_tensor_or_a_shape_that_is_wrong(name, tmp_path):
    path, block = tmp_path / "checkpoint.pt", BLOCK[name]
    shown = block.removeprefix("encoder.") if name == "text_v1" else block

    def rename(content):
        content["model"][block.replace("fc1", "fc9")] = content["model"].pop(block)

    def remove(content):
        del content["model"][block]

    def reshape(content):
        content["model"][block] = content["model"][block][:-1]

    for change, words in (
        (rename, (f"missing: {shown}", f"unexpected: {shown.replace('fc1', 'fc9')}")),
        (remove, (f"missing: {shown}",)),
        (reshape, (f"of another shape: {shown}", "expected [")),
    ):
        original_file(name, path)
        tamper(path, change)
        with pytest.raises(WeightMismatch) as error:
            ours.load_pretrained(path)
        for word in words:
            assert word in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", RECORDINGS)
def test_truncated_files(name, tmp_path):
    path = tmp_path / "checkpoint.pt"
    original_file(name, path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="is not an intact checkpoint|was refused"):
            ours.load_pretrained(path)


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "call", ["os.system", "posix.system", "subprocess.call", "builtins.eval", "builtins.exec", "torch.load", "getattr"]
)
def test_pickled_code_does_not_run(call, legacy, tmp_path):
    import subprocess

    target = {
        "os.system": (os.system, f"touch {tmp_path}/ran"),
        "posix.system": (sys.modules["posix"].system, f"touch {tmp_path}/ran"),
        "subprocess.call": (subprocess.call, ["touch", f"{tmp_path}/ran"]),
        "builtins.eval": (eval, f"open({str(tmp_path / 'ran')!r}, 'w')"),
        "builtins.exec": (exec, f"open({str(tmp_path / 'ran')!r}, 'w')"),
        "torch.load": (torch.load, str(tmp_path / "other.pt")),
        "getattr": (getattr, torch.Size(), "count"),
    }[call]
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {"a": Evil(*target)}}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigError, match=r"was refused, and nothing in it was run: it asks for \w+\.\w+"):
        ours.load_pretrained(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps({"model": {"a": Evil(*target)}}))
    with pytest.raises(ConfigError):
        ours.load_pretrained(path)
    assert not (tmp_path / "ran").exists()


def test_objects_of_other_programs_become_containers(tmp_path):
    module = types.ModuleType("otherprogram")
    exec(  # classes that the reader cannot import
        "import enum\n"
        "class Kind(enum.Enum):\n    layer = 'layer'\n"
        "class Node:\n    def __init__(self, value): self._content = value\n"
        "class Leaf:\n    def __init__(self, value): self._val = value\n"
        "class Slotted(dict): pass\n",
        module.__dict__,
    )
    for name in ("Kind", "Node", "Leaf", "Slotted"):
        getattr(module, name).__module__ = "otherprogram"
        getattr(module, name).__qualname__ = name
    sys.modules["otherprogram"] = module
    assert issubclass(module.Kind, enum.Enum)
    path = tmp_path / "checkpoint.pt"
    config = module.Node({"model": module.Node({"num_heads": module.Leaf(4), "kind": module.Leaf(module.Kind.layer)})})
    namespace = argparse.Namespace(lr=0.1, sizes=[1, 2])
    torch.save({"cfg": config, "args": namespace, "slotted": module.Slotted(a=1), "w": torch.arange(3)}, path)
    del sys.modules["otherprogram"]
    content = read_checkpoint(path)
    assert plain(content["cfg"]) == {"model": {"num_heads": 4, "kind": "layer"}}
    assert plain(content["args"]) == {"lr": 0.1, "sizes": [1, 2]}
    assert content["slotted"]["a"] == 1
    assert torch.equal(content["w"], torch.arange(3))


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        ours.load_pretrained(path)
    torch.save({"model": {"conv1.weight": torch.zeros(2)}}, path)
    with pytest.raises(ConfigError, match=r"no known data2vec model.*got conv1\.weight"):
        ours.load_pretrained(path)
    torch.save({"weights": 3}, path)
    with pytest.raises(ConfigError, match="top keys: weights"):
        ours.load_pretrained(path)
    torch.save([1, 2], path)
    with pytest.raises(ConfigError, match="holds a list"):
        ours.load_pretrained(path)
    with pytest.raises(ConfigError, match="weights='both'"):
        ours.load_pretrained(path, weights="both")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ours.load_pretrained(tmp_path)


def test_heads_that_no_tensor_tells(tmp_path):
    path = tmp_path / "checkpoint.pt"
    original_file("text_v2", path)
    tamper(path, lambda content: content.update(cfg=None))
    with pytest.raises(ConfigError, match="give num_heads"):
        ours.load_pretrained(path)
    assert ours.load_pretrained(path, num_heads=4).config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("written", "strides"),
    [
        ("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]", [5, 2, 2, 2, 2, 2, 2]),
        ("[(16,10,5),(16,3,2)]", [5, 2]),
        ([[16, 10, 5], [16, 3, 2]], [5, 2]),
    ],
)
def test_front_ends_as_fairseq_writes_them(written, strides):
    assert [layer[2] for layer in fairseq._spec_of(written, "here")] == strides


@pytest.mark.parametrize("written", ["__import__('os').getcwd()", "[(1, 2, 3)] * x", "[(1, 2"])
def test_front_ends_are_not_evaluated(written):
    with pytest.raises(ConfigError, match="cannot be parsed"):
        fairseq._spec_of(written, "here")


def test_names_are_taken_apart_and_put_together_again():
    names = {"a.q": "x#q", "a.k": "x#k", "a.v": "x#v", "b": "y"}
    from data2vec_train.weights.names import to_theirs

    theirs = collections.OrderedDict((key, torch.randn(2, 3)) for key in names)
    back = to_theirs(names, to_ours(names, theirs))
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.items())
