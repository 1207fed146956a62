"""The original programs' pretraining steps, with our weights, our inputs and our masks.

    images 1.0      the BEiT-based code of facebookresearch/data2vec_vision
    the other five  fairseq with its examples/data2vec

Sizes and constants are taken from our objective; randomness (dropout, layer drop, noise at masked positions) is off.
Everything that is timed is original code: model, teacher, loss, gradient norm, optimizer, averaging. Two things are
not: the masks, which fairseq's 1.0 speech model would draw without a seed, and the division by the number of masked
tokens, which fairseq's trainer applies to the gradients.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.batch import Batch
from data2vec_train.benchmark.steps import StepArm, Steps, Update
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.objective.decoders import ConvDecoder
from data2vec_train.objective.teacher import tau_at
from data2vec_train.training.optim import parameter_groups
from data2vec_train.weights.names import (
    beit_vision,
    fairseq_audio_v1,
    fairseq_audio_v2,
    fairseq_image,
    fairseq_text_v1,
    fairseq_text_v2,
    to_ours,
    to_theirs,
)


@dataclass(frozen=True)
class _Original:
    """An original model, and the mapping of its parts and names to ours."""

    model: nn.Module
    names: dict[str, str]  # theirs -> ours, see `weights/names.py`
    prefix: str  # prefix of their names in `model`
    make_teacher: Callable[[], nn.Module]  # called after the student's weights are loaded; returns the averaged module
    teacher_prefix: str  # prefix of `names` that the teacher's names do not have
    loss: Callable[[], Tensor]
    average: Callable[[int], None]  # called with the step number; one averaging step


def original_step(modality: str, objective: str, *, ours: Data2Vec, batch: Batch, update: Update) -> StepArm:
    """The original program's step for a modality and objective, which computes the same as `ours`.

    Args:
        modality: vision, audio or text.
        objective: data2vec or data2vec2.
        ours: gives the weights of student, decoder and teacher, sizes and constants.
        batch: inputs of equal length, and masks.
        update: settings of the optimizer.

    Raises:
        ConfigError: the original is not installed or cannot be imported.
    """
    build = {
        ("vision", "data2vec"): _image_v1,
        ("audio", "data2vec"): _audio_v1,
        ("text", "data2vec"): _text_v1,
        ("vision", "data2vec2"): _image_v2,
        ("audio", "data2vec2"): _audio_v2,
        ("text", "data2vec2"): _text_v2,
    }[modality, objective]
    original = build(ours, batch)
    student = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    _load(original.model, _below(original.prefix, original.names), student)
    teacher = original.make_teacher()
    averaged = {f"teacher.encoder.{name}": p for name, p in ours.teacher.encoder.named_parameters()}
    averaged |= {f"teacher.encoder.{name}": p for name, p in ours.teacher.encoder.named_buffers()}
    teacher_names = {
        name.removeprefix(original.teacher_prefix): of_ours.replace("student.", "teacher.encoder.", 1)
        for name, of_ours in original.names.items()
        if name.startswith(original.teacher_prefix) and of_ours.startswith("student.")
    }
    held = {name for name, _ in teacher.named_parameters()}
    teacher_names = {name: of_ours for name, of_ours in teacher_names.items() if name in held}
    _load(teacher, teacher_names, averaged, partly=modality == "vision" and objective == "data2vec")

    original.model.train()
    count = Steps()
    names = _below(original.prefix, original.names)
    return StepArm(
        name="the original",
        model=original.model,
        loss=original.loss,
        optimise=_beit_optimizer(original, update) if build is _image_v1 else _fairseq_optimizer(original, update),
        average=lambda: original.average(count.next()),
        gradients=lambda: to_ours(
            names, {name: p.grad for name, p in original.model.named_parameters() if p.grad is not None}
        ),
        teacher=lambda: {
            name.replace("teacher.encoder.", "student.", 1): p
            for name, p in to_ours(
                teacher_names, {name: p for name, p in teacher.named_parameters() if name in teacher_names}
            ).items()
        },
    )


def _below(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {prefix + theirs: ours for theirs, ours in names.items()}


@torch.no_grad()
def _load(model: nn.Module, names: dict[str, str], ours: dict[str, Tensor], *, partly: bool = False) -> None:
    """Copy our tensors into the model's parameters: into all of them, unless `partly`."""
    theirs = to_theirs(names, ours)
    for name, parameter in model.named_parameters():
        if name in theirs:
            parameter.copy_(theirs[name].view_as(parameter))
        elif not partly:
            raise ValueError(f"no weight of ours for {name} of the original")


