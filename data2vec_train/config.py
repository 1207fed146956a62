"""From a command line to checked settings and built objects: plugins, every fault at once, `build`, `main`.

Imports only the standard library, hydra and omegaconf: a wrong command is answered before torch and lightning load,
which takes ten seconds and more on a busy machine. Code that a config names (`_target_`) is therefore read, never
imported: its file is parsed and its signature compared with the settings.
"""

import argparse
import ast
import copy
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
)

from data2vec_train.errors import CollapseError, ConfigError, DataError

_HERE = Path(__file__).resolve().parent

# A config may come from anybody, and `_target_` runs what it names: only these prefixes and registered plugins.
_ALLOWED = ("data2vec_train.", "lightning.", "torch.optim.", "torchvision.")
_REFUSED = ("lightning.pytorch.cli.",)  # builds whatever its own arguments name
_plugin_packages: set[str] = set()

_MAX_MEMBERS_CHECKED = 32
_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)

# What a bug in one sweep member can raise: named one by one so that exits and interrupts still end the whole sweep.
_MEMBER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


# ---------------------------------------------------------------------------------------------------------------------
# Places, plugins, resolvers


def config_directory() -> Path:
    """The directory with `train.yaml`: inside the package in a wheel, beside it in a checkout."""
    return _inside_or_beside("configs")


def recipes_parent() -> Path:
    """The directory that contains `recipes/`, so that `recipes/vision/x` is found below it."""
    return _inside_or_beside("recipes").parent


def _inside_or_beside(name: str) -> Path:
    for parent in (_HERE, _HERE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise ConfigError(f"there is no directory {name} in {_HERE} or {_HERE.parent}; install data2vec_train again")


def expose_recipes() -> None:
    """Sets DATA2VEC_RECIPES, which `hydra.searchpath` of the primary config reads, unless the user has set it."""
    if not os.environ.get("DATA2VEC_RECIPES"):
        os.environ["DATA2VEC_RECIPES"] = str(recipes_parent())


def load_plugins() -> None:
    """Imports the modules in DATA2VEC_PLUGINS and the entry points `data2vec_train.plugins`; both fill the ConfigStore.

    Raises:
        ConfigError: A module that DATA2VEC_PLUGINS names, or that an entry point names, cannot be found.
    """
    named = [name.strip() for name in os.environ.get("DATA2VEC_PLUGINS", "").split(",") if name.strip()]
    if named and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # last, so that a file here cannot hide an installed package
    installed = [entry.module for entry in importlib.metadata.entry_points(group="data2vec_train.plugins")]
    for name in [*named, *installed]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ConfigError(f"plugin {name} needs the module {error.name}, which is not installed") from error
            source = "DATA2VEC_PLUGINS" if name in named else "an installed package"
            raise ConfigError(
                f"{source} names the plugin {name}, and there is no module {error.name}; it has to be importable from "
                f"{Path.cwd()} or installed"
            ) from error
        _plugin_packages.add(name.split(".")[0])


def _share(fraction: float, total: int) -> int:
    share = int(round(fraction * total))
    return max(1, share) if fraction > 0 else share


def register_resolvers() -> None:
    """Makes `${share:0.1,${trainer.max_steps}}` available: that share of a whole number, at least 1 unless it is 0."""
    OmegaConf.register_new_resolver("share", _share, replace=True)


# ---------------------------------------------------------------------------------------------------------------------
# All faults of a command line


def find_faults(
    overrides: list[str],
    *,
    config_name: str,
    config_dir: Path | None = None,
    extra_config_dir: Path | None = None,
    multirun: bool | None = None,
    names_only: bool = False,
) -> list[str]:
    """Every fault of a command line, one plain sentence each; an empty list when there is nothing to mend.

    What can be composed without the faulty overrides is composed and goes through `preflight`, so that one answer has
    everything. Of a sweep, each choice of a group is looked up, and the first 32 members are composed.

    Args:
        overrides: Hydra overrides as typed, flags left out.
        config_name: The primary config.
        config_dir: Where it lies; `config_directory()` unless given.
        extra_config_dir: The value of `--config-dir`.
        multirun: Whether `-m` was given; None accepts several values either way.
        names_only: Look up only the choices of groups, which is what `--help` needs.
    """
    expose_recipes()
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir or config_directory()), version_base="1.3"):
        configs = _Configs(GlobalHydra.instance().config_loader(), config_name, extra_config_dir)
        command = _CommandLine(configs, multirun)
        command.read(overrides)
        if not names_only:
            command.check_members()
    return command.faults


class _Configs:
    """What can be chosen, and its composition."""

    def __init__(self, loader: ConfigLoader, name: str, extra_dir: Path | None) -> None:
        self.loader = loader
        self.name = name
        self.always: list[str] = []  # overrides that every composition needs
        self._listed: dict[tuple[str, ObjectType], list[str]] = {}
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        if extra_dir is not None:
            # --config-dir comes before hydra.searchpath and after the primary directory, as in hydra itself.
            paths = [f"file://{extra_dir.absolute()}", *self._primary_search_path()]
            self.always = ["hydra.searchpath=[" + ",".join(f'"{path}"' for path in paths) + "]"]

    def _primary_search_path(self) -> list[str]:
        try:
            return list(self.compose([]).hydra.searchpath)
        except _COMPOSE_ERRORS:
            return [f"file://{os.environ['DATA2VEC_RECIPES']}"]

    def _list(self, group: str, kind: ObjectType) -> list[str]:
        if (group, kind) not in self._listed:
            self._listed[group, kind] = self.loader.get_group_options(
                group, results_filter=kind, config_name=self.name, overrides=self.always
            )
        return self._listed[group, kind]

    def is_group(self, key: str) -> bool:
        return "." not in key and bool(self._list(key, ObjectType.CONFIG) or self._list(key, ObjectType.GROUP))

    def groups_with(self, option: str) -> list[str]:
        return [group for group in self._list("", ObjectType.GROUP) if option in self._list(group, ObjectType.CONFIG)]

    def options(self, group: str) -> list[str]:
        """All choices, those in sub-directories as `vision/base_imagenet`."""
        below = self._list(group, ObjectType.GROUP)
        nested = [f"{sub}/{option}" for sub in below for option in self.options(f"{group}/{sub}")]
        return [*self._list(group, ObjectType.CONFIG), *nested]

    def compose(self, lines: Iterable[str]) -> DictConfig:
        """The config with these choices and hydra's own part; kept for later calls, so copy it before changing it."""
        key = tuple(lines)
        if key not in self._composed:
            cfg = compose(self.name, overrides=[*self.always, *key], return_hydra_config=True)
            with read_write(cfg), open_dict(cfg):
                # Known only once a job runs; settings may refer to them, so any value will do here.
                cfg.hydra.runtime.output_dir = "outputs"
                cfg.hydra.job.id, cfg.hydra.job.num = "0", 0
            OmegaConf.set_readonly(cfg.hydra, False)
            self._composed[key] = cfg
        return self._composed[key]


