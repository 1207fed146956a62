"""Every number against recordings of the original programs (fairseq 1.0 and 2.0; the BEiT-based 1.0 vision code).

`DATA2VEC_GOLDEN` names another folder of recordings; the format is described in `tests/golden/README.md`. A model,
its teacher and a batch are built from the config stored in each file, whatever its sizes. What EAT has besides these is
in `test_eat.py`.
"""

import ast
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data2vec_train.batch import Batch, Masks
from data2vec_train.encoders.backends import NAMES
from data2vec_train.encoders.positions import relative_position_index
from data2vec_train.encoders.spectrogram import SpectrogramEncoder
from data2vec_train.encoders.text import TextEncoder
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.encoders.waveform import WaveformEncoder
from data2vec_train.objective.data2vec import Data2Vec, Data2VecOutput, std_over_rows
from data2vec_train.objective.decoders import Conv1dDecoder, Conv2dDecoder, Decoder, LinearDecoder, MLPDecoder
from data2vec_train.objective.targets import TargetBuilder
from data2vec_train.weights.names import (
    beit_vision,
    fairseq_audio_v1,
    fairseq_audio_v2,
    fairseq_image,
    fairseq_text_v1,
    fairseq_text_v2,
    to_ours,
)

FOLDER = Path(os.environ.get("DATA2VEC_GOLDEN", Path(__file__).parents[1] / "golden"))


@dataclass
class Recording:
    config: dict
    scalars: dict
    tensors: dict[str, Tensor]
    model: Data2Vec
    names: dict[str, str]
    teacher_prefix: str
    batch: Batch

    @property
    def gradient_error(self) -> float:
        """The largest that may be seen, relative to a gradient's largest entry."""
        return 1e-5 if "mel_bins" in self.config else 1e-4

    def group(self, name: str) -> dict[str, Tensor]:
        """The recorded tensors under `name/`, by our names."""
        prefix = self.teacher_prefix if name.startswith("teacher") else ""
        found = {
            prefix + key.removeprefix(name + "/"): value
            for key, value in self.tensors.items()
            if key.startswith(name + "/") and not key.endswith("/version")
        }
        unknown = sorted(set(found) - set(self.names))
        assert not unknown, f"no name of ours for {unknown}"
        return to_ours(self.names, found)


def _number_after(word: str, text: str, default: float) -> float:
    found = re.search(rf"{word}\s+([0-9.]+(?:e-?\d+)?)", text)
    return float(found.group(1)) if found else default


def _norms(text: str) -> tuple[list[str], list[str]]:
    """'layer norm per layer, mean, layer norm' / 'instance per layer, then layer norm of the mean' -> two lists."""
    per_layer, _, of_mean = text.partition("per layer")
    words = ("instance", "layer", "batch")
    return (
        [word for word in words if word in per_layer],
        [word for word in words if re.search(rf"{word} norm|{word} of", of_mean)],
    )


NO_DROPOUT = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "drop_path": 0.0,
    "activation_checkpointing": False,
}


def _vision_encoder(config: dict, *, version: int, depth: int, channels: int, **common) -> VisionEncoder:
    first = version == 1
    return VisionEncoder(
        image_px=config["image_px"],
        patch_px=config["patch_px"],
        channels=channels,
        norm_first=config["pre_ln"] if first else not config["post_ln"],
        final_norm=config["pre_ln"] if first else not config["post_ln"],
        norm_eps=config.get("norm_eps", 1e-6),
        activation="gelu",
        positions="none" if first else "sincos",
        relative_bias=("shared" if config["shared_relative_position_bias"] else "per_layer") if first else "none",
        class_token=True if first else config["prefix_tokens"] > 0,
        mask_token=first,
        qkv_bias="qv" if first else "qkv",
        layer_scale=1e-4 if first and config["layer_scale"] else None,
        init="beit" if first else "bert",
        depth=depth,
        **common,
    )


def _audio_encoder(config: dict, *, version: int, **common) -> WaveformEncoder:
    widths, kernels, strides = zip(*ast.literal_eval(config["conv_layers"]), strict=True)
    return WaveformEncoder(
        channels=1,
        conv_dim=widths,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=False,
        conv_activation="gelu",
        norm_eps=config.get("norm_eps", 1e-5),
        activation="gelu",
        position_kernel=config["conv_pos_kernel"],
        position_depth=config["conv_pos_layers"],
        position_groups=config["conv_pos_groups"],
        alibi="none" if version == 1 else "shared",
        mask_token=version == 1,
        reference_padding=False,
        embed_gradient=1.0,
        conv_as_matmul=True,
        input_dropout=0.0,
        layer_drop=0.0,
        **common,
    )


