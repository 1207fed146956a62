"""Every fault of a command line at once, in about a second: names, choices, values, arguments and rules between them.

Imports only hydra and omegaconf. What a config names (`_target_`) is read and never imported, see `schema`.
"""

import contextlib
import copy
import difflib
import functools
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from data2vec_train.config.check.rules import (
    MACHINE_RULES,
    REFUSED_CHOICES,
    RULES,
    TOGETHER,
    WRITING_RULES,
    choices_suit_the_modality,
    has_names,
    plans_only,
    weights_can_be_read,
)
from data2vec_train.config.check.schema import Parameter, did_you_mean, find, mismatch, show, signature
from data2vec_train.config.check.security import (
    SUPPLIED,
    called_hydra_faults,
    hydra_faults,
    nodes_of,
    place_faults,
    search_path_faults,
    target_fault,
)
from data2vec_train.config.resolvers import register_resolvers
from data2vec_train.errors import ConfigError
from data2vec_train.paths import config_directory, expose_recipes, text_of_recipe
from data2vec_train.system import constraints
from data2vec_train.system.compat import private
from data2vec_train.system.moved import SETTINGS, current
from data2vec_train.system.plugins import plugin_packages

_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ConfigError)
MAX_MEMBERS_CHECKED = 32  # of a sweep before it starts, and one for each combination of files; the others in turn

