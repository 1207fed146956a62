"""Modules of the user, named by `DATA2VEC_PLUGINS` or by entry points of installed packages."""

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

from data2vec_train.errors import ConfigError

plugin_packages: set[str] = set()


plugin_modules: list[str] = []  # imported by loader processes too


def load_plugins() -> None:
    """Import the modules in DATA2VEC_PLUGINS and in entry points `data2vec_train.plugins`; they fill the ConfigStore.

    Raises:
        ConfigError: A plugin, or a module that it imports, cannot be found.
    """
    named = [name.strip() for name in os.environ.get("DATA2VEC_PLUGINS", "").split(",") if name.strip()]
    if named and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # last, so that a file here cannot hide an installed package
    installed = [entry.module for entry in importlib.metadata.entry_points(group="data2vec_train.plugins")]
    for name in [*named, *installed]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            source = "DATA2VEC_PLUGINS" if name in named else "an installed package"
            raise ConfigError(
                f"{source} names the plugin {name}, but there is no module {error.name}; it must be importable from "
                f"{Path.cwd()} or installed"
            ) from error
        plugin_packages.add(name.split(".")[0])
        if name not in plugin_modules:
            plugin_modules.append(name)
