"""Checkpoints of the original programs: fairseq's 1.0 and 2.0 for all modalities, and the BEiT-based 1.0 images.

The kind of a file follows from the names of its tensors, most sizes from their shapes, the rest from its config, if it
holds one. Sources: ALGORITHM.md 5 and `tests/golden/checkpoint_names.json`.
"""

import ast
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data2vec_train.encoders.positions import sincos_grid
from data2vec_train.errors import ConfigError, WeightMismatch
from data2vec_train.weights import names as tables
from data2vec_train.weights.pickles import plain

# Width -> attention heads of the published models, for files without a config.
_HEADS = {768: 12, 1024: 16, 1280: 16}
_WAV2VEC_STRIDES = {(10, 3, 3, 3, 3, 2, 2): (5, 2, 2, 2, 2, 2, 2)}
_WITHOUT_MEANING = (r".*\.version", r"version", r".*relative_position_index", r".*_float_tensor", r".*num_updates")


# What 2.0 calls the modalities in names of tensors; EAT has kept that of images.
_WORDS = {"audio": "AUDIO", "sound": "IMAGE", "text": "TEXT", "vision": "IMAGE"}
_EAT_POSITIONS = "modality_encoders.IMAGE.fixed_positional_encoder.positions"


@dataclass
class Original:
    """The parts of a checkpoint of an original program.

    Tensors have the names of the file without the prefix that all of them share.
    """

    modality: str  # audio, text or vision
    version: int  # 1 or 2
    tensors: dict[str, Tensor]  # the student
    teacher: dict[str, Tensor]  # tensors in the file; the teacher's other tensors are the student's
    settings: dict[str, Any]  # of the model, {} if the file has none
    head: dict[str, Tensor] = field(default_factory=dict)  # a fine-tuned one, by our names in `_HEAD_NAMES`


# Fine-tuned heads: their name (pattern) -> ours in one of the fifteen classes
_HEAD_NAMES = (
    (r"(?:w2v_encoder\.)?proj\.(weight|bias)", "lm_head.{}", "CTC"),
    (r"(?:model\.)?fc_norm\.(weight|bias)", "pooler.layernorm.{}", "ImageClassification"),
    (r"(?:model\.)?head\.(weight|bias)", "classifier.{}", "ImageClassification"),
    (
        r"(?:model\.)?classification_heads\.\w+\.(dense|out_proj)\.(weight|bias)",
        "classifier.{}.{}",
        "SequenceClassification",
    ),
)
# Names of tensors that only pretraining needs (the decoder's), or that are unused.
_PRETRAINING = (
    r"modality_encoders\.\w+\.decoder\..*",
    r"(recon_proj|shared_decoder|final_proj|regression_head|lm_head)\..*",
    # Old 1.0 speech files carry unused parts of wav2vec 2.0.
    r"(quantizer|project_q|input_quantizer|project_inp|target_glu)\..*",
)


def looks_original(content: dict[str, Any]) -> bool:
    """Whether the content of a checkpoint comes from one of the original programs."""
    return _flat(content) is not None


def take_apart(content: dict[str, Any], where: str) -> Original:
    """Recognise a checkpoint of an original program.

    Raises:
        ConfigError: it is not of a known kind.
    """
    flat = _flat(content)
    if flat is None:
        raise ConfigError(f"{where}: not a known kind of data2vec checkpoint; top keys: {', '.join(content)}")
    tensors, teacher = flat
    settings = plain(content.get("cfg") or {})
    if not settings and content.get("args") is not None:
        settings = {"model": plain(content["args"])}
    settings = settings.get("model") or {} if isinstance(settings, dict) else {}
    settings = settings if isinstance(settings, dict) else {}

    tensors = {name: tensor for name, tensor in tensors.items() if not _any(_WITHOUT_MEANING, name)}
    head: dict[str, Tensor] = {}
    body: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = next(
            ((match, ours) for pattern, ours, _ in _HEAD_NAMES if (match := re.fullmatch(pattern, name))), None
        )
        if found is None:
            body[name] = tensor
        else:
            head[found[1].format(*found[0].groups())] = tensor
    for prefix in ("w2v_encoder.w2v_model.", "model.", "encoder.w2v_model."):
        if any(name.startswith(prefix) for name in body):
            body = {name.removeprefix(prefix): tensor for name, tensor in body.items()}
    if any(name.startswith("encoder.sentence_encoder.") for name in body):
        body = {name.removeprefix("encoder."): tensor for name, tensor in body.items()}

    kind = _kind_of(body)
    if kind is None:
        raise ConfigError(
            f"{where}: its tensors belong to no known data2vec model; expected names such as mask_emb, "
            "encoder.sentence_encoder.*, patch_embed.proj.* or modality_encoders.*, got " + ", ".join(list(body)[:5])
        )
    modality, version = kind
    if version == 2:
        used = _WORDS[modality]
        body = {
            name: tensor
            for name, tensor in body.items()
            if not name.startswith("modality_encoders.") or name.startswith(f"modality_encoders.{used}.")
        }
        _older_spellings(body, used)
    body = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in body.items()}
    teacher = {name: tensor.float() for name, tensor in teacher.items() if not _any(_WITHOUT_MEANING, name)}
    return Original(modality, version, body, teacher, settings, {name: tensor.float() for name, tensor in head.items()})


