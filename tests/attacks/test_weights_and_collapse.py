"""Attacks on weights, configs, preprocessing files and the judgement of collapse: each ends in one line, or in the
right numbers."""

import json
import pickle
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import data2vec_train as ours
from data2vec_train.errors import CollapseError, ConfigError
from data2vec_train.features.embedding import embed_inputs
from data2vec_train.objective.data2vec import relative_std
from data2vec_train.report.page import curves_section, read_metrics
from data2vec_train.training.callbacks.monitor import Monitor
from data2vec_train.training.module import TrainingModule
from data2vec_train.weights.convert import load_pretrained, wrap
from data2vec_train.weights.preprocessing import AudioFeatureExtractor, ImageProcessor

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embedding_groups": 4}
SPEECH |= {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2, "vocab_size": 10, "mask_time_prob": 0.05}
IMAGES = {"image_size": 16, "patch_size": 4, "use_relative_position_bias": True, "num_labels": 3}
TEXTS = {"vocab_size": 50, "max_position_embeddings": 20}
MODELS = {
    "vision": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", IMAGES),
    "text": ("Data2VecTextForSequenceClassification", "Data2VecTextConfig", TEXTS),
    "audio": ("Data2VecAudioForCTC", "Data2VecAudioConfig", SPEECH),
}


def folder_of(path: Path, modality: str = "vision") -> Path:
    torch.manual_seed(0)
    name, config, more = MODELS[modality]
    getattr(ours, name)(getattr(ours, config)(**SIZES, **more)).save_pretrained(path)
    return path


def refused(call) -> str:
    """The one line that it says, soon."""
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        call()
    assert time.process_time() - start < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# -------------------------------------------------------------------------------------------------------------- configs

WIDE = [
    pytest.param("vision", {"image_size": [16, 16, 16]}, id="an image with three sides"),
    pytest.param("vision", {"image_size": 10**9}, id="an image of a billion pixels a side"),
    pytest.param("vision", {"image_size": 17}, id="patches that do not tile"),
    pytest.param("vision", {"image_size": []}, id="an image without sides"),
    pytest.param("vision", {"patch_size": [4, 8]}, id="oblong patches"),
    pytest.param("vision", {"patch_size": 0}, id="patches of nothing"),
    pytest.param("vision", {"num_channels": 4}, id="another number of channels than the weights"),
    pytest.param("vision", {"drop_path_rate": 1.0}, id="every path dropped"),
    pytest.param("vision", {"layer_scale_init_value": "0.1"}, id="a number in quotes"),
    pytest.param("vision", {"use_relative_position_bias": "yes"}, id="yes for true"),
    pytest.param("vision", {"use_absolute_position_embeddings": True}, id="positions that the file has not"),
    pytest.param("vision", {"out_indices": [[1]]}, id="a list in a list"),
    pytest.param("vision", {"hidden_act": ""}, id="an activation without a name"),
    pytest.param("text", {"pad_token_id": 50}, id="padding beyond the vocabulary"),
    pytest.param("text", {"pad_token_id": None}, id="no padding where it is needed"),
    pytest.param("text", {"vocab_size": 2**62}, id="a vocabulary that overflows"),
    pytest.param("text", {"max_position_embeddings": 1}, id="positions for nothing but padding"),
    pytest.param("text", {"type_vocab_size": -1}, id="a negative table"),
    pytest.param("text", {"hidden_dropout_prob": 1.5}, id="a dropout above 1"),
    pytest.param("text", {"attention_probs_dropout_prob": float("nan")}, id="a dropout that is no number"),
    pytest.param("text", {"num_labels": 10**9, "id2label": None}, id="a billion classes"),
    pytest.param("text", {"id2label": {str(i): [i] for i in range(2)}}, id="class names that are lists"),
    pytest.param("audio", {"conv_dim": [8]}, id="convolution lists of other lengths"),
    pytest.param("audio", {"conv_dim": [8] * 5000}, id="five thousand convolutions"),
    pytest.param("audio", {"conv_kernel": [10**9, 3]}, id="a kernel of a billion samples"),
    pytest.param("audio", {"conv_stride": [0, 2]}, id="a stride of 0"),
    pytest.param("audio", {"num_conv_pos_embeddings": 10**7}, id="ten million positional convolutions"),
    pytest.param("audio", {"num_conv_pos_embedding_groups": 5}, id="groups that do not divide the width"),
    pytest.param("audio", {"layerdrop": -0.1}, id="a negative probability"),
    pytest.param("audio", {"add_adapter": True, "num_adapter_layers": 10**6}, id="a million adapters"),
]


