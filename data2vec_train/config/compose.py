"""From a command line to a running task: `main`.

Imports only hydra and omegaconf: a wrong command is answered before torch and lightning load, which takes ten seconds
and more on a busy machine.
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig

from data2vec_train.config import resolvers  # noqa: F401
from data2vec_train.config.check.overrides import choices_of, find_faults, preflight
from data2vec_train.config.check.security import links_out, saved_faults
from data2vec_train.config.help import help_text
from data2vec_train.config.saved import COMMAND, HEAL, read_yaml
from data2vec_train.errors import ConfigError, Interrupted
from data2vec_train.paths import config_directory, stay_off_the_network
from data2vec_train.system import launch
from data2vec_train.system.compat import private
from data2vec_train.system.moved import with_current_setting
from data2vec_train.system.plugins import load_plugins
from data2vec_train.system.stopping import NEWS_S, judged, leave, listener, told

MODEL_FOLDER = "model"  # of a run directory of fine-tuning

# What a bug in one sweep member can raise; exits and interrupts still end the whole sweep.
_BUGS = (ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError)
_BUGS += (OSError, RuntimeError, TypeError, ValueError)


def main(task: Callable[[DictConfig], object], *, config_name: str, weights: str | None = None) -> None:
    """Runs `task` on what the command line describes: the whole of `python -m data2vec_train`.

    `weights` names the setting with trained weights: unless the command says `modality=`, it is that of the weights.

    Exits with 2 for a fault in the command, the config, the data or the disk, with 3 for a collapse, with 130 after
    Ctrl-C and with 75 after SIGTERM, SIGUSR1 or SIGHUP (a run is saved then, and the same command goes on with it;
    after SIGUSR1 a job of SLURM puts itself back into the queue), with 76 when another process of the command was
    killed, and with 1 for anything else, which keeps its stack trace. A sweep goes on when a member fails, and exits
    with the worst status of its members.
    """
    # Hydra's own short form hides the frames that a bug report needs.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    parser = private("hydra._internal.utils:get_args_parser")()
    # Overrides may stand on both sides of a flag, as in `modality=audio -m seed=0,1`.
    args, unknown = parser.parse_known_intermixed_args()
    unknown += ["--experimental-rerun"] if args.experimental_rerun else []  # unpickles whatever file it is given
    if weights is not None:
        args.overrides += modality_of_weights(args.overrides, weights)
    statuses: list[int] = []
    stay_off_the_network()
    typed = list(args.overrides)
    try:
        load_plugins()
        _resume(args)
        faults = [f"{flag}: there is no such flag; settings have no dashes: {flag.lstrip('-')}" for flag in unknown]
        faults += _faults_of_command(args, config_name)
        if listener.received:  # Hydra turns what a signal handler raises into an error of its own, without a message
            raise Interrupted(listener.received)
        if faults:
            lines = "".join(f"  {fault}\n" for fault in faults)
            sys.stderr.write(f"{len(faults)} error{'s' * (len(faults) > 1)} in the command or config:\n{lines}")
            sys.exit(2)
        if args.help:
            sys.stdout.write(_help(args, config_name))
            sys.exit(0)
        # Not an error, because scripts append settings to others; a note says which one counts.
        if launch.rank() == 0:
            sys.stderr.write("".join(f"note: {note}\n" for note in _said_twice(typed)))
        if any(override.startswith("hydra/launcher=") for override in args.overrides):
            os.environ["DATA2VEC_LAUNCH"] = launch.name()  # its members run elsewhere and later, and have one directory
        guarded = _guard(task, statuses)
        guarded.__module__ = f"data2vec_train.{config_name}"  # after which hydra names the job, and so its log file
        directory, args.config_path = args.config_path or config_directory(), None
        with listener.listening():
            run = private("hydra._internal.utils:_run_hydra")
            run(args, parser, guarded, str(Path(directory).absolute()), config_name)
    except Interrupted as error:
        sys.exit(told(error))
    except KeyboardInterrupt:  # where signals are not heard, as in a thread
        sys.exit(130)
    except Exception as error:  # of the command, or of Hydra's own files
        failure, status = judged(error)
        if isinstance(error, ConfigCompositionException) and listener.received:  # as above; no task has begun
            sys.exit(told(Interrupted(listener.received)))
        if status == 1:
            raise
        sys.stderr.write(f"error: {failure}\n")
        sys.exit(status)
    if statuses:
        sys.exit(max(statuses))


def _resume(args: argparse.Namespace) -> None:
    """`resume=DIR` stands for the command that made the run or the sweep in DIR; other settings add to it."""
    value = next(
        (override.partition("=")[2].strip("'\"") for override in args.overrides if override.startswith("resume=")),
        "auto",
    )
    if value in ("auto", "never", "changed"):
        return
    directory = Path(value).expanduser()
    runs, sweep = (directory / COMMAND, directory / ".hydra" / "overrides.yaml"), directory / "multirun.yaml"
    run = next((file for file in runs if file.is_file()), None)
    if run is not None:
        saved, place = _saved_overrides(run, read_yaml(run)), "hydra.run.dir"
    elif sweep.is_file():
        run, saved, place = sweep, _overrides_of_sweep(sweep), "hydra.sweep.dir"
        args.multirun = True
    else:
        raise ConfigError(f"resume={value}: expected auto, never, changed, or the directory of a run or a sweep")
    added = [override for override in args.overrides if not override.startswith("resume=")]
    typed = {override.partition("=")[0].strip("+~ ") for override in added}
    faults = saved_faults(saved, typed, run)
    if (link := links_out(directory)) is not None:
        faults.append(
            f"{link} leads to {link.resolve()}, outside of the run; give the run's own command to go on there"
        )
    if faults:
        raise ConfigError("; ".join(faults))
    args.overrides = [*saved, f"{place}='{directory}'", *added]


def _overrides_of_sweep(file: Path) -> list[str]:
    own = ("hydra.mode", "hydra.run.dir", "hydra.sweep.dir")
    try:
        overrides = read_yaml(file)["hydra"]["overrides"]
        task, hydra = (_saved_overrides(file, overrides[name]) for name in ("task", "hydra"))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: it has no hydra.overrides; give the sweep's own command") from error
    return [*task, *(override for override in hydra if not override.startswith(own))]


def _saved_overrides(file: Path, found: object) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(override, str) for override in found):
        raise ConfigError(f"{file} is damaged: expected a list of settings; {HEAL}")
    return [with_current_setting(override) for override in found]


def modality_of_weights(overrides: list[str], setting: str) -> list[str]:
    """`["modality=audio"]` when the command leaves the modality out and a file beside the weights says it."""
    given = dict(override.partition("=")[::2] for override in overrides)
    if setting not in given or any(name.lstrip("+") in ("modality", "recipes") for name in given):
        return []
    path = Path(given[setting].strip("'\"")).expanduser()
    folders = [path, path / MODEL_FOLDER, *path.absolute().parents[:3]]
    for folder in folders:
        for name, pattern in (("config.json", r'"model_type": "data2vec(?:_train)?-(\w+)"'), ("config.yaml", _NAMED)):
            file = folder / name
            text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            found = re.search(pattern, text)
            if found and found[1] == "plugin":
                found = re.search(_OF_PLUGIN, text)
            if found:
                return [f"modality={found[1]}"]
    return []


_OF_PLUGIN = r'"modality": \{\s*"name": "([\w-]+)"'  # in the config.json of weights
_NAMED = r"(?m)^modality:\n(?:  .*\n)*?  name: (\w+)$"  # in the config.yaml of a run


def _said_twice(overrides: list[str]) -> list[str]:
    values: dict[str, list[str]] = {}
    for override in overrides:
        name, _, value = override.partition("=")
        values.setdefault(name.lstrip("+"), []).append(value)
    twice = {name: found for name, found in values.items() if name and len(set(found)) > 1}
    return [
        f"{name}: is set {len(found)} times, to {' and '.join(found)}; the last counts" for name, found in twice.items()
    ]


def _faults_of_command(args: argparse.Namespace, config_name: str) -> list[str]:
    directory = Path(args.config_path) if args.config_path else None
    extra = Path(args.config_dir) if args.config_dir else None
    absent = [folder for folder in (directory, extra) if folder is not None and not folder.is_dir()]
    if absent:
        return [f"{folder}: there is no such directory of configs" for folder in absent]
    return find_faults(
        [*args.overrides, *(["hydra.mode=MULTIRUN"] if args.multirun else [])],
        config_name=args.config_name or config_name,
        config_dir=directory and directory.absolute(),
        extra_config_dir=extra,
        multirun=args.multirun,
        on_this_machine=True,
        names_only=bool(args.help or args.hydra_help or args.cfg or args.info),
    )


def _help(args: argparse.Namespace, config_name: str) -> str:
    name = (args.config_name or config_name).removesuffix(".yaml")
    folders = [Path(args.config_path).absolute() if args.config_path else config_directory()]
    folders += [Path(args.config_dir)] if args.config_dir else []
    return help_text(name, choices_of(args.overrides, config_name=name, folders=folders), folders)


def _guard(task: Callable[[DictConfig], object], statuses: list[int]) -> Callable[[DictConfig], object]:
    """The task with its failures turned into one line and an exit status; those of sweep members are collected."""

    def run(cfg: DictConfig) -> object:
        hydra_config = HydraConfig.get()
        is_member = hydra_config.mode == RunMode.MULTIRUN
        who = f" in sweep member {hydra_config.job.num} ({' '.join(hydra_config.overrides.task)})" if is_member else ""
        who += f" in process {launch.rank()}" if launch.rank() else ""
        try:
            if is_member:
                load_plugins()  # on a cluster the member is another process
                # A sweep may be longer than what was checked before it started.
                if faults := preflight(cfg):
                    raise ConfigError("; ".join(faults))
                from data2vec_train.config.isolation import isolated

                with listener.listening(), isolated():  # a member on a cluster came here without `main`
                    return task(cfg)
            return task(cfg)
        except Interrupted as error:
            status = told(error)
            is_member = False  # a signal ends the whole sweep
        except Exception as error:
            failure, status = judged(error)
            gone = listener.verdict(NEWS_S) if status == 1 else None
            if gone is not None:
                status = gone.status
                sys.stderr.write(f"{gone.line}\n")
            elif status > 1:
                sys.stderr.write(f"error{who}: {failure}\n")
            elif not is_member and not listener.accompanied or not isinstance(error, _BUGS):
                raise
            else:
                traceback.print_exc()
                sys.stderr.write(f"error{who}: {type(error).__name__}: {error}\n")
        if listener.accompanied:  # a thread that waits for the other processes would abort this one at its end
            sys.stdout.flush()
            leave(status)
        if not is_member:
            raise SystemExit(status)
        statuses.append(status)
        return float("nan")  # what a sweeper that optimises reads as a failed trial

    return run
