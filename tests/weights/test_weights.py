"""Weights and configs as strangers' files have them: half precision, odd tensors, sizes that are not the file's."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data2vec_train as ours
from data2vec_train.errors import ConfigError, WeightMismatch
from data2vec_train.weights.convert import load_pretrained

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embedding_groups": 4}
SPEECH |= {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2, "vocab_size": 10}
MODELS = {
    "vision": ("Data2VecVisionForImageClassification", {"image_size": 16, "patch_size": 4, "num_labels": 3}),
    "text": ("Data2VecTextForSequenceClassification", {"vocab_size": 50, "max_position_embeddings": 20}),
    "audio": ("Data2VecAudioForCTC", SPEECH),
}
INPUTS = {
    "vision": {"pixel_values": torch.randn(2, 3, 16, 16)},
    "text": {"input_ids": torch.randint(5, 50, (2, 9))},
    "audio": {"input_values": torch.randn(2, 400)},
}


def folder_of(path: Path, modality: str) -> Path:
    name, more = MODELS[modality]
    config = getattr(ours, f"Data2Vec{modality.title()}Config")(**SMALL, **more)
    getattr(ours, name)(config).save_pretrained(path)
    return path


def with_tensors(path: Path, change) -> None:
    tensors = {name: change(name, tensor) for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def with_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def one_line(path: Path, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load_pretrained(path, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 or isinstance(caught.value, WeightMismatch)  # which lists all tensors
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("modality", MODELS)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "mixed"])
def test_weights_of_any_precision_are_float32_and_compute_the_same(modality, kind, tmp_path):
    path = folder_of(tmp_path / "m", modality)
    expected = load_pretrained(path)(**INPUTS[modality]).logits
    kinds = {"mixed": [torch.float32, torch.bfloat16]}.get(kind) or [getattr(torch, kind)]
    with_tensors(path, lambda name, tensor: tensor.to(kinds[len(name) % len(kinds)]))
    model = load_pretrained(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(**INPUTS[modality]).logits, expected, atol=0.02, rtol=0.02)
    if kind == "float64":
        torch.testing.assert_close(model(**INPUTS[modality]).logits, expected)


def test_a_caller_may_ask_for_a_type_or_for_that_of_the_file(tmp_path):
    path = folder_of(tmp_path / "m", "text")
    with_tensors(path, lambda name, tensor: tensor.half())
    assert load_pretrained(path, dtype="auto").dtype == torch.float16
    assert load_pretrained(path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_pretrained(path, dtype="float64").dtype == torch.float64
    assert "too large" in one_line(huge(path), dtype="float16")


def huge(path: Path) -> Path:
    with_tensors(path, lambda name, tensor: tensor.float() + 1e6 * (name.endswith("out_proj.bias")))
    return path


# --------------------------------------------------------------------------------------------------------- odd tensors


@pytest.mark.parametrize("modality", MODELS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensor: torch.full_like(tensor, float("nan")), "are not finite"),
        (
            lambda tensor: torch.where(torch.arange(tensor.numel()).view_as(tensor) == 3, float("-inf"), tensor),
            "1 of .* not finite",
        ),
        (lambda tensor: tensor.to(torch.int64), "is of type int64, expected floating-point"),
        (lambda tensor: tensor > 0, "is of type bool"),
        (lambda tensor: tensor.to(torch.complex64), "is of type complex64"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "is of type float8"),
        (lambda tensor: tensor.double() + 1e300, "are not finite"),
    ],
)
def test_a_tensor_that_is_no_finite_float_is_refused_by_its_name(modality, spoil, message, tmp_path):
    path = folder_of(tmp_path / "m", modality)
    names = sorted(name for name in load_file(path / "model.safetensors") if name.endswith("weight"))
    with_tensors(path, lambda name, tensor: spoil(tensor) if name == names[-1] else tensor)
    said = one_line(path)
    assert said.startswith(f"{path / 'model.safetensors'}: {names[-1]} ")
    assert re.search(message, said)


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("modality", MODELS)
@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 3},
        {"hidden_size": -16},
        {"hidden_size": 10**9},
        {"hidden_size": 16.5},
        {"hidden_size": True},
        {"hidden_size": 18},
        {"num_attention_heads": 3},
        {"num_attention_heads": None},
        {"intermediate_size": 10**6},
        {"hidden_act": "gelu_fancy"},
        {"hidden_act": ["gelu"]},
        {"layer_norm_eps": float("nan")},
        {"layer_norm_eps": -1e-5},
        {"layer_norm_eps": float("inf")},
        {"layer_norm_eps": 0},
        {"layer_norm_eps": "1e-5"},
        {"id2label": ["a", "b"]},
        {"id2label": {"a": "b"}},
        {"id2label": {"0": "a", "7": "b"}},
        {"architectures": {"a": 1}},
        {"architectures": [[1]]},
        {"encoder": {"dim": 4}},
        {"encoder": ["dim"]},
        {"model_type": "llama"},
        {"model_type": None},
    ],
    ids=str,
)
def test_a_config_that_describes_no_such_model_is_one_line(modality, change, tmp_path):
    path = folder_of(tmp_path / "m", modality)
    with_config(path, **change)
    one_line(path)


@pytest.mark.parametrize(
    "index",
    [
        [],
        "text",
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../m/model-1.safetensors"}},
        {"weight_map": {"a": "absent.safetensors"}},
        {"weight_map": {"a": "model-1.safetensors"}},
    ],
    ids=str,
)
def test_an_index_that_names_no_tensors_is_one_line(index, tmp_path):
    path = folder_of(tmp_path / "m", "text")
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model" in one_line(path)
