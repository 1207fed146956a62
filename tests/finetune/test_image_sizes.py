"""Sizes that weights decide, with one rule in every command; images that are not square, more than four channels."""

import json
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import data2vec_train as ours
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.weights.convert import load_pretrained, refusal_of_transformers, with_image_size, wrap
from data2vec_train.weights.preprocessing import ImageProcessor
from data2vec_train.weights.vision import encoder_arguments
from tests.tiffs import tiff

SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}


def small(image_px, *, positions: bool = False, bias: bool = True, channels: int = 3) -> ours.Data2VecVisionModel:
    torch.manual_seed(0)
    config = ours.Data2VecVisionConfig(
        **SIZE,
        image_size=image_px,
        patch_size=8,
        num_channels=channels,
        out_indices=[0, 1, 2, 3],
        use_shared_relative_position_bias=bias,
        use_absolute_position_embeddings=positions,
        use_mean_pooling=False,
    )
    model = ours.Data2VecVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def version_two(image_px) -> ours.Data2VecVisionModel:
    """A 2.0 encoder: fixed positions, which transformers does not have."""
    config = ours.Data2VecVisionConfig(**SIZE, image_size=32, patch_size=8)
    arguments = encoder_arguments(config) | {"image_px": image_px, "positions": "sincos", "relative_bias": "none"}
    arguments |= {"norm_first": False, "final_norm": False, "layer_scale": None, "qkv_bias": "qkv", "mask_token": False}
    torch.manual_seed(0)
    encoder = VisionEncoder(**arguments)
    return wrap("data2vec_train.encoders.vision.VisionEncoder", arguments, encoder.state_dict(), where="x").eval()


