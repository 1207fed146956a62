"""Builds the sources of a composed config and checks that they are those that a run started with."""

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data2vec_train.config.build import build
from data2vec_train.data.groups import group
from data2vec_train.data.identity import difference, identify
from data2vec_train.data.sources.files import Source, StreamingSource
from data2vec_train.errors import ConfigError
from data2vec_train.training.run_directory import RunDirectory
from data2vec_train.weights.convert import PREPROCESSING_FOLDER

log = logging.getLogger(__name__)

Sources = dict[str, Source | StreamingSource]  # "source", and "test_source" where there is one


def build_sources(data: DictConfig) -> Sources:
    """The sources of samples for pretraining and probes; records that are held out together are grouped."""
    sources: Sources = {"source": build_source(data)}
    if data.test_source:
        sources["test_source"] = build(OmegaConf.merge(data.source, data.test_source))
    return sources


def build_source(data: DictConfig) -> Source | StreamingSource:
    """`data.source`, grouped by the column `data.group_column`; not grouped if there is a `data.test_source`."""
    node = OmegaConf.to_container(data.source, resolve=True)
    target = node["_target_"].rpartition(".")[2]
    if data.test_source:
        return build(node)
    if data.get("group_column") and target in ("FolderSource", "HFSource", "handed_over"):
        node["fields"] = [data.get("group_column")]
        node |= {"metadata": node["metadata"] or "auto"} if target == "FolderSource" else {}
    source = build(node)
    group(source, column=data.get("group_column"), pattern=data.get("group_pattern"))
    return source


def same_data(cfg: DictConfig, run: RunDirectory, sources: Sources) -> dict[str, Any]:
    """Check that the sources are those that the run started with; returns their identity, for checkpoints.

    Args:
        cfg: the config.
        run: the run directory.
        sources: as stored in the files, before cutting and tokenizing.

    Raises:
        ConfigError: they differ, and `resume` is not `changed`; or their classes do.
    """
    now = {name: identify(source) for name, source in sources.items()}
    if run.checkpoint is None:
        return now
    before = run.data.get("identity")
    if before is None:
        log.warning(
            "%s is of a version that did not record its data: they cannot be compared, and held-out samples are chosen "
            "again, so that scores include samples of the training",
            run.checkpoint,
        )
        return now
    for name, source in sources.items():
        found = difference(before[name], now[name], source) if name in before else None
        if found is None:
            continue
        if cfg.resume != "changed":
            raise ConfigError(
                f"data.{name} has changed since {run.path} was saved: {found}. Restore the old data, or continue with "
                "resume=changed (held-out samples stay held out), or start another run with another hydra.run.dir"
            )
        if before[name]["classes"] != now[name]["classes"]:
            raise ConfigError(
                f"resume=changed: data.{name} has other classes than {run.path}, whose scores are for the old ones: "
                f"{found}. Restore the old classes, or start another run with init_from={run.path}"
            )
        log.warning("data.%s has changed: %s; scores before and after are not exactly comparable", name, found)
    return now


def same_tokenizer(run: RunDirectory, source: Source | StreamingSource) -> str | None:
    """The fingerprint of the tokenizer of a prepared source, for checkpoints; None without one.

    Raises:
        ConfigError: it differs from the run's, since it was trained again on changed data.
    """
    tokenizer = getattr(source, "tokenizer", None)
    now = None if tokenizer is None else tokenizer.fingerprint
    if run.data.get("tokenizer", now) != now:
        raise ConfigError(
            f"the tokenizer is not that of {run.path}: it was trained on other data and gives other ids. Keep the "
            f"run's own with resume=changed modality.tokenizer.train_vocab_size=null "
            f"modality.tokenizer.path={run.path / PREPROCESSING_FOLDER}"
        )
    return now


def same_outputs(run: RunDirectory, outputs: list[str] | None) -> None:
    """Refuse to continue if the outputs of a head, such as letters or classes, have changed their meaning.

    Raises:
        ConfigError: they have.
    """
    before = run.data.get("outputs", outputs)
    if before != outputs:
        old, new = before or [], outputs or []
        raise ConfigError(
            f"the outputs of the head have another meaning than in {run.path}: {_listed(old, new)} are gone, and "
            f"{_listed(new, old)} are new. Restore the old data, or choose another hydra.run.dir"
        )


def _listed(names: list[str], others: list[str]) -> str:
    """How many of `names` are not among `others`, and the first five of these."""
    found = [name for name in names if name not in others]
    return f"{len(found)} of {len(names)}" + (f" ({', '.join(found[:5])})" if found else "")