def _text_encoder(config: dict, **common) -> TextEncoder:
    return TextEncoder(
        vocab_size=config["vocab"],
        max_tokens=config["max_positions"],
        pad_id=config["pad_id"],
        num_token_types=0,
        norm_eps=config.get("norm_eps", 1e-5),
        activation="gelu",
        layer_drop=0.0,
        **common,
    )


def _sound_encoder(config: dict, **common) -> SpectrogramEncoder:
    return SpectrogramEncoder(
        mel_bins=config["mel_bins"],
        patch=config["patch"],
        max_frames=config["max_length"] * config["patch"],
        norm_eps=config["norm_eps"],
        activation="gelu",
        class_token=config["prefix_tokens"] > 0,
        mask_token=False,
        **common,
    )


def _decoder(config: dict, *, version: int, modality: str) -> Decoder:
    if version == 1:
        if modality == "text":
            return MLPDecoder(dim=config["dim"], ratio=2, init_std=None)
        return LinearDecoder(dim=config["dim"], init_std=None)
    wanted = config["decoder"]
    return (Conv2dDecoder if modality in ("vision", "sound") else Conv1dDecoder)(
        dim=config["dim"],
        channels=wanted["decoder_dim"],
        depth=wanted["decoder_layers"],
        kernel=wanted["decoder_kernel"],
        groups=wanted["decoder_groups"],
        residual=wanted.get("decoder_residual", True),
        projection_layers=wanted.get("projection_layers", 1),
        input_dropout=wanted["input_dropout"],
        noise_std=config["mask_noise_std"],
        init_std=None,
        reference_padding=False,
    )


def _names(config: dict, *, version: int, modality: str, depth: int) -> dict[str, str]:
    if modality == "vision" and version == 1:
        shared = config["shared_relative_position_bias"]
        return beit_vision(depth=depth, relative_bias="shared" if shared else "per_layer")
    if modality == "text" and version == 1:
        return fairseq_text_v1(depth=depth)
    front_end = {}
    if modality == "audio":
        front_end["conv_layers"] = len(ast.literal_eval(config["conv_layers"]))
        front_end["position_depth"] = config["conv_pos_layers"]
        if version == 1:
            return fairseq_audio_v1(depth=depth, **front_end)
    decoder = {
        "depth": depth,
        "decoder_depth": config["decoder"]["decoder_layers"],
        "projection_layers": config["decoder"].get("projection_layers", 1),
    }
    if modality == "text":
        return fairseq_text_v2(**decoder)
    prenet = {"prenet_depth": config["prenet_blocks"]}
    if modality == "audio":
        return fairseq_audio_v2(**decoder, **prenet, **front_end)
    return fairseq_image(**decoder, **prenet)


# What the teacher's names lack in front (ALGORITHM.md 5.1), and what of it follows the student how (ALGORITHM.md 1.1).
TEACHER = {
    ("vision", 1): {"prefix": "", "share_embeddings": False, "copied": []},
    ("vision", 2): {"prefix": "", "share_embeddings": False, "copied": []},
    ("audio", 1): {"prefix": "encoder.", "share_embeddings": True, "copied": ["positions."]},
    ("audio", 2): {"prefix": "", "share_embeddings": True, "copied": []},
    ("sound", 2): {"prefix": "", "share_embeddings": False, "copied": []},
    ("text", 1): {"prefix": "sentence_encoder.", "share_embeddings": False, "copied": ["embedder."]},
    ("text", 2): {"prefix": "blocks.", "share_embeddings": True, "copied": []},
}