_MAY_BE_LEFT_OUT = ("debug", "sample", "supervised", "pieces", "recipes")  # groups; the others are read by the program
_TAKES_SEVERAL = ("logger", "recipes", "debug")
# Mappings whose settings the program knows by name: one more would be read by nobody.
_FIXED = ("attention", "attentive", "callbacks", "data", "freeze", "hardware", "layer_decay", "modality", "precision")
_FIXED += ("rates", "reserve", "size")
_FIXED += ("peak", "step", "encoder", "backends", "loader", "ema", "startup", "seed_table")  # of a benchmark
# What other programs call it.
_ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr", "peak_lr"), "optimizer.lr"),
    **dict.fromkeys(("wd", "decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("epochs", "max_epochs", "num_epochs", "steps", "max_steps", "iterations"), "trainer.max_steps"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "gpu"), "strategy.devices"),
    **dict.fromkeys(("bs", "batch", "batch_size"), "data.batch_size_per_device"),
    **dict.fromkeys(("workers", "num_workers"), "data.num_workers"),
    **dict.fromkeys(("output", "output_dir", "out_dir", "run_dir", "save_dir"), "hydra.run.dir"),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed_precision"), "precision"),
    **dict.fromkeys(("model", "arch", "model_size"), "size"),
    **dict.fromkeys(("pretrained", "ckpt", "weights_path"), "init_from"),
    **dict.fromkeys(("speech", "voice", "wav2vec"), "audio"),
    **dict.fromkeys(("spectrogram", "mel", "eat", "sounds"), "sound"),
    **dict.fromkeys(("image", "images", "picture"), "vision"),
    **dict.fromkeys(("language", "nlp", "bert"), "text"),
    **dict.fromkeys(("mfu", "utilization"), "utilisation"),
    **dict.fromkeys(("machine", "gpu_type"), "hardware"),
    "dataset": "data",
    # Settings that have other names today, said without their group.
    **{old.rpartition(".")[2]: new for old, new in SETTINGS.items()},
}

_apply_overrides = private("hydra._internal.config_loader_impl:ConfigLoaderImpl._apply_overrides_to_config")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def find_faults(
    overrides: list[str],
    *,
    config_name: str,
    config_dir: Path | None = None,
    extra_config_dir: Path | None = None,
    multirun: bool | None = None,
    names_only: bool = False,
    on_this_machine: bool = False,
) -> list[str]:
    """Every fault of a command line, one plain sentence each; an empty list when there is none.

    Faulty overrides are left out, so that the rest can be composed and one answer has everything. Of a sweep, each
    choice of a group is looked up, and the first `MAX_MEMBERS_CHECKED` members are composed.

    Args:
        overrides: Hydra overrides as typed, flags left out.
        config_name: The primary config.
        config_dir: Where it lies; `config_directory()` unless given.
        extra_config_dir: The value of `--config-dir`.
        multirun: Whether `-m` was given; None accepts several values either way.
        names_only: Look up only the choices of groups, which is what `--help` needs.
        on_this_machine: Look also for the data, the GPU and so on, as for a command that is about to run.
    """
    expose_recipes()
    register_resolvers()
    GlobalHydra.instance().clear()
    folders = [config_dir or config_directory(), *([extra_config_dir] if extra_config_dir else [])]
    always = [line for line in overrides if line.startswith("hydra.searchpath=")]
    # Before anything else, since a package on this path is imported.
    if unsafe := search_path_faults(_search_path(always, folders, config_name)):
        return unsafe
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        try:
            configs = _Configs(config_name, always, folders)
        except _COMPOSE_ERRORS as error:
            return [f"{config_name}: {_one_line(error)}"]
        lines, faults = _without_spaces(overrides)
        read = [_read(line, configs, multirun) for line in lines]
        faults += [fault for _, wrong in read for fault in wrong]
        if not names_only:
            pairs = zip(lines, read, strict=True)
            wrong = [line.partition("=")[0].lstrip("+~") for line, (values, found) in pairs if found and not values]
            more = _faults_of_members(
                [values for values, _ in read if values], configs, on_this_machine=on_this_machine
            )
            # What only follows from a line that was left out is not a fault of its own.
            faults += [
                fault
                for fault in more
                if not any(
                    f": {name} is not set" in fault or fault.startswith((f"{name}.", f"{name}:")) for name in wrong
                )
            ]
    return list(dict.fromkeys(faults))


def choices_of(overrides: list[str], *, config_name: str, folders: list[Path]) -> dict[str, list[str]]:
    """Group -> the choices that a command takes, those of plugins too; for `--help`."""
    expose_recipes()
    register_resolvers()
    always = [line for line in overrides if line.startswith("hydra.searchpath=")]
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        configs = _Configs(config_name, always, folders)
        groups = [*dict.fromkeys(configs.own_groups), "recipes"]
        found = {group: configs.options(group) for group in groups}
    refused = REFUSED_CHOICES.get(config_name, {})
    return {
        group: [choice for choice in choices if choice not in refused.get(group, ())]
        for group, choices in found.items()
    }


def _search_path(overrides: list[str], folders: list[Path], name: str) -> list[str]:
    """Where a command, or else its primary config, wants configs to be looked for."""
    try:
        if overrides:
            return [str(entry) for entry in OverridesParser.create().parse_overrides(overrides[:1])[0].value() or []]
        found = [OmegaConf.select(cfg, "hydra.searchpath") for cfg in _primary_configs(folders, name)]
        return [str(entry) for entries in found if isinstance(entries, ListConfig) for entry in entries]
    except (*_COMPOSE_ERRORS, TypeError):
        return []  # said when it is composed


def _primary_configs(folders: list[Path], name: str) -> list[DictConfig]:
    files = [folder / (name if name.endswith(".yaml") else f"{name}.yaml") for folder in folders]
    loaded = [OmegaConf.load(file) for file in files if file.is_file()]
    return [cfg for cfg in loaded if isinstance(cfg, DictConfig)]


def _without_spaces(overrides: list[str]) -> tuple[list[str], list[str]]:
    """The overrides without those that spaces around an '=' took apart, and a sentence for each of these."""
    words, faults = list(overrides), []
    for place in range(len(words) - 1, 0, -1):
        text = " ".join(words[place - 1 : place + 2])
        parts = re.fullmatch(r"([^\s=]+)( = |(?: =|= )(?=\S))([^\s=]+)(.*)", text)
        if parts is None or (parts[2] != " = " and "=" in words[place - 1].rstrip("=")):
            continue
        used = 3 if parts[2] == " = " else 2
        faults.append(f"{parts[1]}{parts[2]}{parts[3]}: write it without spaces: {parts[1]}={parts[3]}")
        words[place - 1 : place - 1 + used] = []
    return words, faults[::-1]


class _Configs:
    """What can be chosen, and its composition."""

    def __init__(self, name: str, always: list[str], folders: list[Path]) -> None:
        self.name = name
        self.always = always  # overrides that decide where configs are looked for
        self.loader = GlobalHydra.instance().config_loader()
        for extra in folders[1:]:  # what `--config-dir` does, see `hydra._internal.utils._run_hydra`
            path, search_path = f"file://{extra.absolute()}", self.loader.config_search_path
            search_path.prepend("command-line", path, anchor=SearchPathQuery(provider="schema"))
            self.loader.repository.initialize_sources(search_path)
        self.parser = OverridesParser.create(config_loader=self.loader)
        # Made once, because it reads the primary config, whose search path has the recipes.
        _, self.repository = self.loader._parse_overrides_and_create_caching_repo(name, always)
        self.options = functools.cache(self._options)
        self.compose = functools.cache(self._compose)
        # Those of all commands, and those of this one. Where recipes lie there may be other folders, without configs.
        self.groups = [
            entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir() if entry.is_dir()
        ]
        entries = [entry for cfg in _primary_configs(folders, name) for entry in cfg.get("defaults") or []]
        keys = [str(key).split()[-1] for entry in entries if isinstance(entry, DictConfig) for key in entry]
        self.own_groups = [key for key in keys if key in self.groups] if keys else self.groups

    def _options(self, group: str) -> list[str]:
        """The choices of a group, those in sub-directories as `vision/base_imagenet`; empty when it is no group."""
        below = self.repository.get_group_options(group, ObjectType.GROUP)
        nested = [f"{sub}/{option}" for sub in below for option in self.options(f"{group}/{sub}")]
        return [*self.repository.get_group_options(group, ObjectType.CONFIG), *nested]

    def is_choice(self, override: Override) -> bool:
        """Whether it chooses from a group, rather than changing a setting."""
        is_path = "." not in override.key_or_group
        return is_path and not isinstance(override.value(), dict) and bool(self.options(override.key_or_group))

    def _compose(self, choices: tuple[str, ...]) -> DictConfig | Exception:
        """The config with these choices and hydra's own part, or the error; kept, so copy it before changing it."""
        try:
            cfg = compose(self.name, overrides=[*self.always, *choices], return_hydra_config=True)
        except _COMPOSE_ERRORS as error:
            return error
        except KeyError as error:
            return ConfigError(f"hydra.job.env_copy: there is no environment variable {error}")
        said = _plain(cfg.hydra.overrides)
        if len(said["hydra"]) + len(said["task"]) != len(self.always) + len(choices):
            return ConfigError("hydra.overrides: a file of configs says what the command line is")
        OmegaConf.set_readonly(cfg.hydra, False)
        with read_write(cfg), open_dict(cfg):
            # Known only once a job runs; settings may refer to them, so any value will do here.
            cfg.hydra.runtime.output_dir = "outputs"
            cfg.hydra.job.id, cfg.hydra.job.num = "0", 0
        return cfg


def _read(line: str, configs: _Configs, multirun: bool | None) -> tuple[list[Override], list[str]]:
    """The usable values of an override, more than one in a sweep, and what is wrong with the others."""
    if re.fullmatch(r"[^=~]+=", line):
        return [], [f"{line}: no value given; write {line}VALUE, or {line}null for none"]
    try:
        [override] = configs.parser.parse_overrides([line])
        values = _values(override, configs)
    except HydraException:
        return [], [_syntax_fault(line, configs)]
    if not override.key_or_group:
        return [], [f"{line}: there is no name before the '='; write key=value without spaces"]
    if override.is_sweep_override() and multirun is False:
        as_list = f"{override.get_key_element()}=[{override.get_value_string()}]"
        return [], [f"{line}: several values make a sweep, which needs -m; for one list write {as_list}"]
    wrong = [_wrong_choices(value, configs) for value in values]
    usable = [value for value, faults in zip(values, wrong, strict=True) if not faults]
    return usable, [fault for faults in wrong for fault in faults]


def _values(override: Override, configs: _Configs) -> list[Override]:
    if not override.is_sweep_override():
        return [override]
    if override.value_type == ValueType.INTERVAL_SWEEP:  # the sweeper draws its values
        return []
    texts = override.sweep_string_iterator()
    return configs.parser.parse_overrides([f"{override.get_key_element()}={text}" for text in texts])


def _syntax_fault(line: str, configs: _Configs) -> str:
    key, sign, value = line.partition("=")
    if re.fullmatch(r"[\w./]+", line):
        if line in configs.groups:
            return f"{line}: no choice given; write {line}=... one of {', '.join(configs.options(line))}"
        groups = [group for group in configs.own_groups if line in configs.options(group)]
        return f"{line}: no value given; {f'did you mean {groups[0]}={line}?' if groups else f'write {line}=VALUE'}"
    if not sign and (parts := re.fullmatch(r"([\w./]+):(.+)", line)):
        return f"{line}: cannot be read; write {parts[1]}={parts[2].strip()}"
    if value.startswith("="):
        return f"{line}: cannot be read; one '=' is enough: {key}={value.lstrip('=')}"
    quoted = f"'{key}=\"{value}\"'"
    if any(value.count(a) != value.count(b) for a, b in ("[]", "{}", "()")) or value.count('"') % 2:
        return (
            f"{line}: cannot be read, a bracket or quote is not closed; close it, or put the value in quotes: {quoted}"
        )
    if value.endswith(",") or value.startswith(","):
        return f"{line}: cannot be read; leave out the comma at the end: {key}={value.strip(',')}"
    return (
        f"{line}: cannot be read; a value with spaces, commas, brackets, an '=' or letters beyond ASCII goes in "
        f"quotes: {quoted}"
    )


def _wrong_choices(override: Override, configs: _Configs) -> list[str]:
    group, value, line = override.key_or_group, override.value(), override.input_line
    line = line or f"{override.get_key_element()}={value}"
    if override.is_delete():
        is_read = group in configs.own_groups and group not in _MAY_BE_LEFT_OUT
        return [f"{line}: {group} cannot be left out; choose one of {', '.join(configs.options(group))}"] * is_read
    if not configs.is_choice(override):
        return []
    options = configs.options(group)
    if override.is_force_add():
        return [f"{line}: a group takes no pluses: {group}={value}"]
    if value is None:
        return [f"{line}: a group is not null; choose one of {', '.join(options)}"]
    if group in configs.groups and group not in (*configs.own_groups, "recipes"):
        return [f"{line}: {_command(configs)} has no {group}; it has {', '.join(dict.fromkeys(configs.own_groups))}"]
    if isinstance(value, list) and group in configs.own_groups and group not in _TAKES_SEVERAL:
        return [f"{line}: {group} takes one choice; for several runs write -m {group}={','.join(map(str, value))}"]
    what = "recipe" if group == "recipes" else group
    return [
        f"{override.get_key_element()}={choice}: there is no {what} called '{choice}'"
        f"{did_you_mean(_ELSEWHERE.get(str(choice), str(choice)), options)} Choices: {_some(options, str(choice))}"
        for choice in (value if isinstance(value, list) else [value])
        if str(choice) not in options
    ]


def _some(options: list[str], like: str) -> str:
    """All choices, or of many those that are most alike."""
    if len(options) <= 20:
        return ", ".join(options)
    near = difflib.get_close_matches(like, options, n=6, cutoff=0)
    return f"{', '.join(near)} and {len(options) - len(near)} more"


def _command(configs: _Configs) -> str:
    return "python -m data2vec_train" + ("" if configs.name == "train" else f".{configs.name}")


def _faults_of_members(variants: list[list[Override]], configs: _Configs, *, on_this_machine: bool) -> list[str]:
    """What is wrong with the run, or with the members of the sweep that the values in `variants` make."""
    members = list(itertools.islice(itertools.product(*variants), MAX_MEMBERS_CHECKED))
    # One more for each combination of files: what a file says about Hydra counts before a member can be checked.
    plain = [values if configs.is_choice(values[0]) else values[:1] for values in variants]
    seen = {tuple(override.input_line for override in member if configs.is_choice(override)) for member in members}
    for member in itertools.product(*plain) if len(members) == MAX_MEMBERS_CHECKED else ():
        if tuple(override.input_line for override in member if configs.is_choice(override)) not in seen:
            members.append(member)
    found: dict[str, list[str]] = {}
    for member in members:
        swept = [override.input_line for override, values in zip(member, variants, strict=True) if len(values) > 1]
        for fault in _faults_of_member(member, configs, on_this_machine=on_this_machine):
            found.setdefault(fault, []).append(" ".join(swept))
    return [
        fault if len(where) == len(members) else f"{fault} (in the sweep member {where[0]})"
        for fault, where in found.items()
    ]


def _faults_of_member(member: tuple[Override, ...], configs: _Configs, *, on_this_machine: bool) -> list[str]:
    faults: list[str] = []
    choices = [override for override in member if configs.is_choice(override)]
    guessed: list[str] = []  # groups that have to be chosen and are not; any choice will do to look at the rest
    while isinstance(base := configs.compose(tuple(choice.input_line for choice in choices)), Exception):
        asked = re.match(r"You must specify '(\w+)'", str(base))
        culprit = None if asked else next((choice for choice in choices if _is_about(base, choice)), None)
        faults.append(_choice_fault(culprit, base, configs) if culprit else f"{configs.name}: {_one_line(base)}")
        if asked and asked[1] not in guessed:
            guessed.append(asked[1])
            choices += configs.parser.parse_overrides([f"{asked[1]}={configs.options(asked[1])[0]}"])
        elif culprit:
            choices.remove(culprit)
        else:
            return faults
    cfg = copy.deepcopy(base)
    retyped: dict[str, str] = {}
    wrong: list[Override] = []
    for override in (override for override in member if not configs.is_choice(override)):
        key = override.key_or_group
        if key.split(".")[0] in guessed:
            continue
        try:
            _apply_overrides([override], cfg)
        except HydraException as error:
            faults.append(_setting_fault(override, error, cfg))
            wrong.append(override)
            continue
        retyped |= _retyped(base, cfg, key)
        if fault := _unread_fault(override, base):
            faults.append(fault)
    if guessed:
        absent = weights_can_be_read(cfg)  # which would have said the modality
        return faults if absent is None else [*faults, absent]
    said = [override.input_line for override in member if override not in wrong]
    cfg.hydra.overrides.hydra = [line for line in said if _is_hydras(line)]
    cfg.hydra.overrides.task = [line for line in said if not _is_hydras(line)]
    cfg.hydra.job.config_name = configs.name
    shown = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)  # for ${hydra:...}
    unread = {} if any(" no setting called " in fault for fault in faults) else _unread_settings(cfg, configs, said)
    try:
        more = _inspect(cfg, retyped, on_this_machine=on_this_machine)
        below = tuple(f"{path}." for path in unread)
        return [*faults, *unread.values(), *(fault for fault in more if not fault.startswith(below))]
    finally:
        HydraConfig.instance().cfg = shown


