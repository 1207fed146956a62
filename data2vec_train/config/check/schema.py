"""What a class takes, read from its source file: torch and lightning take seconds to import, parsing a file does not.

Whatever cannot be read (C code, names made at run time) is taken to accept anything.
"""

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import NoneType
from typing import NamedTuple

from data2vec_train.system.constraints import show

_MAX_DEPTH = 12  # of imports of imports; more is a circle


# ---------------------------------------------------------------------------------------------------------------------
# Names


class Definition(NamedTuple):
    """The statement or expression that a name stands for; a whole module when `node` is None."""

    module: str
    node: ast.AST | None


def find(target: str) -> Definition | None:
    """The definition that the dotted path of a module and a name in it leads to, through imports and aliases."""
    module, _, name = target.rpartition(".")
    return _lookup(module, name) if module else None


@functools.cache
def file_of(module: str) -> Path | None:
    """The source file of a module, found without importing its package."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    for name in rest.split(".") if rest else ():
        if spec is None or spec.submodule_search_locations is None:
            return None
        package = f"{package}.{name}"
        spec = PathFinder.find_spec(package, spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def public_names(module: str) -> list[str]:
    """The names that a module defines or imports, without those that begin with an underscore."""
    return [name for name in _contents(module) or () if not name.startswith(("_", "*"))]


def keys_of(module: str, name: str) -> list[str]:
    """The text keys of a dictionary that a module writes out."""
    found = find(f"{module}.{name}")
    keys = found.node.keys if found and isinstance(found.node, ast.Dict) else []
    return [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or a full stop when nothing is near."""
    known = list(known)
    # `base_imagenet` stands for `vision/base_imagenet`
    near = difflib.get_close_matches(name, known, n=1) or [option for option in known if option.endswith(f"/{name}")]
    return f"; did you mean {near[0]}?" if near else "."


@functools.cache
def _contents(module: str) -> dict[str, ast.AST | tuple[str, str]] | None:
    """Name -> its definition, or (module, name) it is imported from; "*module" for each star import."""
    file = file_of(module)
    if file is None:
        return None
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names: dict[str, ast.AST | tuple[str, str]] = {}

    def read(statements: list[ast.stmt]) -> None:
        for node in statements:
            match node:
                case ast.ClassDef() | ast.FunctionDef():
                    names[node.name] = node
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)) if node.value:
                    names[name] = node.value
                case ast.Import():
                    for alias in node.names:
                        top = alias.name.split(".")[0]
                        names[alias.asname or top] = (alias.name if alias.asname else top, "")
                case ast.ImportFrom():
                    origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    for alias in node.names:
                        key = f"*{origin}" if alias.name == "*" else alias.asname or alias.name
                        names[key] = (origin, alias.name)
                case ast.If() | ast.Try():
                    # The last definition of a name wins, so the main branch is read last.
                    read(node.orelse)
                    read(node.body)

    read(ast.parse(file.read_bytes()).body)
    return names


@functools.cache
def _lookup(module: str, name: str, depth: int = 0) -> Definition | None:
    contents = _contents(module)
    if contents is None or depth > _MAX_DEPTH:
        return None
    entry = contents.get(name)
    if entry is None or entry == (module, name):  # the latter: `from . import name` in a package
        if file_of(f"{module}.{name}"):
            return Definition(f"{module}.{name}", None)
        stars = [key[1:] for key in contents if key.startswith("*")]
        return next((found for star in stars if (found := _lookup(star, name, depth + 1))), None)
    if isinstance(entry, tuple):
        origin, original = entry
        return _lookup(origin, original, depth + 1) if original else Definition(origin, None)
    if isinstance(entry, (ast.Name, ast.Attribute)):
        return _resolve(entry, module, depth + 1)
    return Definition(module, entry)


def _resolve(node: ast.expr, module: str, depth: int = 0) -> Definition | None:
    """What an expression such as `Module`, `nn.Module` or `Sequence[int]` names in `module`."""
    match node:
        case ast.Subscript():
            return _resolve(node.value, module, depth)
        case ast.Name():
            return _lookup(module, node.id, depth)
        case ast.Attribute():
            holder = _resolve(node.value, module, depth)
            return _lookup(holder.module, node.attr, depth) if holder and holder.node is None else None
    return None