def load(path: Path, attention: str = "sdpa") -> Recording:
    recorded = json.loads(path.with_suffix(".json").read_text())
    config, scalars, tensors = recorded["config"], recorded["scalars"], load_file(path)
    modality = _modality(path)
    version = 1 if "in/mask" in tensors else 2
    inputs = tensors["in/tokens_full" if "in/tokens_full" in tensors else "in/source"]
    layer_norms, mean_norms = _norms(config["target_norm"])
    depth = config["depth"] if version == 1 else config["main_blocks"] + config["prenet_blocks"]
    masks_per_sample = config.get("views", 1)
    common = {
        "dim": config["dim"],
        "depth": depth,
        "prenet_depth": config.get("prenet_blocks", 0),
        "num_heads": config["num_heads"],
        "ffn_dim": config.get("ffn_dim") or int(config["dim"] * config["mlp_ratio"]),
        "attention": attention,
        **NO_DROPOUT,
    }
    if modality == "vision":
        encoder = _vision_encoder(config, version=version, channels=inputs.shape[1], **common)
    elif modality == "audio":
        encoder = _audio_encoder(config, version=version, **common)
    elif modality == "sound":
        encoder = _sound_encoder(config, **common)
        inputs = spectrograms(inputs)
    else:
        encoder = _text_encoder(config, **common)
        inputs = inputs.long()
    # The originals sum the class-token term over rows; ours is a mean over rows (ALGORITHM.md 7, row 5).
    weight = config.get("cls_loss", _number_after("cls", config["loss"], 0.0)) * inputs.shape[0] * masks_per_sample
    reduction = (
        "mean" if "mean over" in config["loss"] else "sum_over_sqrt_dim" if "sqrt(D)" in config["loss"] else "sum"
    )
    model = Data2Vec(
        encoder=encoder,
        decoder=_decoder(config, version=version, modality=modality),
        targets=TargetBuilder(
            target_layer=config.get("tap", "ffn"),
            top_k_layers=config["top_k"],
            layer_norms=layer_norms,
            mean_norms=mean_norms,
            reference_padding=False,
        ),
        mask_mode="drop" if version == 2 else "corrupt" if modality == "text" else "replace",
        masks_per_sample=masks_per_sample,
        loss_beta=_number_after("beta", config["loss"], 0.0),
        channel_reduction=reduction,
        class_token_weight=weight,
        tau_start=config.get("ema_decay", 0.5),
        tau_end=config.get("ema_end_decay", 0.5),
        tau_anneal_steps=config.get("ema_anneal_end_step", 0),
        share_embeddings=TEACHER[modality, version]["share_embeddings"],
        copied=TEACHER[modality, version]["copied"],
    )
    masked = (
        tensors["in/mask" if version == 1 else "in/precomputed_mask"].view(inputs.shape[0], masks_per_sample, -1).bool()
    )
    corrupted = tensors["in/tokens_student"].long()[:, None] if "in/tokens_student" in tensors else None
    batch = Batch(inputs=inputs, masks=Masks.from_masked(masked), corrupted=corrupted)
    names = _names(config, version=version, modality=modality, depth=depth)
    recording = Recording(config, scalars, tensors, model, names, TEACHER[modality, version]["prefix"], batch)
    weights = recording.group("student")
    weights |= {
        name.replace("student.", "teacher.encoder.", 1): value for name, value in _teacher(recording, "teacher")
    }
    state = model.state_dict(keep_vars=True)
    fixed = {name for name, _ in model.named_buffers()} - set(state)  # positions, recomputed by us
    missing = set(state) - set(weights)
    if modality == "audio":
        # The original averages the transformer alone; our teacher has the vector for hidden frames, and no use for it.
        missing -= {"teacher.encoder.mask_token"}
    assert not missing, f"the recording lacks {sorted(missing)}"
    unexpected = sorted(set(weights) - set(state) - fixed)
    assert not unexpected, f"the model lacks {unexpected}"
    # EAT computes its positions in float32, which shows in late rows.
    exact = 100 if modality == "sound" else None
    for name in sorted(fixed & set(weights)):
        ours = dict(model.named_buffers())[name]
        torch.testing.assert_close(ours, weights[name], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours[:, :exact], weights[name][:, :exact], rtol=0, atol=1e-6)
    loaded = {name: weights.get(name, state[name]) for name in state}
    model.load_state_dict(loaded, strict=True)
    return recording


def spectrograms(recorded: Tensor) -> Tensor:
    """EAT's inputs (B, 1, frames, mel) as ours, (B, mel, frames)."""
    return recorded[:, 0].mT


def _teacher(recording: Recording, group: str) -> list[tuple[str, Tensor]]:
    """Recorded teacher tensors; the original 1.0 code also averages the head, which has no part in the targets."""
    return [(name, value) for name, value in recording.group(group).items() if not name.startswith("decoder.")]


def relative_error(measured: Tensor | float, recorded: Tensor | float) -> float:
    measured, recorded = torch.as_tensor(measured), torch.as_tensor(recorded)
    return float((measured - recorded).abs().max() / recorded.abs().max())


WITH_A_BIAS = ("vision_v1", "audio_v2")
FILES = sorted([*FOLDER.glob("*.safetensors"), *FOLDER.glob("eat/*.safetensors")])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", FILES, ids=[file.stem for file in FILES])


def _modality(path: Path) -> str:
    config = json.loads(path.with_suffix(".json").read_text())["config"]
    told_by = {"image_px": "vision", "conv_layers": "audio", "mel_bins": "sound"}
    return next((modality for name, modality in told_by.items() if name in config), "text")


@pytest.fixture
def recording(path: Path, request: pytest.FixtureRequest) -> Recording:
    backend = getattr(request, "param", "sdpa")
    if backend == "flex":
        request.getfixturevalue("flex_on_cpu")
    if backend == "flash" and path.stem in WITH_A_BIAS:
        pytest.skip("flash supports no position bias")
    return load(path, attention=backend)


@pytest.fixture
def output(recording: Recording) -> Data2VecOutput:
    output = recording.model.train()(recording.batch)
    output.loss.backward()
    return output


def test_there_are_recordings() -> None:
    assert FILES, f"no recordings in {FOLDER}"


