"""What `--help` prints: the verb, example commands, its groups with their choices, and its own settings."""

import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import yaml

from data2vec_train.config.commented import Commented, Setting, read
from data2vec_train.paths import config_directory, text_of_recipe

WIDTH = 110
REFERENCE = "README.md"  # of configs/


def help_text(name: str, choices: Mapping[str, list[str]], folders: list[Path]) -> str:
    """The help of one primary config.

    Args:
        name: The primary config.
        choices: Group -> what can be chosen from it.
        folders: Where the primary config is looked for; our own, which are the last, describe what it leaves out.
    """
    file = next((path for path in (folder / f"{name}.yaml" for folder in folders) if path.is_file()), None)
    file = file or config_directory() / "train.yaml"
    found = read(file)
    template = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader).get("hydra", {}).get("help", {})
    parts = [str(template.get("template", found.purpose or name)).strip()]
    groups = [_group(group, options, found) for group, options in choices.items() if group != "recipes"]
    if groups:
        parts.append("Groups, chosen with group=choice (default):\n" + "\n".join(groups))
    if recipes := suited_recipes(name, choices.get("recipes", [])):
        parts.append(_wrapped("Recipes, added with +recipes=NAME: ", ", ".join(recipes), indent=2))
    own = [setting for setting in found.settings if setting.default is not None and not is_program_text(setting.path)]
    heading = f"Settings of {file.name}, changed with name=value; ??? has to be given:"
    parts.append("\n".join([heading, *map(_setting, own)]))
    parts.append(
        f"Settings of the groups: {_reference()}\n--cfg job prints all settings of a command, with --resolve as "
        "values;\n-m runs every combination of several values; --version names the program."
    )
    return "\n\n".join(parts) + "\n"


def is_program_text(path: str) -> bool:
    """Whether a key says what the program calls, as `_target_` does, and not a setting."""
    return re.fullmatch(r"_\w+_", path.rpartition(".")[2]) is not None


def suited_recipes(name: str, recipes: list[str]) -> list[str]:
    """The recipes whose first line is a command with this primary config; plans take those of pretraining."""
    module = "data2vec_train" if name in ("train", "plan") else f"data2vec_train.{name}"
    commands = {recipe: re.search(r"python -m (\S+) ", text_of_recipe(recipe)) for recipe in recipes}
    return [recipe for recipe, command in commands.items() if command and command[1] == module]


def _group(group: str, options: list[str], found: Commented) -> str:
    chosen, said = found.choices.get(group, ("", ""))
    notes = [] if chosen == "???" or chosen.startswith("${") else [chosen]
    notes += [said] if said else []
    text = f"  {group}: {', '.join(options)}" + (f" ({'; '.join(notes)})" if notes else "")
    return _wrapped(text, "", indent=6)


def _setting(setting: Setting) -> str:
    text = f"  {setting.path}={setting.default}"
    return _wrapped(f"{text:<33} " if len(text) < 33 else f"{text}  ", setting.said, indent=34)


def _wrapped(start: str, text: str, *, indent: int) -> str:
    return textwrap.fill(
        start + text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _reference() -> str:
    """The file with every setting, below the working directory or in full."""
    file = config_directory() / REFERENCE
    relative = os.path.relpath(file)
    return str(file) if relative.startswith("..") else relative
