"""The verbs as Python calls: `data2vec_train.pretrain(modality="vision", data=images)`.

Each call composes and checks the config of its command, then runs the command's code in the caller's process.
"""

import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data2vec_train.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    import lightning as L
    import pandas
    from omegaconf import DictConfig

    from data2vec_train.data.datamodule import DataModule
    from data2vec_train.encoders.base import ModalityEncoder
    from data2vec_train.training.module import Data2VecModule
    from data2vec_train.weights.base import PretrainedModel

__all__ = ["Run", "embed", "export", "finetune", "parts", "predict", "pretrain", "probe"]

_SAVED_DATASET = ("state.json", "dataset_dict.json", "dataset_info.json")  # what datasets' save_to_disk leaves
_TABLES = (".parquet", ".arrow", ".tar", ".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class Run:
    """The run directory of pretraining, fine-tuning or a probe.

    Attributes:
        path: the directory.
    """

    path: Path

    @property
    def summary(self) -> dict[str, Any]:
        """Results: the content of `summary.json`, or of `probe.json` for a probe."""
        import json

        file = next((file for name in ("summary.json", "probe.json") if (file := self.path / name).is_file()), None)
        if file is None:
            raise ConfigError(f"{self.path} has no summary.json: the run is not finished, or this is no run")
        return json.loads(file.read_bytes())

    @property
    def metrics(self) -> "pandas.DataFrame":
        """The content of `metrics.csv`: a row for each logged step."""
        import pandas

        return pandas.read_csv(self.path / "metrics.csv")

    @property
    def report(self) -> Path | None:
        """Path of the HTML report; None if none was written."""
        return next((page for name in ("report.html", "probe.html") if (page := self.path / name).is_file()), None)

    def model(self, *, weights: str = "student") -> "PretrainedModel":
        """The trained model from `load_pretrained`: an encoder, with a head after fine-tuning."""
        from data2vec_train.weights.convert import load_pretrained

        return load_pretrained(str(self.path), weights=weights)

    def encoder(self, *, weights: str = "student") -> "ModalityEncoder":
        """The trained encoder, in evaluation mode.

        Args:
            weights: "student" or "teacher", of pretraining.
        """
        return self.model(weights=weights).get_encoder().eval()

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def pretrain(
    *,
    data: Any = None,
    test_data: Any = None,
    labels: Any = None,
    test_labels: Any = None,
    out: str | os.PathLike | None = None,
    callbacks: "Sequence[L.Callback] | Mapping[str, Any]" = (),
    logger: Any = None,
    **settings: Any,
) -> Run:
    """Pretrain an encoder: `python -m data2vec_train` as a call.

    Args:
        data: a folder, a file, a list of folders; or objects: a list of images of PIL, of arrays, tensors, (waveform,
            rate) pairs, texts or paths, an array (n, ...), a data set of torch or Hugging Face, a frame of pandas or
            polars (`data2vec_train.data.sources.objects.as_source` lists them); or the name of a group of settings
            such as "hf". None = the sample inside the package.
        test_data: samples to test the probes on, of the same kind; None = a share of `data` is held out.
        labels: one for each object, used by the probes only; None = labels in the data; False = none.
        test_labels: labels of `test_data`.
        out: the run directory; None = a new one below runs/. A directory with an unfinished run of the same settings
            is continued.
        callbacks: Lightning callbacks to add to the program's own; or a dict of settings.
        logger: one Lightning logger or a list; or the name of a group of settings, such as "tensorboard".
        **settings: every setting of the command: `modality="vision"`, `objective="data2vec"`, `max_steps=200` for
            `trainer.max_steps`, `precision="fp32"`, `recipes="vision/cifar10"`; those below another one as a dict,
            `trainer={"max_steps": 200}`, or by their dotted name, `**{"trainer.max_steps": 200}`.

    Returns:
        The run: its directory, summary, metrics, encoder.

    Raises:
        ConfigError: an error in the settings, in one line, as the command reports it.
        DataError, SaveError, CollapseError: where the command exits with status 2 or 3.
        KeyboardInterrupt: after Ctrl-C; the run is saved, and the same call with the same `out` continues it.
    """
    objects = _lightning(callbacks, logger, settings)
    settings |= _data_settings(data, test_data, labels, test_labels)
    with _session("train", settings, out=out) as cfg:
        from data2vec_train.pretrain.run import pretrain as run

        run(cfg, **objects)
        return Run(_run_directory())


def parts(
    *,
    data: Any = None,
    test_data: Any = None,
    labels: Any = None,
    test_labels: Any = None,
    out: str | os.PathLike | None = None,
    **settings: Any,
) -> "tuple[Data2VecModule, DataModule]":
    """The module and the data of `pretrain`, for your own `Trainer`.

    `L.Trainer(max_steps=100).fit(module, datamodule=data)` trains. Checkpoints, probes, report and exact resume belong
    to `pretrain` and are absent here. The learning rate schedule ends at `max_steps` of the settings: give your trainer
    the same number.

    Args:
        data: as in `pretrain`.
        test_data: as in `pretrain`.
        labels: as in `pretrain`.
        test_labels: as in `pretrain`.
        out: folder for the list of broken samples.
        **settings: as in `pretrain`.

    Returns:
        The module, whose `objective` is the `Data2Vec`, and the data.
    """
    settings |= _data_settings(data, test_data, labels, test_labels)
    with _session("train", settings, out=out) as cfg:
        import torch

        from data2vec_train.config.inputs import given_settings
        from data2vec_train.training.assemble import build_data, build_module, build_objective
        from data2vec_train.training.init_from import config_from_pretrained, initialise
        from data2vec_train.training.records import build_sources

        start = None if cfg.init_from is None else config_from_pretrained(cfg, given_settings())
        torch.manual_seed(cfg.seed)
        objective = build_objective(cfg)
        if start is not None:
            initialise(objective, start, str(cfg.init_from), fresh_teacher=cfg.fresh_teacher)
        found = build_data(cfg, build_sources(cfg.data), encoder=objective.student, run_dir=_run_directory())
        return build_module(cfg, objective), found


def finetune(
    init_from: str | os.PathLike,
    *,
    data: Any,
    test_data: Any = None,
    labels: Any = None,
    test_labels: Any = None,
    out: str | os.PathLike | None = None,
    callbacks: "Sequence[L.Callback] | Mapping[str, Any]" = (),
    logger: Any = None,
    **settings: Any,
) -> Run:
    """Train a head on a pretrained encoder: `python -m data2vec_train.finetune` as a call.

    Args:
        init_from: a `Run`, a checkpoint, or a folder with weights.
        data: as in `pretrain`; the columns that the head reads come from frames, dicts, or data sets with columns.
        test_data: records to test on; None = a share of `data` is held out.
        labels: one for each object of `data`; None = labels in the data.
        test_labels: labels of `test_data`.
        out: the run directory, as in `pretrain`.
        callbacks: as in `pretrain`.
        logger: as in `pretrain`.
        **settings: as in `pretrain`; `head="image"` says what is learned.

    Returns:
        The run; its `model()` has the head.
    """
    objects = _lightning(callbacks, logger, settings)
    settings |= _data_settings(data, test_data, labels, test_labels) | {"init_from": os.fspath(init_from)}
    with _session("finetune", settings, out=out, weights="init_from") as cfg:
        from data2vec_train.finetune.run import finetune as run

        run(cfg, **objects)
        return Run(_run_directory())


def probe(
    checkpoint: str | os.PathLike,
    *,
    data: Any,
    test_data: Any = None,
    labels: Any = None,
    test_labels: Any = None,
    out: str | os.PathLike | None = None,
    **settings: Any,
) -> Run:
    """Measure how well each layer predicts the labels: `python -m data2vec_train.probe` as a call.

    Args: as in `finetune`.

    Returns:
        The run; its `summary` has the accuracies.
    """
    settings |= _data_settings(data, test_data, labels, test_labels) | {"checkpoint": os.fspath(checkpoint)}
    with _session("probe", settings, out=out, weights="checkpoint") as cfg:
        from data2vec_train.probe.run import probe as run

        run(cfg)
        return Run(_run_directory())


def embed(
    checkpoint: str | os.PathLike, data: Any, *, out: str | os.PathLike | None = None, **settings: Any
) -> "pandas.DataFrame":
    """Features of `data`: `python -m data2vec_train.embed` as a call.

    Args:
        checkpoint: a `Run`, a checkpoint, or a folder with weights.
        data: as in `pretrain`.
        out: the .parquet file to keep; None = none.
        **settings: those of the command, such as `layers="all"`, `pooling="mean"`.

    Returns:
        A row for each record that could be used: its `key` ("data[3]" of objects), and in `layer_N` its features, an
        array. `numpy.stack(frame["layer_6"])` is (rows, width).
    """
    import pandas

    settings |= _data_settings(data) | {"checkpoint": os.fspath(checkpoint)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "features.parquet") if out is None else Path(out)
        with _session("embed", settings | {"out": str(file)}, weights="checkpoint") as cfg:
            from data2vec_train.embed.run import embed as run

            run(cfg)
        return pandas.read_parquet(file)


def predict(
    checkpoint: str | os.PathLike, data: Any, *, out: str | os.PathLike | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Predictions of a fine-tuned model for `data`: `python -m data2vec_train.predict` as a call.

    Args: as in `embed`; for class maps `out` is the folder to make, and must be given.

    Returns:
        {"key": ..., "prediction": ...} of each record, or {"key": ..., "error": ...} of one that could not be used.
    """
    import json

    settings |= _data_settings(data) | {"checkpoint": os.fspath(checkpoint)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "predictions.jsonl") if out is None else Path(out)
        with _session("predict", settings | {"out": str(file)}, weights="checkpoint") as cfg:
            from data2vec_train.predict.run import LISTING
            from data2vec_train.predict.run import predict as run

            run(cfg)
        listing = file / LISTING if file.is_dir() else file
        return [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]


def export(checkpoint: str | os.PathLike, out: str | os.PathLike, **settings: Any) -> Path:
    """Write trained weights for other tools: `python -m data2vec_train.export` as a call.

    Args:
        checkpoint: a `Run`, a checkpoint, or a file of the original programs.
        out: folder to make.
        **settings: those of the command, such as `format="hf"`.

    Returns:
        The folder.
    """
    with _session("export", settings | {"checkpoint": os.fspath(checkpoint), "out": os.fspath(out)}) as cfg:
        from data2vec_train.export.run import export as run

        run(cfg)
    return Path(out)


# ---------------------------------------------------------------------------------------------------------------------
# From arguments to overrides

_OBJECTS = "objects"  # key for data that no config can hold; no setting has this name
_SHORT = {"max_steps": "trainer.max_steps"}
_BARE = re.compile(r"[A-Za-z_][\w./-]*")  # strings that need no quotes
_WORDS = {"null", "true", "false", "nan", "inf"}  # strings that Hydra would read as another type without quotes


def _lightning(callbacks: Any, logger: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Lightning objects among the arguments; names of groups and dicts of settings move to `settings`."""
    if isinstance(callbacks, (str, Mapping)):
        settings["callbacks"], callbacks = callbacks, ()
    if isinstance(logger, (str, Mapping)):
        settings["logger"], logger = logger, ()
    trainer = settings.get("trainer")
    if trainer is not None and not isinstance(trainer, (str, Mapping)):
        raise ConfigError(
            f"trainer: got a {type(trainer).__name__}, expected settings such as {{'max_steps': 100}}; to train with a "
            'Trainer of your own, see "Your own Trainer" in data2vec_train/training/README.md'
        )
    logger = () if logger is None else logger
    return {
        "callbacks": list(callbacks) if isinstance(callbacks, Sequence) else [callbacks],
        "loggers": list(logger) if isinstance(logger, Sequence) else [logger],
    }


def _data_settings(data: Any, test_data: Any = None, labels: Any = None, test_labels: Any = None) -> dict[str, Any]:
    """The settings of the data."""
    if data is None:
        if test_data is not None or labels is not None:
            raise ConfigError("test_data and labels go with data, which is not given")
        return {}
    is_place, test_is_place = _is_place(data), test_data is not None and _is_place(test_data)
    if test_data is not None and is_place != test_is_place:
        raise ConfigError("data and test_data: one is a file or folder and the other objects; give both alike")
    if is_place and (labels is not None or test_labels is not None):
        raise ConfigError("labels go with objects; records of files have them by folder, metadata or column")
    if is_place:
        found = _place(data)
        if test_is_place:
            found["data.test_source"] = {"path": _plain_place(test_data)}
        return found
    found = {"data": "objects", _OBJECTS: {"data": (data, labels)}}
    if test_data is not None:
        found["data.test_source"] = {"name": "test_data"}
        found[_OBJECTS]["test_data"] = test_data, test_labels
    return found


def _is_place(data: Any) -> bool:
    """Whether `data` is a path, a list of folders, or the name of a group of settings."""
    if isinstance(data, (str, os.PathLike)):
        return True
    is_list = isinstance(data, (list, tuple)) and len(data) > 0
    return is_list and all(isinstance(path, (str, os.PathLike)) and Path(path).expanduser().is_dir() for path in data)


def _plain_place(data: Any) -> str | list[str]:
    return os.fspath(data) if isinstance(data, (str, os.PathLike)) else [os.fspath(path) for path in data]


def _place(data: Any) -> dict[str, Any]:
    from data2vec_train.paths import config_directory

    place = _plain_place(data)
    if isinstance(place, list):
        return {"data": "folder", "data.path": place}
    path = Path(place).expanduser()
    if not path.exists():
        if (config_directory() / "data" / f"{place}.yaml").is_file():
            return {"data": place}
        raise ConfigError(
            f"data: there is no file or folder {place}; a data set of the hub is data='hf', **{{'data.path': 'NAME'}}"
        )
    if path.is_dir():
        is_saved = any((path / name).is_file() for name in _SAVED_DATASET)
        has_tables = any(file.suffix in (".parquet", ".arrow", ".tar") for file in path.iterdir())
        return {"data": "hf" if is_saved or has_tables else "folder", "data.path": place}
    if path.suffix == ".tsv":
        return {"data": "manifest", "data.path": place}
    if path.suffix in _TABLES:
        return {"data": "hf", "data.path": place}
    raise ConfigError(
        f"data: {place} is one file; expected a folder, a table ({', '.join(_TABLES)}) or a manifest .tsv"
    )


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """Hydra overrides for the settings, as typed after a command."""
    lines = []
    for name, value in settings.items():
        name = _SHORT.get(name, name)
        if name.partition(".")[0] in ("hydra", "hydra/launcher", "hydra/sweeper"):
            raise ConfigError(f"{name}: Hydra's own settings are for commands; the run directory is out=")
        lines += [f"+{line}" if _is_new(line) else line for line in _lines(name, value)]
    return lines


def _is_new(line: str) -> bool:
    """Whether an override adds a key that the command's config does not have: a recipe, or a callback of the caller."""
    from data2vec_train.system.constraints import OWN_CALLBACKS

    found = re.match(r"callbacks\.(\w+)", line)
    return line.startswith("recipes=") or (found is not None and found[1] not in OWN_CALLBACKS)


def _lines(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value and name.rpartition(".")[2] != "test_source":  # which is null before
        for key, below in value.items():
            yield from _lines(f"{name}.{key}", below)
    else:
        yield f"{name}={_literal(value, name)}"


def _literal(value: Any, name: str) -> str:
    """The value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a number of numpy or torch
        value = value.item()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(below, name)}" for key, below in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_literal(below, name) for below in value) + "]"
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name}: got a {type(value).__name__}, expected a number, a text, a list or a dict")
    from hydra.core.override_parser.types import Quote, QuotedString

    text = os.fspath(value)
    if _BARE.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return QuotedString(text=text, quote=Quote.single).with_quotes()


# ---------------------------------------------------------------------------------------------------------------------
# One call


@contextmanager
def _session(
    config_name: str, settings: Mapping[str, Any], *, out: str | os.PathLike | None = None, weights: str | None = None
) -> "Iterator[DictConfig]":
    """Compose the config of a command to run inside; afterwards restore the state of the process.

    Args:
        config_name: name of the command's config.
        settings: settings and objects of the call.
        out: the run directory, for commands that have one; None = from the config.
        weights: the setting that names trained weights.
    """
    from hydra.core.singleton import Singleton

    from data2vec_train.config.isolation import isolated
    from data2vec_train.data.sources.objects import Handed, handing_over
    from data2vec_train.paths import stay_off_the_network
    from data2vec_train.system.plugins import load_plugins
    from data2vec_train.system.stopping import judged, listener, told

    settings = dict(settings)
    objects = {name: Handed(*pair) for name, pair in settings.pop(_OBJECTS, {}).items()}
    load_plugins()  # first: a module is imported once, and what it registers has to be there for the next call too
    before = dict(Singleton.get_state())  # the caller may be a Hydra application
    with ExitStack() as stack:
        stack.callback(Singleton.set_state, before)
        stack.enter_context(isolated())
        stack.enter_context(handing_over(objects))
        stay_off_the_network()
        try:
            cfg = _compose(config_name, _overrides(settings), out=out, weights=weights)
            stack.enter_context(_talking(_run_directory() if config_name in _WITH_RUN else None, config_name))
            with listener.listening():
                yield cfg
        except Interrupted as error:
            status = told(error)
            if error.signal_number == signal.SIGINT:
                raise KeyboardInterrupt(str(error)) from None
            raise SystemExit(status) from None
        except Exception as error:
            failure, status = judged(error)
            if status == 1 or failure is error:
                raise
            raise failure from error


_WITH_RUN = ("train", "finetune", "probe")


def _compose(
    config_name: str, overrides: list[str], *, out: str | os.PathLike | None, weights: str | None
) -> "DictConfig":
    """The checked config; HydraConfig holds Hydra's part, where the verbs read it.

    Raises:
        ConfigError: all errors, in one line.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from data2vec_train.config.check.overrides import find_faults
    from data2vec_train.config.compose import modality_of_weights
    from data2vec_train.paths import config_directory
    from data2vec_train.system import launch

    launch.name.cache_clear()  # so that each run gets its own directory
    if weights is not None:
        overrides = [*overrides, *modality_of_weights(overrides, weights)]
    if out is not None:
        overrides = [*overrides, f"hydra.run.dir={_literal(os.fspath(out), 'out')}"]
    value = next((line.partition("=")[2] for line in overrides if line.startswith("resume=")), "auto")
    if value not in ("auto", "never", "changed"):
        raise ConfigError(f"resume={value}: expected auto, never or changed; a call goes on in the directory out=")
    if faults := find_faults(overrides, config_name=config_name, multirun=False, on_this_machine=True):
        raise ConfigError("; ".join(faults))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose(config_name, overrides=overrides, return_hydra_config=True)
    directory = Path(cfg.hydra.run.dir).absolute()
    if out is None and config_name in _WITH_RUN and launch.started_processes() is None:
        directory = _free(directory)
    with open_dict(cfg):
        cfg.hydra.run.dir = str(directory)
        cfg.hydra.runtime.output_dir = str(directory)
        cfg.hydra.job.num = 0
        cfg.hydra.job.name = config_name
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    if launch.started_processes() is None and _devices(cfg) > 1:
        raise ConfigError(
            f"strategy.devices: {_devices(cfg)} devices, and this is one process; start the script with torchrun "
            f"--nproc-per-node {_devices(cfg)}, or use the command"
        )
    if config_name in _WITH_RUN:
        directory.mkdir(parents=True, exist_ok=True)
    return cfg


def _devices(cfg: "DictConfig") -> int:
    devices = cfg.strategy.devices if "strategy" in cfg else 1
    if not isinstance(devices, (int, str)):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def _free(directory: Path) -> Path:
    """The directory, with a number appended if it exists: two runs may start within one second."""
    number, free = 1, directory
    while free.exists():
        number += 1
        free = directory.with_name(f"{directory.name}-{number}")
    return free


def _run_directory() -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


@contextmanager
def _talking(directory: Path | None, name: str) -> Iterator[None]:
    """Send the program's log to standard output and to a file in the run directory, as a command does."""
    log = logging.getLogger("data2vec_train")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if directory is not None:
        handlers.append(logging.FileHandler(directory / f"{name}.log", encoding="utf-8", delay=True))
    level, propagates = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False  # the caller's handlers would print each line again
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagates
        for handler in handlers:
            log.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):
                handler.close()