def _is_about(error: Exception, choice: Override) -> bool:
    group = choice.key_or_group
    texts = (f"'{group}'", f"for {group}.", f"{group} appears", f"{group}/{choice.value()}")
    return any(text in str(error) for text in texts)


def _choice_fault(choice: Override, error: Exception, configs: _Configs) -> str:
    line, plain = choice.input_line, f"{choice.key_or_group}={choice.value()}"
    if choice.key_or_group == "recipes" and choice.is_add() and "No match in the defaults list" in str(error):
        used = re.search(r"python -m (data2vec_train(?:\.\w+)?) ", text_of_recipe(str(choice.value())))
        command = f"; this recipe is for python -m {used[1]}" if used else ""
        return f"{line}: it makes a choice that {_command(configs)} does not have{command}"
    if "No match in the defaults list" in str(error) and not choice.is_delete():
        return f"{line}: {choice.key_or_group} is not chosen by default; add it with a plus: +{plain}"
    if choice.is_add() and re.search("Multiple values|more than once", str(error)):
        return f"{line}: {choice.key_or_group} already has a choice; leave out the plus: {plain}"
    if "Could not load 'hydra/launcher/submitit" in str(error):
        return f"{line}: needs the package submitit: pip install 'data2vec-train[slurm]'"
    return f"{line}: {_one_line(error)}"


