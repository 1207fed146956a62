"""Continued pretraining: whatever the weights come from, 1.0 and 2.0 start with them and say what is new."""

import itertools

import pytest
import torch
from omegaconf import OmegaConf

import data2vec_train as ours
from data2vec_train import checkpoints
from data2vec_train.batch import Batch, Masks
from data2vec_train.encoders.waveform import ConvLayer
from data2vec_train.errors import ConfigError
from data2vec_train.export.run import example_for
from data2vec_train.training import init_from
from data2vec_train.training.assemble import build_objective
from data2vec_train.training.init_from import config_from_pretrained, initialise
from data2vec_train.weights.convert import load_pretrained
from data2vec_train.weights.preprocessing import AudioFeatureExtractor

TINY = ("size.dim=32", "size.depth=3", "size.num_heads=4", "size.ffn_dim=48", "size.conv_dim=16")
SMALL_INPUTS = {
    "vision": ("modality.image_px=32", "modality.patch_px=8"),
    "audio": (),
    "text": ("modality.block_tokens=32",),
}
OBJECTIVES = ("data2vec", "data2vec2")
MODALITIES = ("vision", "audio", "text")


def settings(modality: str, objective: str, *more: str) -> list[str]:
    return [f"modality={modality}", f"objective={objective}", "data=folder", "data.path=nowhere", *more]


@pytest.fixture
def trained(composed, tmp_path):
    """A checkpoint as a run writes them, with weights that nothing else has."""

    def make(modality: str, objective: str):
        cfg = composed(*settings(modality, objective, *TINY, *SMALL_INPUTS[modality]))
        torch.manual_seed(3)
        model = build_objective(cfg)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        path = tmp_path / f"{modality}-{objective}.ckpt"
        config = OmegaConf.to_container(cfg, resolve=True)
        torch.save({"state_dict": {f"objective.{k}": v for k, v in model.state_dict().items()}, "config": config}, path)
        return path, model

    return make


def start_from(composed, path, modality: str, objective: str, *more: str):
    torch.manual_seed(4)
    cfg = composed(*settings(modality, objective, f"init_from={path}", *more))
    start = config_from_pretrained(cfg)
    model = build_objective(cfg)
    return model, initialise(model, start, str(path)), cfg


def runs(model) -> None:
    """One forward and backward pass on noise."""
    inputs = example_for_encoder(model.student)
    tokens, mask = model.student.embed(inputs)
    num_tokens = tokens.shape[1]
    masked = torch.zeros(len(inputs), model.masks_per_sample, num_tokens, dtype=torch.bool)
    masked[:, :, 1 : 1 + num_tokens // 3] = True
    corrupted = (
        inputs[:, None].expand(-1, model.masks_per_sample, *inputs.shape[1:]) if model.mask_mode == "corrupt" else None
    )
    loss = model(Batch(inputs=inputs, masks=Masks.from_masked(masked), corrupted=corrupted)).loss
    loss.backward()
    assert loss.isfinite()
    assert mask is None


def example_for_encoder(encoder) -> torch.Tensor:
    if hasattr(encoder, "image_size"):
        return torch.randn(2, encoder.embedder.project.in_channels, *encoder.image_size)
    if hasattr(encoder, "max_tokens"):
        return torch.randint(4, encoder.embedder.tokens.num_embeddings, (2, 20))
    return torch.randn(2, next(size for size in range(10**6) if encoder.token_count(size) >= 20))


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize(("before", "after"), list(itertools.product(OBJECTIVES, OBJECTIVES)))
def test_a_run_goes_on_from_a_run(modality, before, after, composed, trained):
    path, old = trained(modality, before)
    model, notes, cfg = start_from(composed, path, modality, after, *SMALL_INPUTS["text"] * (modality == "text"))
    assert cfg.size.dim == 32
    expected = old.student.state_dict()
    found = model.student.state_dict()
    same = {name for name in found if name in expected}
    assert all(torch.equal(found[name], expected[name]) for name in same)
    teacher, averaged = model.teacher.encoder.state_dict(), old.teacher.encoder.state_dict()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in teacher.items() if name in averaged)
    new = set(found) - same
    assert new <= {"mask_token"}
    assert ("mask token is new" in " ".join(notes)) == bool(new)
    if before == after:
        assert not notes
        assert all(
            torch.equal(tensor, old.decoder.state_dict()[name]) for name, tensor in model.decoder.state_dict().items()
        )
    else:
        assert "the decoder is new" in " ".join(notes)
    runs(model)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_goes_on_from_a_folder_of_transformers(modality, objective, composed, tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    more = {
        "audio": {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4},
        "text": {"vocab_size": 50262, "max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "vision": {
            "image_size": 32,
            "patch_size": 8,
            "use_shared_relative_position_bias": True,
            "use_mean_pooling": False,
        },
    }[modality]
    name = f"Data2Vec{modality.title()}"
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**size | more)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(tmp_path)
    model, notes, _ = start_from(composed, tmp_path, modality, objective)
    assert any("the teacher starts as a copy" in note for note in notes)
    assert any("the decoder is new: the file has none" in note for note in notes)
    # The student computes what transformers' model does, token types included.
    inputs = example_for_encoder(model.student)
    model.eval()
    encoded = model.student(inputs)
    expected = theirs(inputs).last_hidden_state[:, -encoded.tokens.shape[1] :]
    torch.testing.assert_close(encoded.tokens, expected, atol=5e-6, rtol=1e-5)
    runs(model.train())