def with_teacher(original: Original, where: str) -> dict[str, Tensor]:
    """The student's tensors with the teacher's in their place.

    Raises:
        ConfigError: the file holds no teacher.
        WeightMismatch: the names of the teacher's tensors do not match the student's.
    """
    if not original.teacher:
        raise ConfigError(f"{where} holds no teacher; choose weights=student")
    for prefix in ("", "encoder.", "sentence_encoder.", "blocks."):
        renamed = {prefix + name: tensor for name, tensor in original.teacher.items()}
        if set(renamed) <= set(original.tensors):
            return original.tensors | renamed
    raise WeightMismatch(f"{where}: the teacher's tensors are not those of the student, such as {list(renamed)[:3]}")


def names_of(original: Original, arguments: dict[str, Any]) -> dict[str, str]:
    """{name in the file: name in the encoder} for the encoder that `arguments` describe, without the decoder."""
    depth, prenet = arguments["depth"], arguments["prenet_depth"]
    if original.modality == "audio":
        shape = dict(conv_layers=len(arguments["conv_kernel"]), position_depth=arguments["position_depth"])
        if original.version == 1:
            table = tables.fairseq_audio_v1(depth=depth, **shape)
        else:
            table = tables.fairseq_audio_v2(
                depth=depth, prenet_depth=prenet, decoder_depth=0, projection_layers=1, **shape
            )
    elif original.modality == "text":
        if original.version == 1:
            table = tables.fairseq_text_v1(depth=depth)
        else:
            table = tables.fairseq_text_v2(depth=depth, decoder_depth=0, projection_layers=1)
    elif original.version == 1:
        table = tables.beit_vision(depth=depth, relative_bias=arguments["relative_bias"])
    else:
        table = tables.fairseq_image(depth=depth, prenet_depth=prenet, decoder_depth=0, projection_layers=1)
    table = {theirs: ours.removeprefix("student.") for theirs, ours in table.items() if ours.startswith("student.")}
    absent = []
    if original.modality == "vision" and original.version == 1:
        absent += [] if arguments["mask_token"] else ["mask_token"]
        absent += [] if arguments["final_norm"] else ["final_norm."]
        if arguments["layer_scale"] is None:
            absent += [f"transformer.blocks.{layer}.scale" for layer in range(depth)]
    return {theirs: ours for theirs, ours in table.items() if not ours.startswith(tuple(absent))}


def decoder_of(original: Original) -> dict[str, Tensor]:
    """The decoder's tensors by our names; empty if the file has none."""
    if original.version == 1:
        table = tables.fairseq_text_v1(depth=0) | tables.beit_vision(depth=0, relative_bias="none")
        table |= tables.fairseq_audio_v1(depth=0, conv_layers=0, position_depth=0)
    else:
        word = _WORDS[original.modality]
        depth = _count(original.tensors, f"modality_encoders.{word}.decoder.blocks")
        layers = 1 if f"modality_encoders.{word}.decoder.proj.weight" in original.tensors else 2
        table = {
            "AUDIO": tables.fairseq_audio_v2(
                depth=0, prenet_depth=0, conv_layers=0, position_depth=0, decoder_depth=depth, projection_layers=layers
            ),
            "TEXT": tables.fairseq_text_v2(depth=0, decoder_depth=depth, projection_layers=layers),
            "IMAGE": tables.fairseq_image(depth=0, prenet_depth=0, decoder_depth=depth, projection_layers=layers),
        }[word]
    return {
        ours.removeprefix("decoder."): original.tensors[theirs]
        for theirs, ours in table.items()
        if ours.startswith("decoder.") and theirs in original.tensors
    }