class _CommandLine:
    """The overrides of one command against the configs they choose from."""

    def __init__(self, configs: _Configs, multirun: bool | None) -> None:
        self.configs = configs
        self.multirun = multirun
        self.faults: list[str] = []
        self._parser = OverridesParser.create(config_loader=configs.loader)
        self._variants: list[list[Override]] = []  # for every readable override, the values it takes

    def _add(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)

    def read(self, overrides: list[str]) -> None:
        """Parses each override, spreads the values of a sweep and looks up the choices of groups."""
        for line in overrides:
            try:
                override = self._parser.parse_override(line)
                override.config_loader = self.configs.loader  # which glob() asks
                values = self._spread(override)
            except HydraException as error:
                groups = self.configs.groups_with(line)
                near = f"; did you mean {groups[0]}={line}?" if groups else ""
                self._add(f"{line}: no value given{near}" if near else _syntax_fault(line, error))
                continue
            if not override.key_or_group:
                self._add(f"{line}: there is no name before the '='; write key=value")
            elif override.is_sweep_override() and self.multirun is False:
                as_list = f"{override.get_key_element()}=[{override.get_value_string()}]"
                self._add(f"{line}: several values make a sweep, which needs -m; for one list write {as_list}")
            elif override.key_or_group == "hydra.searchpath":
                self.configs.always = [line]
            elif not values:
                self._add(f"{line}: this sweep has no values")
            elif usable := [value for value in values if not self._choice_fault(value)]:
                self._variants.append(usable)

    def _spread(self, override: Override) -> list[Override]:
        if not override.is_sweep_override():
            return [override]
        if override.value_type == ValueType.INTERVAL_SWEEP:
            values: Iterable[str] = [str(override.value().start), str(override.value().end)]
        else:
            values = itertools.islice(override.sweep_string_iterator(), 1000)
        return [self._parser.parse_override(f"{override.get_key_element()}={value}") for value in values]

    def _choice_fault(self, override: Override) -> bool:
        group, value = override.key_or_group, override.value()
        if override.is_delete() or isinstance(value, dict) or value is None or not self.configs.is_group(group):
            return False
        options = self.configs.options(group)
        wrong = [str(one) for one in (value if isinstance(value, list) else [value]) if str(one) not in options]
        for one in wrong:
            kind = "recipe" if group == "recipes" else group
            self._add(
                f"{override.get_key_element()}={one}: there is no {kind} called '{one}'"
                f"{_did_you_mean(one, options)} Choices: {', '.join(options) or 'none'}"
            )
        return bool(wrong)

    def _is_choice(self, override: Override) -> bool:
        return self.configs.is_group(override.key_or_group) and not isinstance(override.value(), dict)

    def check_members(self) -> None:
        """Composes the run, or the members of the sweep, and reports what is wrong with them."""
        members = list(itertools.islice(itertools.product(*self._variants), _MAX_MEMBERS_CHECKED))
        found: dict[str, list[str]] = {}
        for member in members:
            swept = [one.input_line for one, values in zip(member, self._variants, strict=True) if len(values) > 1]
            for fault in self._member_faults(member):
                found.setdefault(fault, []).append(" ".join(swept))
        for fault, where in found.items():
            self._add(fault if len(where) == len(members) else f"{fault} (in the sweep member {where[0]})")

    def _member_faults(self, member: tuple[Override, ...]) -> list[str]:
        faults: list[str] = []
        chosen = self._usable_choices([one.input_line for one in member if self._is_choice(one)], faults)
        if chosen is None:
            return faults
        base = self.configs.compose(chosen)
        cfg = copy.deepcopy(base)
        changed = []
        for override in (one for one in member if not self._is_choice(one)):
            fault = _apply(cfg, override, self.configs)
            if fault:
                faults.append(fault)
            else:
                changed.append(override)
        retyped = {one.key_or_group: fault for one in changed if (fault := _retyped(base, cfg, one.key_or_group))}
        shown = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(cfg)
        try:
            return [*faults, *_inspect(cfg, retyped)]
        finally:
            HydraConfig.instance().cfg = shown

    def _usable_choices(self, lines: list[str], faults: list[str]) -> list[str] | None:
        """The choices that compose, the others reported; None when not even the defaults compose."""
        try:
            self.configs.compose(lines)
            return lines
        except _COMPOSE_ERRORS:
            kept: list[str] = []
        # One at a time. A message that was there before a line joined is not about that line.
        trouble = self._trouble(kept)
        for line in lines:
            after = self._trouble([*kept, line])
            if after is None or (trouble is not None and str(after) == str(trouble)):
                kept, trouble = [*kept, line], after
            else:
                faults.append(f"{line}: {_explain_choice(self._parser.parse_override(line), after)}")
        if trouble is not None:
            faults.append(f"{self.configs.name}: {_one_line(trouble)}")
            return None
        return kept

    def _trouble(self, lines: list[str]) -> Exception | None:
        try:
            self.configs.compose(lines)
        except _COMPOSE_ERRORS as error:
            return error
        return None


def _syntax_fault(line: str, error: HydraException) -> str:
    key, equals, _ = line.partition("=")
    if not equals and re.fullmatch(r"[\w./+@]+", line):
        return f"{line}: no value given; write {line}=VALUE"
    if "[" in key:
        return f"{line}: one item of a list cannot be set; write the whole list, {key.split('[')[0]}=[...]"
    return (
        f"{line}: cannot be read ({_one_line(error)}); write key=value, and a value with spaces, commas, brackets or "
        "an '=' in quotes: 'key=\"value\"'"
    )


