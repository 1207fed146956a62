"""The sources of a composed config, and whether they are still what a run began with."""

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
    """Where pretraining and probes take their samples from; records to hold out are in their groups."""
    sources: Sources = {"source": build_source(data)}
    if data.test_source:
        sources["test_source"] = build(OmegaConf.merge(data.source, data.test_source))
    return sources


def build_source(data: DictConfig) -> Source | StreamingSource:
    """`data.source` with the column that `data.group_column` names; grouped, unless `data.test_source` tests."""
    node = OmegaConf.to_container(data.source, resolve=True)
    target = node["_target_"].rpartition(".")[2]
    if data.test_source:
        return build(node)
    if data.get("group_column") and target in ("FolderSource", "HFSource"):
        node["fields"] = [data.get("group_column")]
        node |= {"metadata": node["metadata"] or "auto"} if target == "FolderSource" else {}
    source = build(node)
    group(source, column=data.get("group_column"), pattern=data.get("group_pattern"))
    return source


def same_data(cfg: DictConfig, run: RunDirectory, sources: Sources) -> dict[str, Any]:
    """The identity of the sources, for checkpoints, once they are known to be those that the run began with.

    Args:
        cfg: the config.
        run: where the run stands.
        sources: as they lie in the files, before anything is cut or tokenized.

    Raises:
        ConfigError: they differ, and `resume` is not `changed`; or their classes do.
    """
    now = {name: identify(source) for name, source in sources.items()}
    if run.checkpoint is None:
        return now
    before = run.data.get("identity")
    if before is None:
        log.warning(
            "%s is of a version that did not keep what its data were: they are not compared, and what is held out is "
            "chosen anew, so that scores are partly of samples that have trained",
            run.checkpoint,
        )
        return now
    for name, source in sources.items():
        found = difference(before[name], now[name], source) if name in before else None
        if found is None:
            continue
        if cfg.resume != "changed":
            raise ConfigError(
                f"data.{name} is not what it was when {run.path} was saved: {found}. Bring the old data back, or go on "
                "with resume=changed: held-out samples stay held out. Another hydra.run.dir starts another run"
            )
        if before[name]["classes"] != now[name]["classes"]:
            raise ConfigError(
                f"resume=changed: data.{name} has other classes than {run.path}, whose scores are of the old ones: "
                f"{found}. Bring the old classes back, or begin another run with init_from={run.path}"
            )
        log.warning("data.%s is not what it was: %s; scores before and after do not compare exactly", name, found)
    return now


def same_tokenizer(run: RunDirectory, source: Source | StreamingSource) -> str | None:
    """The fingerprint of the tokenizer of a prepared source, for checkpoints; None without one.

    Raises:
        ConfigError: it is another one than the run has: trained again, on data that changed.
    """
    tokenizer = getattr(source, "tokenizer", None)
    now = None if tokenizer is None else tokenizer.fingerprint
    if run.data.get("tokenizer", now) != now:
        raise ConfigError(
            f"the tokenizer is not that of {run.path}: trained on other data it gives other ids. Keep the run's own "
            f"with resume=changed modality.tokenizer.train_vocab_size=null "
            f"modality.tokenizer.path={run.path / PREPROCESSING_FOLDER}"
        )
    return now


def same_outputs(run: RunDirectory, outputs: list[str] | None) -> None:
    """Refuse to go on when the outputs of a head would mean something else than they did, as letters and classes may.

    Raises:
        ConfigError: they would.
    """
    before = run.data.get("outputs", outputs)
    if before != outputs:
        old, new = before or [], outputs or []
        raise ConfigError(
            f"the outputs of the head meant something else in {run.path}: {_listed(old, new)} are gone, and "
            f"{_listed(new, old)} are new. Bring the old data back, or choose another hydra.run.dir"
        )


def _listed(names: list[str], others: list[str]) -> str:
    """Those that are not among others."""
    found = [name for name in names if name not in others]
    return f"{len(found)} of {len(names)}" + (f" ({', '.join(found[:5])})" if found else "")