def _unread_fault(override: Override, base: DictConfig) -> str | None:
    """The removal of a setting that the program reads, or a misspelt one of the top level."""
    key, line = override.key_or_group, override.input_line
    parent, _, last = key.rpartition(".")
    above = OmegaConf.select(base, parent) if parent else base
    if key.split(".")[0] in ("hydra", "logger") or not isinstance(above, DictConfig) or "_target_" in above:
        return None
    if override.is_delete():
        return f"{line}: {key} cannot be left out; set it to another value" if last in above else None
    if parent or last in above or not (override.is_add() or override.is_force_add()):
        return None
    near = difflib.get_close_matches(key, ["recipes", *map(str, base)], n=1, cutoff=0.75)
    return f"{line}: there is no setting called '{key}'; did you mean {near[0]}?" if near else None


def _unread_settings(cfg: DictConfig, configs: _Configs, said: list[str]) -> dict[str, str]:
    """Path -> sentence for what a file of configs or the command adds and nobody reads: misspelt, as a rule."""
    chosen = cfg.hydra.runtime.choices.items()
    choices = [
        f"{group}={choice}" for group, choice in chosen if group in configs.own_groups and isinstance(choice, str)
    ]
    plainest = configs.compose(tuple(choices))  # the same groups, and nothing on top
    if isinstance(plainest, Exception) or "name" not in cfg.get("modality", {"name": 0}):
        return {}
    known, tree = (_plain(part) for part in (plainest, cfg))
    values = " ".join(str(value) for _, value in nodes_of(tree) if isinstance(value, str))
    lines = {line.partition("=")[0].lstrip("+"): line for line in said}
    faults = {}
    for path in _added(tree, known, ""):
        parent, _, last = path.rpartition(".")
        siblings = list(map(str, OmegaConf.select(plainest, parent) if parent else plainest))
        near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6 if parent else 0.75)
        is_open = parent.split(".")[0] not in _FIXED if parent else not near  # any name may stand at the top
        if parent == "callbacks" and _is_callback(OmegaConf.select(cfg, f"{path}._target_", default=None)):
            continue
        if path != "hydra" and not is_open and f"${{{path}}}" not in values:
            meant = f"{parent}.{near[0]}".lstrip(".") if near else ""
            instead = f"did you mean {meant}?" if meant else f"{parent} has {', '.join(siblings)}"
            faults[path] = f"{lines.get(path, path)}: there is no setting called '{path}'; {instead}"
    return faults


