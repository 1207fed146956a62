"""Encoders of other libraries: the contract, both objectives, their weights as a start, and the way back."""

import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data2vec_train.errors import ConfigError
from data2vec_train.testing import check_encoder
from data2vec_train.weights.convert import load_pretrained
from data2vec_train.wrapped import hf
from data2vec_train.wrapped import timm as wrapped_timm

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

SIDE, PATCH = 16, 4
IMAGES = {"image_px": SIDE, "patch_px": PATCH, "channels": 1}
TIMM = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}
TIMM |= {"prenet_depth": 1, "activation_checkpointing": False}
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FFN = {"intermediate_size": 64}
FRONT = {"conv_dim": [16] * 3, "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3}
FRONT |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
WORDS = {"vocab_size": 50, "max_position_embeddings": 60}
BIASES = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True, "use_mask_token": True}
FAMILIES = {
    "vit": ("ViTConfig", SIZE | FFN, IMAGES),
    "beit": ("BeitConfig", SIZE | FFN, IMAGES),
    "beit with biases": ("BeitConfig", SIZE | FFN | BIASES | {"use_absolute_position_embeddings": True}, IMAGES),
    "dinov2": ("Dinov2Config", SIZE, IMAGES),
    "wav2vec2": ("Wav2Vec2Config", SIZE | FFN | FRONT, {"channels": 1}),
    "wav2vec2 pre-norm": (
        "Wav2Vec2Config",
        SIZE | FFN | FRONT | {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
        {"channels": 1},
    ),
    "hubert": ("HubertConfig", SIZE | FFN | FRONT, {"channels": 1}),
    "bert": ("BertConfig", SIZE | FFN | WORDS, {"vocab_size": 50, "max_tokens": 40}),
    "roberta": ("RobertaConfig", SIZE | FFN | WORDS, {"vocab_size": 50, "max_tokens": 40}),
}
INPUTS = {
    "HFImages": lambda: torch.randn(3, 1, SIDE, SIDE),
    "HFSpeech": lambda: torch.randn(3, 1200),
    "HFText": lambda: torch.randint(3, 50, (3, 30)),
}
NAMES = ("test_vit", "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2")
NAMES += ("deit3_small_patch16_224", "vit_base_patch16_clip_224")


def timm_encoder(name: str = "test_vit", *, mask_token: bool = False, **other) -> wrapped_timm.TimmViT:
    torch.manual_seed(0)
    return wrapped_timm.TimmViT(name=name, mask_token=mask_token, **IMAGES, **(TIMM | other))


def hf_encoder(family: str, *, mask_token: bool = False, **other):
    name, sizes, inputs = FAMILIES[family]
    config = getattr(transformers, name)(**sizes).to_dict()
    kind = getattr(hf, hf.FAMILIES[config["model_type"]][0])
    settings = {"inputs": inputs, "prenet_depth": 1, "activation_checkpointing": False} | other
    torch.manual_seed(0)
    made = kind(path="-", config=json.dumps(config), mask_token=mask_token, **settings)
    with torch.no_grad():
        for parameter in made.parameters():  # transformers starts some of them with zeros
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_timm_keeps_the_contract(name, mode):
    encoder = timm_encoder(name, mask_token=mode == "replace")
    check_encoder(encoder, torch.randn(2, 1, SIDE, SIDE), mode=mode, variable_length=False, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["hidden", "drop"])
def test_transformers_keeps_the_contract(family, way):
    kind = type(hf_encoder(family)).__name__
    mode = "drop" if way == "drop" else "corrupt" if kind == "HFText" else "replace"
    encoder = hf_encoder(family, mask_token=mode == "replace")
    check_encoder(encoder, INPUTS[kind](), mode=mode, variable_length=kind != "HFImages")


@pytest.mark.parametrize("name", NAMES)
def test_timm_computes_the_same_from_these_weights(name):
    encoder = timm_encoder(name).eval()
    images = torch.randn(2, 1, SIDE, SIDE)
    with torch.no_grad():
        found, expected = encoder(images), encoder.library_model().forward_features(images)
    assert torch.equal(found.tokens, expected[:, encoder.num_prefix_tokens :])
    assert torch.equal(found.prefix[:, -1], expected[:, 0])  # the class token


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_from_these_weights(family):
    encoder = hf_encoder(family).eval()
    inputs = INPUTS[type(encoder).__name__]()
    with torch.no_grad():
        found, expected = encoder(inputs), encoder.library_model()(inputs).last_hidden_state
    torch.testing.assert_close(found.tokens, expected[:, encoder.num_prefix_tokens :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [timm_encoder, lambda **given: hf_encoder("bert", **given)])
def test_ffn_targets_are_the_raw_output_of_the_second_linear_layer(make):
    encoder = make().eval()
    inputs = torch.randn(2, 1, SIDE, SIDE) if encoder.num_prefix_tokens else INPUTS["HFText"]()
    tokens, _ = encoder.embed(inputs)
    seen = []
    last = encoder.blocks()[-1]
    linear = last.mlp.fc2 if encoder.num_prefix_tokens else last.output.dense
    linear.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    output = encoder.contextualize(tokens, target_layer="ffn", top_k_layers=1)
    assert torch.equal(output.layers[0], seen[0][:, encoder.num_prefix_tokens :])


@pytest.mark.parametrize("make", [timm_encoder, lambda **given: hf_encoder("beit with biases", **given)])
def test_activation_checkpointing_changes_no_gradient(make):
    images, gradients = torch.randn(2, 1, SIDE, SIDE), []
    for checkpointing in (False, True):
        encoder = make(activation_checkpointing=checkpointing).train()
        encoder(images).tokens.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be wrapped


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_tinny_patch16_224", "timm has no model called vit_tinny_patch16_224"),
        ("resnet18", "not a plain vision transformer"),
        ("hf-hub:someone/something", "timm has no model called"),
        ("vit_base_patch16_siglip_224", "not a plain vision transformer"),
    ],
)
def test_what_timm_cannot_give_is_one_sentence(name, said):
    with pytest.raises(ConfigError, match=said):
        wrapped_timm.facts(name)