@pytest.mark.parametrize("recording", NAMES, indirect=True)
def test_loss_predictions_and_targets(recording: Recording, output: Data2VecOutput) -> None:
    assert output.loss.item() == pytest.approx(recording.scalars["loss"], rel=1e-5)
    size = recording.scalars.get("sample_size")
    assert size is None or output.predictions.shape[0] == output.targets.shape[0] == size
    for name, tensor in (("predictions", output.predictions), ("targets", output.targets)):
        if f"out/{name}_masked" in recording.tensors:
            torch.testing.assert_close(tensor, recording.tensors[f"out/{name}_masked"], rtol=0, atol=1e-5)


def test_loss_terms_and_collapse_metrics(recording: Recording, output: Data2VecOutput) -> None:
    scalars = recording.scalars
    recorded = scalars.get("loss_terms_sum") or {"regression": scalars.get("loss_sum")}
    ours = {"cls" if name == "class_token" else name: value.item() for name, value in output.terms.items()}
    assert set(ours) == {name.rpartition("_")[2] for name in recorded}
    if "sample_size" in scalars:
        terms = {name.rpartition("_")[2]: value / scalars["sample_size"] for name, value in recorded.items()}
        assert ours == pytest.approx(terms, rel=1e-5)
    for name, tensor in (("target_std", output.targets), ("pred_std", output.predictions)):
        if name in scalars:
            assert std_over_rows(tensor).item() == pytest.approx(scalars[name], rel=1e-4)


@pytest.mark.parametrize("recording", NAMES, indirect=True)
def test_gradients(recording: Recording, output: Data2VecOutput) -> None:
    gradients = {
        name: parameter.grad for name, parameter in recording.model.named_parameters() if parameter.requires_grad
    }
    recorded = recording.group("grad")
    assert set(gradients) == set(recorded)
    largest = max(value.abs().max().item() for value in recorded.values())
    for name, value in recorded.items():
        # Key biases have a zero gradient: what is recorded there is rounding noise, hence the second term.
        allowed = recording.gradient_error * value.abs().max().item() + 1e-7 * largest
        difference = (gradients[name] - value).abs().max().item()
        assert difference <= allowed, f"{name}: differs by {difference:.3g}, allowed {allowed:.3g}"


def test_targets_at_all_positions_and_teacher_taps(recording: Recording) -> None:
    model, tensors = recording.model.eval(), recording.tensors
    if "out/targets_all_positions" not in tensors:
        pytest.skip("no targets recorded")
    embedded = model.student.embed(recording.batch.inputs)
    targets = model.compute_targets(recording.batch, embedded)
    torch.testing.assert_close(targets, tensors["out/targets_all_positions"], rtol=0, atol=1e-5)
    layers = tensors.get("out/teacher_tap_per_layer")
    if layers is not None:
        encoder = model.teacher.encoder
        tokens = embedded[0] if model.teacher.share_embeddings else encoder.embed(recording.batch.inputs)[0]
        output = encoder.contextualize(tokens, target_layer=model.targets.target_layer, top_k_layers=layers.shape[0])
        for ours, recorded in zip(output.layers, layers, strict=True):
            torch.testing.assert_close(ours, recorded, rtol=0, atol=1e-5)


def test_teacher_after_two_updates(recording: Recording) -> None:
    recorded = dict(_teacher(recording, "teacher_after_2_updates"))
    if not recorded:
        assert "ema_decays" not in recording.scalars
        pytest.skip("nothing recorded after teacher updates")
    decays = [recording.model.step_teacher(step) for step in (1, 2)]
    assert decays == pytest.approx(recording.scalars["ema_decays"], rel=1e-9)
    averaged = {name.replace("student.", "", 1): value for name, value in recorded.items()}
    teacher = dict(recording.model.teacher.encoder.named_parameters())
    if "positions.convolutions.0.weight" in teacher:
        teacher.pop("mask_token", None)  # not part of the original's teacher
    assert set(teacher) <= set(averaged)
    for name, parameter in teacher.items():
        torch.testing.assert_close(parameter, averaged[name], rtol=0, atol=1e-6)


def test_features_of_whole_inputs(recording: Recording) -> None:
    recorded = recording.tensors.get("out/features_unmasked")
    if recorded is None:
        pytest.skip("no features recorded")
    features = recording.model.eval().student(recording.batch.inputs).tokens
    torch.testing.assert_close(features, recorded, rtol=0, atol=1e-5)


def test_relative_position_index(recording: Recording) -> None:
    recorded = recording.tensors.get("out/relative_position_index")
    if recorded is None:
        pytest.skip("no index recorded")
    student = recording.model.student
    index = relative_position_index(student.grid, student.num_prefix_tokens)
    assert torch.equal(index, recorded.long())