def _is_callback(target: object) -> bool:
    """Whether a target may be added below `callbacks`: a callback of Lightning, or anything of a plugin."""
    return str(target).startswith("lightning.pytorch.callbacks.") or str(target).split(".")[0] in plugin_packages


def _added(tree: dict, known: dict, path: str) -> Iterator[str]:
    """Paths that are in `tree` and not in `known`; what a class takes is judged by its signature."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        if key not in known:
            yield here
        elif isinstance(value, dict) and isinstance(known[key], dict) and "_target_" not in value and here != "hydra":
            yield from _added(value, known[key], here)


def _setting_fault(override: Override, error: HydraException, cfg: DictConfig) -> str:
    line, key = override.input_line, override.key_or_group
    if "Could not append" in str(error):
        return f"{line}: {key} is already there; leave out the plus: {line.removeprefix('+')}"
    if "Could not override" in str(error) or "does not exist" in str(error):
        if renamed := _renamed(key, cfg):
            return renamed
        return f"{line}: there is no setting called '{key}'{_did_you_mean_setting(cfg, key)}"
    return f"{line}: {_one_line(error.__cause__ or error)}"


def _retyped(base: DictConfig, cfg: DictConfig, key: str) -> dict[str, str]:
    """A fault when a setting was a number, true/false or a mapping by default and now is something else."""
    try:
        before, after = OmegaConf.select(base, key), OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return {}
    kinds = [
        (DictConfig, "a mapping of settings", after is None or isinstance(after, DictConfig)),
        (bool, "true or false", has_names(key) or not isinstance(after, str)),
        (int, "a whole number", after == "auto" or not isinstance(after, (bool, str, DictConfig))),
        (float, "a number", not isinstance(after, (bool, str, DictConfig))),
        (ListConfig, "a list", after is None or isinstance(after, ListConfig)),
    ]
    expected, is_right = next(((text, right) for kind, text, right in kinds if isinstance(before, kind)), ("", True))
    return {} if is_right else {key: f"{key}: expected {expected}, got {show(after)}"}


def _one_line(error: BaseException) -> str:
    text = textwrap.shorten(str(error), 300, placeholder="...")
    asked = re.match(r"You must specify '(\w+)', e.g, \w+=<OPTION> Available options: (.*)", text)
    return f"{asked[1]} is not set; say which: {asked[1]}=... one of {', '.join(asked[2].split())}" if asked else text


# ---------------------------------------------------------------------------------------------------------------------
# Near names


def _renamed(path: str, cfg: DictConfig) -> str | None:
    """A sentence for a setting that an earlier version had under this name."""
    new = SETTINGS.get(path)
    if new is None or not isinstance(OmegaConf.select(cfg, new.rpartition(".")[0]), DictConfig):
        return None
    return f"{path} is now called {new}"


def _did_you_mean_setting(cfg: DictConfig, key: str) -> str:
    tree = OmegaConf.to_container(cfg, resolve=False)
    hydras = tree.get("hydra", {})
    choices = hydras.get("runtime", {}).get("choices", {})
    written = dict(nodes_of({"hydra": hydras} if key.startswith("hydra.") else tree | {"hydra": None}))
    paths = [*written, "recipes", *choices]
    parent, _, last = key.rpartition(".")
    if key == "data.path" and choices.get("data") == "sample":
        return "; data=sample needs none, for your own data choose data=folder, hf, manifest or stream"
    if parent == "data.test_source" and parent in paths:
        return f"; write {parent}={{{last}:...}}"
    if key in SETTINGS and SETTINGS[key] in paths:
        return f"; it is now called {SETTINGS[key]}"
    if (other := _ELSEWHERE.get(key)) in paths:
        return f"; did you mean {other}?"
    last_names = {path: path.rpartition(".")[2] for path in paths}
    near = (
        difflib.get_close_matches(key, paths, n=1, cutoff=0.9)
        or [path for path, name in last_names.items() if name == last]
        or difflib.get_close_matches(key, paths, n=1, cutoff=0.8)
        or [path for path, name in last_names.items() if name.startswith(last) and path.startswith(parent)]
        or [path for path, name in last_names.items() if difflib.get_close_matches(last, [name], cutoff=0.75)]
    )
    # Of a value and what only passes it on, the value.
    passed_on = {path: str(written.get(path))[2:-1] for path in near}
    near = [path for path in near if passed_on[path] not in near]
    if near:
        return f"; did you mean {' or '.join(difflib.get_close_matches(key, dict.fromkeys(near), cutoff=0))}?"
    inside = OmegaConf.select(cfg, parent) if parent else cfg
    if isinstance(inside, DictConfig) and not inside:
        return f"; {parent} is empty, add it with a plus: +{key}=..."
    where, inside = (parent, inside) if parent and isinstance(inside, DictConfig) else ("the config", cfg)
    return f"; {where} has {', '.join(str(key) for key in inside if str(key) != 'hydra')}"


# ---------------------------------------------------------------------------------------------------------------------
# The composed config against the code it names


def preflight(cfg: DictConfig) -> list[str]:
    """Every fault of a composed config: what is not set, cannot be resolved, does not fit its `_target_`, or a rule."""
    return _inspect(cfg, {}, on_this_machine=False)


def _inspect(cfg: DictConfig, retyped: dict[str, str], *, on_this_machine: bool) -> list[str]:
    walk = _Walk(cfg)
    walk.visit(cfg, walk.plain, "")
    faults = {path: text for path, text in retyped.items() if path not in walk.accepted} | walk.faults
    underived = _first_causes(walk.derived, faults)
    foreign = _foreign_faults(cfg, walk.plain) if "hydra" in cfg else {}
    faults |= foreign
    try:
        called = {} if foreign or "hydra" not in cfg else called_hydra_faults(_plain(cfg.hydra, resolve=True))
        faults |= called
    except OmegaConfBaseException as error:  # no part of it may stay unseen
        if not (faults or underived):
            faults["hydra"] = f"hydra: {_one_line(error)}"
    about_machine = WRITING_RULES if plans_only(cfg) else MACHINE_RULES
    rules = [*RULES, *(about_machine if on_this_machine else [])]
    said = [*walk.broken_constraints(), *(fault for rule in rules for fault in rule(cfg))]
    broken = [fault for fault in said if fault.partition(":")[0] not in faults]
    # One sentence for each setting; the first rule has the narrower view.
    first = {fault.partition(":")[0]: fault for fault in reversed(broken)}
    if misfit := choices_suit_the_modality(cfg):  # whose settings then fit nothing
        faults = {path: text for path, text in faults.items() if not path.startswith(("modality.", "objective."))}
        first, underived = {misfit.partition(":")[0]: misfit}, []
    own = [text for path, text in reversed(first.items()) if walk.passes_on(path) not in first]
    return list(dict.fromkeys([*faults.values(), *underived, *own]))


def _foreign_faults(cfg: DictConfig, plain: dict) -> dict[str, str]:
    """What a file of configs sets and only the command line may: Hydra's own part, and places to write."""
    said = _plain(cfg.hydra.overrides)
    choices = {
        name: choice for name, choice in cfg.hydra.runtime.choices.items() if name.startswith("hydra/") and choice
    }
    own = _own_hydra(config_directory(), cfg.hydra.job.config_name, tuple(said["hydra"]), tuple(choices.items()))
    typed = {line.partition("=")[0].lstrip("+") for line in said["task"]}
    tree = {key: value for key, value in plain.items() if key != "hydra"}
    return hydra_faults(_plain(cfg.hydra), own) | place_faults(tree, typed)