# ---------------------------------------------------------------------------------------------------------------------
# Importing


def _fairseq(module: str) -> ModuleType:
    """A module of fairseq's examples/data2vec.

    Raises:
        ConfigError: it cannot be imported.
    """
    import importlib

    try:
        with _older_libraries():
            sys.modules.setdefault("examples", importlib.import_module("fairseq.examples"))
            return importlib.import_module(f"examples.data2vec.models.{module}")
    except ImportError as error:
        raise ConfigError(
            f"the original program cannot be imported ({error}). It is fairseq with its examples/data2vec; "
            "pip install fairseq-fixed installs a version that works with current Python. Without it, only this "
            "comparison is left out"
        ) from error


@contextmanager
def _older_libraries() -> Iterator[None]:
    """Make fairseq importable: allow dataclass instances as defaults of dataclass fields, and restore `numpy.float`.

    Every instance gets a copy of such a default; before Python 3.11 all instances shared one.
    """
    strict = dataclasses.dataclass

    def tolerant(cls: type | None = None, **options: Any) -> Any:
        if cls is None:
            return partial(tolerant, **options)
        for name, value in list(vars(cls).items()):
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                setattr(cls, name, dataclasses.field(default_factory=partial(copy.deepcopy, value)))
        return strict(cls, **options)

    dataclasses.dataclass = tolerant
    np.float = float
    try:
        yield
    finally:
        dataclasses.dataclass = strict
        del np.float


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


def _fairseq_optimizer(original: _Original, update: Update) -> Callable[[], None]:
    """Like fairseq, compute the gradient norm in every step, even without clipping."""
    from fairseq.optim.adam import Adam
    from fairseq.utils import clip_grad_norm_

    parameters = [p for p in original.model.parameters() if p.requires_grad]
    optimizer = Adam(parameters, lr=update.lr, betas=update.betas, eps=update.eps, weight_decay=update.weight_decay)

    def optimise() -> None:
        clip_grad_norm_(parameters, update.clip_norm or 0.0)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return optimise