def _explain_choice(override: Override, error: Exception) -> str:
    text, plain = str(error), f"{override.key_or_group}={override.value()}"
    if "No match in the defaults list" in text and not override.is_delete():
        return f"{override.key_or_group} is not chosen by default; add it with a plus: +{plain}"
    if override.is_add() and ("Multiple values" in text or "already" in text):
        return f"{override.key_or_group} already has a choice; leave out the plus: {plain}"
    if override.is_delete() and "Could not delete" in text:
        return f"there is no choice of {override.key_or_group} to leave out"
    return _one_line(error)


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or a full stop when nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    # `base_imagenet` for `vision/base_imagenet`
    near = near or [option for option in known if option.rpartition("/")[2] == name.rpartition("/")[2]][:1]
    return f"; did you mean {near[0]}?" if near else "."


def _apply(cfg: DictConfig, override: Override, configs: _Configs) -> str | None:
    """Changes `cfg` as hydra would, or says why that is impossible."""
    key, line = override.key_or_group, override.input_line
    if override.package is not None:
        return f"{line}: there is no group called '{key}'{_did_you_mean(key, _groups(cfg))}"
    try:
        there = OmegaConf.select(cfg, key, throw_on_missing=False, throw_on_resolution_failure=False)
        if override.is_delete():
            if there is None:
                return f"{line}: there is nothing called '{key}' to remove{_did_you_mean_setting(cfg, key)}"
            parent, _, last = key.rpartition(".")
            with open_dict(cfg):
                del (OmegaConf.select(cfg, parent) if parent else cfg)[last]
        elif override.is_add() and there is not None and not isinstance(override.value(), (dict, list)):
            return f"{line}: {key} is already there; leave out the plus: {line.removeprefix('+')}"
        elif override.is_add() or override.is_force_add():
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)
        else:
            OmegaConf.update(cfg, key, override.value(), merge=True)
    except (ConfigKeyError, ConfigAttributeError):
        return f"{line}: there is no setting called '{key}'{_did_you_mean_setting(cfg, key, configs)}"
    except OmegaConfBaseException as error:
        return f"{line}: {str(error).splitlines()[0]}"
    return None


def _groups(cfg: DictConfig) -> list[str]:
    return [str(group) for group in cfg.hydra.runtime.choices if not str(group).startswith("hydra/")]


def _did_you_mean_setting(cfg: DictConfig, key: str, configs: _Configs | None = None) -> str:
    tree = OmegaConf.to_container(cfg, resolve=False)
    if not key.startswith("hydra"):
        tree.pop("hydra", None)
    near = _nearest_settings(tree, key)
    if not near and "." not in key and configs is not None:
        groups = [*_groups(cfg), "recipes"]
        near = difflib.get_close_matches(key, groups, n=1, cutoff=0.6)
        near = [f"+{near[0]}" if near[0] == "recipes" else near[0]] if near else []
    if near:
        return f"; did you mean {' or '.join(near)}?"
    parent = key.rpartition(".")[0]
    inside = _dig(tree, parent) if parent else tree
    if isinstance(inside, dict) and inside:
        return f"; {parent or 'the config'} has {', '.join(map(str, inside))}"
    return ""


def _nearest_settings(tree: dict, key: str) -> list[str]:
    """Dotted paths near `key`: the same last name elsewhere, each part mended, or a like last name elsewhere."""
    parts = key.split(".")
    paths = list(_paths(tree))
    same = sorted((path for path in paths if path.rpartition(".")[2] == parts[-1]), key=lambda path: path.count("."))
    if same and len(parts) == 1:
        return same[:3]
    mended, node = [], tree
    for part in parts:
        names = [str(name) for name in node] if isinstance(node, dict) else []
        near = [part] if part in names else difflib.get_close_matches(part, names, n=1, cutoff=0.6)
        if not near:
            break
        mended.append(near[0])
        node = node[near[0]]
    else:
        return [".".join(mended)]
    if same:
        return same[:3]
    last_names = difflib.get_close_matches(parts[-1], {path.rpartition(".")[2] for path in paths}, n=1, cutoff=0.75)
    return [path for path in paths if path.rpartition(".")[2] in last_names][:3]