@functools.cache
def _own_hydra(
    folder: Path, name: str, overrides: tuple[str, ...], choices: tuple[tuple[str, str], ...]
) -> tuple[dict, ...]:
    """Hydra's part as our own configs, and as Hydra's alone, make it of a command line; no other folder is read.

    Args:
        folder: Our own configs.
        name: The primary config of the command.
        overrides: Those of Hydra's part that were typed.
        choices: Group of Hydra's -> what was chosen, by whomever: nothing but what Hydra and we offer is found here.
    """
    search_path = private("hydra._internal.utils:create_config_search_path")(str(folder))
    loader = private("hydra._internal.config_loader_impl:ConfigLoaderImpl")(config_search_path=search_path)
    chosen = [f"{group}={choice}" for group, choice in choices]
    try:
        alone = loader.load_configuration(None, chosen, RunMode.RUN)
    except _COMPOSE_ERRORS:  # a choice that only another folder has
        alone = loader.load_configuration(None, [], RunMode.RUN)
    file = folder / (f"{name}.yaml" if (folder / f"{name}.yaml").is_file() else "train.yaml")
    ours = OmegaConf.merge({"hydra": alone.hydra}, {"hydra": OmegaConf.load(file).get("hydra", {})})
    typed = [line for line in overrides if not line.lstrip("+~").startswith(_NEVER_TYPED)]
    for cfg in (alone, ours):
        _apply_overrides(OverridesParser.create().parse_overrides(typed), cfg)
    return tuple(_plain(cfg.hydra) for cfg in (alone, ours))