def _beit_optimizer(original: _Original, update: Update) -> Callable[[], None]:
    groups = parameter_groups(
        [original.model], weight_decay=update.weight_decay, decay_all=False, no_decay=frozenset({"cls_token"})
    )
    optimizer = torch.optim.AdamW(groups, lr=update.lr, betas=update.betas, eps=update.eps)

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(original.model.parameters(), update.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return optimise


# ---------------------------------------------------------------------------------------------------------------------
# What the models have in common


def _widths(ours: Data2Vec) -> dict[str, Any]:
    block = ours.student.transformer.blocks[0]
    return {
        "dim": ours.student.dim,
        "heads": block.attention.num_heads,
        "ffn_dim": block.ffn.fc1.out_features,
        "norm_eps": block.norm1.eps,
    }


def _constants(ours: Data2Vec) -> dict[str, Any]:
    """Settings that have the same names in all fairseq models."""
    targets = ours.targets
    return {
        "loss_beta": ours.loss_beta,
        "loss_scale": ours.scale,
        "average_top_k_layers": targets.top_k_layers,
        "instance_norm_target_layer": "instance" in targets.layer_norms,
        "layer_norm_target_layer": "layer" in targets.layer_norms,
        "batch_norm_target_layer": "batch" in targets.layer_norms,
        "instance_norm_targets": "instance" in targets.mean_norms,
        "layer_norm_targets": "layer" in targets.mean_norms,
        "ema_decay": ours.tau["start"],
        "ema_end_decay": ours.tau["end"],
        "ema_anneal_end_step": ours.tau["anneal_steps"],
    }


def _with(config: Any, **values: Any) -> Any:
    """Set fields of a config; unknown names are an error."""
    for name, value in values.items():
        if not hasattr(config, name):
            raise ValueError(f"{type(config).__name__} has no {name}")
        setattr(config, name, value)
    return config


def _convolutions(ours: Data2Vec) -> str:
    """The front end in fairseq's notation: [(channels, kernel, stride), ...]."""
    layers = [layer.conv for layer in ours.student.embedder.features]
    return str([(conv.out_channels, conv.kernel_size[0], conv.stride[0]) for conv in layers])


def _mean(result: dict[str, Any]) -> Tensor:
    """The sum of `ModelCriterion`, divided by the sample size as in fairseq's trainer."""
    return sum(loss.float().sum() for loss in result["losses"].values()) / result["sample_size"]


@dataclass(frozen=True)
class _Vocabulary:
    """The methods of a dictionary that fairseq's models call."""

    size: int
    pad_id: int
    mask_id: int

    def __len__(self) -> int:
        return self.size

    def pad(self) -> int:
        """Id of the padding token."""
        return self.pad_id

    def unk(self) -> int:
        """An invalid id: no token is unknown here."""
        return -1

    def index(self, symbol: str) -> int:
        """Id of the mask token, the only symbol that the models look up."""
        if symbol != "<mask>":
            raise ValueError(f"unexpected symbol {symbol!r}")
        return self.mask_id


def _vocabulary(ours: Data2Vec, mask_id: int) -> _Vocabulary:
    embedder = ours.student.embedder
    return _Vocabulary(embedder.tokens.num_embeddings, embedder.pad_id, mask_id)


# ---------------------------------------------------------------------------------------------------------------------
# 1.0


def _image_v1(ours: Data2Vec, batch: Batch) -> _Original:
    try:
        from modeling_cyclical import VisionTransformerForCyclicalTraining
        from timm.utils import ModelEmaV2
    except ImportError as error:
        raise ConfigError(
            f"the original program of data2vec 1.0 for images cannot be imported ({error}). It is not a package: put "
            "the folder beit of github.com/facebookresearch/data2vec_vision on PYTHONPATH, and install timm. Without "
            "it, only this comparison is left out"
        ) from error
    student, widths = ours.student, _widths(ours)
    model = VisionTransformerForCyclicalTraining(
        img_size=student.image_size,
        patch_size=student.embedder.project.kernel_size[0],
        in_chans=student.embedder.project.in_channels,
        embed_dim=widths["dim"],
        depth=student.depth,
        num_heads=widths["heads"],
        mlp_ratio=widths["ffn_dim"] / widths["dim"],
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=widths["norm_eps"]),
        init_values=1.0,  # replaced by our scales
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
    )
    held: list[Any] = []
    masked = batch.masks.masked[:, 0].unflatten(1, student.grid)
    width, beta, tau = (widths["dim"],), ours.loss_beta, ours.tau
    wanted = range(student.depth - ours.targets.top_k_layers, student.depth)

    def make_teacher() -> nn.Module:
        held.append(ModelEmaV2(model))
        return held[0].module

    def loss() -> Tensor:
        with torch.no_grad():
            layers = held[0].module(batch.inputs, bool_masked_pos=None, return_all_tokens=True, layer_results="end")
            targets = sum(F.layer_norm(layers[i].float(), width) for i in wanted) / len(wanted)
            targets = F.layer_norm(targets.float(), width)
            targets = targets.reshape(-1, *width)[masked.flatten().bool()]
        predictions = model(batch.inputs, bool_masked_pos=masked, return_all_tokens=False).float()
        return F.smooth_l1_loss(predictions.reshape(-1, *width), targets, beta=beta)

    def average(step: int) -> None:
        decay = tau_at(step, **tau)
        held[0]._update(model, update_fn=lambda e, m: decay * e + (1.0 - decay) * m)

    names = beit_vision(depth=student.depth, relative_bias="shared")
    return _Original(model, names, "", make_teacher, "", loss, average)