@pytest.mark.parametrize(("modality", "change"), WIDE)
def test_config(modality, change, tmp_path):
    path = folder_of(tmp_path / "m", modality)
    rewrite(path, **change)
    refused(lambda: load_pretrained(path))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="an empty file"),
        pytest.param(b"\x00" * 100, id="NUL bytes"),
        pytest.param(b"[" * 100_000, id="brackets without end"),
        pytest.param(b'{"hidden_size": ' + b"9" * 10_000 + b"}", id="a number of ten thousand digits"),
        pytest.param(b"\xff\xfe{\x00}\x00", id="UTF-16"),
        pytest.param(b'"data2vec-vision"', id="a text"),
        pytest.param(b'{"model_type": "data2vec-vision", "hidden_size": 1e999}', id="an infinite width"),
    ],
)
def test_config_file(content, tmp_path):
    path = folder_of(tmp_path / "m")
    (path / "config.json").write_bytes(content)
    refused(lambda: load_pretrained(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"depth": 10**6}, "depth=1000000", id="a million blocks"),
        pytest.param({"image_px": 2**20}, "numbers", id="a table of positions of a million pixels a side"),
        pytest.param({"norm_eps": float("nan")}, "norm_eps=nan", id="an epsilon that is no number"),
        pytest.param({"activation": "gelu_new2"}, "activation", id="an unknown activation"),
        pytest.param({"dim": "32"}, "dim='32'", id="a width in quotes"),
        pytest.param({"class_token": 1}, "class_token=1", id="1 for true"),
        pytest.param({"positions": "rotary"}, "positions='rotary'", id="positions of another kind"),
        pytest.param({"surprise": 1}, "unknown: surprise", id="an argument that there is none of"),
    ],
)
def test_the_description_in_a_checkpoint(change, message, composed):
    from omegaconf import OmegaConf

    cfg = composed("modality=vision", "data=folder", "data.path=nowhere", "modality.image_px=32", "modality.patch_px=8")
    node = OmegaConf.to_container(cfg, resolve=True)["modality"]["encoder"]
    target = node.pop("_target_")
    assert message in refused(lambda: wrap(target, node | change, {"class_token": torch.zeros(1, 1, 4)}, where="x"))


# -------------------------------------------------------------------------------------------------------------- weights