def _last_name(node: ast.expr) -> str:
    """`dataclass` of `@dataclasses.dataclass(frozen=True)`, `list` of `list[int]`."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return node.attr
        case ast.Subscript():
            return _last_name(node.value)
        case ast.Call():
            return _last_name(node.func)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Signatures


@dataclass(frozen=True)
class Parameter:
    """One argument; the names in its annotation mean something in `module`."""

    annotation: ast.expr | None
    required: bool
    default_is_none: bool
    module: str


@dataclass(frozen=True)
class Signature:
    """The arguments of a function or class; `is_open` when it takes other names as well, or cannot be read."""

    parameters: dict[str, Parameter]
    is_open: bool


@functools.cache
def signature(definition: Definition | None, depth: int = 0) -> Signature:
    """What a function takes, or a class: its own constructor, a dataclass's fields, or what its first base takes."""
    node = definition.node if definition else None
    if isinstance(node, ast.FunctionDef):
        return _function_signature(node, definition.module, skip_first=False)
    if not isinstance(node, ast.ClassDef) or depth > _MAX_DEPTH:
        return Signature({}, is_open=True)
    for name in ("__init__", "__new__"):
        own = [
            statement for statement in node.body if isinstance(statement, ast.FunctionDef) and statement.name == name
        ]
        if own:  # overloads come first, the implementation last
            return _function_signature(own[-1], definition.module, skip_first=True)
    if _is_dataclass(node):
        return Signature(_dataclass_fields(definition), is_open=False)
    return signature(_resolve(node.bases[0], definition.module), depth + 1) if node.bases else Signature({}, False)


def class_attribute(definition: Definition | None, name: str, depth: int = 0) -> object:
    """What a class, or its first base that says so, sets an attribute to; None when that is no constant."""
    node = definition.node if definition else None
    if not isinstance(node, ast.ClassDef) or depth > _MAX_DEPTH:
        return None
    for statement in node.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=found)], value=ast.Constant(value=value)) if found == name:
                return value
    return class_attribute(_resolve(node.bases[0], definition.module), name, depth + 1) if node.bases else None


def _function_signature(node: ast.FunctionDef, module: str, *, skip_first: bool) -> Signature:
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(positional) - len(node.args.defaults)) + node.args.defaults
    pairs = [*zip(positional, defaults, strict=True)][skip_first:]
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    parameters = {argument.arg: _parameter(argument.annotation, default, module) for argument, default in pairs}
    return Signature(parameters, is_open=node.args.kwarg is not None)


def _dataclass_fields(definition: Definition) -> dict[str, Parameter]:
    fields: dict[str, Parameter] = {}
    for base in definition.node.bases:
        above = _resolve(base, definition.module)
        if above and isinstance(above.node, ast.ClassDef) and _is_dataclass(above.node):
            fields |= _dataclass_fields(above)
    for node in definition.node.body:
        if isinstance(node, ast.AnnAssign) and _last_name(node.annotation) != "ClassVar":
            fields[node.target.id] = _parameter(node.annotation, node.value, definition.module)
    return fields


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(_last_name(decorator) == "dataclass" for decorator in node.decorator_list)


def _parameter(annotation: ast.expr | None, default: ast.expr | None, module: str) -> Parameter:
    is_none = isinstance(default, ast.Constant) and default.value is None
    return Parameter(annotation, required=default is None, default_is_none=is_none, module=module)


# ---------------------------------------------------------------------------------------------------------------------
# Values against annotations

_SCALARS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
    "Path": (str, "a path"),
    "PathLike": (str, "a path"),
    "None": (NoneType, "null"),
}
_LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "tuple", "Tuple", "set", "Set"}
_MAPPINGS = {"dict", "Dict", "Mapping"}
_WRITTEN_AS_TEXT = ("Enum", "TypedDict", "NamedTuple", "str", "int")  # bases of classes that YAML can write


class _Alternative(NamedTuple):
    """One member of a union: a name from the tables above, "Literal", "class" or "Any", and what is in its brackets."""

    name: str
    arguments: list[ast.expr]
    module: str

    @property
    def has_fixed_length(self) -> bool:
        ends_open = isinstance(self.arguments[-1], ast.Constant) if self.arguments else True  # tuple[int, ...]
        return self.name in ("tuple", "Tuple") and not ends_open


