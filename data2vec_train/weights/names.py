"""Tables between parameter names of other programs and ours: one bijection per family, used in both directions.

Each function returns {their name: our name}. For the original programs, ours are relative to `Data2Vec`, with the
prefix `student.` or `decoder.`; a teacher's are the student's with `teacher.encoder.` instead. For Hugging Face's
models they are relative to the encoder. If their query, key and value are separate tensors, ours are `name#q`,
`name#k`, `name#v`: rows of one tensor, see `to_ours` and `to_theirs`.
Sources: ALGORITHM.md 5, TRANSFORMERS.md 3, `checkpoint_names.json` and `hf_state.json.gz` in `tests/golden`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def beit_vision(*, depth: int, relative_bias: str) -> dict[str, str]:
    """data2vec 1.0 images, as saved by the BEiT-based code."""
    names = {
        "cls_token": "student.class_token",
        "mask_token": "student.mask_token",
        **_affine("patch_embed.proj", "student.embedder.project"),
        **_affine("norm", "student.final_norm"),
        **_affine("lm_head", "decoder.project"),
    }
    if relative_bias == "shared":
        names["rel_pos_bias.relative_position_bias_table"] = "student.relative_biases.0.table"
    for layer in range(depth):
        theirs, ours = f"blocks.{layer}", f"student.transformer.blocks.{layer}"
        if relative_bias == "per_layer":
            names[f"{theirs}.attn.relative_position_bias_table"] = f"student.relative_biases.{layer}.table"
        names |= {
            f"{theirs}.gamma_1": f"{ours}.scale1",
            f"{theirs}.gamma_2": f"{ours}.scale2",
            f"{theirs}.attn.q_bias": f"{ours}.attention.q_bias",
            f"{theirs}.attn.v_bias": f"{ours}.attention.v_bias",
            f"{theirs}.attn.qkv.weight": f"{ours}.attention.qkv.weight",
            **_block_without_qkv(theirs, ours),
        }
    return names


def fairseq_image(*, depth: int, prenet_depth: int, decoder_depth: int, projection_layers: int) -> dict[str, str]:
    """data2vec 2.0 images, as saved by fairseq. `depth` counts the prenet blocks too."""
    encoder = "modality_encoders.IMAGE"
    names = {
        f"{encoder}.extra_tokens": "student.class_token",
        f"{encoder}.fixed_positional_encoder.positions": "student.positions",
        **_affine(f"{encoder}.local_encoder.proj", "student.embedder.project"),
        **_affine(f"{encoder}.context_encoder.norm", "student.input_norm"),
    }
    return names | _fairseq_v2(encoder, depth, prenet_depth, decoder_depth, projection_layers)


def fairseq_audio_v1(*, depth: int, conv_layers: int, position_depth: int) -> dict[str, str]:
    """data2vec 1.0 speech, as saved by fairseq; the teacher's names lack the leading `encoder.`."""
    names = {
        "mask_emb": "student.mask_token",
        **_affine("layer_norm", "student.embedder.norm"),
        **_affine("post_extract_proj", "student.embedder.project"),
        **_affine("encoder.layer_norm", "student.input_norm"),
        **_affine("final_proj", "decoder.project"),
        **_waveform_features("feature_extractor", conv_layers),
    }
    for layer in range(position_depth):
        names |= _affine(f"encoder.pos_conv.{layer}.0", f"student.positions.convolutions.{layer}")
    for layer in range(depth):
        names |= _fairseq_block(f"encoder.layers.{layer}", f"student.transformer.blocks.{layer}")
    return names


def fairseq_text_v1(*, depth: int) -> dict[str, str]:
    """data2vec 1.0 text, as saved by fairseq, without the leading `encoder.`.

    The teacher's names lack `sentence_encoder.` too.
    """
    encoder = "sentence_encoder"
    names = {
        f"{encoder}.embed_tokens.weight": "student.embedder.tokens.weight",
        f"{encoder}.embed_positions.weight": "student.embedder.positions.weight",
        **_affine(f"{encoder}.layernorm_embedding", "student.embedder.norm"),
        **_affine("regression_head.0", "decoder.project.0"),
        **_affine("regression_head.2", "decoder.project.2"),
    }
    for layer in range(depth):
        names |= _fairseq_block(f"{encoder}.layers.{layer}", f"student.transformer.blocks.{layer}")
    return names


