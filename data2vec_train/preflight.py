"""Every fault of a command line at once, in about a second: names, choices, values, arguments and rules between them.

Imports only hydra and omegaconf. What a config names (`_target_`) is read and never imported, see `signatures`.
"""

import copy
import difflib
import functools
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from data2vec_train.places import config_directory, expose_recipes, register_resolvers
from data2vec_train.signatures import Parameter, file_of, find, mismatch, public_names, show, signature

# A config may come from anybody, and `_target_` runs what it names: only these prefixes and the plugins' packages.
ALLOWED = ("data2vec_train.", "lightning.", "torch.optim.", "torchvision.")
REFUSED = ("lightning.pytorch.cli.",)  # builds whatever its own arguments name
plugin_packages: set[str] = set()

_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
MAX_MEMBERS_CHECKED = 32  # of a sweep, before it starts; the others are checked when their turn comes


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
) -> list[str]:
    """Every fault of a command line, one plain sentence each; an empty list when there is nothing to mend.

    Faulty overrides are left out, so that the rest can be composed and one answer has everything. Of a sweep, each
    choice of a group is looked up, and the first `MAX_MEMBERS_CHECKED` members are composed.

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
    with initialize_config_dir(str(config_dir or config_directory()), version_base="1.3"):
        always = [line for line in overrides if line.startswith("hydra.searchpath=")]
        try:
            configs = _Configs(config_name, always, extra_config_dir)
        except _COMPOSE_ERRORS as error:
            return [f"{config_name}: {_one_line(error)}"]
        read = [_read(line, configs, multirun) for line in overrides]
        faults = [fault for _, wrong in read for fault in wrong]
        if not names_only:
            pairs = zip(overrides, read, strict=True)
            wrong = [line.partition("=")[0] for line, (values, found) in pairs if found and not values]
            more = _faults_of_members([values for values, _ in read if values], configs)
            faults += [one for one in more if not any(f": {group} is not set" in one for group in wrong)]
    return list(dict.fromkeys(faults))


class _Configs:
    """What can be chosen, and its composition."""

    def __init__(self, name: str, always: list[str], extra_dir: Path | None) -> None:
        self.name = name
        self.always = always  # overrides that decide where configs are looked for
        self.loader = GlobalHydra.instance().config_loader()
        if extra_dir is not None:  # what `--config-dir` does, see `hydra._internal.utils._run_hydra`
            path, search_path = f"file://{extra_dir.absolute()}", self.loader.config_search_path
            search_path.prepend("command-line", path, anchor=SearchPathQuery(provider="schema"))
            self.loader.repository.initialize_sources(search_path)
        self.parser = OverridesParser.create(config_loader=self.loader)
        # Made once, because it reads the primary config, whose search path has the recipes.
        _, self.repository = self.loader._parse_overrides_and_create_caching_repo(name, always)
        self.options = functools.cache(self._options)
        self.compose = functools.cache(self._compose)

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
        OmegaConf.set_readonly(cfg.hydra, False)
        with read_write(cfg), open_dict(cfg):
            # Known only once a job runs; settings may refer to them, so any value will do here.
            cfg.hydra.runtime.output_dir = "outputs"
            cfg.hydra.job.id, cfg.hydra.job.num = "0", 0
        return cfg


def _read(line: str, configs: _Configs, multirun: bool | None) -> tuple[list[Override], list[str]]:
    """The usable values of an override, more than one in a sweep, and what is wrong with the others."""
    try:
        [override] = configs.parser.parse_overrides([line])
        values = _values(override, configs)
    except HydraException as error:
        return [], [_syntax_fault(line, error, configs)]
    if not override.key_or_group:
        return [], [f"{line}: there is no name before the '='; write key=value without spaces"]
    if override.is_sweep_override() and multirun is False:
        as_list = f"{override.get_key_element()}=[{override.get_value_string()}]"
        return [], [f"{line}: several values make a sweep, which needs -m; for one list write {as_list}"]
    wrong = [_unknown_choices(value, configs) for value in values]
    usable = [value for value, faults in zip(values, wrong, strict=True) if not faults]
    return usable, [fault for faults in wrong for fault in faults]


def _values(override: Override, configs: _Configs) -> list[Override]:
    if not override.is_sweep_override():
        return [override]
    if override.value_type == ValueType.INTERVAL_SWEEP:  # its values are the sweeper's business
        return []
    texts = override.sweep_string_iterator()
    return configs.parser.parse_overrides([f"{override.get_key_element()}={text}" for text in texts])


def _syntax_fault(line: str, error: HydraException, configs: _Configs) -> str:
    if re.fullmatch(r"[\w./]+", line):
        groups = configs.repository.get_group_options("", ObjectType.GROUP)
        groups = [group for group in groups if line in configs.options(group)]
        return f"{line}: no value given; {f'did you mean {groups[0]}={line}?' if groups else f'write {line}=VALUE'}"
    return (
        f"{line}: cannot be read ({_one_line(error)}); write key=value, and a value with spaces, commas, brackets or "
        "an '=' in quotes: 'key=\"value\"'"
    )


def _unknown_choices(override: Override, configs: _Configs) -> list[str]:
    group, value = override.key_or_group, override.value()
    if override.is_delete() or value is None or not configs.is_choice(override):
        return []
    options = configs.options(group)
    return [
        f"{override.get_key_element()}={one}: there is no {'recipe' if group == 'recipes' else group} called '{one}'"
        f"{_did_you_mean(str(one), options)} Choices: {', '.join(options)}"
        for one in (value if isinstance(value, list) else [value])
        if str(one) not in options
    ]


def _faults_of_members(variants: list[list[Override]], configs: _Configs) -> list[str]:
    """What is wrong with the run, or with the members of the sweep that the values in `variants` make."""
    members = list(itertools.islice(itertools.product(*variants), MAX_MEMBERS_CHECKED))
    found: dict[str, list[str]] = {}
    for member in members:
        swept = [one.input_line for one, values in zip(member, variants, strict=True) if len(values) > 1]
        for fault in _faults_of_member(member, configs):
            found.setdefault(fault, []).append(" ".join(swept))
    return [
        fault if len(where) == len(members) else f"{fault} (in the sweep member {where[0]})"
        for fault, where in found.items()
    ]


def _faults_of_member(member: tuple[Override, ...], configs: _Configs) -> list[str]:
    faults: list[str] = []
    choices = [one for one in member if configs.is_choice(one)]
    while isinstance(base := configs.compose(tuple(one.input_line for one in choices)), Exception):
        culprit = next((one for one in choices if _is_about(base, one)), None)
        faults.append(_choice_fault(culprit, base) if culprit else f"{configs.name}: {_one_line(base)}")
        if culprit is None:
            return faults
        choices.remove(culprit)
    cfg = copy.deepcopy(base)
    retyped: dict[str, str] = {}
    for override in (one for one in member if not configs.is_choice(one)):
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], cfg)
        except HydraException as error:
            faults.append(_setting_fault(override, error, cfg))
        else:
            retyped |= _retyped(base, cfg, override.key_or_group)
    shown = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)  # for ${hydra:...}
    try:
        return [*faults, *_inspect(cfg, retyped)]
    finally:
        HydraConfig.instance().cfg = shown


def _is_about(error: Exception, choice: Override) -> bool:
    group = choice.key_or_group
    texts = (f"'{group}'", f"for {group}.", f"{group} appears", f"{group}/{choice.value()}")
    return any(text in str(error) for text in texts)


def _choice_fault(choice: Override, error: Exception) -> str:
    line, plain = choice.input_line, f"{choice.key_or_group}={choice.value()}"
    if "No match in the defaults list" in str(error) and not choice.is_delete():
        return f"{line}: {choice.key_or_group} is not chosen by default; add it with a plus: +{plain}"
    if choice.is_add() and re.search("Multiple values|more than once", str(error)):
        return f"{line}: {choice.key_or_group} already has a choice; leave out the plus: {plain}"
    return f"{line}: {_one_line(error)}"


def _setting_fault(override: Override, error: HydraException, cfg: DictConfig) -> str:
    line, key = override.input_line, override.key_or_group
    if "Could not append" in str(error):
        return f"{line}: {key} is already there; leave out the plus: {line.removeprefix('+')}"
    if "Could not override" in str(error) or "does not exist" in str(error):
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
        (bool, "true or false", not isinstance(after, str)),
        (int, "a whole number", not isinstance(after, (bool, str, DictConfig))),
        (float, "a number", not isinstance(after, (bool, str, DictConfig))),
    ]
    expected, is_right = next(((text, right) for kind, text, right in kinds if isinstance(before, kind)), ("", True))
    return {} if is_right else {key: f"{key}: expected {expected}, got {show(after)}"}


def _one_line(error: BaseException) -> str:
    text = textwrap.shorten(str(error), 300, placeholder="...")
    asked = re.match(r"You must specify '(\w+)', e.g, \w+=<OPTION> Available options: (.*)", text)
    return f"{asked[1]} is not set; say which: {asked[1]}=... one of {', '.join(asked[2].split())}" if asked else text


# ---------------------------------------------------------------------------------------------------------------------
# Near names


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or a full stop when nothing is near."""
    known = list(known)
    # `base_imagenet` stands for `vision/base_imagenet`
    near = difflib.get_close_matches(name, known, n=1) or [one for one in known if one.endswith(f"/{name}")]
    return f"; did you mean {near[0]}?" if near else "."


