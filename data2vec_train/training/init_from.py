"""Continued pretraining: starts from the encoder in a file; parts that the file lacks are initialised."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from data2vec_train import checkpoints
from data2vec_train.config.inputs import block_tokens, facts_of, follow, for_images_of, refuse_other
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.weights.convert import LOOSE, Start, encoder_description, load_pretrained, load_start
from data2vec_train.weights.weights import put_into

log = logging.getLogger(__name__)

_SIZES = ("dim", "depth", "num_heads", "ffn_dim", "conv_dim")
_TOKENIZERS = ("tokenizer.json", "merges.txt")  # a folder with one of these has a tokenizer
_INPUTS = ("image_px", "patch_px", "channels")  # settings of the modality that have to agree with the encoder


@dataclass(frozen=True)
class LibraryStart:
    """Weights for an encoder of another library: a file or folder of the library, or a run with such an encoder."""

    path: Path


def config_from_pretrained(cfg: DictConfig, given: Collection[str] = ()) -> Start | LibraryStart:
    """Read `cfg.init_from` and change `cfg` to describe its encoder; settings of training stay as configured.

    Args:
        cfg: the config.
        given: settings from the command line or a recipe; sizes among them have to equal those of the weights, except
            the image size, to which the weights are adapted.

    Raises:
        ConfigError: the weights are of another modality or other sizes, or do not fit the tokenizer.
    """
    if cfg.get("encoder"):
        return LibraryStart(Path(cfg.init_from).expanduser())
    start, where = load_start(cfg.init_from), f"init_from={cfg.init_from}"
    modality, arguments, _ = encoder_description(start.model)
    if modality != cfg.modality.name:
        raise ConfigError(f"{where} is a model for {modality}; choose modality={modality}")
    _refuse_others(cfg, arguments, given, where)
    if "modality.image_px" in given:
        size = cfg.modality.image_px
        teacher = None if start.teacher is None else for_images_of(start.teacher, size, where)
        start = replace(start, model=for_images_of(start.model, size, where), teacher=teacher)
        _, arguments, _ = encoder_description(start.model)
    if modality != "text":
        facts = facts_of(modality, start.model)
        follow(cfg, {name: fact for name, fact in facts.items() if name not in _INPUTS}, given, where)
    with open_dict(cfg):
        if modality == "text":
            _tokenizer_from_pretrained(cfg, arguments, given)
        for name in _SIZES:
            if name in arguments:
                cfg.size[name] = arguments[name]
        for name in _INPUTS:
            if name in arguments and name in cfg.modality:
                if cfg.modality[name] != arguments[name]:
                    log.info("modality.%s=%s, as in %s", name, arguments[name], cfg.init_from)
                cfg.modality[name] = arguments[name]
        for name, value in arguments.items():
            # The objective decides whether hidden tokens are replaced.
            if name not in LOOSE and name not in ("mask_token", "cross_attention"):
                cfg.modality.encoder[name] = value
    return start


def _refuse_others(cfg: DictConfig, arguments: dict[str, Any], given: Collection[str], where: str) -> None:
    """Raise ConfigError for settings among `given` that differ from those of the weights."""
    for name in _SIZES:
        if name in arguments and not {"size", f"size.{name}"}.isdisjoint(given):
            fact = arguments[name]  # for the front end: one width for each layer, or one for all
            alike = isinstance(fact, (list, tuple)) and len(set(fact)) == 1
            refuse_other(f"size.{name}", cfg.size[name], fact[0] if alike else fact, where)
    for name in ("patch_px", "channels", "patch", "mel_bins"):
        if name in arguments and f"modality.{name}" in given:
            refuse_other(f"modality.{name}", cfg.modality[name], arguments[name], where)
    for name, value in arguments.items():
        if f"modality.encoder.{name}" in given and name not in (*LOOSE, "mask_token"):
            asked = cfg.modality.encoder[name]
            asked = OmegaConf.to_container(asked) if OmegaConf.is_config(asked) else asked
            refuse_other(f"modality.encoder.{name}", asked, value, where)


def _tokenizer_from_pretrained(cfg: DictConfig, arguments: dict, given: Collection[str]) -> None:
    folder = Path(cfg.init_from).expanduser()
    places = [folder, *(base / "preprocessing" for base in [folder, *folder.absolute().parents[1:3]])]
    if cfg.modality.tokenizer.path is None:
        beside = next((place for place in places if any((place / name).is_file() for name in _TOKENIZERS)), None)
        if beside is not None:
            cfg.modality.tokenizer.path, cfg.modality.tokenizer.train_vocab_size = str(beside.resolve()), None
            log.info("tokenizer: %s", beside)
        elif cfg.modality.tokenizer.train_vocab_size is not None:
            raise ConfigError(
                f"init_from={cfg.init_from} has no tokenizer beside it, and a newly trained tokenizer would give other "
                "ids; set modality.tokenizer.path to the one it was trained with"
            )
    if cfg.modality.vocab_size != arguments["vocab_size"]:
        raise ConfigError(
            f"init_from={cfg.init_from} has a vocabulary of {arguments['vocab_size']} tokens, the tokenizer has "
            f"{cfg.modality.vocab_size}; set modality.tokenizer.path to the one it was trained with"
        )
    cfg.modality.block_tokens = block_tokens(cfg, arguments["max_tokens"], given, f"init_from={cfg.init_from}")


@torch.no_grad()
def initialise(
    objective: Data2Vec, start: Start | LibraryStart, where: str, *, fresh_teacher: bool = False
) -> list[str]:
    """Load weights into student, teacher and decoder; returns a sentence for each part that the file lacked.

    With `fresh_teacher` the teacher starts as a copy of the student, even if the file has a teacher, as in the second
    phase of 1.0's large images (ALGORITHM.md 2.3).

    Raises:
        ConfigError: the file's encoder does not fit.
    """
    if isinstance(start, LibraryStart):
        return _from_library(objective, start.path, fresh_teacher=fresh_teacher)
    notes = []
    _, _, tensors = encoder_description(start.model)
    student = objective.student.state_dict()
    missing, excess = sorted(set(student) - set(tensors)), sorted(set(tensors) - set(student))
    wrong = [name for name in set(student) & set(tensors) if student[name].shape != tensors[name].shape]
    if wrong or set(missing) - {"mask_token"} or set(excess) - {"mask_token"}:
        raise ConfigError(
            f"{where} does not fit the encoder; missing: {missing}, unexpected: {excess}, of another shape: {wrong}"
        )
    if missing:
        notes.append("the mask token is new: the file has none")
    if excess:
        notes.append("the file's mask token is not used: this objective replaces no tokens")
    objective.student.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name in student}, strict=False
    )

    followed = dict(objective.student.state_dict())
    if fresh_teacher:
        notes.append("the teacher starts as a copy of the student")
    elif start.teacher is not None:
        _, _, averaged = encoder_description(start.teacher)
        followed |= {name: tensor for name, tensor in averaged.items() if name in followed}
    else:
        notes.append("the teacher starts as a copy of the student: the file has none")
    teacher = objective.teacher.encoder
    teacher.load_state_dict({name: tensor for name, tensor in followed.items() if name in teacher.state_dict()})

    decoder = objective.decoder.state_dict()
    fits = {name: tensor.shape for name, tensor in decoder.items()} == {
        n: tensor.shape for n, tensor in start.decoder.items()
    }
    if fits:
        put_into(objective.decoder, {name: name for name in decoder}, start.decoder, where=where)
    else:
        notes.append("the decoder is new: " + ("the file's does not fit" if start.decoder else "the file has none"))
    return notes


def _from_library(objective: Data2Vec, path: Path, *, fresh_teacher: bool) -> list[str]:
    """`initialise` for an encoder of another library."""
    notes = []
    student, teacher = objective.student, objective.teacher.encoder
    averaged = None
    if path.is_file() and path.suffix != ".ckpt" or checkpoints.resolve(path) is None:
        student.load_library_state(student.read_library_weights(path), where=f"init_from={path}")
    else:
        found = load_pretrained(path).get_encoder()
        if type(found) is not type(student):
            raise ConfigError(f"init_from={path} has a {type(found).__name__}, and encoder= a {type(student).__name__}")
        student.load_library_state(found.library_state(), where=f"init_from={path}")
        if found.mask_token is not None and student.mask_token is not None:
            student.mask_token.copy_(found.mask_token)
        averaged = None if fresh_teacher else load_pretrained(path, weights="teacher").get_encoder().state_dict()
    followed = student.state_dict() | (averaged or {})
    teacher.load_state_dict({name: tensor for name, tensor in followed.items() if name in teacher.state_dict()})
    if averaged is None:
        notes.append("the teacher starts as a copy of the student")
    return [*notes, "the decoder is new"]