# Looked at elsewhere, chosen above, or never to be changed.
_NEVER_TYPED = ("hydra/", "hydra.searchpath", "hydra.job_logging", "hydra.hydra_logging")


def _plain(node: DictConfig | ListConfig, *, resolve: bool = False) -> dict | list:
    return OmegaConf.to_container(node, resolve=resolve)


def _is_hydras(line: str) -> bool:
    return re.match(r"[+~]*hydra[./]", line) is not None


def _first_causes(derived: list[tuple[str, str, str]], faults: dict[str, str]) -> list[str]:
    """Sentences for the values that cannot be worked out, but not because of another one that is wrong."""

    def refers(raw: str, paths: Iterable[str]) -> bool:
        return any(f"${{{path}}}" in raw for path in paths)

    explained = set(faults)
    while more := {here for here, raw, _ in derived if here not in explained and refers(raw, explained)}:
        explained |= more
    left = [value for value in derived if value[0] not in explained]
    first = [text for here, raw, text in left if not refers(raw, (other for other, _, _ in left if other != here))]
    return first or [text for _, _, text in left][:1]  # values that wait for each other


_UNKNOWN = object()


def _known(place: dict[str, tuple[str, object]]) -> dict[str, object]:
    """Name -> plain value of the settings of one place that are known."""
    values = {}
    for name, (_, value) in place.items():
        with contextlib.suppress(OmegaConfBaseException):
            values[name] = _plain(value, resolve=True) if isinstance(value, ListConfig) else value
    return {name: value for name, value in values.items() if value is not _UNKNOWN}