def fairseq_audio_v2(
    *, depth: int, prenet_depth: int, conv_layers: int, position_depth: int, decoder_depth: int, projection_layers: int
) -> dict[str, str]:
    """data2vec 2.0 speech, as saved by fairseq. `depth` counts the prenet blocks too."""
    encoder = "modality_encoders.AUDIO"
    names = {
        f"{encoder}.alibi_scale": "student.alibi.scale",
        **_affine(f"{encoder}.project_features.1", "student.embedder.norm"),
        **_affine(f"{encoder}.project_features.2", "student.embedder.project"),
        **_affine(f"{encoder}.context_encoder.norm", "student.input_norm"),
        **_waveform_features(f"{encoder}.local_encoder", conv_layers),
    }
    for layer in range(position_depth):
        theirs = f"{encoder}.relative_positional_encoder.{layer + 1}.0"
        names |= _affine(theirs, f"student.positions.convolutions.{layer}")
    return names | _fairseq_v2(encoder, depth, prenet_depth, decoder_depth, projection_layers)


def fairseq_text_v2(*, depth: int, decoder_depth: int, projection_layers: int) -> dict[str, str]:
    """data2vec 2.0 text, as saved by fairseq; the teacher's names lack the leading `blocks.`."""
    encoder = "modality_encoders.TEXT"
    return {
        f"{encoder}.local_encoder.embed_tokens.weight": "student.embedder.tokens.weight",
        f"{encoder}.local_encoder.embed_positions.weight": "student.embedder.positions.weight",
        **_affine(f"{encoder}.local_encoder.layernorm_embedding", "student.embedder.norm"),
        **_fairseq_v2(encoder, depth, 0, decoder_depth, projection_layers),
    }


