"""What EAT has besides data2vec 2.0, against recordings of the original: its front end, class token, lengths and head.

Loss, gradients, targets and teacher are in `test_golden.py`. The recordings are described in `tests/golden/README.md`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data2vec_train import load_pretrained, save_pretrained
from data2vec_train.data.audio import decode_audio
from data2vec_train.data.spectrogram import SILENCE, SpectrogramTransform
from data2vec_train.encoders.positions import sincos_grid
from data2vec_train.errors import WeightMismatch
from data2vec_train.objective.data2vec import mean_over_time
from data2vec_train.weights.sound import Data2VecSoundModel, SpectrogramExtractor
from tests.parity.test_golden import FILES, FOLDER, Recording, load, spectrograms

# mean and std of log-mel values (ALGORITHM.md 8.1)
STATISTICS = {"": (-4.268, 4.569), "_esc50": (-6.627, 5.359), "_spcv2": (-6.846, 5.565)}
EAT = [file for file in FILES if file.stem == "eat_v2"]


def recorded_beside(name: str) -> Path:
    """A file of the folder of recordings; the test is skipped where there is none."""
    found = next((path for path in (FOLDER / name, FOLDER / "eat" / name) if path.exists()), None)
    if found is None:
        pytest.skip(f"no {name} in {FOLDER}")
    return found


@pytest.fixture(params=EAT, ids=lambda file: file.stem)
def eat(request) -> Recording:
    recording = load(request.param)
    recording.model.eval()
    return recording


@pytest.fixture(scope="module")
def front_end() -> dict[str, np.ndarray]:
    return dict(np.load(recorded_beside("front_end.npz")))


def transform_for(num_frames: int, mel_bins: int, suffix: str = "") -> SpectrogramTransform:
    mean, std = STATISTICS[suffix]
    return SpectrogramTransform(
        sample_rate_hz=16_000,
        window_ms=25.0,
        frames_per_second=100,
        mel_bins=mel_bins,
        low_hz=20.0,
        high_hz=0.0,
        mean=mean,
        std=std,
        max_frames=num_frames,
        patch=1,  # any length
        crop="first",
        reference_padding=True,
    )


def decoded(wave: np.ndarray, rate: int, folder: Path) -> np.ndarray:
    """As from a file of floats."""
    soundfile.write(folder / "wave.wav", wave, rate, subtype="FLOAT")
    limits = {"min_seconds": 0.0, "min_level": 0.0, "max_level": 1e9}
    return decode_audio(folder / "wave.wav", sample_rate_hz=16_000, channels=1, **limits)


# --------------------------------------------------------------------------------------------------------- front end


def test_spectrograms_of_every_kind_of_file(front_end, tmp_path):
    """`mel_KIND_lenFRAMES_DATA` of `wave_KIND`: padded, cut, resampled, stereo, with three sets of statistics."""
    names = [name for name in front_end if name.startswith("mel_") and "_len" in name]
    assert len(names) >= 6
    for name in names:
        kind, _, rest = name.removeprefix("mel_").partition("_len")
        frames, _, data = rest.partition("_")
        wave, rate = ("16k_stereo", "16k") if kind == "stereo" else (kind, kind)
        recorded = torch.from_numpy(front_end[name])[0].mT  # (F, frames)
        transform = transform_for(int(frames), len(recorded), f"_{data}" if data else "")
        ours = transform.train(decoded(front_end[f"wave_{wave}"], 1000 * int(rate.removesuffix("k")), tmp_path))
        torch.testing.assert_close(ours, recorded, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_resampled_waveforms(front_end, tmp_path):
    ours = decoded(front_end["wave_32k"], 32_000, tmp_path)
    np.testing.assert_allclose(ours, front_end["wave_32k_resampled"], rtol=0, atol=1e-6)


def test_log_mel_values(front_end):
    recorded = front_end["mel_16k_raw"]  # (frames, F)
    ours = transform_for(160, recorded.shape[1]).log_mel(front_end["wave_16k"]).mT.numpy()
    # 1e-4 after normalisation: of energies near the floor, rounding is seen before it.
    np.testing.assert_allclose(ours, recorded, rtol=0, atol=1e-4 * 2 * STATISTICS[""][1])


def test_an_empty_filter_stays_at_the_floor(front_end):
    bank = next(value for name, value in front_end.items() if name.startswith("mel_filterbank"))  # (F, FFT bins)
    empty = np.flatnonzero(bank.sum(axis=1) == 0)
    mel = transform_for(160, len(bank)).log_mel(front_end["wave_16k"])
    assert len(empty)
    torch.testing.assert_close(mel[empty], torch.full_like(mel[empty], SILENCE))


def test_positions(front_end):
    given = torch.from_numpy(front_end["positions_given"])
    columns = json.loads(recorded_beside("eat_v2.json").read_text())["config"]["grid_time_by_mel"][1]
    torch.testing.assert_close(sincos_grid((len(given) // columns, columns), given.shape[1]), given, rtol=0, atol=1e-6)
    columns = 8  # of the published models
    name = next(name for name in front_end if name.startswith("positions_base_rows_"))
    rows = [int(row) for row in name.removeprefix("positions_base_rows_").split("_")]
    recorded = torch.from_numpy(front_end[name])
    ours = sincos_grid((max(rows) // columns + 1, columns), recorded.shape[1])[rows]
    for row, mine, theirs in zip(rows, ours, recorded, strict=True):
        # The original computes them in float32, which shows in late rows.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 if row < 100 else 1e-4)


# -------------------------------------------------------------------------------------------------------- class token


def test_class_tokens_and_what_they_are_compared_with(eat):
    tensors, model = eat.tensors, eat.model
    embedded = model.student.embed(eat.batch.inputs)
    _, student = model.predict(eat.batch, embedded)
    torch.testing.assert_close(student.prefix[:, 0], tensors["out/class_token_predictions"], rtol=0, atol=1e-5)
    summary = mean_over_time(model.compute_targets(eat.batch, embedded), None)
    torch.testing.assert_close(summary, tensors["out/class_token_targets"], rtol=0, atol=1e-5)


def test_features_with_the_class_token(eat):
    output = eat.model.student(eat.batch.inputs)
    ours = torch.cat([output.prefix, output.tokens], dim=1)
    torch.testing.assert_close(ours, eat.tensors["out/features_unmasked_with_class_token"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_frames", [None, 16])
def test_features_of_longer_and_shorter_inputs(eat, max_frames):
    """Beyond the kept positions, too: those are the rows that the formula gives."""
    student = eat.model.student
    if max_frames is not None:
        student.positions = student.positions[:, : student.token_count(max_frames)]
    longer = spectrograms(eat.tensors["in/source_longer"])
    columns, patch = eat.config["grid_time_by_mel"][1], eat.config["patch"]
    shorter = (eat.tensors["out/features_unmasked_shorter"].shape[1] - 1) // columns * patch
    for name, inputs in (("longer", longer), ("shorter", longer[..., :shorter])):
        output = student(inputs)
        ours = torch.cat([output.prefix, output.tokens], dim=1)
        torch.testing.assert_close(ours, eat.tensors[f"out/features_unmasked_{name}"], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def classified(eat) -> dict:
    """Logits of the recorded head on our encoder, and all that was recorded."""
    path = recorded_beside("finetune.npz")
    tensors = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    scalars = json.loads(path.with_suffix(".json").read_text())["scalars"]

    def head(features: torch.Tensor) -> torch.Tensor:
        weight, bias = tensors["fc_norm.weight"], tensors["fc_norm.bias"]
        normalised = F.layer_norm(features, features.shape[-1:], weight, bias, eps=1e-6)
        return F.linear(normalised, tensors["head.weight"], tensors["head.bias"])

    return {"student": eat.model.student, "head": head, "tensors": tensors, "scalars": scalars}


@torch.no_grad()
def test_logits_of_class_token_and_mean(classified):
    tensors = classified["tensors"]
    output = classified["student"](spectrograms(tensors["source"]))
    for name, features in (("class_token", output.prefix[:, 0]), ("mean_pooling", output.tokens.mean(dim=1))):
        torch.testing.assert_close(classified["head"](features), tensors[f"logits_{name}"], rtol=0, atol=1e-5)


def mixed(x: torch.Tensor, share: float) -> torch.Tensor:
    return share * x + (1 - share) * x.flip(0)


@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [
        "audioset_eval",
        "audioset_train_no_mixup",
        "audioset_train_mixup",
        "esc50_train_smoothing_0.1",
        "esc50_eval",
        "esc50_train_mixup",
        "spcv2_train_mixup",
        "spcv2_eval",
    ],
)
def test_losses_of_the_recorded_heads(classified, case):
    """AudioSet: binary cross entropy for each positive label; Speech Commands: for each clip; ESC-50: cross entropy."""
    tensors, recorded = classified["tensors"], classified["scalars"][case]
    share = recorded.get("lambda", 1.0)
    labels = mixed(tensors["labels_multi" if case.startswith("audioset") else "labels_single"], share)
    inputs = mixed(spectrograms(tensors["source"]), share)
    logits = classified["head"](classified["student"](inputs).prefix[:, 0])
    if case.startswith("esc50"):
        smoothing = 0.1 if "smoothing" in case else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    else:
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    size = labels.sum() if case.startswith("audioset") else len(labels)
    assert loss.item() == pytest.approx(recorded["loss_sum"], rel=1e-5)
    assert float(size) == pytest.approx(recorded["sample_size"], rel=1e-6)
    assert loss.item() / float(size) == pytest.approx(recorded["loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------- files of fairseq


def checkpoint(eat: Recording, folder: Path, *, steps: int | None = None) -> Path:
    """The recorded model as a file of the original program, with the positions of so many time steps."""
    student = {name.removeprefix("student/"): one for name, one in eat.tensors.items() if name.startswith("student/")}
    teacher = {name.removeprefix("teacher/"): one for name, one in eat.tensors.items() if name.startswith("teacher/")}
    name = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    if steps is not None:
        columns = eat.config["grid_time_by_mel"][1]
        student[name] = sincos_grid((steps, columns), eat.config["dim"])[None]
        teacher.pop(name, None)
    path = folder / "eat.pt"
    torch.save({"model": student | {"_ema": teacher}, "cfg": {"model": {"_name": "data2vec_multi"}}}, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("steps", [None, 768])
def test_a_file_of_the_original_gives_the_recorded_features(eat, tmp_path, steps):
    path = checkpoint(eat, tmp_path, steps=steps)
    heads = eat.config["num_heads"]
    model = load_pretrained(path, num_heads=heads)
    assert isinstance(model, Data2VecSoundModel)
    inputs = spectrograms(eat.tensors["in/source"])
    recorded = eat.tensors["out/features_unmasked_with_class_token"]
    torch.testing.assert_close(model(inputs).last_hidden_state, recorded, rtol=0, atol=1e-5)
    save_pretrained(model, tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())
    front_end = SpectrogramExtractor.from_pretrained(tmp_path / "saved")
    assert front_end.settings["mean"] == -4.268
    teacher = load_pretrained(path, num_heads=heads, weights="teacher")
    ours = {name.removeprefix("student."): one for name, one in eat.group("teacher").items()}
    for name, one in teacher.get_encoder().named_parameters():
        assert torch.equal(one, ours[name]), name


@torch.no_grad()
def test_a_folder_with_code_gives_the_same_and_runs_none_of_it(eat, tmp_path):
    """EAT on Hugging Face: the same tensors by other names."""
    folder, tensors = tmp_path / "remote", {}
    folder.mkdir()
    for name, one in eat.tensors.items():
        if name.startswith("student/") and ".decoder." not in name:
            name = name.removeprefix("student/").replace("modality_encoders.IMAGE.", "")
            tensors["model." + name.replace("context_encoder.norm", "pre_norm")] = one
    save_file(tensors, folder / "model.safetensors")
    described = {"model_type": "eat", "num_heads": eat.config["num_heads"], "embed_dim": eat.config["dim"]}
    described |= {"auto_map": {"AutoModel": "eat_model.EATModel"}, "architectures": ["EATModel"]}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "eat_model.py").write_text("raise RuntimeError('code was run')")
    output = load_pretrained(folder)(spectrograms(eat.tensors["in/source"]))
    recorded = eat.tensors["out/features_unmasked_with_class_token"]
    torch.testing.assert_close(output.last_hidden_state, recorded, rtol=0, atol=1e-5)
    tensors["model.blocks.9.attn.qkv.bias"] = tensors["model.blocks.0.attn.qkv.bias"].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightMismatch, match=r"blocks\.9|blocks\.2"):
        load_pretrained(folder)


def test_a_file_that_lacks_a_tensor_is_refused(eat, tmp_path):
    path = checkpoint(eat, tmp_path)
    content = torch.load(path)
    del content["model"]["blocks.0.attn.qkv.bias"]
    torch.save(content, path)
    with pytest.raises(WeightMismatch, match="blocks.0.attn.qkv.bias"):
        load_pretrained(path, num_heads=eat.config["num_heads"])