def _audio_v1(ours: Data2Vec, batch: Batch) -> _Original:
    module = _fairseq("data2vec_audio")
    student, widths = ours.student, _widths(ours)
    positions = student.positions.convolutions
    config = _with(
        module.Data2VecAudioConfig(),
        **_constants(ours),
        extractor_mode="layer_norm",
        conv_feature_layers=_convolutions(ours),
        encoder_layers=student.depth,
        encoder_embed_dim=widths["dim"],
        encoder_ffn_embed_dim=widths["ffn_dim"],
        encoder_attention_heads=widths["heads"],
        # fairseq's setting is the total width of all convolutions.
        conv_pos=positions[0].kernel_size[0] * len(positions),
        conv_pos_groups=positions[0].groups,
        pos_conv_depth=len(positions),
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        dropout_input=0.0,
        dropout_features=0.0,
        ema_transformer_only=True,
        ema_layers_only=True,
    )
    model = module.Data2VecAudioModel(config)
    names = fairseq_audio_v1(
        depth=student.depth, conv_layers=len(student.embedder.features), position_depth=len(positions)
    )
    masked = batch.masks.masked[:, 0]

    def make_teacher() -> nn.Module:
        model.set_num_updates(0)
        return model.ema.model

    def loss() -> Tensor:
        return _mean(model(batch.inputs, mask_indices=masked))

    return _Original(model, names, "", make_teacher, "encoder.", loss, model.set_num_updates)


def _text_v1(ours: Data2Vec, batch: Batch) -> _Original:
    module = _fairseq("data2vec_text")
    from fairseq.models.transformer.transformer_config import DecoderConfig, EncDecBaseConfig

    student, widths = ours.student, _widths(ours)
    config = _with(module.Data2VecTextConfig(), **_constants(ours), head_layers=2, ema_transformer_layers_only=True)
    _with(
        config.transformer,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layernorm_embedding=True,
        activation_fn="gelu",
        no_scale_embedding=True,
        max_source_positions=student.max_tokens,
        decoder=DecoderConfig(),
        encoder=_with(
            EncDecBaseConfig(),
            embed_dim=widths["dim"],
            ffn_embed_dim=widths["ffn_dim"],
            layers=student.depth,
            attention_heads=widths["heads"],
            normalize_before=False,
            learned_pos=True,
            layerdrop=0.0,
        ),
    )
    corrupted = batch.corrupted[:, 0]
    mask_id = int(corrupted.flatten()[batch.masks.hidden[0]])
    encoder = module.Data2VecTextEncoder(config, _vocabulary(ours, mask_id), None)
    model = module.Data2VecTextModel(config, encoder)

    def make_teacher() -> nn.Module:
        model.set_num_updates(0)
        return encoder.ema.model

    def loss() -> Tensor:
        return _mean(model(corrupted, target_tokens=batch.inputs))

    names = fairseq_text_v1(depth=student.depth)
    return _Original(model, names, "encoder.", make_teacher, "sentence_encoder.", loss, model.set_num_updates)


# ---------------------------------------------------------------------------------------------------------------------
# 2.0


def _image_v2(ours: Data2Vec, batch: Batch) -> _Original:
    project = ours.student.embedder.project
    encoder = {
        "input_size": ours.student.image_size[0],
        "in_chans": project.in_channels,
        "patch_size": project.kernel_size[0],
        "embed_dim": ours.student.dim,
        "num_extra_tokens": ours.student.num_prefix_tokens,
        "ema_local_encoder": True,
    }
    names = fairseq_image(**_depths(ours), prenet_depth=ours.student.prenet_depth)
    return _multi(ours, batch, "IMAGE", names, encoder=encoder, task=None)