class _Walk:
    """One pass over a composed config; `faults` maps a dotted path to its sentence, so that each is named once."""

    def __init__(self, cfg: DictConfig) -> None:
        self.root = cfg
        self.plain = OmegaConf.to_container(cfg, resolve=False)
        self.written = dict(nodes_of(self.plain))
        self.faults: dict[str, str] = {}
        self.accepted: set[str] = set()  # settings that fit an annotation
        self.derived: list[tuple[str, str, str]] = []  # (path, expression, sentence)
        self.settings: dict[str, dict[str, tuple[str, object]]] = {}  # place -> name -> (what to change, value)

    def visit(self, node: DictConfig | ListConfig, plain: dict | list, path: str) -> None:
        arguments = self.settings[path] = {}  # name -> (path that the user has to change, value)
        for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
            here = f"{path}.{key}" if path else str(key)
            if here == "hydra":
                continue
            if OmegaConf.is_missing(node, key):
                if not (here.startswith("data.") and plans_only(self.root)):
                    self.faults.setdefault(here, f"{here}: not set; say which, for example {here}=VALUE")
                arguments[str(key)] = (here, _UNKNOWN)
            elif OmegaConf.is_interpolation(node, key):
                arguments[str(key)] = (self._origin(here, plain[key]), self._resolve(node, key, here, plain[key]))
            else:
                arguments[str(key)] = (here, node[key])
                if OmegaConf.is_config(node[key]):
                    self.visit(node[key], plain[key], here)
        if arguments.get("_target_", ("", _UNKNOWN))[1] is not _UNKNOWN:
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
            reason = str(error).splitlines()[0]
            # What a function of ours refuses is said once, however many settings ask it.
            refused = re.match(r"ConfigError raised while resolving interpolation: (.*)", reason)
            reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", reason)
            self.derived.append((here, raw, refused[1] if refused else f"{here}: cannot work out {raw}: {reason}"))
        return _UNKNOWN

    def _origin(self, here: str, raw: object) -> str:
        """Where a value that is only passed on was written: that is what the user has to change."""
        seen = {here}
        while (passed_on := re.fullmatch(r"\$\{(\w[\w.]*)\}", str(raw))) and passed_on[1] not in seen:
            here, raw = passed_on[1], self.written.get(passed_on[1])
            seen.add(here)
        return here

    def _cause(self, path: str) -> str:
        """The setting itself, or the first of those that its value is worked out from."""
        computed_from = re.match(r"\$\{[\w.]+:[^$]*\$\{(\w[\w.]*)\}", str(self.written.get(path)))
        return self._origin(computed_from[1], self.written.get(computed_from[1])) if computed_from else path

    def passes_on(self, path: str) -> str | None:
        """The setting whose value `path` only hands on; None if it has its own."""
        origin = self._origin(path, self.written.get(path))
        return None if origin == path else origin

    def broken_constraints(self) -> Iterator[str]:
        """Sentences for what `constraints` says of settings of one place, and of those in TOGETHER."""
        places = [*self.settings.values()]
        if "modality" in self.settings and OmegaConf.select(self.root, "modality.encoder") is None:
            # The patches are those of the weights, whatever the modality says.
            places.remove(self.settings["modality"])
            places.append({name: found for name, found in self.settings["modality"].items() if name != "patch_px"})
        for row in TOGETHER:
            found = {name: self._setting(path) for name, path in row.items()}
            places.append({name: setting for name, setting in found.items() if setting})
        known = [({name: self._cause(label) for name, (label, _) in place.items()}, _known(place)) for place in places]
        for place, (labels, values) in zip(places, known, strict=True):  # these may explain the next ones
            for name, value in values.items():
                if expected := constraints.out_of_range(place[name][0], value):
                    yield f"{labels[name]}: expected {expected}, got {show(value)}"
        for labels, values in known:
            yield from (constraints.named(sentence, labels) for sentence in constraints.unrelated(values))

    def _setting(self, path: str) -> tuple[str, object] | None:
        parent, _, name = path.rpartition(".")
        return self.settings.get(parent, {}).get(name)

    def _check_call(self, path: str, arguments: dict[str, tuple[str, object]]) -> None:
        prefix = f"{path}." if path else ""
        where, target = arguments["_target_"]
        target = current(target) if isinstance(target, str) else target
        fault = target_fault(target)
        if fault:
            self.faults.setdefault(where, f"{where}: {fault}")
            return
        takes, short = signature(find(target)), target.rpartition(".")[2]
        given = {name: value for name, value in arguments.items() if not re.fullmatch(r"_\w+_", name)}
        if "_args_" in arguments:
            self.faults.setdefault(f"{prefix}_args_", f"{prefix}_args_: {short} takes its settings by name")
        supplied = [name for name in SUPPLIED.get(target, ()) if name in given]
        for name in supplied:
            self.faults.setdefault(f"{prefix}{name}", f"{prefix}{name}: the program says this itself; leave it out")
        renamed_arguments: set[str] = set()  # which are given, under the names of earlier versions
        for name, (label, value) in given.items():
            parameter = takes.parameters.get(name)
            if parameter is None and (renamed := _renamed(f"{prefix}{name}", self.root)):
                self.faults.setdefault(f"{prefix}{name}", renamed)
                renamed_arguments.add(SETTINGS[f"{prefix}{name}"].rpartition(".")[2])
            elif parameter is None and not takes.is_open:
                near = did_you_mean(name, takes.parameters)
                listing = f" It takes {', '.join(takes.parameters) or 'no settings'}." if near == "." else ""
                text = f"{prefix}{name}: {short} has no setting called '{name}'{near}{listing}"
                self.faults.setdefault(f"{prefix}{name}", text)
            elif parameter is not None and value is not _UNKNOWN and label not in self.faults:
                self._check_value(label, value, parameter)
        if arguments.get("_partial_", ("", False))[1] is True:
            return
        for name, parameter in takes.parameters.items():
            if parameter.required and name not in given and name not in renamed_arguments:
                self.faults.setdefault(f"{prefix}{name}", f"{prefix}{name}: not set, and {short} needs it")

    def _check_value(self, label: str, value: object, parameter: Parameter) -> None:
        try:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            return  # reported by `visit`
        expected = mismatch(plain, parameter)
        if expected:
            self.faults[label] = f"{label}: expected {expected}, got {show(plain)}"
        elif parameter.annotation is not None:
            self.accepted.add(label)