def is_for_pretraining(name: str) -> bool:
    """Whether a tensor belongs to the decoder of pretraining, or is unused."""
    return _any(_PRETRAINING, name)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def encoder_arguments(original: Original, where: str, *, num_heads: int | None = None) -> dict[str, Any]:
    """Arguments to build the encoder of a checkpoint with; dropout is that of the originals' configs.

    Raises:
        WeightMismatch: a tensor that determines a size is missing.
        ConfigError: a size can neither be read from a shape nor from the file's config.
    """
    try:
        return _SIZES[original.modality, original.version](original, where, num_heads)
    except KeyError as error:
        raise WeightMismatch(
            f"{where} does not fit a data2vec {original.version}.0 {original.modality} model; missing: {error.args[0]}"
        ) from error


def _audio(original: Original, where: str, num_heads: int | None) -> dict[str, Any]:
    tensors, settings = original.tensors, original.settings
    second = original.version == 2
    inside = "modality_encoders.AUDIO."
    front = f"{inside}local_encoder.conv_layers" if second else "feature_extractor.conv_layers"
    spec = settings.get("conv_feature_layers")
    if second:
        spec = ((settings.get("modalities") or {}).get("audio") or {}).get("feature_encoder_spec")
    convolutions = [tensors[f"{front}.{layer}.0.weight"] for layer in range(_count(tensors, front))]
    if not convolutions:
        raise KeyError(f"{front}.0.0.weight")
    kernels = tuple(weight.shape[2] for weight in convolutions)
    strides = _WAV2VEC_STRIDES.get(kernels)
    if spec:
        strides = tuple(int(layer[2]) for layer in _spec_of(spec, where))
    if strides is None or len(strides) != len(kernels):
        raise ConfigError(f"{where}: the strides of the front end (kernels {kernels}) are not in the file's config")
    positions = f"{inside}relative_positional_encoder" if second else "encoder.pos_conv"
    first = tensors[f"{positions}.{1 if second else 0}.0.weight"]
    dim = first.shape[0]
    prenet = _count(tensors, f"{inside}context_encoder.blocks") if second else 0
    depth = prenet + _count(tensors, "blocks" if second else "encoder.layers")
    block = "blocks.0.mlp" if second else "encoder.layers.0"
    heads = tensors[f"{inside}alibi_scale"].shape[-3] if second else None
    scales = tensors[f"{inside}alibi_scale"].shape[0] if second else 0
    return {
        "channels": 1,
        "conv_dim": [weight.shape[0] for weight in convolutions],
        "conv_kernel": list(kernels),
        "conv_stride": list(strides),
        "conv_bias": False,
        "conv_activation": "gelu",
        "dim": dim,
        "depth": depth,
        "prenet_depth": prenet,
        "num_heads": num_heads or heads or _heads(settings, dim, where),
        "ffn_dim": tensors[f"{block}.fc1.weight"].shape[0],
        "norm_eps": 1e-5,
        "activation": "gelu",
        "position_kernel": first.shape[2],
        "position_depth": _count(tensors, positions),
        "position_groups": dim // first.shape[1],
        "alibi": "none" if not second else "shared" if scales == 1 else "per_layer",
        "mask_token": not second,
        "reference_padding": False,
        "embed_gradient": 1.0,
        "conv_as_matmul": True,
        "input_dropout": 0.0,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "layer_drop": 0.05,
        "activation_checkpointing": False,
        "attention": "sdpa",
    }


