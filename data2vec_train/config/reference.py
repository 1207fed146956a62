"""configs/README.md: every group and setting with type, default and one line, from the comments of the YAML files.

`python -m data2vec_train.config.reference` (`make docs`) writes it. Nothing is imported that takes time: types come
from the rules of the check, from the source of what a setting is handed to, or from the default.
"""

import ast
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from data2vec_train.config.check import rules
from data2vec_train.config.check.schema import Definition, describe, find, signature
from data2vec_train.config.command import VERBS
from data2vec_train.config.commented import Commented, Setting, read
from data2vec_train.config.help import REFERENCE, is_program_text
from data2vec_train.paths import config_directory

PRIMARY = {verb: "train" if verb == "pretrain" else verb for verb in VERBS}
_SHARED = 0.5  # share of their settings that the choices of a group have in common to be told in one table
# Of settings that the program reads itself, and whose default does not tell.
_KINDS = {
    **dict.fromkeys(("checkpoint", "init_from", "out"), "path"),
    **dict.fromkeys(
        ("test_source", "source", "words", "beam", "corruption", "batching", "prepare", "pictures"), "mapping"
    ),
    **dict.fromkeys(("preprocessing", "raw"), "mapping"),
    **dict.fromkeys(("group_column", "group_pattern", "note"), "text"),
    **dict.fromkeys(("layers",), "text or list of items, each whole number"),
    "devices": "whole number or auto",
}
_TOP = """# Groups and settings

Written by `make docs` from the comments of the YAML files in this folder; change those.

A command is a verb, choices from groups (`group=choice`) and settings (`name=value`):

    python -m data2vec_train modality=audio size=small optimizer.lr=5e-4

`--help` prints a short form of this page, `--cfg job --resolve` the composed settings of a command. How mistakes are
answered, and what a config may do: [config](../data2vec_train/config/README.md). Recipes are files that make many
choices at once: [recipes](../recipes/README.md).

`???` has to be given. `${name}` is the value of another setting, `${share:F,N}` the share F of N, `${product:A,B}` the
product. `hydra.run.dir=DIR` sets the directory of a run.
"""


def main() -> None:
    """Writes the file."""
    (config_directory() / REFERENCE).write_text(reference(config_directory()), encoding="utf-8")


def reference(folder: Path) -> str:
    """The text of configs/README.md for the configs in a folder."""
    configs = _Configs(folder)
    parts = [_TOP, "## Verbs\n", *_verbs(configs), "## Groups\n", *_groups(configs)]
    return "\n".join(parts).rstrip() + "\n"


def settings_without_a_line(folder: Path) -> list[str]:
    """FILE: SETTING of every setting that no comment describes."""
    configs = _Configs(folder)
    return [
        f"{file}: {setting.path}"
        for file in configs.files
        for setting in configs.settings(file)
        if setting.default is not None and not configs.line(file, setting)
    ]


