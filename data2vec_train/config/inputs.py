"""How inputs are prepared for weights from files: what the files say overrides the config."""

import itertools
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from data2vec_train.config.build import build
from data2vec_train.data.image import remarks_on
from data2vec_train.data.sources.files import Source, StreamingSource
from data2vec_train.encoders.spectrogram import SpectrogramEncoder
from data2vec_train.encoders.text import TextEncoder
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.encoders.waveform import WaveformEncoder
from data2vec_train.errors import BadSample, ConfigError
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.convert import with_image_size
from data2vec_train.weights.plugin import PluginConfig
from data2vec_train.weights.preprocessing import AudioFeatureExtractor, ImageProcessor, is_described
from data2vec_train.weights.sound import SpectrogramExtractor

log = logging.getLogger(__name__)

LOOKED_AT = 16  # images that are checked before a run
# The first one counts: a spectrogram is an image.
MODALITIES = {"audio": WaveformEncoder, "text": TextEncoder, "sound": SpectrogramEncoder, "vision": VisionEncoder}


def inherit(cfg: DictConfig, model: PretrainedModel, where: str) -> PretrainedModel:
    """Make `cfg.modality` prepare inputs as the weights want them, but for what the command line or a recipe sets.

    Returns:
        The model for these inputs: where images are to have another size, with positions and biases of that size.

    Raises:
        ConfigError: the weights are of another modality, or cannot take what the command line or a recipe sets.
    """
    encoder = model.get_encoder()
    if isinstance(model.config, PluginConfig) and cfg.modality.name != "text":
        _inherit_from_run(cfg, model.config, where)
        return model
    modality = next((name for name, kind in MODALITIES.items() if isinstance(encoder, kind)), None)
    if modality is not None and modality != cfg.modality.name:
        raise ConfigError(f"{where} is a model for {modality}; choose modality={modality}")
    given = given_settings()
    facts = facts_of(cfg.modality.name, model)
    for name in ("patch_px", "channels", "patch", "mel_bins"):
        if name in facts and f"modality.{name}" in given:
            refuse_other(f"modality.{name}", cfg.modality.get(name), facts[name], where)
    follow(cfg, facts, given, where)
    if modality == "text":
        with open_dict(cfg):
            cfg.modality.block_tokens = block_tokens(cfg, encoder.max_tokens, given, where)
    return for_images_of(model, cfg.modality.image_px, where) if modality == "vision" else model


def _inherit_from_run(cfg: DictConfig, config: PluginConfig, where: str) -> None:
    """Prepare inputs with the settings of the run that trained an encoder of a plugin: nothing else describes them."""
    name = (config.modality or {}).get("name")
    if name is None:
        log.warning("%s does not say how its run prepared inputs: they are prepared as modality.* says", where)
        return
    if name != cfg.modality.name:
        raise ConfigError(f"{where} is a model for {name}; choose modality={name}")
    facts = {key: fact for part in _PREPARING for key, fact in _decisive(cfg, config.modality, part)}
    for key, fact in facts.items():  # a run stores values; a reference in a file of a stranger could read anything
        if "${" in str(fact) or not re.fullmatch(r"[\w.-]+", key):
            raise ConfigError(f"{where} holds modality.{key}={fact}, which no run writes")
    follow(cfg, facts, given_settings(), where)


_PREPARING = ("decode", "transform", "pad_value")  # what happens to a record on its way to an encoder