def _audio_v2(ours: Data2Vec, batch: Batch) -> _Original:
    positions = ours.student.positions.convolutions
    encoder = {
        "feature_encoder_spec": _convolutions(ours),
        "conv_pos_width": positions[0].kernel_size[0] * len(positions),
        "conv_pos_groups": positions[0].groups,
        "conv_pos_depth": len(positions),
        "use_alibi_encoder": True,
        "learned_alibi_scale": True,
        "learned_alibi_scale_per_head": True,
    }
    names = fairseq_audio_v2(
        **_depths(ours),
        prenet_depth=ours.student.prenet_depth,
        conv_layers=len(ours.student.embedder.features),
        position_depth=len(positions),
    )
    return _multi(ours, batch, "AUDIO", names, encoder=encoder, task=None)


def _text_v2(ours: Data2Vec, batch: Batch) -> _Original:
    @dataclass(frozen=True)
    class Task:
        source_dictionary: _Vocabulary

    task = Task(_vocabulary(ours, mask_id=-1))
    encoder = {"max_source_positions": ours.student.max_tokens, "dropout": 0.0}
    return _multi(ours, batch, "TEXT", fairseq_text_v2(**_depths(ours)), encoder=encoder, task=task)


def _depths(ours: Data2Vec) -> dict[str, int]:
    return {
        "depth": ours.student.depth,
        "decoder_depth": len(ours.decoder.convolutions),
        "projection_layers": _projection_layers(ours.decoder),
    }


def _projection_layers(decoder: ConvDecoder) -> int:
    return 1 if isinstance(decoder.project, nn.Linear) else 2


def _multi(
    ours: Data2Vec, batch: Batch, modality: str, names: dict[str, str], *, encoder: dict[str, Any], task: object
) -> _Original:
    """`Data2VecMultiModel` for one modality; the teacher averages the blocks alone only for text."""
    module = _fairseq("data2vec2")
    student, decoder, widths = ours.student, ours.decoder, _widths(ours)
    convolution = decoder.convolutions[0]
    depth = student.depth - student.prenet_depth
    rows = batch.masks.masked.flatten(0, 1)  # (N, T), sample-major as theirs
    kind = module.Modality[modality]
    config = _with(
        module.Data2VecMultiConfig(),
        **_constants(ours),
        depth=depth,
        num_heads=widths["heads"],
        norm_eps=widths["norm_eps"],
        encoder_dropout=0.0,
        post_mlp_drop=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        embed_dim=widths["dim"],
        mlp_ratio=widths["ffn_dim"] / widths["dim"],
        end_of_block_targets=ours.targets.target_layer == "block",
        clone_batch=ours.masks_per_sample,
        ema_encoder_only=modality == "TEXT",
        supported_modality=kind,
        # The original sums over rows, we take the mean.
        cls_loss=ours.class_token_weight / rows.shape[0],
        seed=0,
    )
    of_modality = _with(
        getattr(config.modalities, modality.lower()),
        **encoder,
        prenet_depth=student.prenet_depth,
        prenet_dropout=0.0,
        prenet_layerdrop=0.0,
        mask_noise_std=decoder.noise_std,
        num_alibi_heads=widths["heads"],
        model_depth=depth,
    )
    _with(
        of_modality.decoder,
        decoder_dim=convolution.out_channels,
        decoder_groups=convolution.groups,
        decoder_kernel=convolution.kernel_size[0],
        decoder_layers=len(decoder.convolutions),
        input_dropout=0.0,
        decoder_residual=decoder.residual,
        projection_layers=_projection_layers(decoder),
    )
    with _older_libraries():
        model = module.Data2VecMultiModel(config, [kind], task=task)

    def loss() -> Tensor:
        return _mean(model(batch.inputs, mode=kind, precomputed_mask=rows))

    prefix = "blocks." if modality == "TEXT" else ""
    return _Original(model, names, "", lambda: model.ema.model, prefix, loss, model.set_num_updates)