def _text(original: Original, where: str, num_heads: int | None) -> dict[str, Any]:
    tensors, settings = original.tensors, original.settings
    second = original.version == 2
    inside = "modality_encoders.TEXT.local_encoder" if second else "sentence_encoder"
    tokens, positions = tensors[f"{inside}.embed_tokens.weight"], tensors[f"{inside}.embed_positions.weight"]
    dim, pad = tokens.shape[1], 1
    return {
        "vocab_size": tokens.shape[0],
        "max_tokens": positions.shape[0] - pad - 1,
        "pad_id": pad,
        "num_token_types": 0,
        "dim": dim,
        "depth": _count(tensors, "blocks" if second else f"{inside}.layers"),
        "prenet_depth": 0,
        "num_heads": num_heads or _heads(settings, dim, where),
        "ffn_dim": tensors["blocks.0.mlp.fc1.weight" if second else f"{inside}.layers.0.fc1.weight"].shape[0],
        "norm_eps": 1e-5,
        "activation": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "layer_drop": 0.0,
        "activation_checkpointing": False,
        "attention": "sdpa",
    }


def _vision(original: Original, where: str, num_heads: int | None) -> dict[str, Any]:
    tensors, settings = original.tensors, original.settings
    second = original.version == 2
    inside = "modality_encoders.IMAGE." if second else ""
    prenet = _count(tensors, f"{inside}context_encoder.blocks") if second else 0
    patch = tensors[f"{inside}local_encoder.proj.weight" if second else "patch_embed.proj.weight"]
    dim, channels, patch_px = patch.shape[:3]
    scale = tensors.get("blocks.0.gamma_1")
    shared = tensors.get("rel_pos_bias.relative_position_bias_table")
    table = shared if shared is not None else tensors.get("blocks.0.attn.relative_position_bias_table")
    if second:
        positions = tensors[f"{inside}fixed_positional_encoder.positions"]  # (1, T, D)
        side, heads = math.isqrt(positions.shape[1]), None
    elif table is None:
        raise KeyError("rel_pos_bias.relative_position_bias_table")
    else:
        side, heads = (math.isqrt(table.shape[0] - 3) + 1) // 2, table.shape[1]
    return {
        "image_px": side * patch_px,
        "patch_px": patch_px,
        "channels": channels,
        "dim": dim,
        "depth": prenet + _count(tensors, "blocks"),
        "prenet_depth": prenet,
        "num_heads": num_heads or heads or _heads(settings, dim, where),
        "ffn_dim": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "norm_first": not second,
        "final_norm": "norm.weight" in tensors,
        "norm_eps": 1e-6,
        "activation": "gelu",
        "positions": _positions_of(positions, (side, side)) if second else "none",
        "relative_bias": "none" if second else "shared" if shared is not None else "per_layer",
        "class_token": True,
        "mask_token": "mask_token" in tensors,
        "qkv_bias": "qkv" if second else "qv",
        "layer_scale": None if scale is None else 1e-4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "init": "bert" if second else "beit",
        "activation_checkpointing": False,
        "attention": "sdpa",
    }


def _positions_of(found: Tensor, grid: tuple[int, int]) -> str:
    """Either "sincos", computed again because files round fixed positions to half precision, or "learned"."""
    same = found.shape[1] == grid[0] * grid[1] and found.shape[2] % 4 == 0
    if same and torch.allclose(found[0], sincos_grid(grid, found.shape[2]), atol=1e-3):
        return "sincos"
    return "learned"


def _sound(original: Original, where: str, num_heads: int | None) -> dict[str, Any]:
    tensors = original.tensors
    patch = tensors["modality_encoders.IMAGE.local_encoder.proj.weight"]
    dim, _, side = patch.shape[:3]
    positions, columns = tensors[_EAT_POSITIONS], _mel_patches(tensors)
    rows = positions.shape[1] // columns
    return {
        "mel_bins": columns * side,
        "patch": side,
        "max_frames": min(rows * side, 1024),  # the original keeps 123 s; more than the usual 10 s is computed
        "dim": dim,
        "depth": _count(tensors, "blocks"),
        "prenet_depth": 0,
        "num_heads": num_heads or _heads(original.settings, dim, where),
        "ffn_dim": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "norm_eps": 1e-6,
        "activation": "gelu",
        "class_token": True,
        "mask_token": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "activation_checkpointing": False,
        "attention": "sdpa",
    }