def mismatch(value: object, parameter: Parameter) -> str | None:
    """What was expected, when `value` (plain dicts and lists) cannot be it; None when it can, or nobody knows."""
    if parameter.annotation is None or (value is None and parameter.default_is_none):
        return None
    if _fits(value, parameter.annotation, parameter.module):
        return None
    expected = _describe(parameter.annotation, parameter.module)
    near = isinstance(value, float) and value.is_integer() and "whole number" in expected
    return f"{expected} ({int(value)})" if near else expected


def describe(parameter: Parameter) -> str | None:
    """What a value has to be, as an error says it; None when anything will do."""
    text = _describe(parameter.annotation, parameter.module) if parameter.annotation is not None else ""
    missing = parameter.default_is_none and text and "null" not in text
    return f"{text} or null" if missing else text or None


def _alternatives(node: ast.expr, module: str) -> Iterator[_Alternative]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a forward reference
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.BinOp):
        yield from _alternatives(node.left, module)
        yield from _alternatives(node.right, module)
        return
    base, inner = (node.value, node.slice) if isinstance(node, ast.Subscript) else (node, ast.Tuple(elts=[]))
    arguments = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    name = "None" if isinstance(base, ast.Constant) and base.value is None else _last_name(base)
    if name in ("Optional", "Union"):
        for argument in [*arguments, *([ast.Constant(None)] if name == "Optional" else [])]:
            yield from _alternatives(argument, module)
    elif name == "Literal" and not all(isinstance(argument, ast.Constant) for argument in arguments):
        yield _Alternative("Any", [], module)
    elif name == "Literal" or name in _SCALARS or name in _LISTS or name in _MAPPINGS:
        yield _Alternative(name, arguments, module)
    else:
        found = _resolve(base, module)
        match found and found.node:
            case ast.ClassDef(bases=bases) if not any(_last_name(base).endswith(_WRITTEN_AS_TEXT) for base in bases):
                yield _Alternative("class", [base], module)
            case ast.Subscript() | ast.BinOp() | ast.Constant():
                yield from _alternatives(found.node, found.module)
            case _:
                yield _Alternative("Any", [], module)


def _fits(value: object, annotation: ast.expr, module: str) -> bool:
    is_object = isinstance(value, dict) and "_target_" in value
    return is_object or any(_fits_one(value, wanted) for wanted in _alternatives(annotation, module))


def _fits_one(value: object, wanted: _Alternative) -> bool:
    if wanted.name in _SCALARS:
        is_bool = isinstance(value, bool)  # Python's True is a number as well
        return isinstance(value, _SCALARS[wanted.name][0]) and is_bool == (wanted.name == "bool")
    if wanted.name == "Literal":
        return any(type(value) is type(literal.value) and value == literal.value for literal in wanted.arguments)
    if wanted.name in _LISTS:
        if not isinstance(value, list) or (wanted.has_fixed_length and len(value) != len(wanted.arguments)):
            return False
        items = wanted.arguments if wanted.has_fixed_length else wanted.arguments[:1] * len(value)
        return all(_fits(entry, item, wanted.module) for entry, item in zip(value, items, strict=False))
    return wanted.name == "Any" or isinstance(value, dict)  # a mapping, or the settings of a class


def _describe(annotation: ast.expr, module: str, *, inside_list: bool = False) -> str:
    texts: list[str] = []
    classes: list[str] = []
    for wanted in _alternatives(annotation, module):
        if wanted.name == "Literal":
            texts.append(f"one of {', '.join(show(literal.value) for literal in wanted.arguments)}")
        elif wanted.name in _SCALARS:
            texts.append(_SCALARS[wanted.name][1])
        elif wanted.name == "class":
            classes.append(f"a {_last_name(wanted.arguments[0])} (a mapping with _target_)")
        elif wanted.name in _MAPPINGS:
            texts.append("a mapping")
        elif wanted.name in _LISTS:
            fixed = wanted.has_fixed_length
            items = wanted.arguments if fixed else wanted.arguments[:1]
            each = set() if inside_list else {_describe(item, wanted.module, inside_list=True) for item in items}
            each = f", each {each.pop()}" if len(each - {""}) == 1 else ""
            texts.append(f"a list of {len(items)} items{each}" if fixed else f"a list of items{each}")
    return " or ".join(dict.fromkeys(texts or classes))
