"""Loading and saving weights: files of every supported kind to the fifteen classes, and these to files."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor

from data2vec_train import checkpoints
from data2vec_train.data.vocabulary import read_vocabulary, tokenizer_files
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.encoders.positions import sincos_grid
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.system.moved import with_current_names
from data2vec_train.weights import audio, fairseq, plugin, sound, text, vision
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.checks import build_encoder, check_size
from data2vec_train.weights.configs import (
    CONFIG_NAME,
    CONFIGS,
    Data2VecAudioConfig,
    Data2VecConfig,
    Data2VecTextConfig,
    Data2VecVisionConfig,
    config_class_of,
    read_config,
)
from data2vec_train.weights.pickles import read_checkpoint
from data2vec_train.weights.preprocessing import AudioFeatureExtractor, ImageProcessor
from data2vec_train.weights.tokenizers import CTCTokenizer, TextTokenizer, has_tokenizer
from data2vec_train.weights.weights import PICKLE_NAME, SAFETENSORS_NAME, put_into, read_tensors

Weights = Literal["student", "teacher"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Files beside weights that describe how inputs are prepared.
PREPROCESSING = (
    "preprocessor_config.json",
    "processor_config.json",
    *TOKENIZER_FILES,
    "finetuning.json",  # of a head: facts that `predict` needs
)
PREPROCESSING_FOLDER = "preprocessing"  # of a run directory
MODEL_FOLDER = "model"  # of a run directory of fine-tuning
# Arguments of encoders that do not change what a trained encoder computes, or that a model sets when it is loaded.
LOOSE = {
    *(
        "attention",
        "activation_checkpointing",
        "embed_gradient",
        "conv_as_matmul",
        "reference_padding",
        "init",
        "prenet_depth",
        "max_frames",
    ),
    *("drop_path", "layer_drop", "dropout", "attention_dropout", "activation_dropout", "input_dropout"),
}


@dataclass(frozen=True)
class Family:
    """The classes of a modality."""

    encoder: str  # our encoder's class, as configs name it
    base: type[PretrainedModel]
    heads: dict[str, type[PretrainedModel]]
    arguments: Callable[[Any], dict[str, Any]]  # config -> arguments of the encoder
    config: Callable[[dict[str, Any]], Data2VecConfig]  # arguments of the encoder -> config, where it can hold them


def _audio_config(arguments: dict[str, Any]) -> Data2VecAudioConfig:
    widths = arguments["conv_dim"]
    return Data2VecAudioConfig(
        hidden_size=arguments["dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=arguments["ffn_dim"],
        hidden_act=arguments["activation"],
        hidden_dropout=arguments["dropout"],
        activation_dropout=arguments["activation_dropout"],
        attention_dropout=arguments["attention_dropout"],
        feat_proj_dropout=arguments["input_dropout"],
        layerdrop=arguments["layer_drop"],
        layer_norm_eps=arguments["norm_eps"],
        feat_extract_activation=arguments["conv_activation"],
        conv_dim=[widths] * len(arguments["conv_kernel"]) if isinstance(widths, int) else list(widths),
        conv_stride=list(arguments["conv_stride"]),
        conv_kernel=list(arguments["conv_kernel"]),
        conv_bias=arguments["conv_bias"],
        num_conv_pos_embedding_groups=arguments["position_groups"],
        conv_pos_kernel_size=arguments["position_kernel"],
        num_conv_pos_embeddings=arguments["position_depth"],
        # transformers has a mask token exactly if this is above 0.
        mask_time_prob=0.05 if arguments["mask_token"] else 0.0,
    )


def _text_config(arguments: dict[str, Any]) -> Data2VecTextConfig:
    return Data2VecTextConfig(
        vocab_size=arguments["vocab_size"],
        hidden_size=arguments["dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=arguments["ffn_dim"],
        hidden_act=arguments["activation"],
        hidden_dropout_prob=arguments["dropout"],
        attention_probs_dropout_prob=arguments["attention_dropout"],
        max_position_embeddings=arguments["max_tokens"] + arguments["pad_id"] + 1,
        type_vocab_size=arguments["num_token_types"],
        layer_norm_eps=arguments["norm_eps"],
        pad_token_id=arguments["pad_id"],
    )


def _vision_config(arguments: dict[str, Any]) -> Data2VecVisionConfig:
    bias, scale = arguments["relative_bias"], arguments["layer_scale"]
    return Data2VecVisionConfig(
        hidden_size=arguments["dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=arguments["ffn_dim"],
        hidden_act=arguments["activation"],
        hidden_dropout_prob=arguments["dropout"],
        attention_probs_dropout_prob=arguments["attention_dropout"],
        layer_norm_eps=arguments["norm_eps"],
        image_size=arguments["image_px"],
        patch_size=arguments["patch_px"],
        num_channels=arguments["channels"],
        use_mask_token=arguments["mask_token"],
        use_absolute_position_embeddings=arguments["positions"] == "learned",
        use_relative_position_bias=bias in ("per_layer", "both"),
        use_shared_relative_position_bias=bias in ("shared", "both"),
        layer_scale_init_value=0.0 if scale is None else scale,
        drop_path_rate=arguments["drop_path"],
        # 2.0 has neither a final norm nor a norm in its pretrained classes; pooling is by mean.
        use_mean_pooling=not arguments["final_norm"],
        out_indices=_spread(arguments["depth"]),
    )


def _spread(depth: int) -> list[int]:
    """Indices of four blocks for segmentation; of 12 blocks 3, 5, 7, 11."""
    return [max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1)]


FAMILIES = {
    "audio": Family(
        "data2vec_train.encoders.waveform.WaveformEncoder",
        audio.Data2VecAudioModel,
        {"CTC": audio.Data2VecAudioForCTC},
        audio.encoder_arguments,
        _audio_config,
    ),
    "sound": Family(
        "data2vec_train.encoders.spectrogram.SpectrogramEncoder",
        sound.Data2VecSoundModel,
        {},
        sound.encoder_arguments,
        lambda arguments: sound.Data2VecSoundConfig(encoder=arguments),
    ),
    "text": Family(
        "data2vec_train.encoders.text.TextEncoder",
        text.Data2VecTextModel,
        {"SequenceClassification": text.Data2VecTextForSequenceClassification},
        text.encoder_arguments,
        _text_config,
    ),
    "vision": Family(
        "data2vec_train.encoders.vision.VisionEncoder",
        vision.Data2VecVisionModel,
        {"ImageClassification": vision.Data2VecVisionForImageClassification},
        vision.encoder_arguments,
        _vision_config,
    ),
}
ALL_CONFIGS = (*CONFIGS, sound.Data2VecSoundConfig, plugin.PluginConfig)
CLASSES: dict[str, type[PretrainedModel]] = {
    kind.__name__: kind
    for module in (audio, sound, text, vision, plugin)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, PretrainedModel) and kind.__name__.startswith("Data2Vec")
}


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_pretrained(
    path: str | Path,
    *,
    weights: Weights = "student",
    num_heads: int | None = None,
    dtype: torch.dtype | str | None = "float32",
    **options: Any,
) -> PretrainedModel:
    """The model in a file or folder, in evaluation mode, as one of the fifteen classes.

    A folder is one of transformers' or one that `save_pretrained` wrote. A file is a checkpoint of a pretraining run,
    or one of the original programs: fairseq's 1.0 and 2.0 of all modalities, and the BEiT-based 1.0 images. Nothing in
    a file is executed. data2vec 2.0, which transformers does not have, is loaded into the same classes with our
    encoder.

    Args:
        path: the file or folder; a run directory stands for its newest checkpoint, after fine-tuning for model/.
        weights: of a checkpoint, the student's or the teacher's.
        num_heads: number of attention heads, for a file that does not hold it and whose width is not a published one.
        dtype: of the weights, by default float32 whatever the file has; "auto" = as in the file. `torch_dtype`, the
            name in transformers 4, is the same.
        **options: see `PretrainedModel.from_pretrained`, such as `device_map`, `attn_implementation`.

    Raises:
        ConfigError: there are no weights at `path`, the file is broken or asks to run code, or weights are not finite
            floating-point numbers.
        WeightMismatch: tensors are missing, in excess, or of another shape.
    """
    path = Path(path).expanduser()
    dtype = options.pop("torch_dtype", dtype)
    if weights not in ("student", "teacher"):
        raise ConfigError(f"weights={weights!r}: expected student or teacher")
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder")
    if path.name in (SAFETENSORS_NAME, PICKLE_NAME) and (path.parent / CONFIG_NAME).is_file():
        path = path.parent
    if path.is_dir() and (path / MODEL_FOLDER / CONFIG_NAME).is_file():
        path = path / MODEL_FOLDER
    if not (path / CONFIG_NAME).is_file():
        path = checkpoints.resolve(path) or path
    if path.is_dir():
        if weights == "teacher":
            raise ConfigError(f"{path} holds one set of weights; weights=teacher is for checkpoints of pretraining")
        described = read_config(path)
        if described.get("model_type") == sound.REMOTE_CODE:
            content = sound.as_fairseq(read_tensors(path), described)
            return _from_original(content, str(path), weights, num_heads).placed(dtype=dtype, **options).eval()
        return _class_for(described, path).from_pretrained(path, dtype=dtype, **options)
    content = read_checkpoint(path)
    if "state_dict" in content and "model" in content:
        model = _from_finetuning(content, str(path), weights)
    elif "state_dict" in content and "config" in content:
        model = _from_run(content, str(path), weights)
    else:
        model = _from_original(content, str(path), weights, num_heads)
    return model.placed(dtype=dtype, **options).eval()


def _class_for(content: dict[str, Any], folder: Path) -> type[PretrainedModel]:
    """The class that a config.json names, else the one without a head for its model type."""
    names = content.get("architectures") or [None]
    if not isinstance(names, list) or not isinstance(names[0], (str, NoneType)):
        raise ConfigError(f"{folder / CONFIG_NAME}: architectures={str(names)[:60]}, expected a list of class names")
    return CLASSES.get(names[0]) or base_class_of(config_class_of(content, ALL_CONFIGS))


def base_class_of(config_class: type[Data2VecConfig]) -> type[PretrainedModel]:
    """The class without a head for a config."""
    return next(kind for name, kind in CLASSES.items() if kind.config_class is config_class and name.endswith("Model"))


def wrap(
    target: str,
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    where: str,
    settings: dict[str, Any] | None = None,
) -> PretrainedModel:
    """The model around one of our encoders, or around one of a plugin.

    Args:
        target: the encoder's class, as configs name it.
        arguments: what it is built with.
        tensors: its state, by our names.
        where: for messages.
        settings: of the modality of a run, which may be a plugin's with one of our encoders; None = unknown.

    Raises:
        WeightMismatch: the tensors do not fit.
        ConfigError: the class is not known, or needs other arguments.
    """
    modality = next((name for name, family in FAMILIES.items() if family.encoder == target), None)
    facts = None if settings is None else plugin.preparation_of(settings)
    if modality is None or (facts is not None and facts["name"] not in FAMILIES):
        kind, encoder = plugin.Data2VecPluginModel, {"_target_": target, **arguments}
        config = plugin.PluginConfig(encoder=encoder, modality=facts)
    else:
        kind, encoder = FAMILIES[modality].base, plugin.encoder_class(target)
        check_size(lambda: build_encoder(encoder, arguments), tensors, where)
        config, tensors = describe(modality, arguments, tensors)
    try:
        model = _without_pooler(kind, config)
    except TypeError as error:
        raise ConfigError(f"{where}: {target} cannot be built with the file's arguments ({error})") from error
    put_into(
        model,
        {f"encoder.{name}": f"encoder.{name}" for name in model.encoder.state_dict()},
        {f"encoder.{name}": tensor for name, tensor in tensors.items()},
        where=where,
    )
    return model


def describe(
    modality: str, arguments: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Data2VecConfig, dict[str, Tensor]]:
    """A config for an encoder, and its tensors with those that transformers' models have in addition.

    If transformers can build the encoder, the config is one of theirs; else `config.encoder` holds the arguments.
    """
    family = FAMILIES[modality]
    arguments = {name: value for name, value in arguments.items() if name != "_target_"}
    if modality == "text" and not arguments["num_token_types"]:
        arguments["num_token_types"] = 1
        tensors = tensors | {"embedder.types.weight": torch.zeros(1, arguments["dim"])}
    if modality == "vision" and arguments["norm_first"] and arguments["positions"] == "sincos":
        # transformers has learned positions only, so that fixed ones are stored as learned ones.
        arguments["positions"] = "learned"
        tensors = tensors | {"learned_positions": _fixed_as_learned(arguments)}
    config = family.config(arguments)
    if _essence(family.arguments(config)) != _essence(arguments) or _needs_a_square(arguments):
        config.encoder = arguments
    return config, tensors


def _needs_a_square(arguments: dict[str, Any]) -> bool:
    """Whether non-square images give wrong positions or biases in transformers (TRANSFORMERS.md, fault 4)."""
    size = arguments.get("image_px", 0)
    height, width = (size, size) if isinstance(size, int) else size
    return height != width and (arguments["relative_bias"] != "none" or arguments["positions"] == "learned")


def refusal_of_transformers(model: PretrainedModel) -> str | None:
    """Why transformers cannot compute what a model does; None if it can."""
    encoder = model.get_encoder()
    if isinstance(encoder, VisionEncoder) and _needs_a_square(FAMILIES["vision"].arguments(model.config)):
        height, width = encoder.image_size
        return f"images of {height}x{width} pixels: transformers has positions and relative biases for squares only"
    if model.config.encoder is not None:
        return (
            "transformers has data2vec 1.0 only (and text 2.0, which has the same architecture), and cannot build this "
            "encoder"
        )
    return None


@torch.no_grad()
def with_image_size(model: PretrainedModel, image_px: int | list[int]) -> PretrainedModel:
    """An image model with the same weights for images of another size.

    Fixed positions are those of the new grid of patches; learned ones are resized bicubically and biases bilinearly, as
    transformers and BEiT do it.

    Args:
        model: of images.
        image_px: side of the square input, or [height, width]; patches tile it.
    """
    family, encoder = FAMILIES["vision"], model.get_encoder()
    config = copy.deepcopy(model.config)
    before = family.arguments(config)
    after = before | {"image_px": image_px}
    config.image_size = image_px
    if config.encoder is not None or _needs_a_square(after):
        config.encoder = {name: value for name, value in after.items() if name != "attention"}
    height, width = (image_px, image_px) if isinstance(image_px, int) else image_px
    state = encoder.state_for((height // encoder.patch_px, width // encoder.patch_px))
    if encoder.learned_positions is not None and _are_fixed(encoder.learned_positions, before):
        state["learned_positions"] = _fixed_as_learned(after).to(encoder.learned_positions)
    has_pooler = getattr(model, "pooler", None) is not None
    made = type(model)(config, add_pooling_layer=True) if has_pooler else type(model)(config)
    inside = "encoder." if model.base_model is model else f"{model.base_model_prefix}.encoder."
    made.load_state_dict(model.state_dict() | {inside + name: tensor for name, tensor in state.items()})
    made.source, made.preparation = model.source, model.preparation
    return made.to(device=encoder.embedder.project.weight.device, dtype=model.dtype).train(model.training)


def _are_fixed(learned: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether learned positions were fixed ones before `describe` stored them as learned."""
    return torch.equal(learned.float(), _fixed_as_learned(arguments))