def shards(path: Path, places) -> Path:
    """The tensors of a folder in two files, and an index that is made from their names."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    half = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in half.items():
        save_file({name: tensors[name] for name in some}, path / file)
    index = {"weight_map": places({name: file for file, some in half.items() for name in some})}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_two_files_and_a_right_index_are_the_model(tmp_path):
    expected = load_pretrained(folder_of(tmp_path / "m")).state_dict()
    found = load_pretrained(shards(tmp_path / "m", lambda places: places)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "places",
    [
        pytest.param(lambda places: dict.fromkeys(places, "a.safetensors"), id="all said to be in one file"),
        pytest.param(lambda places: dict(list(places.items())[:-1]), id="a tensor that the index forgets"),
        pytest.param(lambda places: {name: f"../m/{file}" for name, file in places.items()}, id="a path upwards"),
        pytest.param(lambda places: {name: f"/etc/{file}" for name, file in places.items()}, id="a path from the root"),
        pytest.param(lambda places: {name: [file] for name, file in places.items()}, id="files in lists"),
        pytest.param(lambda places: list(places), id="a list of names"),
        pytest.param(lambda places: None, id="null"),
    ],
)
def test_index(places, tmp_path):
    path = shards(folder_of(tmp_path / "m"), places)
    refused(lambda: load_pretrained(path))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda tensor: tensor.to(torch.int8), id="8-bit whole numbers without their scale"),
        pytest.param(lambda tensor: tensor.to(torch.uint8), id="bytes"),
        pytest.param(lambda tensor: tensor.to(torch.complex64), id="complex numbers"),
        pytest.param(lambda tensor: tensor.to_sparse(), id="a sparse tensor"),
        pytest.param(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), id="a quantised tensor"),
        pytest.param(lambda tensor: tensor * float("inf"), id="infinities"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_pickled_weights(spoil, tmp_path):
    path = folder_of(tmp_path / "m", "text")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    name = next(name for name in tensors if name.endswith("query.weight"))
    torch.save(tensors | {name: spoil(tensors[name])}, path / "pytorch_model.bin")
    said = refused(lambda: load_pretrained(path))
    assert "pytorch_model.bin" in said


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(struct.pack("<Q", 2**40) + b"{}", id="a header of a terabyte"),
        pytest.param(struct.pack("<Q", 2) + b"[]", id="a header that is a list"),
        pytest.param(b"", id="an empty file"),
        pytest.param(pickle.dumps({"a": 1}), id="a pickle by that name"),
    ],
)
def test_safetensors_file(content, tmp_path):
    path = folder_of(tmp_path / "m")
    (path / "model.safetensors").write_bytes(content)
    refused(lambda: load_pretrained(path))


def test_a_nan_in_a_tensor_that_the_model_has_no_place_for_is_no_fault(tmp_path):
    path = folder_of(tmp_path / "m", "text")
    tensors = load_file(path / "model.safetensors")
    tensors["classifier.out_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert ours.Data2VecTextModel.from_pretrained(path).get_encoder().dim == 16
    refused(lambda: load_pretrained(path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda c: c["state_dict"]["w"].fill_(float("nan")), "w holds 2 of 2", id="weights"),
        pytest.param(
            lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"].fill_(float("inf")), "exp_avg", id="moments"
        ),
        pytest.param(
            lambda c: c["state_dict"].update(w=torch.ones(2, dtype=torch.int64)), "w is of type int64", id="type"
        ),
    ],
)
def test_a_checkpoint_to_go_on_from(spoil, message):
    module = TrainingModule(schedule=lambda step: 0.1, seed=0, log_every_n_steps=1)
    module.w = torch.nn.Parameter(torch.zeros(2))
    module._trainer = SimpleNamespace(ckpt_path="RUN/state.ckpt")
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}
    content = {"state_dict": {"w": torch.ones(2)}, "optimizer_states": [{"state": {0: moments}}]}
    module.on_load_checkpoint(content)
    spoil(content)
    said = refused(lambda: module.on_load_checkpoint(content))
    assert said.startswith("RUN/state.ckpt")
    assert message in said


# -------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([], id="a list"),
        pytest.param({"feature_extractor": []}, id="a part that is a list"),
        pytest.param({"feature_extractor": {"sampling_rate": "8k"}}, id="a rate in words"),
        pytest.param({"feature_extractor": {"sampling_rate": -1}}, id="a negative rate"),
        pytest.param({"image_processor": {"image_std": [0.5, 0, 0.5]}}, id="the part of another modality"),
    ],
)
def test_processor_file_of_recordings(content, tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    refused(lambda: AudioFeatureExtractor.from_pretrained(tmp_path))


def test_a_deviation_of_0_would_make_infinite_pixels(tmp_path):
    content = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5, 0, 0.5]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    assert "image_std" in refused(lambda: ImageProcessor.from_pretrained(tmp_path))


def test_features_of_half_precision_weights_with_a_processor_file_are_those_of_float32(tmp_path):
    path = folder_of(tmp_path / "m", "audio")
    how = {"feature_extractor": {"sampling_rate": 8000, "do_normalize": False}}
    (path / "processor_config.json").write_text(json.dumps(how))
    waves = [torch.randn(600).numpy(), torch.randn(431).numpy()]
    expected = embed_inputs(path, waves)
    tensors = {name: tensor.half() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = embed_inputs(path, waves)
    for vectors, other in zip(expected, found, strict=True):
        assert other[0].dtype.name == "float32"
        assert abs(vectors[0] - other[0]).max() < 0.02


# ------------------------------------------------------------------------------------------------------------- collapse


def judged(first: dict[str, float], last: dict[str, float], *, steps: int = 100, **options) -> None:
    """What a monitor says of the first and the last step of a run."""
    settings = {"min_target_std": 0.1, "min_prediction_std": 0.01, "grace_steps": 500, "progress": "none"}
    settings |= {"max_data_wait": 0.2, "data_wait_rows": 5, "min_feature_ratio": 0.01, "min_rank_ratio": 0.02}
    monitor = Monitor(**settings | options)
    monitor.first = {f"train/{name}": value for name, value in first.items()}
    row = {"train/loss": 1.0} | {f"train/{name}": value for name, value in last.items()}
    monitor._check_collapse(SimpleNamespace(global_step=steps, max_steps=steps), row)


HEALTHY = {"target_std": 0.9, "prediction_std": 0.5, "feature_std": 0.4}


@pytest.mark.parametrize(
    ("first", "last", "falls"),
    [
        pytest.param({}, {"feature_std": 1e-7}, True, id="constant features behind normalised targets"),
        pytest.param({}, {"feature_std": 0.1}, False, id="features that draw nearer"),
        pytest.param({"feature_std": 1e-3}, {"feature_std": 9e-4}, False, id="data that hardly differ"),
        pytest.param({"feature_std": 0.0}, {"feature_std": 0.0}, False, id="data that do not differ"),
        pytest.param({}, {"target_std": 0.04}, True, id="targets that shrank in a short run"),
        pytest.param({"prediction_std": 0.02}, {"prediction_std": 0.008}, False, id="predictions of a new decoder"),
        pytest.param({}, {"prediction_std": 0.001}, True, id="predictions that shrank to a constant"),
        pytest.param({}, {"target_std": float("nan")}, True, id="targets that are no number"),
    ],
)
def test_the_end_of_a_short_run(first, last, falls):
    if falls:
        with pytest.raises(CollapseError) as caught:
            judged(HEALTHY | first, HEALTHY | last)
        assert "\n" not in str(caught.value)
    else:
        judged(HEALTHY | first, HEALTHY | last)


def test_a_checkpoint_from_before_there_was_the_measure_goes_on():
    judged({"target_std": 0.9, "prediction_std": 0.5}, HEALTHY)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_features_does_not_matter(scale):
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(relative_std(scale * x), relative_std(x), rtol=1e-3, atol=0)


def test_positions_that_differ_hide_no_samples_that_do_not():
    assert relative_std(torch.randn(1, 50, 8).expand(6, -1, -1)) < 1e-6


def test_a_run_that_ended_before_its_first_row_has_curves_to_show(tmp_path):
    assert "No metrics were logged" in curves_section(read_metrics(tmp_path / "metrics.csv"), baselines={}).html
