"""What a config may run: a file of settings can come from anybody, and must not be able to do more than set things.

Three places of a config name code: `_target_`, `hydra.searchpath` (a `pkg://` is imported), and logging, whose
dictionaries call any class. Nothing is imported here to find out.
"""

import re
from collections.abc import Iterator

from data2vec_train.signatures import did_you_mean, file_of, find, public_names, show

# Modules whose classes, and ours whose functions, `_target_` may name. What writes wherever it is told, loads files or
# downloads is left out: tasks, hf, lightning's command line and its demos, torchvision's data sets.
OURS = (
    *("data2vec", "data", "decoders", "encoders", "finetuning", "heads", "layers", "masking", "module", "monitor"),
    *("optim", "parallel", "pictures", "probes", "saving", "targets", "teacher", "hf.preprocessing", "tasks.sweep"),
)
LIBRARIES = (
    *("lightning.Trainer", "lightning.pytorch.Trainer", "lightning.pytorch.trainer.Trainer"),
    *(f"lightning.pytorch.{name}" for name in ("callbacks", "loggers", "plugins", "profilers", "strategies")),
    *("torch.optim", "torchvision.transforms"),
)
_DEFINED_IN = ("lightning.", "torch.optim.", "torchvision.transforms.")
plugin_packages: set[str] = set()
plugin_modules: list[str] = []  # which loader processes import too

_LOGGING = (
    *("logging.Formatter", "logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Filter"),
    *("logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler"),
    *("logging.handlers.WatchedFileHandler", "colorlog.ColoredFormatter"),
)
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def target_fault(target: object) -> str | None:
    """Why a config may not, or cannot, call `target`; None when it may."""
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target, re.ASCII):
        return f"expected the dotted path of a class, got {show(target)}"
    module, _, name = target.rpartition(".")
    top = target.split(".")[0]
    if not _is_allowed(target) or any(part.startswith("_") for part in target.split(".")):
        listed = ", ".join(["data2vec_train", *LIBRARIES, *sorted(plugin_packages)])
        return (
            f"'{target}' may not be called from a config; allowed are public classes in {listed} "
            "and in the modules that DATA2VEC_PLUGINS names"
        )
    if file_of(module) is None:
        return f"there is no module {module}."
    found = find(target)
    if found is None:
        return f"there is no '{name}' in {module}{did_you_mean(name, public_names(module))}"
    # An import can lead anywhere (`torchvision.io.os.system`), so the definition has to be in an allowed place as well.
    ours = top in {"data2vec_train", *plugin_packages}
    kinds = ("ClassDef", "FunctionDef") if ours else ("ClassDef",)
    is_home = _is_allowed(found.module) if ours else f"{found.module}.".startswith(_DEFINED_IN)
    if type(found.node).__name__ not in kinds or not is_home:
        return f"'{target}' is not a {' or '.join(kinds)} of {top}"
    return None


def _is_allowed(dotted: str) -> bool:
    places = (*(f"data2vec_train.{name}" for name in OURS), *LIBRARIES, *plugin_packages)
    return any(f"{dotted}.".startswith(f"{place}.") for place in places)


def search_path_faults(entries: object) -> list[str]:
    """What is wrong with `hydra.searchpath`: folders are only read, packages are imported."""
    faults = []
    for entry in entries if isinstance(entries, list) else []:
        scheme, _, rest = str(entry).rpartition("://")
        top = re.split(r"[./]", rest)[0]
        if scheme == "pkg" and top not in ("hydra", "hydra_plugins", "data2vec_train", *plugin_packages):
            faults.append(
                f"hydra.searchpath: {entry} would be imported; give its folder as file://DIR, or name it in "
                "DATA2VEC_PLUGINS"
            )
        elif scheme not in ("", "file", "pkg"):
            faults.append(f"hydra.searchpath: expected file://DIR or pkg://PACKAGE, got {entry}")
    return faults


def hydra_faults(part: dict) -> dict[str, str]:
    """Dotted path -> sentence for what hydra's own part of a config may not hold; references filled in before."""
    faults: dict[str, str] = {}
    for path, value in nodes_of(part, "hydra"):
        if path.endswith("._target_") and not _is_plugin_of_hydra(value, path):
            faults |= {path: f"{path}: {fault}"} if (fault := target_fault(value)) else {}
    for group in ("job_logging", "hydra_logging"):
        for path, value in nodes_of(part.get(group) or {}, f"hydra.{group}"):
            key = path.rpartition(".")[2]
            texts = value if isinstance(value, list) else [value]
            refers = [one for one in texts if isinstance(one, str) and re.match(r"\w+://", one)]
            if path.endswith((".()", "..")) and value not in _LOGGING:
                faults[path] = f"{path}: {show(value)} may not be called from a config; set a class of logging instead"
            elif key == "class" and value not in _LOGGING:
                faults[path] = f"{path}: expected one of {', '.join(_LOGGING)}, got {show(value)}"
            elif refers and refers[0] not in _STREAMS:
                faults[path] = f"{path}: expected {' or '.join(_STREAMS)}, got {refers[0]}"
    for name in (part.get("job") or {}).get("env_set") or {}:
        path = f"hydra.job.env_set.{name}"
        faults[path] = f"{path}: a config does not change the environment; write {name}=VALUE before the command"
    return faults


def _is_plugin_of_hydra(target: object, path: str) -> bool:
    """Hydra itself accepts only its registered plugins as launcher and sweeper; its callbacks only write."""
    places = (
        (r"hydra\.(launcher|sweeper)\._target_", r"(hydra\._internal\.core_plugins|hydra_plugins)\.[\w.]+"),
        (r"hydra\.callbacks\.\w+\._target_", r"hydra\.experimental\.callbacks\.\w+"),
        (r"hydra\.sweeper\.sampler\._target_", r"optuna\.samplers\.\w+"),
    )
    return any(re.fullmatch(where, path) and re.fullmatch(what, str(target)) for where, what in places)


def nodes_of(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of everything in a tree of dicts and lists."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        here = f"{path}.{key}" if path else str(key)
        yield here, value
        yield from nodes_of(value, here)