def _fixed_as_learned(arguments: dict[str, Any]) -> Tensor:
    """Sine-cosine positions of an image encoder, and zero for its class token, (1, E + T, D)."""
    size, patch = arguments["image_px"], arguments["patch_px"]
    height, width = (size, size) if isinstance(size, int) else size
    before = torch.zeros(int(arguments["class_token"]), arguments["dim"])
    if arguments["dim"] % 4:
        return before[None]  # sine-cosine positions need a width divisible by 4
    return torch.cat([before, sincos_grid((height // patch, width // patch), arguments["dim"])])[None]


def _essence(arguments: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in arguments.items() if name not in LOOSE}
    if isinstance(kept.get("conv_dim"), int):
        kept["conv_dim"] = [kept["conv_dim"]] * len(kept["conv_kernel"])
    kept.setdefault("cross_attention", False)
    # In a trained model it matters whether there are scales, but not their initial value.
    kept["layer_scale"] = kept.get("layer_scale") is not None
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def _without_pooler(kind: type[PretrainedModel], config: Data2VecConfig) -> PretrainedModel:
    return kind(config, add_pooling_layer=False) if kind is text.Data2VecTextModel else kind(config)


# Rates of regularisation: our name -> the field of each family's config.
RATES: dict[str, dict[str, str]] = {
    "audio": {
        "dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "activation_dropout": "activation_dropout",
        "input_dropout": "feat_proj_dropout",
        "layer_drop": "layerdrop",
        "head_dropout": "final_dropout",
    },
    "sound": {},
    "text": {
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "head_dropout": "classifier_dropout",
    },
    "vision": {
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "drop_path": "drop_path_rate",
    },
}


def with_head(
    model: PretrainedModel,
    class_name: str,
    *,
    settings: dict[str, Any],
    rates: dict[str, float],
    random_weights: bool = False,
    keep_head: bool = False,
    start_head: Callable[[PretrainedModel], None] | None = None,
) -> tuple[PretrainedModel, list[str]]:
    """A model of another class of the family with this one's encoder, and a sentence on each part that is new.

    Args:
        model: model with the encoder.
        class_name: one of the fifteen.
        settings: fields of its config.
        rates: dropout and the like by our names, see `RATES`; those that the family does not have must be 0.
        random_weights: keep the architecture only, and draw its weights as before pretraining.
        keep_head: keep the head's weights, if `model` has a head of the same class and shape.
        start_head: changes the initial weights of a new head.

    Raises:
        ConfigError: the class is of another family, or a rate of another modality.
    """
    kind = CLASSES[class_name]
    modality = next((name for name, family in FAMILIES.items() if isinstance(model.base_model, family.base)), "plugin")
    if kind.config_class is not type(model.config):
        raise ConfigError(f"{class_name} does not fit a {type(model).__name__}: it is for another modality")
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    if settings.get("id2label") is not None:
        config.__post_init__()
    inside = config.encoder is not None
    for name, value in rates.items():
        if inside and name in config.encoder:
            config.encoder[name] = value
        known = RATES.get(modality, {}).get(name)
        if known is not None:
            setattr(config, known, value)
        elif value and not (inside and name in config.encoder):
            raise ConfigError(f"rates.{name}={value}: {modality} encoders like this one have no such rate; set it to 0")
    encoder = model.get_encoder()
    if modality == "audio":
        config.keep_mask_token = True if not inside else None
    made = kind(config)
    if random_weights:
        encoder = untrained(made)
    missing, excess = made.get_encoder().load_state_dict(encoder.state_dict(), strict=False)
    # The norm of the head replaces the norm after the last block; the vector for hidden frames may be new.
    wrong = [name for name in (*missing, *excess) if name != "mask_token" and not name.startswith("final_norm.")]
    if wrong:
        raise ConfigError(f"the encoder of {type(model).__name__} does not fit {class_name}: {', '.join(wrong[:5])}")
    notes = [f"the {name} is new" for name in missing]
    if random_weights:
        notes.append("encoder: random weights")
    inner = f"{made.base_model_prefix}.encoder."
    ours = {name: tensor for name, tensor in made.state_dict().items() if not name.startswith(inner)}
    theirs = {name: tensor for name, tensor in model.state_dict().items() if name in ours}
    same = type(model) is kind and keep_head and not random_weights
    if same and {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }:
        made.load_state_dict(theirs, strict=False)
        notes.append("the head keeps its weights")
    else:
        notes.append("the head is new")
        if start_head is not None:
            start_head(made)
    made.tie_weights()
    made.source, made.preparation = model.source, model.preparation
    return made, notes


def untrained(model: PretrainedModel) -> ModalityEncoder:
    """An encoder of the architecture of the model's, with random weights as before pretraining."""
    encoder, config = model.get_encoder(), copy.deepcopy(model.config)
    if isinstance(config, plugin.PluginConfig):
        return type(encoder)(**{name: value for name, value in config.encoder.items() if name != "_target_"})
    family = next(family for family in FAMILIES.values() if isinstance(model.base_model, family.base))
    return type(encoder)(**family.arguments(config))


@dataclass(frozen=True)
class Start:
    """What a pretraining run can start from."""

    model: PretrainedModel  # the student
    teacher: PretrainedModel | None  # None if the file has none
    decoder: dict[str, Tensor]  # by our names; empty if the file has none


def load_start(path: str | Path) -> Start:
    """Everything in a file or folder that pretraining can start from; see `load_pretrained`."""
    model = load_pretrained(path)
    found = Path(path).expanduser()
    found = checkpoints.resolve(found) or found
    if not found.is_file() or model.base_model is not model:
        return Start(model, None, {})
    content = read_checkpoint(found)
    if "state_dict" in content:
        teacher = any(name.startswith("objective.teacher.") for name in content["state_dict"])
        decoder = _below(content["state_dict"], "objective.decoder.")
    else:
        original = fairseq.take_apart(content, str(found))
        teacher, decoder = bool(original.teacher), fairseq.decoder_of(original)
    return Start(model, load_pretrained(path, weights="teacher") if teacher else None, decoder)


def encoder_description(model: PretrainedModel) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Modality, arguments and tensors of the encoder in a model, as pretraining builds it.

    Token types, which pretraining does not have, are added to the positions: every token is of type 0.

    Raises:
        ConfigError: the encoder is not one of ours.
    """
    modality = next((name for name, family in FAMILIES.items() if isinstance(model.base_model, family.base)), None)
    if modality is None:
        name = (model.config.encoder or {}).get("_target_", type(model).__name__)
        raise ConfigError(
            f"pretraining cannot start from the weights of {name}, the encoder of a plugin; to go on with its run, "
            "give the run's own command"
        )
    arguments = FAMILIES[modality].arguments(model.config)
    tensors = dict(model.get_encoder().state_dict())
    types = tensors.pop("embedder.types.weight", None)
    if types is not None:
        arguments["num_token_types"] = 0
        tensors["embedder.positions.weight"] = tensors["embedder.positions.weight"] + types[0]
    learned = tensors.get("learned_positions")
    if learned is not None and _are_fixed(learned, arguments):
        arguments["positions"] = "sincos"
        del tensors["learned_positions"]
    return modality, arguments, {name: tensor.float() for name, tensor in tensors.items()}


def _from_run(content: dict[str, Any], where: str, weights: Weights) -> PretrainedModel:
    """The model in a checkpoint of a pretraining run."""
    try:
        modality = with_current_names(content["config"]["modality"])
        # Another library's encoder stands beside the modality, see `configs/encoder`.
        node = dict(content["config"].get("encoder") or modality["encoder"])
        state = content["state_dict"]
        target = node.pop("_target_")
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where} holds a config that describes no encoder") from error
    student = _below(state, "objective.student.")
    if weights == "teacher":
        student |= _below(state, "objective.teacher.encoder.")
    settings = modality if isinstance(modality.get("name"), str) else None
    model = wrap(target, node, student, where=where, settings=settings)
    beside = checkpoints.run_of(Path(where)) / PREPROCESSING_FOLDER
    model.source = beside if beside.is_dir() else None
    model.preparation = _preparation_in(modality.get("preprocessing"), where)
    if isinstance(model.config, Data2VecTextConfig) and has_tokenizer(beside):
        facts = read_vocabulary(tokenizer_files(beside)).facts
        model.config.bos_token_id, model.config.eos_token_id = facts["bos_id"], facts["eos_id"]
    return model


def _preparation_in(node: Any, where: str) -> tuple[Any, ...]:
    """How a run prepared its inputs, from the config in its checkpoint, which may be outside the run's folder."""
    if not isinstance(node, dict):
        return ()
    arguments = dict(node)
    known = (AudioFeatureExtractor, ImageProcessor, sound.SpectrogramExtractor)
    kinds = {f"{kind.__module__}.{kind.__name__}": kind for kind in known}
    kind = kinds.get(str(arguments.pop("_target_", None)))
    try:
        return () if kind is None else (kind(**arguments),)
    except TypeError as error:
        raise ConfigError(f"{where} holds a config that describes no preprocessing ({error})") from error


def _from_finetuning(content: dict[str, Any], where: str, weights: Weights) -> PretrainedModel:
    """The model in a checkpoint of a fine-tuning run."""
    if weights == "teacher":
        raise ConfigError(f"{where} is a fine-tuned model and has no teacher; choose weights=student")
    try:
        kind, facts = CLASSES[content["model"]["class"]], content["model"]["config"]
        state = _below(content["state_dict"], "model.")
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where} does not say which model it holds") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{where} does not say which model it holds")
    config = kind.config_class.from_dict(facts)
    config.keep_mask_token = any(name.endswith("encoder.mask_token") for name in state)
    check_size(lambda: kind(config), state, where)
    model = kind(config)
    put_into(model, {name: name for name in model.state_dict()}, state, where=where)
    model.tie_weights()
    beside = checkpoints.run_of(Path(where)) / MODEL_FOLDER
    model.source = beside if beside.is_dir() else None
    return model


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _from_original(content: dict[str, Any], where: str, weights: Weights, num_heads: int | None) -> PretrainedModel:
    """The model in a checkpoint of fairseq or of the BEiT-based code."""
    original = fairseq.take_apart(content, where)
    if original.head and weights == "teacher":
        raise ConfigError(f"{where} is a fine-tuned model and has no teacher; choose weights=student")
    arguments = fairseq.encoder_arguments(original, where, num_heads=num_heads)
    tensors = original.tensors if weights == "student" else fairseq.with_teacher(original, where)
    names = fairseq.names_of(original, arguments)
    positions = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    if original.modality == "sound" or arguments.get("positions") == "sincos":
        names.pop(positions, None)
        tensors = {name: tensor for name, tensor in tensors.items() if name != positions}
    elif arguments.get("positions") == "learned":
        names[positions] = "learned_positions"
        found = tensors[positions]
        tensors = tensors | {positions: torch.cat([found.new_zeros(1, 1, found.shape[2]), found], dim=1)}

    config, more = describe(original.modality, arguments, {})
    family = FAMILIES[original.modality]
    kind = family.base
    if original.head:
        kind, changes = _head_of(original, family)
        for name, value in changes.items():
            setattr(config, name, value)
        if "num_labels" in changes:
            config.id2label = config.label2id = None
            config.__post_init__()
    check_size(lambda: _without_pooler(kind, config), tensors, where)
    model = _without_pooler(kind, config)
    inside = "encoder." if model.base_model is model else f"{model.base_model_prefix}.encoder."
    names = {theirs: inside + ours for theirs, ours in names.items()}
    # Tensors that transformers' models have in addition, and the head, have the names of `model.names`.
    own = {ours: theirs for theirs, ours in model.names(own=True).items()}
    for name, tensor in more.items():
        names[f"+{name}"] = inside + name
        tensors = tensors | {f"+{name}": tensor}
    for name, tensor in original.head.items():
        theirs = name if name in own.values() else f"{model.base_model_prefix}.{name}"
        ours = next((own_name for own_name, file_name in own.items() if file_name == theirs), None)
        if ours is not None:
            names[theirs] = ours
        tensors = tensors | {theirs: tensor}
    put_into(
        model,
        names,
        {name: tensor for name, tensor in tensors.items() if name in names or not fairseq.is_for_pretraining(name)},
        where=where,
    )
    model.preparation = _preparation_of(original, arguments, model.config)
    return model


def _preparation_of(original: fairseq.Original, arguments: dict[str, Any], config: Data2VecConfig) -> tuple[Any, ...]:
    """How the original programs prepare speech and images; texts need the files of a tokenizer."""
    if original.modality == "audio":
        letters = (CTCTokenizer(),) if "lm_head.weight" in original.head and config.vocab_size == 32 else ()
        return (AudioFeatureExtractor(), *letters)
    if original.modality == "sound":
        sizes = {name: arguments[name] for name in ("mel_bins", "patch")}
        return (sound.SpectrogramExtractor(**sound.OF_AUDIOSET, **sizes),)
    if original.modality == "vision":
        # 1.0 uses BEiT's code and statistics; 2.0 uses those of ImageNet.
        of_imagenet = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
        same = arguments["channels"] == 3
        more = of_imagenet if original.version == 2 else {}
        return (ImageProcessor(size=arguments["image_px"], **more),) if same else ()
    return ()


def _head_of(original: fairseq.Original, family: Family) -> tuple[type[PretrainedModel], dict[str, Any]]:
    head = original.head
    if original.modality == "sound":
        raise ConfigError("a fine-tuned EAT model, whose head cannot be read yet; load the pretrained file")
    if "lm_head.weight" in head:
        return family.heads["CTC"], {"vocab_size": head["lm_head.weight"].shape[0]}
    if "classifier.weight" in head:
        return family.heads["ImageClassification"], {
            "num_labels": head["classifier.weight"].shape[0],
            "use_mean_pooling": True,
        }
    if "classifier.out_proj.weight" in head:
        return family.heads["SequenceClassification"], {"num_labels": head["classifier.out_proj.weight"].shape[0]}
    raise ConfigError(f"unknown fine-tuned head: {', '.join(head)}; expected one for CTC, images or sentences")


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_pretrained(model: PretrainedModel, folder: str | Path, *, preprocessing: str | Path | None = None) -> None:
    """Write weights and config, and beside them the files that describe how inputs are prepared.

    transformers' Auto classes read the folder, unless the encoder is one that transformers cannot build (2.0 for
    speech and images): then its model type starts with `data2vec_train`, and `load_pretrained` reads it.

    Args:
        model: one of the fifteen classes.
        folder: created if it does not exist.
        preprocessing: folder with a preprocessor or tokenizer to copy; None = the one the model was loaded from.

    Raises:
        ConfigError: the model is not one of ours.
    """
    if not isinstance(model, PretrainedModel):
        hint = "; wrap it with weights.convert.wrap" if isinstance(model, ModalityEncoder) else ""
        raise ConfigError(f"save_pretrained takes one of the fifteen classes, got {type(model).__name__}{hint}")
    folder = Path(folder)
    model.save_pretrained(folder)
    write_preprocessing(model, folder, source=preprocessing)


def write_preprocessing(model: PretrainedModel, folder: Path, *, source: str | Path | None = None) -> None:
    """Put a preprocessor and tokenizer into `folder`: those in `source`, else those that belong to the model's weights.

    Existing files are not changed.
    """
    source = model.source if source is None else Path(source)
    if source is None:
        for part in model.preparation:
            part.save_pretrained(folder)
        return
    names = PREPROCESSING
    if isinstance(model.config, Data2VecTextConfig) and has_tokenizer(source):
        # Not copied: files of older runs name a class that gives other ids.
        names = tuple(name for name in names if name not in TOKENIZER_FILES)
        if not has_tokenizer(folder):
            tokenizer = TextTokenizer.from_pretrained(source)
            tokenizer.model_max_length = tokenizer.model_max_length or model.get_encoder().max_tokens
            tokenizer.save_pretrained(folder)
    for name in names:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