@pytest.fixture
def folder(tmp_path):
    def save(model, name: str = "weights", size=32):
        model.save_pretrained(tmp_path / name)
        channels = model.get_encoder().embedder.project.in_channels
        ImageProcessor(size=size, image_mean=[0.4], image_std=[0.2], channels=channels).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def images(tmp_path):
    """A table of arrays in two classes."""

    def make(height: int = 40, width: int = 40, channels: int = 3, count: int = 12):
        import datasets

        rng = np.random.default_rng(0)
        shape = (height, width, channels)
        rows = [rng.integers(0, 128, shape) + 100 * (number % 2) for number in range(count)]
        features = datasets.Features({"image": datasets.Array3D(shape, "uint8"), "kind": datasets.Value("string")})
        table = {"image": [image.astype("uint8") for image in rows], "kind": ["dark", "light"] * (count // 2)}
        path = tmp_path / f"{height}x{width}x{channels}.parquet"
        datasets.Dataset.from_dict(table, features=features).to_parquet(path)
        return path

    return make


def fine_tuned(program_of, tmp_path, weights, data, *more: str, name: str = "run"):
    given = ["modality=vision", "head=image", f"init_from={weights}", "data=hf", f"data.path={data}"]
    given += [f"data.test_source={{path:{data}}}", "data.label_column=kind", "trainer.max_steps=2"]
    given += ["data.num_workers=0", "callbacks.monitor.progress=none", f"cache_dir={tmp_path}/cache"]
    given += ["data.batch_size_per_device=4", f"hydra.run.dir={tmp_path}/{name}"]
    return program_of("finetune", *given, *more), tmp_path / name


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "make", [small, lambda px: small(px, positions=True), version_two], ids=["bias", "learned", "2"]
)
@pytest.mark.parametrize("size", [64, [32, 64], [48, 16]])
def test_another_size_is_what_the_model_makes_of_such_images(make, size, tmp_path):
    model = make(32)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(2, 3, height, width)
    resized = with_image_size(model, size)
    assert resized.get_encoder().image_size == (height, width)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        torch.testing.assert_close(resized(pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
        resized.save_pretrained(tmp_path)
        again = load_pretrained(tmp_path)
        torch.testing.assert_close(again(pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-4)


def test_fixed_positions_are_made_anew():
    from data2vec_train.encoders.positions import sincos_grid

    resized = with_image_size(version_two(32), [64, 32])
    assert torch.equal(resized.get_encoder().positions[0], sincos_grid((8, 4), 32))


@pytest.mark.parametrize("size", [[32, 64], [64, 32]])
def test_biases_of_images_that_are_not_square_are_not_for_transformers(size):
    assert "squares only" in refusal_of_transformers(small(size))
    assert refusal_of_transformers(small(32)) is None


def test_what_transformers_would_take_the_wrong_way_round_has_a_type_of_its_own(tmp_path):
    with_image_size(small(32), [32, 64]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("data2vec_train")


# ------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize(("make", "size"), [(small, "[32,64]"), (version_two, "64")], ids=["1.0", "2.0"])
def test_every_command_works_at_a_size_that_is_asked_for(make, size, program_of, folder, images, tmp_path, capsys):
    weights, data = folder(make(32)), images(64, 64)
    asked = f"modality.image_px={size}"
    status, run = fine_tuned(program_of, tmp_path, weights, data, asked)
    assert status == 0
    assert "was made for 32x32: its positions and biases are resized" in capsys.readouterr().out
    wanted = OmegaConf.create(f"x: {size}").x
    assert OmegaConf.load(run / "config.yaml").modality.image_px == wanted
    sides = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
    assert load_pretrained(run).get_encoder().image_size == sides
    common = ["modality=vision", "data=hf", f"data.path={data}", "data.num_workers=0", f"cache_dir={tmp_path}/cache"]
    assert program_of("predict", *common, f"checkpoint={run}", f"out={tmp_path}/own.jsonl") == 0
    assert program_of("predict", *common, f"checkpoint={run}", f"out={tmp_path}/a.jsonl", "modality.image_px=32") == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 12
    assert program_of("embed", *common, f"checkpoint={weights}", f"out={tmp_path}/a.parquet", asked) == 0
    more = ["data.label_column=kind", "probes=[knn]", f"hydra.run.dir={tmp_path}/probe"]
    assert program_of("probe", *common, *more, f"checkpoint={weights}", asked) == 0
    assert OmegaConf.load(tmp_path / "probe" / "config.yaml").modality.image_px == wanted


@pytest.mark.parametrize("command", ["finetune", "embed", "predict", "probe"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("modality.patch_px=16", "modality.patch_px=16: .* was made for 8; leave it out"),
        ("modality.image_px=36", "modality.image_px=36: .* has patches of 8 pixels, which do not tile such images"),
        ("modality.channels=4", "modality.channels=4: .* was made for 3; leave it out"),
    ],
)
def test_what_weights_cannot_take_is_one_line(command, asked, message, program_of, folder, images, tmp_path, capsys):
    torch.manual_seed(0)
    model = small(32)
    if command == "predict":
        config = model.config
        config.num_labels = 2
        model = ours.Data2VecVisionForImageClassification(config)
    weights, data = folder(model), images(16, 16, count=4)
    given = ["modality=vision", "data=hf", f"data.path={data}", "data.num_workers=0", asked]
    given += ["modality.mean=[0.4]", "modality.std=[0.2]"]
    given += {
        "finetune": ["head=image", f"init_from={weights}", f"hydra.run.dir={tmp_path}/run"],
        "embed": [f"checkpoint={weights}", f"out={tmp_path}/a.parquet"],
        "predict": [f"checkpoint={weights}", f"out={tmp_path}/a.jsonl"],
        "probe": [f"checkpoint={weights}", f"hydra.run.dir={tmp_path}/run"],
    }[command]
    assert program_of(command, *given) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "  "))]
    assert len(lines) == 1
    assert re.search(message, lines[0])


@pytest.mark.parametrize("shape", [[32, 64], [64, 32]])
def test_export_of_images_that_are_not_square(shape, program_of, folder, tmp_path, capsys):
    pytest.importorskip("transformers")
    weights = folder(small(shape), size=shape)
    assert program_of("export", f"checkpoint={weights}", "format=hf", f"out={tmp_path}/hf") == 2
    assert "choose format=safetensors, onnx or torch_export" in capsys.readouterr().err
    assert not list(tmp_path.glob("hf*"))
    assert program_of("export", f"checkpoint={weights}", "format=safetensors", f"out={tmp_path}/safe") == 0
    learned = folder(small(shape, bias=False, positions=True), "learned", size=shape)
    assert program_of("export", f"checkpoint={learned}", "format=hf", f"out={tmp_path}/hf") == 2
    plain = folder(small(shape, bias=False), "plain", size=shape)
    assert program_of("export", f"checkpoint={plain}", "format=hf", f"out={tmp_path}/theirs") == 0


def test_the_card_says_which_stored_value_is_white(program_of, tmp_path):
    small(32).save_pretrained(tmp_path / "weights")
    ImageProcessor(size=32, max_value=4095).save_pretrained(tmp_path / "weights")
    given = [f"checkpoint={tmp_path}/weights", "format=safetensors", f"out={tmp_path}/out"]
    assert program_of("export", *given) == 0
    assert "The stored value 4095 is white" in (tmp_path / "out" / "README.md").read_text()
    assert ImageProcessor.from_pretrained(tmp_path / "out").notes == {"max_value": 4095, "pages": None}


def test_five_channels_from_pretraining_to_predictions(program_of, images, run_program, tmp_path):
    data = images(24, 24, channels=5, count=24)
    common = ["modality=vision", "data=hf", f"data.path={data}", "data.num_workers=0", f"cache_dir={tmp_path}/cache"]
    bands = ["modality.channels=5", "modality.mean=[0.4]", "modality.std=[0.2]"]
    tiny = ["modality.image_px=16", "modality.patch_px=4", "size.dim=32", "size.depth=2", "size.num_heads=4"]
    tiny += ["size.ffn_dim=48", "modality.visible_block_patches=2", "objective.targets.top_k_layers=2"]
    tiny += ["modality.encoder.prenet_depth=0", "trainer.max_steps=3", "data.batch_size_per_device=4", "precision=fp32"]
    done = run_program(*common, *bands, *tiny, f"hydra.run.dir={tmp_path}/pretrained", timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    status, run = fine_tuned(program_of, tmp_path, tmp_path / "pretrained", data)
    assert status == 0
    config = OmegaConf.load(run / "config.yaml").modality
    assert (config.channels, list(config.mean)) == (5, [0.4] * 5)
    assert program_of("predict", *common, f"checkpoint={run}", f"out={tmp_path}/a.jsonl") == 0
    assert program_of("embed", *common, f"checkpoint={run}", f"out={tmp_path}/a.parquet") == 0
    assert program_of("export", f"checkpoint={run}", "format=safetensors", f"out={tmp_path}/out") == 0


# ------------------------------------------------------------------------------------------------------ init_from


def test_continued_pretraining_takes_the_size_that_is_asked_for(composed, folder):
    from data2vec_train.training.assemble import build_objective
    from data2vec_train.training.init_from import config_from_pretrained, initialise

    for make, name in ((small, "one"), (version_two, "two")):
        path = folder(make(32), name)
        given = [
            "modality=vision",
            "data=folder",
            "data.path=nowhere",
            f"init_from={path}",
            "modality.image_px=[32,64]",
        ]
        cfg = composed(*given)
        start = config_from_pretrained(cfg, {"modality.image_px"})
        assert list(cfg.modality.image_px) == [32, 64]
        objective = build_objective(cfg)
        initialise(objective, start, str(path))
        assert objective.student.image_size == (32, 64)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("size=small", "size"),
        ("size.dim=64", "size.dim"),
        ("modality.patch_px=16", "modality.patch_px"),
        ("modality.encoder.norm_eps=0.5", "modality.encoder.norm_eps"),
    ],
)
def test_continued_pretraining_refuses_sizes_that_are_not_the_weights(composed, folder, asked, given):
    from data2vec_train.training.init_from import config_from_pretrained

    path = folder(small(32))
    cfg = composed("modality=vision", "data=folder", "data.path=nowhere", f"init_from={path}", asked)
    with pytest.raises(ConfigError, match=r"=.*: init_from=.* was made for .*; leave it out"):
        config_from_pretrained(cfg, {given})


# ---------------------------------------------------------------------------------------------------- from end to end


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["data2vec", "data2vec2"])
def test_wide_images_from_pretraining_to_export(objective, program_of, images, run_program, tmp_path):
    data = images(20, 44, count=24)
    common = ["modality=vision", "data=hf", f"data.path={data}", "data.num_workers=0", f"cache_dir={tmp_path}/cache"]
    tiny = ["modality.image_px=[16,32]", "modality.patch_px=4", "size.dim=32", "size.depth=4", "size.num_heads=4"]
    tiny += ["size.ffn_dim=48", "modality.visible_block_patches=2", f"objective={objective}", "precision=fp32"]
    tiny += ["modality.encoder.prenet_depth=0", "trainer.max_steps=3", "data.batch_size_per_device=4"]
    done = run_program(*common, *tiny, f"hydra.run.dir={tmp_path}/pretrained", timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    status, run = fine_tuned(program_of, tmp_path, tmp_path / "pretrained", data)
    assert status == 0
    assert load_pretrained(run).get_encoder().image_size == (16, 32)
    assert program_of("predict", *common, f"checkpoint={run}", f"out={tmp_path}/a.jsonl") == 0
    for kind, status in (("hf", 2), ("safetensors", 0), ("onnx", 0)):
        assert program_of("export", f"checkpoint={run}", f"format={kind}", f"out={tmp_path}/{kind}") == status
    again = [*common, *tiny, f"init_from={tmp_path}/pretrained", f"hydra.run.dir={tmp_path}/again"]
    again[again.index("modality.image_px=[16,32]")] = "modality.image_px=[32,16]"
    done = run_program(*again, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "images of 32x16 pixels" in done.stdout + done.stderr


@pytest.mark.slow
def test_maps_of_wide_images(program_of, folder, tmp_path, records):
    weights, data = folder(version_two([32, 64]), size=[32, 64]), records("segmentation", tmp_path / "maps.parquet")
    given = ["modality=vision", "data=hf", f"data.path={data}", "data.num_workers=0", f"cache_dir={tmp_path}/cache"]
    head = ["head=segmentation", "head.map_column=map", "head.classes=3", f"init_from={weights}", "trainer.max_steps=2"]
    head += [f"data.test_source={{path:{data}}}", f"hydra.run.dir={tmp_path}/run", "callbacks.monitor.progress=none"]
    assert program_of("finetune", *given, *head) == 0
    assert program_of("predict", *given, f"checkpoint={tmp_path}/run", f"out={tmp_path}/out") == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 16


@pytest.mark.slow
def test_a_folder_of_tiffs_with_five_bands(run_program, tmp_path):
    pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(12):
        pixels = rng.integers(0, 4096, (20, 20, 5)).astype(np.uint16)
        (tmp_path / "data" / f"{number}.tif").write_bytes(tiff(pixels, extra=(0, 0)))
    given = ["modality=vision", "data=folder", f"data.path={tmp_path}/data", "data.num_workers=0", "precision=fp32"]
    given += ["modality.channels=5", "modality.mean=[0.4]", "modality.std=[0.2]", f"hydra.run.dir={tmp_path}/run"]
    given += ["modality.image_px=16", "modality.patch_px=4", "modality.visible_block_patches=2", "trainer.max_steps=2"]
    given += ["data.batch_size_per_device=4"]
    done = run_program(*given, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "less than a tenth of the range" in done.stdout + done.stderr
    done = run_program(*given, "modality.max_value=4095", f"hydra.run.dir={tmp_path}/white", timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "less than a tenth" not in done.stdout + done.stderr
    done = run_program(*given[:5], "trainer.max_steps=2", f"hydra.run.dir={tmp_path}/rgb", timeout=500)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "5 bands (RGB, unspecified, unspecified) of uint16" in done.stdout + done.stderr


@pytest.mark.parametrize("verb", ["embed", "predict", "probe"])
def test_a_size_is_not_compared_with_patches_that_the_weights_decide(verb):
    command = ["modality=vision", "modality.image_px=40", "checkpoint=PATH", "data=folder", "data.path=DIR"]
    faults = find_faults(command, config_name=verb)
    assert not [fault for fault in faults if "patches" in fault]