def _decisive(cfg: DictConfig, settings: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """(name, value in a run) of `name` and what is below it; in place of a reference the settings that it names.

    Args:
        cfg: the config, whose references count.
        settings: below `modality`, of the run.
        name: below `modality`.
    """
    above, _, last = f"modality.{name}".rpartition(".")
    node, value = OmegaConf.select(cfg, above), settings
    if OmegaConf.is_dict(node) and OmegaConf.is_interpolation(node, last):
        for other in re.findall(r"\$\{modality\.([\w.]+)\}", OmegaConf.to_container(node, resolve=False)[last]):
            yield from _decisive(cfg, settings, other)
        return
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return
        value = value[key]
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from _decisive(cfg, settings, f"{name}.{key}")
    else:
        yield name, value


def facts_of(modality: str, model: PretrainedModel) -> dict[str, Any]:
    """What the files beside weights say about inputs, as settings below `modality`."""
    return {"audio": _audio, "sound": _sound, "text": _text, "vision": _vision}[modality](model)


def follow(cfg: DictConfig, facts: dict[str, Any], given: Collection[str], where: str) -> None:
    """Prepare inputs as weights want them, and say so; what the command line or a recipe sets counts, and is said too.

    Args:
        cfg: the config.
        facts: what the weights want, see `facts_of`.
        given: settings that the command line or a recipe makes.
        where: the weights, for the log.
    """
    taken = []
    for name, value in facts.items():
        asked = OmegaConf.select(cfg.modality, name)
        asked = OmegaConf.to_container(asked) if OmegaConf.is_config(asked) else asked
        if asked == value:
            continue
        if f"modality.{name}" in given:
            log.warning("modality.%s=%s, as you say; %s was trained with %s", name, asked, where, value)
            continue
        with open_dict(cfg):
            OmegaConf.update(cfg.modality, name, value)
        taken.append(f"{name}={value}")
    if taken:
        log.info("inputs are prepared as for %s: %s", where, ", ".join(taken))


def refuse_other(name: str, asked: Any, fact: Any, where: str) -> None:
    """Refuse a size that weights decide, and of which the command line or a recipe sets another."""
    if asked != fact:
        raise ConfigError(f"{name}={asked}: {where} was made for {fact}; leave it out")


def block_tokens(cfg: DictConfig, longest: int, given: Collection[str], where: str) -> int:
    """Tokens of a text block, of an encoder that has positions for `longest`.

    Raises:
        ConfigError: the command line or a recipe sets more.
    """
    asked = cfg.modality.block_tokens
    if "modality.block_tokens" in given and asked > longest:
        raise ConfigError(f"modality.block_tokens={asked}: {where} has positions for {longest}; choose at most those")
    return min(asked, longest)


def for_images_of(model: PretrainedModel, image_px: int | Sequence[int], where: str) -> PretrainedModel:
    """A model for images of this size, the same one if it is of them.

    Raises:
        ConfigError: its patches do not tile them.
    """
    encoder = model.get_encoder()
    size = (image_px, image_px) if isinstance(image_px, int) else tuple(image_px)
    if size == encoder.image_size:
        return model
    if not isinstance(encoder, VisionEncoder):
        raise ConfigError(f"modality.image_px={image_px}: {where} is for {encoder.image_size}; leave it out")
    patch = encoder.patch_px
    if any(side < patch or side % patch for side in size):
        raise ConfigError(
            f"modality.image_px={image_px}: {where} has patches of {patch} pixels, which do not tile such images"
        )
    log.info(
        "images of %dx%d pixels, %s was made for %dx%d: its positions and biases are resized",
        *size,
        where,
        *encoder.image_size,
    )
    return with_image_size(model, size[0] if size[0] == size[1] else list(size))


def given_settings() -> set[str]:
    """Settings that the command line makes, itself or by a recipe."""
    given = {override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task}
    recipe = HydraConfig.get().runtime.choices.get("recipes")
    for source in HydraConfig.get().runtime.config_sources:
        path = Path(source.path, "recipes", f"{recipe}.yaml")
        if source.schema == "file" and recipe is not None and path.is_file():
            given |= _names(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
    return given


def _names(node: dict[str, Any]) -> set[str]:
    """Dotted names of all that a config sets."""
    below = [f"{key}.{name}" for key, value in node.items() if isinstance(value, dict) for name in _names(value)]
    return {*map(str, node), *below}


def _described(
    model: PretrainedModel, kind: type[AudioFeatureExtractor] | type[ImageProcessor] | type[SpectrogramExtractor]
) -> Any:
    """The object of that kind that came with the weights; None if there is none."""
    if model.source is not None and is_described(model.source, kind.parts):
        return kind.from_pretrained(model.source)
    found = next((prepared for prepared in model.preparation if isinstance(prepared, kind)), None)
    if found is None:
        log.warning("no preprocessor_config.json beside the weights: inputs are prepared as modality.* says")
    return found


def _audio(model: PretrainedModel) -> dict[str, Any]:
    facts = {"channels": model.get_encoder().channels}
    found = _described(model, AudioFeatureExtractor)
    return facts if found is None else facts | {"sample_rate_hz": found.sampling_rate, "normalise": found.do_normalize}


def _sound(model: PretrainedModel) -> dict[str, Any]:
    encoder = model.get_encoder()
    facts = {"patch": encoder.patch_px, "mel_bins": encoder.mel_bins}
    found = _described(model, SpectrogramExtractor)
    return facts if found is None else facts | {"sample_rate_hz": found.sampling_rate} | found.settings


def _vision(model: PretrainedModel) -> dict[str, Any]:
    encoder = model.get_encoder()
    height, width = encoder.image_size
    facts: dict[str, Any] = {
        "image_px": height if height == width else [height, width],
        "patch_px": encoder.patch_px,
        "channels": encoder.channels,
    }
    found = _described(model, ImageProcessor)
    if found is None:
        return facts
    size = found.crop_size or found.size
    if size is not None:  # fine-tuning may have been at another size than pretraining
        height, width = size
        facts["image_px"] = height if height == width else [height, width]
    known = found.image_mean is not None
    facts |= {"mean": list(found.image_mean), "std": list(found.image_std)} if known else {"mean": [0.0], "std": [1.0]}
    return facts | {"fit": found.fit} | found.notes


def _text(model: PretrainedModel) -> dict[str, Any]:
    folder = model.source
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        log.warning("no tokenizer beside the weights: the one that modality.tokenizer.path names is used")
        return {}
    return {"tokenizer.path": str(folder), "tokenizer.train_vocab_size": None}


def look_at_images(cfg: DictConfig, source: Source | StreamingSource) -> None:
    """Log what is unusual about the first images of a config's data."""
    if cfg.modality.name != "vision":
        return
    if isinstance(source, Source):
        samples = []
        for row in np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int):
            with suppress(BadSample):  # the quarantine lists it
                samples.append(source[int(row)])
    else:
        samples = list(itertools.islice(source.first(), LOOKED_AT))
    for remark in remarks_on([sample.value for sample in samples], build(cfg.modality.decode)):
        log.warning("of %d images: %s", len(samples), remark)