def _paths(tree: dict, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _dig(tree: object, path: str) -> object:
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _retyped(base: DictConfig, cfg: DictConfig, key: str) -> str | None:
    """A fault when a setting was a number, true/false or a mapping by default and now is something else."""
    try:
        before, after = OmegaConf.select(base, key), OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return None
    if isinstance(before, DictConfig) and after is not None and not isinstance(after, DictConfig):
        return f"{key}: expected a mapping of settings, got {_show(after)}"
    if isinstance(before, bool) and isinstance(after, str):
        return f"{key}: expected true or false, got {_show(after)}"
    if not isinstance(before, (int, float)) or isinstance(before, bool):
        return None
    wrong = isinstance(after, (bool, DictConfig))
    if isinstance(after, str):
        try:
            float(after)
        except ValueError:
            wrong = True
    expected = "a whole number" if isinstance(before, int) else "a number"
    return f"{key}: expected {expected}, got {_show(after)}" if wrong else None


# ---------------------------------------------------------------------------------------------------------------------
# Preflight: the composed config against the code it names


def preflight(cfg: DictConfig) -> list[str]:
    """Every fault of a composed config: what is not set, cannot be resolved, does not fit its `_target_`, or a rule."""
    return _inspect(cfg, {})


def _inspect(cfg: DictConfig, retyped: dict[str, str]) -> list[str]:
    walk = _Walk(cfg)
    walk.visit(cfg, walk.plain, "")
    for path, text in retyped.items():
        if path not in walk.accepted:
            walk.faults.setdefault(path, text)
    if "hydra" in cfg:
        walk.faults.update(_hydra_faults(OmegaConf.to_container(cfg.hydra, resolve=False)))
    # A value worked out from a faulty one says nothing new.
    underived = [text for raw, text in walk.derived if not any(f"${{{path}}}" in raw for path in walk.faults)]
    broken = [fault for rule in RULES if (fault := rule(cfg)) and fault.partition(":")[0] not in walk.faults]
    return list(dict.fromkeys([*walk.faults.values(), *underived, *broken]))


class _Walk:
    """One pass over a composed config; `faults` maps a dotted path to its sentence, so that each is named once."""

    def __init__(self, cfg: DictConfig) -> None:
        self.root = cfg
        self.plain = OmegaConf.to_container(cfg, resolve=False)
        self.faults: dict[str, str] = {}
        self.accepted: set[str] = set()  # settings that fit an annotation
        self.derived: list[tuple[str, str]] = []  # (expression, sentence)

    def visit(self, node: DictConfig | ListConfig, plain: dict | list, path: str) -> None:
        is_list = isinstance(node, ListConfig)
        arguments: dict[str, tuple[str, object]] = {}
        for key in range(len(node)) if is_list else list(node.keys()):
            here = f"{path}[{key}]" if is_list else f"{path}.{key}" if path else str(key)
            if here == "hydra":
                continue
            raw = plain[key]
            if OmegaConf.is_missing(node, key):
                self.faults.setdefault(here, f"{here}: not set; say which, for example {here}=VALUE")
                arguments[str(key)] = (here, _UNKNOWN)
            elif OmegaConf.is_interpolation(node, key):
                arguments[str(key)] = (self._origin(here, raw), self._resolve(node, key, here, raw))
            else:
                arguments[str(key)] = (here, node[key])
                if OmegaConf.is_config(node[key]):
                    self.visit(node[key], raw, here)
        if "_target_" in arguments:
            self._check_call(path, arguments)

    def _resolve(self, node: DictConfig | ListConfig, key: str | int, here: str, raw: str) -> object:
        try:
            return node[key]
        except InterpolationToMissingValueError:
            return _UNKNOWN  # reported where the value is missing
        except InterpolationKeyError as error:
            absent = re.search(r"Interpolation key '(.+?)' not found", str(error))
            name = absent[1] if absent else raw
            near = _did_you_mean_setting(self.root, name)
            self.faults.setdefault(here, f"{here}: refers to {raw}, and there is no setting called '{name}'{near}")
        except OmegaConfBaseException as error:
            first = str(error).splitlines()[0]
            self.derived.append((raw, f"{here}: cannot work out {raw}: {first}"))
        return _UNKNOWN

    def _origin(self, here: str, raw: object) -> str:
        """Where a value that is only passed on was written: that is what the user has to mend."""
        for _ in range(10):
            passed_on = re.fullmatch(r"\$\{(\w[\w.]*)\}", raw) if isinstance(raw, str) else None
            if passed_on is None:
                break
            here, raw = passed_on[1], _dig(self.plain, passed_on[1])
        return here

    def _check_call(self, path: str, arguments: dict[str, tuple[str, object]]) -> None:
        target_path, target = arguments["_target_"]
        if target is _UNKNOWN:
            return
        fault = _target_fault(target)
        if fault:
            self.faults.setdefault(target_path, f"{target_path}: {fault}")
            return
        found = _find(target)
        signature = _signature(found)
        short = target.rpartition(".")[2]
        given = {name: value for name, value in arguments.items() if name not in _HYDRA_KEYS}
        for name, (label, value) in given.items():
            here = f"{path}.{name}" if path else name
            parameter = signature.parameters.get(name)
            if parameter is None and not signature.is_open:
                near = _did_you_mean(name, signature.parameters)
                takes = f" It takes {', '.join(signature.parameters) or 'no settings'}." if near == "." else ""
                self.faults.setdefault(here, f"{here}: {short} has no setting called '{name}'{near}{takes}")
            elif parameter is not None and parameter.annotation is not None and label not in self.faults:
                expected = _mismatch(value, parameter)
                if expected:
                    self.faults[label] = f"{label}: expected {expected}, got {_show(value)}"
                else:
                    self.accepted.add(label)
        partial = arguments.get("_partial_", ("", False))[1]
        if partial is True or "_args_" in arguments:
            return
        for name, parameter in signature.parameters.items():
            here = f"{path}.{name}" if path else name
            if parameter.is_required and name not in given:
                self.faults.setdefault(here, f"{here}: not set, and {short} needs it")


_UNKNOWN = object()
_HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
_LOGGING_CLASS = re.compile(r"(logging(\.handlers)?|colorlog|rich\.logging)\.[A-Z]\w*")


def _hydra_faults(tree: dict) -> dict[str, str]:
    """Hydra's own part runs code too: callbacks, launcher, sweeper, and the factories of `logging.config`."""
    faults = {}
    for path, name, value in _leaves(tree, "hydra"):
        if not isinstance(value, str):
            fault = None
        elif name == "_target_" and not value.startswith(("hydra.", "hydra_plugins.")):
            fault = _target_fault(value)
        elif path.startswith(("hydra.job_logging", "hydra.hydra_logging")):
            called = name in ("class", "()") and not _LOGGING_CLASS.fullmatch(value)
            external = value.startswith("ext://") and not re.fullmatch(r"ext://sys\.std(out|err)", value)
            fault = f"'{value}' is not allowed here: only classes of logging" if called or external else None
        else:
            fault = None
        if fault:
            faults[path] = f"{path}: {fault}"
    return faults


def _leaves(tree: object, path: str) -> Iterator[tuple[str, str, object]]:
    """(path, last name, value) of all that is no dict or list itself in a tree of dicts and lists."""
    children = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        if isinstance(value, (Mapping, list)):
            yield from _leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", str(key), value


def _show(value: object) -> str:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict):
        return "a mapping of settings"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Signatures without imports


@dataclass(frozen=True)
class _Parameter:
    annotation: ast.expr | None
    is_required: bool
    default_is_none: bool
    module: str  # where the names in the annotation mean something


@dataclass(frozen=True)
class _Signature:
    parameters: dict[str, _Parameter] = field(default_factory=dict)
    is_open: bool = False  # takes other names as well, or could not be read


@dataclass(frozen=True)
class _Found:
    """A statement or expression that defines a name, or a whole module when there is no node."""

    module: str
    node: ast.AST | None = None


@dataclass(frozen=True)
class _Source:
    names: dict[str, ast.AST | tuple[str, str | None]]  # definition, or (module, name in it or None) of an import
    stars: list[str]