class _Configs:
    """All files, and what can be known of a setting from them together."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.rglob("*.yaml"))
        self.files: dict[str, Commented] = {str(path.relative_to(folder).with_suffix("")): read(path) for path in paths}
        self.by_path: dict[str, list[tuple[str, Setting]]] = {}  # who sets it
        self.readers: dict[str, list[tuple[str, Setting]]] = {}  # who passes its value on
        for file in self.files:
            for setting in self.settings(file):
                self.by_path.setdefault(setting.path, []).append((file, setting))
                if passed_on := _passed_on(setting):
                    self.readers.setdefault(passed_on, []).append((file, setting))

    def choices(self, group: str) -> list[str]:
        return [file.removeprefix(f"{group}/") for file in self.files if file.rpartition("/")[0] == group]

    def settings(self, file: str) -> list[Setting]:
        """Those of a file and of the files it builds on, with full paths, without what names classes."""
        found = self.files[file]
        group = file.rpartition("/")[0].replace("/", ".")
        prefix = "" if found.is_global or not group else f"{group}."
        own = [dataclasses.replace(setting, path=prefix + setting.path) for setting in found.settings]
        folder = file.rpartition("/")[0]
        bases = [f"{folder}/{base}" if folder else base for base in found.bases]
        merged = {
            setting.path: setting for base in bases if folder and base in self.files for setting in self.settings(base)
        }
        for setting in own:
            before = merged.get(setting.path)
            merged[setting.path] = dataclasses.replace(setting, said=setting.said or before.said) if before else setting
        return [
            setting
            for setting in merged.values()
            if setting.path.rpartition(".")[2] == "_target_" or not is_program_text(setting.path)
        ]

    def line(self, file: str, setting: Setting) -> str:
        """Its comment, what it follows, or the comment that another file has for it, the same group first."""
        if setting.said:
            return setting.said
        if setting.path.endswith("_target_"):
            return first_line(find(setting.default or ""))
        if passed_on := _passed_on(setting):
            return f"follows `{passed_on}`"
        group = file.rpartition("/")[0]
        others = sorted(self.by_path[setting.path], key=lambda place: place[0].rpartition("/")[0] != group)
        for other, there in others:
            if there.said:
                return there.said
            for origin, followed in self.by_path.get(_passed_on(there) or "", []):
                if origin == other and followed.said:
                    return followed.said
        return ""

    def kind(self, file: str, setting: Setting) -> str:
        """What a value may be."""
        default = setting.default or ""
        text, expected = self._annotated(file, setting.path, set()) or "", rules.expected(setting.path)
        # A range is that of each number, where a list will do as well.
        text = re.sub("a (whole )?number", expected, text) if expected and " or a list" in text else expected or text
        text = text or _kind_of(setting)
        text = re.sub(r"\b(an?|or an?) ", lambda found: "or " if found[1][:2] == "or" else "", text).replace("'", "")
        if default.startswith("[") and "list" not in text and "text" not in text:
            text = f"list of items, each {text}"
        known = text.replace(",", "").split()
        words = [text, *(word for word in ("null", "auto") if default == word and word not in known)]
        return " or ".join(word for word in words if word)

    def _annotated(self, file: str, path: str, seen: set[str]) -> str | None:
        """What a constructor says of the setting, or of one that has its value."""
        parent, _, name = path.rpartition(".")
        targets = sorted(self.by_path.get(f"{parent}._target_", []), key=lambda place: place[0] != file)
        for _, target in targets:
            parameter = signature(find(target.default)).parameters.get(name)
            if parameter and (text := describe(parameter)):
                return text
        readers = sorted(self.readers.get(path, []), key=lambda place: place[0] != file)
        for other, reader in readers:
            if reader.path not in seen and (text := self._annotated(other, reader.path, {*seen, reader.path})):
                return text
        return None


def first_line(definition: Definition | None) -> str:
    """The first line of the docstring of a class or function."""
    node = definition.node if definition else None
    docstring = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def _passed_on(setting: Setting) -> str | None:
    found = re.fullmatch(r"\$\{(\w[\w.]*)\}", setting.default or "")
    return found[1] if found else None


def _kind_of(setting: Setting) -> str:
    """What the default says, where neither a rule nor a constructor does."""
    name = setting.path.rpartition(".")[2]
    if name in _KINDS:
        return _KINDS[name]
    value = yaml.load(setting.default or "null", Loader=yaml.CSafeLoader)
    names = {bool: "true or false", int: "whole number", float: "number", list: "list", dict: "mapping", str: "text"}
    return names.get(type(value), "")


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def _verbs(configs: _Configs) -> Iterator[str]:
    for verb, name in PRIMARY.items():
        found = configs.files[name]
        yield f"### {verb}\n"
        yield f"`{found.command}`\n"
        if found.purpose:
            yield f"{found.purpose}\n"
        refused = rules.REFUSED_CHOICES.get(name, {})
        rows = []
        for group, (chosen, said) in found.choices.items():
            if group.startswith("hydra/"):
                continue
            choices = [choice for choice in configs.choices(group) if choice not in refused.get(group, ())]
            default = "" if chosen == "???" else f"`{chosen}`"
            rows.append([f"[{group}](#{group})", ", ".join(choices), default, said])
        if rows:
            yield _table(["group", "choices", "default", ""], rows)
        yield _settings(configs, [name])


def _groups(configs: _Configs) -> Iterator[str]:
    folders = list(dict.fromkeys(file.rpartition("/")[0] for file in configs.files))
    order = list(dict.fromkeys(group for name in PRIMARY.values() for group in configs.files[name].choices))
    groups = sorted(filter(None, folders), key=lambda group: order.index(group) if group in order else len(order))
    for group in groups:
        yield f"### {group}\n"
        users = [verb for verb, name in PRIMARY.items() if group in configs.files[name].choices]
        said = next(
            (said for name in PRIMARY.values() if (said := configs.files[name].choices.get(group, ("", ""))[1])), ""
        )
        yield " ".join(text for text in (f"{said[:1].upper()}{said[1:]}." if said else "", _for(users)) if text) + "\n"
        files = [f"{group}/{choice}" for choice in configs.choices(group)]
        if len(files) > 1:
            yield _table(
                ["choice", ""], [[f"`{file.rpartition('/')[2]}`", configs.files[file].purpose] for file in files]
            )
        elif configs.files[files[0]].purpose:
            yield f"`{files[0].rpartition('/')[2]}`: {configs.files[files[0]].purpose}.\n".replace("..\n", ".\n")
        filled = [file for file in files if configs.settings(file)]
        if not _alike(configs, filled):
            for file in filled:
                yield f"#### {file}\n"
                yield f"`{configs.files[file].command}`\n"
                yield _settings(configs, [file])
        elif filled:
            yield _settings(configs, filled)


def _for(verbs: list[str]) -> str:
    return f"For {', '.join(verbs)}." if verbs else ""


def _alike(configs: _Configs, files: list[str]) -> bool:
    """Whether files have most of their settings in common."""
    paths = [{setting.path for setting in configs.settings(file) if setting.default is not None} for file in files]
    return bool(paths) and len(set.intersection(*paths)) >= _SHARED * len(set.union(*paths))


def _settings(configs: _Configs, files: list[str]) -> str:
    found: dict[str, list[tuple[str, Setting]]] = {}
    for file in files:
        for setting in configs.settings(file):
            found.setdefault(setting.path, []).append((file, setting))
    rows = []
    for path, places in found.items():
        file, setting = places[0]
        said = next((line for place in places if (line := configs.line(*place))), "")
        if path.endswith("._target_") or path == "_target_":
            rows.append([f"`{path.removesuffix('._target_')}`", "object", _defaults(places, len(files)), said])
        elif setting.default is None:
            if setting.said:
                rows.append([f"`{path}`", "", "", setting.said])
        else:
            rows.append([f"`{path}`", configs.kind(file, setting), _defaults(places, len(files)), said])
    return _table(["setting", "type", "default", ""], rows) if rows else ""


def _defaults(places: list[tuple[str, Setting]], files: int) -> str:
    """One value, or one for each choice."""
    values: dict[str, list[str]] = {}
    for file, setting in places:
        default = setting.default or ""
        shown = default.rpartition(".")[2] if setting.path.endswith("_target_") else default
        values.setdefault(f"`{shown}`", []).append(file.rpartition("/")[2])
    if len(values) == 1 and len(places) == files:
        return next(iter(values))
    return ", ".join(f"{'/'.join(choices)}: {value}" for value, choices in values.items())


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
