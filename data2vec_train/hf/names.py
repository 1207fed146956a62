"""Parameter names of other programs against ours, one bijection per family, used in both directions.

Each function returns {their name: our name} for a model of the given size. Ours are relative to `Data2Vec`, with
`student.` and `decoder.` in front; a teacher's are the student's with `teacher.encoder.` instead.
Sources: spec section 5, `checkpoint_names.json`.
"""


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