@functools.cache
def _file_of(module: str) -> Path | None:
    """The file of a module, found without importing anything: only top-level names are asked of the import system."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module without a spec, such as __main__
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for root in spec.submodule_search_locations or []:
        place = Path(root, *rest)
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file():
                return file
    return None


@functools.cache
def _source(module: str) -> _Source | None:
    file = _file_of(module)
    if file is None:
        return None
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names: dict[str, ast.AST | tuple[str, str | None]] = {}
    stars: list[str] = []

    def read(statements: list[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                names[node.name] = node
            elif isinstance(node, ast.Assign):
                names.update({target.id: node.value for target in node.targets if isinstance(target, ast.Name)})
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                names[node.target.id] = node.value
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    whole = alias.name if alias.asname else alias.name.split(".")[0]
                    names[alias.asname or whole] = (whole, None)
            elif isinstance(node, ast.ImportFrom):
                origin = node.module or ""
                if node.level:
                    above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                    origin = f"{above}.{origin}" if origin else above
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(origin)
                    else:
                        names[alias.asname or alias.name] = (origin, alias.name)
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                # The last definition of a name wins, so the main branch is read last.
                for handler in getattr(node, "handlers", []):
                    read(handler.body)
                read(getattr(node, "orelse", []))
                read(node.body)

    read(ast.parse(file.read_bytes()).body)
    return _Source(names, stars)


@functools.cache
def _lookup(module: str, name: str, depth: int = 0) -> _Found | None:
    """What `name` means in `module`, through imports and aliases."""
    source = _source(module)
    if source is None or depth > 12:
        return None
    entry = source.names.get(name)
    if entry is None:
        if _file_of(f"{module}.{name}"):
            return _Found(f"{module}.{name}")
        return next((found for star in source.stars if (found := _lookup(star, name, depth + 1))), None)
    if isinstance(entry, tuple):
        origin, original = entry
        if original is None:
            return _Found(origin)
        if (origin, original) == (module, name):  # `from . import x` in a package: the module, not this name
            return _Found(f"{origin}.{original}") if _file_of(f"{origin}.{original}") else None
        return _lookup(origin, original, depth + 1)
    if isinstance(entry, (ast.Name, ast.Attribute)):
        return _resolve_expression(entry, module, depth + 1)
    return _Found(module, entry)


def _resolve_expression(node: ast.expr, module: str, depth: int = 0) -> _Found | None:
    if isinstance(node, ast.Subscript):
        return _resolve_expression(node.value, module, depth)
    if isinstance(node, ast.Name):
        return _lookup(module, node.id, depth)
    if isinstance(node, ast.Attribute):
        holder = _resolve_expression(node.value, module, depth)
        return _lookup(holder.module, node.attr, depth) if holder and holder.node is None else None
    return None


def _find(target: str) -> _Found | None:
    """The definition that a dotted path names: a module, then one name in it."""
    module, _, name = target.rpartition(".")
    return _lookup(module, name) if module else None


def _is_allowed(dotted: str) -> bool:
    return dotted.startswith(_ALLOWED) or dotted.split(".")[0] in _plugin_packages


@functools.cache
def _defined_names(module: str) -> list[str]:
    source = _source(module)
    return [name for name in source.names if not name.startswith("_")] if source else []


def _target_fault(target: object) -> str | None:
    """Why a config may not, or cannot, call `target`; None when it may."""
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        return f"expected the dotted path of a class, got {_show(target)}"
    allowed = ", ".join(prefix.rstrip(".") for prefix in [*_ALLOWED, *sorted(_plugin_packages)])
    private = any(part.startswith("_") for part in target.split("."))
    if not _is_allowed(target) or target.startswith(_REFUSED) or private:
        return (
            f"'{target}' may not be called from a config; allowed are public classes in {allowed} "
            "and in the modules that DATA2VEC_PLUGINS names"
        )
    module, _, name = target.rpartition(".")
    if _file_of(module) is None:
        parent, _, last = module.rpartition(".")
        file = _file_of(parent) if parent else None
        inside = file.parent.iterdir() if file is not None and file.name == "__init__.py" else ()
        beside = sorted({path.stem for path in inside if path.suffix == ".py" or path.is_dir()})
        return f"there is no module {module}{_did_you_mean(last, beside)}"
    found = _find(target)
    if found is None:
        return f"there is no '{name}' in {module}{_did_you_mean(name, _defined_names(module))}"
    ours = target.startswith(_ALLOWED[0]) or target.split(".")[0] in _plugin_packages
    kinds = (ast.ClassDef, ast.FunctionDef) if ours else (ast.ClassDef,)
    # An import can lead anywhere (`torchvision.io.os.system`), so the definition has to be in an allowed place as well.
    if not isinstance(found.node, kinds) or not _is_allowed(f"{found.module}."):
        return f"'{target}' is not a class{' or function' if ours else ''} of {target.split('.')[0]}"
    return None


@functools.cache
def _signature(found: _Found | None, depth: int = 0) -> _Signature:
    if found is None or depth > 12:
        return _Signature(is_open=True)
    if isinstance(found.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _function_signature(found.node, found.module, skip_first=False)
    if not isinstance(found.node, ast.ClassDef):
        return _Signature(is_open=True)
    for name in ("__init__", "__new__"):
        own = [node for node in found.node.body if isinstance(node, ast.FunctionDef) and node.name == name]
        if own:  # overloads come first, the implementation last
            return _function_signature(own[-1], found.module, skip_first=True)
    if _is_dataclass(found.node):
        return _Signature(_dataclass_parameters(found, depth))
    bases = [base for base in found.node.bases if _last_name(base) not in ("object", "ABC", "Protocol", "Generic")]
    if not bases:
        return _Signature()
    return _signature(_resolve_expression(bases[0], found.module), depth + 1)


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(_last_name(decorator) == "dataclass" for decorator in node.decorator_list)


def _dataclass_parameters(found: _Found, depth: int) -> dict[str, _Parameter]:
    parameters: dict[str, _Parameter] = {}
    for base in found.node.bases:
        above = _resolve_expression(base, found.module)
        if above and isinstance(above.node, ast.ClassDef) and _is_dataclass(above.node) and depth < 12:
            parameters.update(_dataclass_parameters(above, depth + 1))
    for node in found.node.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if _last_name(node.annotation) in ("ClassVar", "KW_ONLY"):
            continue
        default = node.value
        required = default is None
        if isinstance(default, ast.Call) and _last_name(default) == "field":
            options = {keyword.arg: keyword.value for keyword in default.keywords}
            if isinstance(options.get("init"), ast.Constant) and options["init"].value is False:
                continue
            required = not {"default", "default_factory"} & set(options)
            default = options.get("default")
        parameters[node.target.id] = _Parameter(node.annotation, required, _is_none(default), found.module)
    return parameters


def _is_none(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _function_signature(node: ast.FunctionDef, module: str, *, skip_first: bool) -> _Signature:
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(positional) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = list(zip(positional, defaults, strict=True))[1 if skip_first else 0 :]
    pairs += list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
    parameters = {
        argument.arg: _Parameter(argument.annotation, default is None, _is_none(default), module)
        for argument, default in pairs
    }
    return _Signature(parameters, is_open=node.args.kwarg is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Values against annotations


@dataclass(frozen=True)
class _Kind:
    """One alternative of an annotation: int float bool str none literal list mapping class any."""

    name: str
    text: str = ""  # how to say it
    value: object = None  # of a literal
    items: tuple[tuple["_Kind", ...], ...] = ()  # of a list: one entry for all items, or one for each
    fixed: bool = False  # a tuple with that many items


_ANY = (_Kind("any"),)
_SIMPLE = {
    "int": _Kind("int", "a whole number"),
    "float": _Kind("float", "a number"),
    "bool": _Kind("bool", "true or false"),
    "str": _Kind("str", "text"),
    "Path": _Kind("str", "a path"),
    "PathLike": _Kind("str", "a path"),
    "None": _Kind("none", "null"),
    "Any": _Kind("any"),
    "object": _Kind("any"),
}
_LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "tuple", "Tuple", "set", "Set", "frozenset"}
_MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "OrderedDict"}
_CLASSES = {"Tensor", "Module", "Generator", "Callable", "type", "Type"}  # nothing that YAML can write
_TEXTUAL_BASES = ("Enum", "Flag", "TypedDict", "NamedTuple", "str", "int", "dict", "list", "tuple")


def _mismatch(value: object, parameter: _Parameter) -> str | None:
    """What was expected, when `value` cannot be it; None when it can, or when that is not known."""
    if value is _UNKNOWN or (value is None and parameter.default_is_none):
        return None
    if OmegaConf.is_config(value):
        try:
            value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException:
            return None
    kinds = _kinds(parameter.annotation, parameter.module)
    if any(_fits(value, kind) for kind in kinds):
        return None
    literals = [kind.value for kind in kinds if kind.name == "literal"]
    scalars = [kind for kind in kinds if kind.name not in ("literal", "class")]
    texts = [kind.text for kind in (scalars or kinds) if kind.name != "literal"]
    if literals:
        texts.insert(0, f"one of {', '.join(_show(literal) for literal in literals)}")
    whole = isinstance(value, float) and value.is_integer() and any(kind.name == "int" for kind in kinds)
    return " or ".join(dict.fromkeys(texts)) + (f" ({int(value)})" if whole else "")


def _fits(value: object, kind: _Kind) -> bool:
    if kind.name == "any" or (isinstance(value, dict) and "_target_" in value):
        return True
    if kind.name == "literal":
        return type(value) is type(kind.value) and value == kind.value
    if kind.name == "list":
        if not isinstance(value, list) or (kind.fixed and len(value) != len(kind.items)):
            return False
        items = kind.items if kind.fixed else kind.items * len(value)
        return all(any(_fits(one, option) for option in options) for one, options in zip(value, items, strict=False))
    plain = {"int": int, "float": (int, float), "str": str, "bool": bool, "none": type(None)}
    if kind.name in plain:
        return isinstance(value, plain[kind.name]) and (not isinstance(value, bool) or kind.name == "bool")
    return isinstance(value, dict)  # a mapping, or the settings of a class


def _kinds(node: ast.expr, module: str, depth: int = 0) -> tuple[_Kind, ...]:
    if depth > 12:
        return _ANY
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return _kinds(ast.parse(node.value, mode="eval").body, module, depth + 1)
        except SyntaxError:
            return _ANY
    if _is_none(node):
        return (_SIMPLE["None"],)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return (*_kinds(node.left, module, depth + 1), *_kinds(node.right, module, depth + 1))
    if isinstance(node, ast.Subscript):
        return _subscript_kinds(node, module, depth)
    name = _last_name(node)
    if name in _SIMPLE:
        return (_SIMPLE[name],)
    if name in _LISTS:
        return (_Kind("list", "a list", items=(_ANY,)),)
    if name in _MAPPINGS:
        return (_Kind("mapping", "a mapping"),)
    if name in _CLASSES:
        return (_Kind("class", _class_text(name)),)
    found = _resolve_expression(node, module) if name else None
    if found is None or found.node is None:
        return _ANY
    if isinstance(found.node, ast.ClassDef):
        textual = any(_last_name(base).endswith(_TEXTUAL_BASES) for base in found.node.bases)
        return _ANY if textual else (_Kind("class", _class_text(name)),)
    is_alias = isinstance(found.node, (ast.Subscript, ast.BinOp, ast.Constant))
    return _kinds(found.node, found.module, depth + 1) if is_alias else _ANY


def _class_text(name: str) -> str:
    return f"a {name} (a mapping with _target_)"


def _subscript_kinds(node: ast.Subscript, module: str, depth: int) -> tuple[_Kind, ...]:
    name = _last_name(node.value)
    inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name in ("Optional", "Union"):
        alternatives = tuple(kind for one in inner for kind in _kinds(one, module, depth + 1))
        return (*alternatives, _SIMPLE["None"]) if name == "Optional" else alternatives
    if name == "Literal":
        constants = [one.value for one in inner if isinstance(one, ast.Constant)]
        return tuple(_Kind("literal", value=value) for value in constants) if len(constants) == len(inner) else _ANY
    if name in ("Annotated", "Final"):
        return _kinds(inner[0], module, depth + 1)
    if name in _MAPPINGS:
        return (_Kind("mapping", "a mapping"),)
    if name in _CLASSES:
        return (_Kind("class", _class_text(name)),)
    if name not in _LISTS:
        return _ANY
    fixed = name in ("tuple", "Tuple") and not (isinstance(inner[-1], ast.Constant) and inner[-1].value is ...)
    if not fixed:
        inner = inner[:1]
    items = tuple(_kinds(one, module, depth + 1) for one in inner)
    count = f"{len(items)} items" if fixed else "items"
    texts = {" or ".join(kind.text for kind in options) for options in items}
    each = texts.pop() if len(texts) == 1 else ""
    return (_Kind("list", f"a list of {count}" + (f", each {each}" if each else ""), items=items, fixed=fixed),)


# ---------------------------------------------------------------------------------------------------------------------
# Rules between settings. Each is silent when a setting it needs is absent or of another type.


def _get(cfg: DictConfig, path: str) -> object:
    try:
        value = OmegaConf.select(cfg, path, default=None)
    except OmegaConfBaseException:
        return None
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


def _number(cfg: DictConfig, path: str) -> int | float | None:
    value = _get(cfg, path)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(cfg: DictConfig, path: str) -> int | None:
    value = _number(cfg, path)
    return value if isinstance(value, int) else None


def _last(cfg: DictConfig, path: str) -> str:
    target = _get(cfg, path)
    return target.rpartition(".")[2] if isinstance(target, str) else ""


def _heads_divide_the_width(cfg: DictConfig) -> str | None:
    dim, heads = _whole(cfg, "size.dim"), _whole(cfg, "size.num_heads")
    if dim is None or heads is None or dim < 1 or (heads > 0 and dim % heads == 0):
        return None
    working = [count for count in range(1, dim + 1) if dim % count == 0]
    below, above = [one for one in working if one < heads][-1:], [one for one in working if one > heads][:1]
    return (
        f"size.num_heads: size.dim={dim} cannot be split into {heads} heads; "
        f"choose {' or '.join(map(str, below + above))} heads, or another size.dim"
    )


def _patches_tile_the_image(cfg: DictConfig) -> str | None:
    place = next((place for place in ("data", "modality") if _get(cfg, f"{place}.image_px") is not None), "modality")
    patch, image = _whole(cfg, "modality.encoder.patch_px"), _get(cfg, f"{place}.image_px")
    sides = image if isinstance(image, list) else [image]
    if not patch or patch < 1 or not all(isinstance(side, int) for side in sides):
        return None
    wrong = next((side for side in sides if side < patch or side % patch), None)
    if wrong is None:
        return None
    near = sorted({max(patch, wrong // patch * patch), (wrong // patch + 1) * patch})
    return (
        f"{place}.image_px: {wrong} pixels cannot be cut into patches of {patch} (modality.encoder.patch_px); "
        f"the nearest sizes that work are {' and '.join(map(str, near))}"
    )


def _enough_layers_for_the_targets(cfg: DictConfig) -> str | None:
    top, depth = _whole(cfg, "objective.targets.top_k_layers"), _whole(cfg, "size.depth")
    if top is None or depth is None or depth < 1:
        return None
    layers = depth - (_whole(cfg, "modality.encoder.prenet_depth") or 0)
    if 1 <= top <= layers:
        return None
    return f"objective.targets.top_k_layers: expected a number from 1 to {layers}, the layers there are, got {top}"


def _dropping_needs_a_constant_count(cfg: DictConfig) -> str | None:
    if _get(cfg, "objective.mask_mode") != "drop":
        return None
    if _last(cfg, "modality.masker._target_") == "BlockMasker":
        return (
            "modality.masker: BlockMasker hides a different number of tokens in each image, and "
            "objective.mask_mode=drop needs the same number; choose data2vec_train.masking.InverseBlockMasker, or "
            "objective.mask_mode=replace"
        )
    for path in ("objective.decoder", "modality.decoder"):
        decoder = _last(cfg, f"{path}._target_")
        if decoder in ("LinearDecoder", "MLPDecoder"):
            return (
                f"{path}: {decoder} sees one token at a time and cannot fill in those that objective.mask_mode=drop "
                "leaves out; choose a convolutional decoder, or objective.mask_mode=replace"
            )
    return None


def _tau_is_a_decay(cfg: DictConfig) -> str | None:
    for name in ("tau_start", "tau_end"):
        tau = _number(cfg, f"objective.{name}")
        if tau is not None and not 0 <= tau <= 1:
            return f"objective.{name}: expected a number from 0 to 1, got {tau}"
    start, end = _number(cfg, "objective.tau_start"), _number(cfg, "objective.tau_end")
    if start is not None and end is not None and start > end:
        return f"objective.tau_start: {start} is above objective.tau_end={end}; the teacher slows down, so start lower"
    return None


def _at_least_one(path: str) -> Callable[[DictConfig], str | None]:
    def rule(cfg: DictConfig) -> str | None:
        value = _number(cfg, path)
        wrong = value is not None and (value < 1 or value != int(value))
        return f"{path}: expected a whole number of at least 1, got {value}" if wrong else None

    return rule


def _hidden_fraction_is_a_fraction(cfg: DictConfig) -> str | None:
    value = _number(cfg, "modality.masker.hidden_fraction")
    if value is None or 0 < value < 1:
        return None
    return f"modality.masker.hidden_fraction: expected a number between 0 and 1, got {value}"


def _bad_fraction_is_a_fraction(cfg: DictConfig) -> str | None:
    value = _number(cfg, "data.max_bad_fraction")
    if value is None or 0 <= value <= 1:
        return None
    return f"data.max_bad_fraction: expected a number from 0 to 1, got {value}"


def _warm_up_ends_in_time(cfg: DictConfig) -> str | None:
    warmup, steps = _number(cfg, "scheduler.warmup_steps"), _number(cfg, "trainer.max_steps")
    if warmup is None or steps is None or steps < 1 or warmup <= steps:
        return None
    return f"scheduler.warmup_steps: {warmup} is more than trainer.max_steps={steps}; lower it or train longer"


def _devices_are_countable(cfg: DictConfig) -> str | None:
    devices = _get(cfg, "trainer.devices")
    countable = isinstance(devices, (int, list)) and not isinstance(devices, bool)
    if devices is None or devices == "auto" or countable:
        return None
    return f"trainer.devices: expected a count, a list such as [0,1], or auto, got {_show(devices)}"


def _seed_is_a_whole_number(cfg: DictConfig) -> str | None:
    seed = _get(cfg, "seed")
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool)):
        return None
    return f"seed: expected a whole number, got {_show(seed)}; for several runs write -m seed=0,1"


RULES: list[Callable[[DictConfig], str | None]] = [
    _seed_is_a_whole_number,
    _heads_divide_the_width,
    _patches_tile_the_image,
    _enough_layers_for_the_targets,
    _dropping_needs_a_constant_count,
    _tau_is_a_decay,
    _at_least_one("trainer.max_steps"),
    _at_least_one("data.batch_size_per_device"),
    _at_least_one("objective.views"),
    _at_least_one("size.depth"),
    _hidden_fraction_is_a_fraction,
    _bad_fraction_is_a_fraction,
    _warm_up_ends_in_time,
    _devices_are_countable,
]


# ---------------------------------------------------------------------------------------------------------------------
# Objects


def build(node: DictConfig | ListConfig | Mapping | None, **supplied: object) -> object:
    """What a config node with `_target_` describes: nested nodes first, plain dicts and lists inside; None for None.

    Args:
        node: One object, or a mapping or list of them. With `_partial_: true` the result is a `functools.partial`.
        **supplied: Arguments that no config can hold (a model, parameters); handed on as they are, never copied.

    Raises:
        ConfigError: The node names something that a config may not call.
    """
    if node is None:
        return None
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    targets = [value for _, name, value in _leaves(plain, "") if name == "_target_"]
    refused = [fault for target in targets if (fault := _target_fault(target))]
    if refused:
        raise ConfigError("; ".join(refused))
    one_object = isinstance(plain, Mapping) and "_target_" in plain
    try:
        # Called here and not by hydra, which would copy what is supplied and turn dataclasses into configs.
        if one_object:
            made = instantiate(node, _convert_="all", _partial_=True)
            return functools.partial(made, **supplied) if plain.get("_partial_", False) else made(**supplied)
        if supplied:
            raise ConfigError(f"{', '.join(supplied)} cannot be handed to a node without _target_")
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(task: Callable[[DictConfig], object], *, config_name: str) -> None:
    """Runs `task` on what the command line describes: the whole of `python -m data2vec_train`.

    Exits with 2 for a fault in the command, the config or the data, with 3 for a collapse, with 130 when interrupted
    and with 1 for anything else, which keeps its stack trace. A sweep goes on when a member fails, and exits with the
    worst status of its members.
    """
    # Hydra's own short form hides the frames that a bug report needs.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    statuses: list[int] = []
    try:
        expose_recipes()
        load_plugins()
        register_resolvers()
        args, overrides, unknown = _arguments()
        faults = unknown + _faults_of_command(args, overrides, config_name)
        if faults:
            things = "1 thing" if len(faults) == 1 else f"{len(faults)} things"
            lines = "".join(f"  {fault}\n" for fault in faults)
            sys.stderr.write(f"{things} to mend in the command or config:\n{lines}")
            sys.exit(2)
        if _shows_only(args) and hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
        guarded = _guard(task, statuses)
        # Hydra names the job, and so its log file, after the module.
        guarded.__module__ = f"{__package__}.{config_name}"
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=config_name)(guarded)()
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if statuses:
        sys.exit(max(statuses))


def _arguments() -> tuple[argparse.Namespace, list[str], list[str]]:
    """Hydra's flags, the overrides, and what is wrong with the other tokens; puts `sys.argv` in hydra's order."""
    args, rest = get_args_parser().parse_known_args()
    # argparse takes only the first stretch of overrides: in `modality=audio -m seed=0,1` the last one would be lost.
    overrides = [*args.overrides, *(token for token in rest if not token.startswith("-"))]
    flags = [token for token in sys.argv[1:] if token not in overrides]
    if args.config_path:
        # Hydra would read a relative path as one inside the package.
        given, args.config_path = args.config_path, str(Path(args.config_path).absolute())
        written = {given: args.config_path, f"--config-path={given}": f"--config-path={args.config_path}"}
        flags = [written.get(flag, flag) for flag in flags]
    sys.argv[1:] = [*flags, *overrides]
    unknown = [token for token in rest if token.startswith("-")]
    faults = [f"{one}: there is no such flag; settings have no dashes: {one.lstrip('-')}" for one in unknown]
    return args, overrides, faults


def _shows_only(args: argparse.Namespace) -> bool:
    flags = ("help", "hydra_help", "cfg", "info", "shell_completion")
    return any(getattr(args, flag) not in (None, False) for flag in flags)


def _faults_of_command(args: argparse.Namespace, overrides: list[str], config_name: str) -> list[str]:
    if args.experimental_rerun is not None:
        return []
    directory = Path(args.config_path) if args.config_path else None
    extra = Path(args.config_dir) if args.config_dir else None
    absent = [one for one in (directory, extra) if one is not None and not one.is_dir()]
    if absent:
        return [f"{one}: there is no such directory of configs" for one in absent]
    return find_faults(
        overrides,
        config_name=args.config_name or config_name,
        config_dir=directory,
        extra_config_dir=extra,
        multirun=args.multirun or any(re.fullmatch(r"\+*hydra\.mode=MULTIRUN", line) for line in overrides),
        names_only=_shows_only(args),
    )


def _guard(task: Callable[[DictConfig], object], statuses: list[int]) -> Callable[[DictConfig], object]:
    """The task with its failures turned into one line and an exit status."""
    launcher_process = os.getpid()

    def run(cfg: DictConfig) -> object:
        hydra_config = HydraConfig.get()
        member = hydra_config.mode == RunMode.MULTIRUN
        who = f" in sweep member {hydra_config.job.num} ({' '.join(hydra_config.overrides.task)})" if member else ""
        try:
            # A sweep may be longer than what was checked before it started.
            if member and (faults := preflight(cfg)):
                raise ConfigError("; ".join(faults))
            return task(cfg)
        except (ConfigError, DataError, CollapseError) as error:
            status = 3 if isinstance(error, CollapseError) else 2
            sys.stderr.write(f"error{who}: {error}\n")
            failure: BaseException = error
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except _MEMBER_ERRORS as error:
            if not member:
                raise
            traceback.print_exc()
            sys.stderr.write(f"error{who}: {type(error).__name__}: {error}\n")
            status, failure = 1, error
        if not member:
            raise SystemExit(status)
        if os.getpid() != launcher_process:
            raise failure  # another process, perhaps another machine: the launcher has to report it
        statuses.append(status)
        return float("nan")  # what a sweeper that optimises reads as a failed trial

    return run