def _mel_patches(tensors: dict[str, Tensor]) -> int | None:
    """How many patches the mel bins of an EAT model have; None for a model of images.

    EAT is data2vec 2.0 for images by its names. Its positions are those of a grid that is not square, of which the
    first half of the channels says the column: it begins again after so many patches.
    """
    found, patch = tensors.get(_EAT_POSITIONS), tensors.get("modality_encoders.IMAGE.local_encoder.proj.weight")
    if found is None or patch is None or patch.shape[1] != 1 or found.dim() != 3 or found.shape[2] % 4:
        return None
    column = found[0, :, : found.shape[2] // 2].float()
    again = (column[1:] - column[0]).abs().amax(dim=1) < 1e-2
    columns = int(again.int().argmax()) + 1 if bool(again.any()) else 0
    if not columns or found.shape[1] % columns or found.shape[1] == columns**2:
        return None
    grid = sincos_grid((found.shape[1] // columns, columns), found.shape[2])
    return columns if torch.allclose(found[0].float(), grid, atol=1e-3) else None


_SIZES: dict[tuple[str, int], Callable[[Original, str, int | None], dict[str, Any]]] = {
    (modality, version): sizes
    for modality, sizes in (("audio", _audio), ("sound", _sound), ("text", _text), ("vision", _vision))
    for version in (1, 2)
}


def _heads(settings: dict[str, Any], dim: int, where: str) -> int:
    for name in ("encoder_attention_heads", "num_heads"):
        for place in (settings, settings.get("transformer", {}).get("encoder", {}) if settings else {}):
            if isinstance(place, dict) and isinstance(place.get(name), int):
                return place[name]
    if dim not in _HEADS:
        raise ConfigError(
            f"{where}: the file has no config, and the number of attention heads of a model of width {dim} does not "
            "follow from its tensors; give num_heads"
        )
    return _HEADS[dim]


def _spec_of(spec: str, where: str) -> list[tuple[int, int, int]]:
    """'[(512, 10, 5)] + [(512, 3, 2)] * 4' -> [(512, 10, 5), (512, 3, 2), ...], without evaluating code."""
    layers: list = []
    try:
        for part in str(spec).split("+"):
            listed, _, times = part.partition("*")
            layers += ast.literal_eval(listed.strip()) * int(times or 1)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ConfigError(
            f"{where}: the front end {spec!r} cannot be parsed; expected a list such as '[(512, 10, 5)]'"
        ) from error
    return layers


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    """Number of different indices after `prefix.`."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match.group(1) for name in tensors if (match := pattern.match(name))})


def _kind_of(tensors: dict[str, Tensor]) -> tuple[str, int] | None:
    for word, modality in (("AUDIO", "audio"), ("IMAGE", "vision"), ("TEXT", "text")):
        if any(name.startswith(f"modality_encoders.{word}.local_encoder.") for name in tensors):
            return "sound" if word == "IMAGE" and _mel_patches(tensors) else modality, 2
    if any(name.startswith("sentence_encoder.") for name in tensors):
        return "text", 1
    if any(name.startswith("feature_extractor.conv_layers.") for name in tensors):
        return "audio", 1
    if any(name.startswith("patch_embed.proj.") for name in tensors):
        return "vision", 1
    return None


def _flat(content: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Student and teacher tensors, named as in the file; None if this is not a checkpoint of theirs."""
    for top in ("model", "module"):
        inside = content.get(top)
        if isinstance(inside, dict) and inside and any(isinstance(value, Tensor) for value in inside.values()):
            tensors = {name: value for name, value in inside.items() if isinstance(value, Tensor)}
            teacher = next((value for name, value in inside.items() if name.endswith("_ema")), None)
            if teacher is None:
                teacher = content.get("model_ema")
            teacher = teacher if isinstance(teacher, dict) else {}
            return tensors, {name: value for name, value in teacher.items() if isinstance(value, Tensor)}
    return None


def _older_spellings(tensors: dict[str, Tensor], word: str) -> None:
    inside = f"modality_encoders.{word}."
    scale = tensors.get(f"{inside}alibi_scale")
    if scale is not None and scale.dim() == 4:
        tensors[f"{inside}alibi_scale"] = scale[None]
    old = tensors.pop(f"{inside}positional_encoder.pos_embed", None)
    if old is not None:
        tensors[f"{inside}fixed_positional_encoder.positions"] = old
    tensors.pop(f"{inside}encoder_mask", None)


def _any(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