def to_ours(names: dict[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under our names; separate queries, keys and values are concatenated.

    Raises:
        KeyError: a tensor has no name of ours, or part of a fused tensor is missing.
    """
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for theirs, tensor in tensors.items():
        name, _, part = names[theirs].partition("#")
        if part:
            parts.setdefault(name, {})[part] = tensor
        else:
            ours[name] = tensor
    return ours | {name: torch.cat([found[part] for part in "qkv"]) for name, found in parts.items()}


def to_theirs(names: dict[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of ours under their names, in the order of `names`; fused queries, keys and values are split.

    Raises:
        KeyError: a tensor in `names` is missing.
    """
    theirs: dict[str, Tensor] = {}
    for name, ours in names.items():
        ours, _, part = ours.partition("#")
        tensor = tensors[ours]
        theirs[name] = tensor.chunk(3)["qkv".index(part)].contiguous() if part else tensor
    return theirs


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face: ours, theirs; {} stands for the part that both share


_HF_AUDIO = (
    ("mask_token", "masked_spec_embed"),
    ("embedder.features.{}.conv.{}", "feature_extractor.conv_layers.{}.conv.{}"),
    ("embedder.features.{}.norm.{}", "feature_extractor.conv_layers.{}.layer_norm.{}"),
    ("embedder.norm.{}", "feature_projection.layer_norm.{}"),
    ("embedder.project.{}", "feature_projection.projection.{}"),
    ("positions.convolutions.{}.{}", "encoder.pos_conv_embed.layers.{}.conv.{}"),
    ("input_norm.{}", "encoder.layer_norm.{}"),
    ("transformer.blocks.{}.attention.qkv.{}", "encoder.layers.{}.attention.QKV_proj.{}"),
    ("transformer.blocks.{}.attention.out.{}", "encoder.layers.{}.attention.out_proj.{}"),
    ("transformer.blocks.{}.norm1.{}", "encoder.layers.{}.layer_norm.{}"),
    ("transformer.blocks.{}.ffn.fc1.{}", "encoder.layers.{}.feed_forward.intermediate_dense.{}"),
    ("transformer.blocks.{}.ffn.fc2.{}", "encoder.layers.{}.feed_forward.output_dense.{}"),
    ("transformer.blocks.{}.norm2.{}", "encoder.layers.{}.final_layer_norm.{}"),
)
_HF_TEXT = (
    ("embedder.tokens.{}", "embeddings.word_embeddings.{}"),
    ("embedder.types.{}", "embeddings.token_type_embeddings.{}"),
    ("embedder.norm.{}", "embeddings.LayerNorm.{}"),
    ("embedder.positions.{}", "embeddings.position_embeddings.{}"),
    ("transformer.blocks.{}.attention.qkv.{}", "encoder.layer.{}.attention.self.QKV.{}"),
    ("transformer.blocks.{}.attention.out.{}", "encoder.layer.{}.attention.output.dense.{}"),
    ("transformer.blocks.{}.norm1.{}", "encoder.layer.{}.attention.output.LayerNorm.{}"),
    ("transformer.blocks.{}.cross.query.{}", "encoder.layer.{}.crossattention.self.query.{}"),
    ("transformer.blocks.{}.cross.key.{}", "encoder.layer.{}.crossattention.self.key.{}"),
    ("transformer.blocks.{}.cross.value.{}", "encoder.layer.{}.crossattention.self.value.{}"),
    ("transformer.blocks.{}.cross.out.{}", "encoder.layer.{}.crossattention.output.dense.{}"),
    ("transformer.blocks.{}.norm_cross.{}", "encoder.layer.{}.crossattention.output.LayerNorm.{}"),
    ("transformer.blocks.{}.ffn.fc1.{}", "encoder.layer.{}.intermediate.dense.{}"),
    ("transformer.blocks.{}.ffn.fc2.{}", "encoder.layer.{}.output.dense.{}"),
    ("transformer.blocks.{}.norm2.{}", "encoder.layer.{}.output.LayerNorm.{}"),
)
_HF_BIAS = "relative_position_bias.relative_position_bias_table"
_HF_VISION = (
    ("class_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("learned_positions", "embeddings.position_embeddings"),
    ("embedder.project.{}", "embeddings.patch_embeddings.projection.{}"),
    ("relative_biases.shared.table", f"encoder.{_HF_BIAS}"),
    ("relative_biases.{}.table", "encoder.layer.{}.attention.attention." + _HF_BIAS),
    ("transformer.blocks.{}.scale1", "encoder.layer.{}.lambda_1"),
    ("transformer.blocks.{}.scale2", "encoder.layer.{}.lambda_2"),
    ("transformer.blocks.{}.attention.qkv.{}", "encoder.layer.{}.attention.attention.QKV.{}"),
    ("transformer.blocks.{}.attention.q_bias", "encoder.layer.{}.attention.attention.query.bias"),
    ("transformer.blocks.{}.attention.v_bias", "encoder.layer.{}.attention.attention.value.bias"),
    ("transformer.blocks.{}.attention.out.{}", "encoder.layer.{}.attention.output.dense.{}"),
    ("transformer.blocks.{}.ffn.fc1.{}", "encoder.layer.{}.intermediate.dense.{}"),
    ("transformer.blocks.{}.ffn.fc2.{}", "encoder.layer.{}.output.dense.{}"),
    ("transformer.blocks.{}.norm1.{}", "encoder.layer.{}.layernorm_before.{}"),
    ("transformer.blocks.{}.norm2.{}", "encoder.layer.{}.layernorm_after.{}"),
    ("final_norm.{}", "layernorm.{}"),
)


def hf_audio(ours: Iterable[str]) -> dict[str, str]:
    """Hugging Face's speech models, for an encoder whose tensors have the names `ours`.

    Raises:
        KeyError: the encoder has a tensor that theirs does not have.
    """
    return _by_rules(_HF_AUDIO, {name: name for name in ours}, ("q", "k", "v"))


def hf_text(ours: Iterable[str]) -> dict[str, str]:
    """Hugging Face's text models; see `hf_audio`."""
    return _by_rules(_HF_TEXT, {name: name for name in ours}, ("query", "key", "value"))


def hf_vision(ours: Iterable[str], *, relative_bias: str) -> dict[str, str]:
    """Hugging Face's image models; see `hf_audio`. `relative_bias` is that of the encoder."""
    ours = list(ours)
    keys = {name: name for name in ours}
    tables = [name for name in ours if name.startswith("relative_biases.")]
    if relative_bias in ("shared", "both"):
        keys[tables[-1]] = "relative_biases.shared.table"
    return _by_rules(_HF_VISION, keys, ("query", "key", "value"))


def _by_rules(rules: Iterable[tuple[str, str]], keys: dict[str, str], parts: tuple[str, str, str]) -> dict[str, str]:
    """{theirs: ours} for {ours: its name in the rules}."""
    compiled = [(re.compile(re.escape(a).replace(re.escape("{}"), r"(\w+)")), b) for a, b in rules]
    names = {}
    for ours, key in keys.items():
        found = next(((match, theirs) for rule, theirs in compiled if (match := rule.fullmatch(key))), None)
        if found is None:
            raise KeyError(f"Hugging Face's models have no tensor for {ours}")
        theirs = found[1].format(*found[0].groups())
        if "QKV" in theirs:
            names |= {theirs.replace("QKV", part): f"{ours}#{part[0]}" for part in parts}
        else:
            names[theirs] = ours
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the original programs' names


def _waveform_features(theirs: str, conv_layers: int) -> dict[str, str]:
    names = {}
    for layer in range(conv_layers):
        ours = f"student.embedder.features.{layer}"
        names[f"{theirs}.conv_layers.{layer}.0.weight"] = f"{ours}.conv.weight"
        names |= _affine(f"{theirs}.conv_layers.{layer}.2.1", f"{ours}.norm")
    return names


def _fairseq_block(theirs: str, ours: str) -> dict[str, str]:
    """A block of fairseq 1.0: separate query, key and value, which are rows of ours: `name#q` and so on."""
    pairs = [("self_attn.out_proj", "attention.out"), ("self_attn_layer_norm", "norm1"), ("final_layer_norm", "norm2")]
    pairs += [("fc1", "ffn.fc1"), ("fc2", "ffn.fc2")]
    names = {k: v for a, b in pairs for k, v in _affine(f"{theirs}.{a}", f"{ours}.{b}").items()}
    for part in "qkv":
        for kind in ("weight", "bias"):
            names[f"{theirs}.self_attn.{part}_proj.{kind}"] = f"{ours}.attention.qkv.{kind}#{part}"
    return names


def _fairseq_v2(
    encoder: str, depth: int, prenet_depth: int, decoder_depth: int, projection_layers: int
) -> dict[str, str]:
    """Blocks and decoder of any 2.0 model."""
    names = {}
    for layer in range(depth):
        in_prenet = layer < prenet_depth
        theirs = f"{encoder}.context_encoder.blocks.{layer}" if in_prenet else f"blocks.{layer - prenet_depth}"
        ours = f"student.transformer.blocks.{layer}"
        names |= _affine(f"{theirs}.attn.qkv", f"{ours}.attention.qkv") | _block_without_qkv(theirs, ours)
    for layer in range(decoder_depth):
        names |= _affine(f"{encoder}.decoder.blocks.{layer}.0", f"decoder.convolutions.{layer}")
    if projection_layers == 1:
        return names | _affine(f"{encoder}.decoder.proj", "decoder.project")
    for layer in (0, 2):
        names |= _affine(f"{encoder}.decoder.proj.{layer}", f"decoder.project.{layer}")
    return names


def _block_without_qkv(theirs: str, ours: str) -> dict[str, str]:
    pairs = [("attn.proj", "attention.out"), ("norm1", "norm1"), ("norm2", "norm2")]
    pairs += [("mlp.fc1", "ffn.fc1"), ("mlp.fc2", "ffn.fc2")]
    return {k: v for a, b in pairs for k, v in _affine(f"{theirs}.{a}", f"{ours}.{b}").items()}


def _affine(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}
