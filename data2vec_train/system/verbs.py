"""Folders of verbs that can be called: `data2vec_train.pretrain` is a package, and `data2vec_train.pretrain(...)` runs.

The import system sets each imported sub-package as an attribute of its parent, which would replace a function of the
same name. So the package itself is callable.
"""

import importlib
import inspect
import sys
import types
from typing import Any


class Verb(types.ModuleType):
    """A package whose call is the function of the same name in `data2vec_train.api`."""

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module("data2vec_train.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Run the verb, see `data2vec_train.api`."""
        return self._function(*args, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the function, for `help` and editors."""
        return inspect.signature(self._function)


def callable_module(name: str) -> None:
    """Make the package `name` callable; called by its own `__init__.py`."""
    sys.modules[name].__class__ = Verb