def test_the_last_run_of_a_directory_is_found(composed, trained, tmp_path):
    path, old = trained("vision", "data2vec2")
    run = tmp_path / "run"
    checkpoints.write(torch.load(path), run / "checkpoints" / "step-00000006", pointers=["last"], keep_last=1)
    model, notes, _ = start_from(composed, run, "vision", "data2vec2")
    assert not notes
    assert torch.equal(model.student.class_token, old.student.class_token)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_fresh_teacher_is_a_copy_of_the_student(modality, composed, trained):
    path, old = trained(modality, "data2vec")
    cfg = composed(*settings(modality, "data2vec", f"init_from={path}", *SMALL_INPUTS[modality]))
    start = config_from_pretrained(cfg)
    model = build_objective(cfg)
    notes = initialise(model, start, str(path), fresh_teacher=True)
    assert "the teacher starts as a copy of the student" in notes
    student, teacher = old.student.state_dict(), model.teacher.encoder.state_dict()
    assert all(torch.equal(tensor, student[name]) for name, tensor in teacher.items())
    assert all(
        torch.equal(tensor, old.decoder.state_dict()[name]) for name, tensor in model.decoder.state_dict().items()
    )


def test_the_size_of_images_comes_from_the_file_and_is_said(composed, trained, monkeypatch):
    said = []
    monkeypatch.setattr(init_from.log, "info", lambda text, *values: said.append(text % values))
    path, _ = trained("vision", "data2vec2")
    _, _, cfg = start_from(composed, path, "vision", "data2vec2", "modality.image_px=96", "modality.patch_px=8")
    assert cfg.modality.image_px == 32
    assert said == [f"modality.image_px=32, as in {path}"]


def test_weights_of_another_modality_are_refused(composed, trained):
    path, _ = trained("vision", "data2vec2")
    with pytest.raises(ConfigError, match="is a model for vision; choose modality=vision"):
        start_from(composed, path, "audio", "data2vec2")