def test_what_transformers_cannot_give_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="there is no .*nothing is downloaded"):
        hf.facts("google/vit-base-patch16-224")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="of type llama; supported are vit, "):
        hf.facts(str(tmp_path))
    with pytest.raises(ConfigError, match=r"modality.block_tokens=70: .* has positions for 60"):
        hf_encoder("bert", inputs={"vocab_size": 50, "max_tokens": 70})
    with pytest.raises(ConfigError, match=r"modality.vocab_size=51: .* has 50 tokens"):
        hf_encoder("bert", inputs={"vocab_size": 51, "max_tokens": 40})


def test_a_config_cannot_ask_for_code():
    config = {"model_type": "vit", "_attn_implementation": "kernels-community/x", "attn_implementation": "someone/x"}
    config |= {"auto_map": {"AutoModel": "evil.Model"}} | SIZE | FFN
    model = hf.build_model(config)
    assert type(model) is transformers.ViTModel
    assert model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, and the weights of both libraries."""
    folder = tmp_path_factory.mktemp("wrapped")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(folder / f"images/{number:02d}.png")
    torch.manual_seed(1)
    config = transformers.ViTConfig(**SIZE, **FFN, image_size=SIDE, patch_size=PATCH, num_channels=1)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
    model = timm.create_model("test_vit", img_size=SIDE, patch_size=PATCH, in_chans=1, num_classes=7)
    torch.save(model.state_dict(), folder / "test_vit.pth")
    return folder


def command(folder: Path, library: str, *more: str) -> list[str]:
    which = {"timm": ["encoder.name=test_vit"], "hf": [f"encoder.path={folder}/vit"]}[library]
    return [
        *("modality=vision", f"encoder={library}", *which, "data=folder", f"data.path={folder}/images"),
        *(f"modality.image_px={SIDE}", f"modality.patch_px={PATCH}", "modality.channels=1", "modality.mean=[0.5]"),
        *("modality.std=[0.25]", "data.batch_size_per_device=4", "objective.masks_per_sample=2", "precision=fp32"),
        *("trainer.log_every_n_steps=1", "callbacks.probe.rank_samples=8", "callbacks.monitor.grace_steps=1000"),
        *("modality.visible_block_patches=2", "data.held_out_fraction=0.2", "data.num_workers=0", *more),
    ]


def losses(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("objective", [pytest.param("data2vec", marks=pytest.mark.slow), "data2vec2"])
def test_it_trains_resumes_and_embeds(run_program, folder, tmp_path, library, objective):
    weights = {"timm": folder / "test_vit.pth", "hf": folder / "vit"}[library]
    more = [f"objective={objective}", f"init_from={weights}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, steps in ((whole, 3), (parts, 2), (parts, 3)):
        done = run_program(*command(folder, library, *more, f"trainer.max_steps={steps}", f"hydra.run.dir={run}"))
        assert done.returncode == 0, done.stderr
        if run is parts and steps == 2:
            (parts / "summary.json").unlink()
            more.append("resume=changed")
    assert len(losses(whole)) == 3
    assert losses(parts)[-1] == losses(whole)[-1]
    out = tmp_path / "features.parquet"
    images = f"data.path={folder}/images"
    done = run_program("modality=vision", f"checkpoint={whole}", "data=folder", images, f"out={out}", verb="embed")
    assert done.returncode == 0, done.stderr
    assert out.is_file()
    back = tmp_path / "back"
    done = run_program(f"checkpoint={whole}", f"format={library}", f"out={back}", verb="export")
    assert done.returncode == 0, done.stderr
    card = (back / "README.md").read_text()
    assert ("checkpoint_path=" if library == "timm" else "AutoModel.from_pretrained") in card
    assert type(load_pretrained(whole).get_encoder()).__module__ == f"data2vec_train.wrapped.{library}"


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_it_starts_from_the_weights_of_the_library(composed, folder, library):
    from data2vec_train.training.assemble import build_objective
    from data2vec_train.training.init_from import config_from_pretrained, initialise

    weights = {"timm": folder / "test_vit.pth", "hf": folder / "vit"}[library]
    cfg = composed(*command(folder, library, f"init_from={weights}"))
    start = config_from_pretrained(cfg)
    objective = build_objective(cfg)
    notes = initialise(objective, start, "")
    assert "the teacher starts as a copy of the student" in notes
    images = torch.randn(2, 1, SIDE, SIDE)
    with torch.no_grad():
        if library == "hf":
            expected = transformers.ViTModel.from_pretrained(weights).eval()(images).last_hidden_state
        else:
            model = timm.create_model("test_vit", img_size=SIDE, patch_size=PATCH, in_chans=1, num_classes=7)
            model.load_state_dict(torch.load(weights))
            expected = model.eval().forward_features(images)
        for encoder in (objective.student.eval(), objective.teacher.encoder):
            torch.testing.assert_close(encoder(images).tokens, expected[:, 1:], atol=1e-5, rtol=0)


def test_weights_of_another_size_are_one_sentence(composed, folder):
    from data2vec_train.training.assemble import build_objective
    from data2vec_train.training.init_from import config_from_pretrained, initialise

    cfg = composed(*command(folder, "hf", f"init_from={folder}/vit", "modality.image_px=32"))
    start = config_from_pretrained(cfg)
    with pytest.raises(ConfigError, match="position_embeddings is .*set the sizes of the inputs"):
        initialise(build_objective(cfg), start, "")


@pytest.mark.parametrize("make", [timm_encoder, *(functools.partial(hf_encoder, family) for family in FAMILIES)])
def test_it_goes_back_into_the_library(tmp_path, make):
    encoder = make().eval()
    encoder.save_for_library(tmp_path)
    inputs = encoder.example()
    with torch.no_grad():
        torch.testing.assert_close(encoder.read_back(tmp_path, inputs), encoder(inputs).tokens, atol=1e-5, rtol=0)
        if encoder.library == "timm":
            model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
            expected = model.forward_features(inputs)[:, encoder.num_prefix_tokens :]
            torch.testing.assert_close(encoder(inputs).tokens, expected, atol=1e-5, rtol=0)