def _did_you_mean_setting(cfg: DictConfig, key: str) -> str:
    tree = OmegaConf.to_container(cfg, resolve=False)
    hydras = tree.pop("hydra", {})
    paths = [path for path, _ in nodes_of({"hydra": hydras} if key.startswith("hydra.") else tree)]
    paths += ["recipes", *hydras.get("runtime", {}).get("choices", {})]
    parent, _, last = key.rpartition(".")
    last_names = {path: path.rpartition(".")[2] for path in paths}
    near = (
        [path for path, name in last_names.items() if name == last]
        or difflib.get_close_matches(key, paths, n=1, cutoff=0.8)
        or [path for path, name in last_names.items() if name.startswith(last) and path.startswith(parent)]
        or [path for path, name in last_names.items() if difflib.get_close_matches(last, [name], cutoff=0.75)]
    )
    if near:
        return f"; did you mean {' or '.join(difflib.get_close_matches(key, dict.fromkeys(near), cutoff=0))}?"
    inside = OmegaConf.select(cfg, parent) if parent else cfg
    return f"; {parent or 'the config'} has {', '.join(map(str, inside))}" if isinstance(inside, DictConfig) else ""


def nodes_of(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of everything in a tree of dicts and lists."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        here = f"{path}.{key}" if path else str(key)
        yield here, value
        yield from nodes_of(value, here)


# ---------------------------------------------------------------------------------------------------------------------
# The composed config against the code it names


def preflight(cfg: DictConfig) -> list[str]:
    """Every fault of a composed config: what is not set, cannot be resolved, does not fit its `_target_`, or a rule."""
    return _inspect(cfg, {})


def _inspect(cfg: DictConfig, retyped: dict[str, str]) -> list[str]:
    walk = _Walk(cfg)
    walk.visit(cfg, walk.plain, "")
    faults = {path: text for path, text in retyped.items() if path not in walk.accepted} | walk.faults
    for path, target in nodes_of({"hydra": walk.plain.get("hydra")}):  # callbacks, launchers and sweepers run as well
        if path.endswith("._target_") and not str(target).startswith(("hydra.", "hydra_plugins.")):
            fault = target_fault(target)
            faults |= {path: f"{path}: {fault}"} if fault else {}
    # A value worked out from a faulty one says nothing new.
    underived = [text for raw, text in walk.derived if not any(f"${{{path}}}" in raw for path in faults)]
    broken = [fault for rule in RULES if (fault := rule(cfg)) and fault.partition(":")[0] not in faults]
    return list(dict.fromkeys([*faults.values(), *underived, *broken]))


_UNKNOWN = object()


class _Walk:
    """One pass over a composed config; `faults` maps a dotted path to its sentence, so that each is named once."""

    def __init__(self, cfg: DictConfig) -> None:
        self.root = cfg
        self.plain = OmegaConf.to_container(cfg, resolve=False)
        self.faults: dict[str, str] = {}
        self.accepted: set[str] = set()  # settings that fit an annotation
        self.derived: list[tuple[str, str]] = []  # (expression, sentence)

    def visit(self, node: DictConfig | ListConfig, plain: dict | list, path: str) -> None:
        arguments: dict[str, tuple[str, object]] = {}  # name -> (path that the user has to mend, value)
        for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
            here = f"{path}.{key}" if path else str(key)
            if here == "hydra":
                continue
            if OmegaConf.is_missing(node, key):
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
            self.derived.append((raw, refused[1] if refused else f"{here}: cannot work out {raw}: {reason}"))
        return _UNKNOWN

    def _origin(self, here: str, raw: object) -> str:
        """Where a value that is only passed on was written: that is what the user has to mend."""
        written = dict(nodes_of(self.plain))
        while passed_on := re.fullmatch(r"\$\{(\w[\w.]*)\}", str(raw)):
            here, raw = passed_on[1], written.pop(passed_on[1], None)
        return here

    def _check_call(self, path: str, arguments: dict[str, tuple[str, object]]) -> None:
        prefix = f"{path}." if path else ""
        where, target = arguments["_target_"]
        fault = target_fault(target)
        if fault:
            self.faults.setdefault(where, f"{where}: {fault}")
            return
        takes, short = signature(find(target)), target.rpartition(".")[2]
        given = {name: value for name, value in arguments.items() if not re.fullmatch(r"_\w+_", name)}
        for name, (label, value) in given.items():
            parameter = takes.parameters.get(name)
            if parameter is None and not takes.is_open:
                near = _did_you_mean(name, takes.parameters)
                listing = f" It takes {', '.join(takes.parameters) or 'no settings'}." if near == "." else ""
                text = f"{prefix}{name}: {short} has no setting called '{name}'{near}{listing}"
                self.faults.setdefault(f"{prefix}{name}", text)
            elif parameter is not None and value is not _UNKNOWN and label not in self.faults:
                self._check_value(label, value, parameter)
        if arguments.get("_partial_", ("", False))[1] is True:
            return
        for name, parameter in takes.parameters.items():
            if parameter.required and name not in given:
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


def target_fault(target: object) -> str | None:
    """Why a config may not, or cannot, call `target`; None when it may."""
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        return f"expected the dotted path of a class, got {show(target)}"
    module, _, name = target.rpartition(".")
    private = any(part.startswith("_") for part in target.split("."))
    if not _is_allowed(target) or target.startswith(REFUSED) or private:
        allowed = ", ".join(prefix.rstrip(".") for prefix in [*ALLOWED, *sorted(plugin_packages)])
        return (
            f"'{target}' may not be called from a config; allowed are public classes in {allowed} "
            "and in the modules that DATA2VEC_PLUGINS names"
        )
    if file_of(module) is None:
        return f"there is no module {module}."
    found = find(target)
    if found is None:
        return f"there is no '{name}' in {module}{_did_you_mean(name, public_names(module))}"
    # An import can lead anywhere (`torchvision.io.os.system`), so the definition has to be in an allowed place as well.
    top = target.split(".")[0]
    kinds = ("ClassDef", "FunctionDef") if top in {"data2vec_train", *plugin_packages} else ("ClassDef",)
    if type(found.node).__name__ not in kinds or not _is_allowed(f"{found.module}."):
        return f"'{target}' is not a {' or '.join(kinds)} of {top}"
    return None


def _is_allowed(dotted: str) -> bool:
    return dotted.startswith(ALLOWED) or dotted.split(".")[0] in plugin_packages


# ---------------------------------------------------------------------------------------------------------------------
# Rules between settings. Each is silent when a setting it needs is absent or of another type.


def _get(cfg: DictConfig, path: str, kind: type | tuple[type, ...] = int) -> object:
    """A setting that has this type, else None; whole numbers unless told otherwise."""
    try:
        value = OmegaConf.select(cfg, path)
    except OmegaConfBaseException:
        return None
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _range(expected: str, is_right: Callable[[float], bool], *paths: str) -> list[Callable[[DictConfig], str | None]]:
    def rule(path: str, cfg: DictConfig) -> str | None:
        value = _get(cfg, path, (int, float))
        return None if value is None or is_right(value) else f"{path}: expected {expected}, got {value}"

    return [functools.partial(rule, path) for path in paths]


_COUNTS = (
    "trainer.max_steps",
    "trainer.log_every_n_steps",
    "trainer.accumulate_grad_batches",
    "data.batch_size_per_device",
    "data.max_probe_samples",
    "objective.views",
    "size.depth",
    "callbacks.probe.every_n_steps",
    "callbacks.probe.neighbours",
    "callbacks.checkpoint.every_n_steps",
)
_SHARES = ("objective.tau_start", "objective.tau_end", "data.max_bad_fraction", "data.held_out_fraction")


def _seed_is_a_whole_number(cfg: DictConfig) -> str | None:
    seed = _get(cfg, "seed", object)
    if seed is None or isinstance(seed, int):
        return None
    return f"seed: expected a whole number, got {show(seed)}; for several runs write -m seed=0,1"


def _heads_divide_the_width(cfg: DictConfig) -> str | None:
    dim, heads = _get(cfg, "size.dim"), _get(cfg, "size.num_heads")
    if dim is None or heads is None or dim < 1 or (heads > 0 and dim % heads == 0):
        return None
    below = [count for count in range(1, min(heads, dim)) if dim % count == 0][-1:]
    above = [count for count in range(max(heads, 1), dim + 1) if dim % count == 0][:1]
    near = " or ".join(map(str, below + above))
    return (
        f"size.num_heads: size.dim={dim} cannot be split into {heads} heads; choose {near} heads, or another size.dim"
    )


def _patches_tile_the_image(cfg: DictConfig) -> str | None:
    patch = _get(cfg, "modality.encoder.patch_px")
    image = _get(cfg, "modality.image_px", (int, list))
    sides = image if isinstance(image, list) else [image]
    if not patch or patch < 1 or not all(isinstance(side, int) for side in sides):
        return None
    wrong = next((side for side in sides if side < patch or side % patch), None)
    if wrong is None:
        return None
    near = sorted({max(patch, wrong // patch * patch), (wrong // patch + 1) * patch})
    return (
        f"modality.image_px: {wrong} pixels cannot be cut into patches of {patch} (modality.encoder.patch_px); "
        f"the nearest sizes that work are {' and '.join(map(str, near))}"
    )


def _enough_layers_for_the_targets(cfg: DictConfig) -> str | None:
    top, depth = _get(cfg, "objective.targets.top_k_layers"), _get(cfg, "size.depth")
    if top is None or depth is None or depth < 1:
        return None
    layers = depth - (_get(cfg, "modality.encoder.prenet_depth") or 0)
    if 1 <= top <= layers:
        return None
    return f"objective.targets.top_k_layers: expected a number from 1 to {layers}, the layers there are, got {top}"


def _dropping_needs_a_constant_count(cfg: DictConfig) -> str | None:
    if _get(cfg, "objective.mask_mode", str) != "drop":
        return None
    _, _, masker = str(_get(cfg, "modality.masker._target_", str)).rpartition(".")
    instead = {"BlockMasker": "InverseBlockMasker", "SpanMasker": "Block1dMasker"}.get(masker)
    if instead is not None:
        return (
            f"modality.masker: {masker} hides a different number of tokens in each sample, and "
            f"objective.mask_mode=drop needs the same number; choose data2vec_train.masking.{instead}, or "
            "objective.mask_mode=replace"
        )
    _, _, decoder = str(_get(cfg, "objective.decoder._target_", str)).rpartition(".")
    if decoder in ("LinearDecoder", "MLPDecoder"):
        return (
            f"objective.decoder: {decoder} sees one token at a time and cannot fill in those that "
            "objective.mask_mode=drop leaves out; choose a convolutional decoder, or objective.mask_mode=replace"
        )
    return None


def _corruption_and_mask_mode_agree(cfg: DictConfig) -> str | None:
    mode, corruption = _get(cfg, "objective.mask_mode", str), _get(cfg, "modality.corruption._target_", str)
    if mode == "corrupt" and corruption is None:
        return (
            "objective.mask_mode: corrupt needs modality.corruption, which says what hidden tokens become; choose "
            "objective=data2vec with modality=text, or another mask mode"
        )
    if mode is not None and mode != "corrupt" and corruption is not None:
        return f"modality.corruption: objective.mask_mode={mode} hides tokens in the encoder; set it to null"
    return None


def _tau_rises(cfg: DictConfig) -> str | None:
    start, end = _get(cfg, "objective.tau_start", (int, float)), _get(cfg, "objective.tau_end", (int, float))
    if start is None or end is None or not 0 <= end < start <= 1:
        return None
    return f"objective.tau_start: {start} is above objective.tau_end={end}; the teacher slows down, so start lower"


def _warm_up_ends_in_time(cfg: DictConfig) -> str | None:
    warmup, steps = _get(cfg, "scheduler.warmup_steps", (int, float)), _get(cfg, "trainer.max_steps")
    if warmup is None or steps is None or steps < 1 or warmup <= steps:
        return None
    return f"scheduler.warmup_steps: {warmup} is more than trainer.max_steps={steps}; lower it or train longer"


def _devices_are_countable(cfg: DictConfig) -> str | None:
    devices = _get(cfg, "trainer.devices", str)
    if devices in (None, "auto"):
        return None
    return f"trainer.devices: expected a count, a list such as [0,1], or auto, got {show(devices)}"


def _normalisation_fits_the_channels(cfg: DictConfig) -> str | None:
    channels = _get(cfg, "modality.channels")
    mean, std = _get(cfg, "modality.mean", list), _get(cfg, "modality.std", list)
    if channels is None or mean is None or std is None or all(len(one) in (1, channels) for one in (mean, std)):
        return None
    return (
        f"modality.channels: {channels}, but modality.mean has {len(mean)} and modality.std {len(std)} values; give 1 "
        f"or {channels} of each, for example modality.mean=[0.449] modality.std=[0.226]"
    )


def _weights_can_be_read(cfg: DictConfig) -> str | None:
    for name in ("checkpoint", "init_from"):
        found = OmegaConf.select(cfg, name, throw_on_missing=False)
        if isinstance(found, str) and not Path(found).expanduser().exists():
            return f"{name}: there is no file or folder {found}"
    found = OmegaConf.select(cfg, "weights")
    if found is not None and found not in ("student", "teacher"):
        return f"weights: expected student or teacher, got {found}"
    return None


def _head_suits_the_modality(cfg: DictConfig) -> str | None:
    target, modality = _get(cfg, "head._target_", str), _get(cfg, "modality.name", str)
    module = str(target).rpartition(".")[0].rpartition(".")[2]
    wanted = {"speech": "audio", "text": "text", "vision": "vision"}.get(module)
    if target is None or wanted is None or modality in (None, wanted):
        return None
    return f"head: {target.rpartition('.')[2]} is for modality={wanted}, and this is modality={modality}"


def _out_is_free(cfg: DictConfig) -> str | None:
    out = OmegaConf.select(cfg, "out", throw_on_missing=False)
    if not isinstance(out, str) or OmegaConf.select(cfg, "format") is not None:
        return None
    return f"out: {out} exists already; choose another name, or remove it" if Path(out).expanduser().exists() else None


def _export_format_exists(cfg: DictConfig) -> str | None:
    formats = ("hf", "safetensors", "onnx", "torch_export")
    found = OmegaConf.select(cfg, "format")
    if found is not None and found not in formats:
        return f"format: expected one of {', '.join(formats)}, got {found}"
    return None


RULES: list[Callable[[DictConfig], str | None]] = [
    _seed_is_a_whole_number,
    _heads_divide_the_width,
    _patches_tile_the_image,
    _normalisation_fits_the_channels,
    _enough_layers_for_the_targets,
    _dropping_needs_a_constant_count,
    _corruption_and_mask_mode_agree,
    *_range("a whole number of at least 1", lambda value: value >= 1 and value == int(value), *_COUNTS),
    *_range("a number from 0 to 1", lambda value: 0 <= value <= 1, *_SHARES),
    *_range("a number between 0 and 1", lambda value: 0 < value < 1, "modality.masker.hidden_fraction"),
    _tau_rises,
    _warm_up_ends_in_time,
    _devices_are_countable,
    _weights_can_be_read,
    _export_format_exists,
    _head_suits_the_modality,
    _out_is_free,
]