def test_another_vocabulary_is_refused(composed, tmp_path):
    config = ours.Data2VecTextConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    ours.Data2VecTextModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a vocabulary of 99 tokens, the tokenizer has 50262.*tokenizer\.path"):
        start_from(composed, tmp_path, "text", "data2vec")
    with pytest.raises(ConfigError, match="has no tokenizer beside it"):
        start_from(composed, tmp_path, "text", "data2vec", "modality.tokenizer.train_vocab_size=300")


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpoints_of_ours_become_models_of_the_page(modality, objective, trained, tmp_path):
    path, old = trained(modality, objective)
    for weights, encoder in (("student", old.student), ("teacher", old.teacher.encoder)):
        model = load_pretrained(path, weights=weights)
        assert type(model).__name__ == f"Data2Vec{modality.title()}Model"
        given = next(iter(example_for(model).inputs.values()))[:1]  # the one without padding
        if encoder.embedder is None:
            encoder.embedder = old.student.embedder  # a teacher that shares it
        for layer in (*encoder.modules(), *model.modules()):
            if isinstance(layer, ConvLayer):
                layer.as_matmul = False  # models that transformers has round as it does
        encoded = encoder.eval()(given)
        expected = torch.cat([encoded.prefix, encoded.tokens], dim=1)
        torch.testing.assert_close(model(given).last_hidden_state, expected, atol=2e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------- how inputs are prepared


def run_of_8_khz(composed, path):
    """A checkpoint of a run at 8 kHz without normalisation."""
    cfg = composed(*settings("audio", "data2vec2", *TINY, "modality.sample_rate_hz=8000", "modality.normalise=false"))
    model = build_objective(cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"objective.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "config": OmegaConf.to_container(cfg, resolve=True)}, path)
    return path


def test_a_run_at_8_khz_is_continued_at_8_khz_and_says_so(composed, tmp_path, caplog):
    path = run_of_8_khz(composed, tmp_path / "alone.ckpt")  # nothing lies beside it
    cfg = composed(*settings("audio", "data2vec2", f"init_from={path}"))
    with caplog.at_level("INFO"):
        config_from_pretrained(cfg)
    assert (cfg.modality.sample_rate_hz, cfg.modality.normalise) == (8000, False)
    assert cfg.modality.preprocessing.sampling_rate == 8000
    assert cfg.modality.decode.sample_rate_hz == 8000
    assert "sample_rate_hz=8000, normalise=False" in caplog.text


def test_a_rate_that_the_command_sets_counts_and_the_difference_is_said(composed, tmp_path, caplog):
    path = run_of_8_khz(composed, tmp_path / "alone.ckpt")
    cfg = composed(*settings("audio", "data2vec2", f"init_from={path}", "modality.sample_rate_hz=4000"))
    with caplog.at_level("INFO"):
        config_from_pretrained(cfg, {"modality.sample_rate_hz"})
    assert (cfg.modality.sample_rate_hz, cfg.modality.normalise) == (4000, False)
    assert "modality.sample_rate_hz=4000, as you say" in caplog.text
    assert "8000" in caplog.text


def test_what_lies_beside_the_weights_goes_before_the_config_in_the_checkpoint(composed, tmp_path):
    path = run_of_8_khz(composed, tmp_path / "run" / "checkpoints" / "step-00000001" / "state.ckpt")
    AudioFeatureExtractor(sampling_rate=11025).save_pretrained(tmp_path / "run" / "preprocessing")
    cfg = composed(*settings("audio", "data2vec2", f"init_from={path}"))
    config_from_pretrained(cfg)
    assert (cfg.modality.sample_rate_hz, cfg.modality.normalise) == (11025, True)


def test_images_keep_the_mean_and_deviation_of_the_weights(composed, trained, tmp_path, caplog):
    path, _ = trained("vision", "data2vec2")
    content = torch.load(path, weights_only=True)
    content["config"]["modality"]["preprocessing"] |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    torch.save(content, path)
    cfg = composed(*settings("vision", "data2vec2", f"init_from={path}"))
    with caplog.at_level("INFO"):
        config_from_pretrained(cfg)
    assert (list(cfg.modality.mean), list(cfg.modality.std)) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert "mean=[0.1, 0.2, 0.3]" in caplog.text


def test_a_decoder_that_is_not_finite_is_refused_by_its_name(composed, trained):
    path, _ = trained("vision", "data2vec2")
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["state_dict"] if name.startswith("objective.decoder."))
    content["state_dict"][name].view(-1)[0] = float("nan")
    torch.save(content, path)
    with pytest.raises(ConfigError, match=f"{name.removeprefix('objective.decoder.')} holds 1 of .* not finite"):
        start_from(composed, path, "vision", "data2vec2", *SMALL_INPUTS["vision"])
