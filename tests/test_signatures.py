"""Signatures and annotations read from a file are those that Python sees."""

import ast
import importlib
import inspect

import pytest

from data2vec_train.config.check.schema import Parameter, find, mismatch, signature


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.AdamW",
        "torch.optim.SGD",
        "torch.optim.lr_scheduler.OneCycleLR",
        "torchvision.transforms.v2.RandomResizedCrop",
        "torchvision.transforms.v2.RandomHorizontalFlip",
        "torchvision.datasets.CIFAR10",
    ],
)
def test_a_signature_read_from_a_file_is_the_one_python_sees(target):
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    read = signature(find(target))
    assert {key: parameter.required for key, parameter in read.parameters.items()} == {
        parameter.name: parameter.default is parameter.empty
        for parameter in real
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    assert read.is_open == any(parameter.kind is parameter.VAR_KEYWORD for parameter in real)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("int", 3, None),
        ("int", True, "a whole number"),
        ("int", 3.0, "a whole number (3)"),
        ("float | None", None, None),
        ("Optional[float]", "x", "a number or null"),
        ("Union[int, Literal['auto']]", "auto", None),
        ("Union[int, Literal['auto']]", "a", "a whole number or one of 'auto'"),
        ("'str'", 3, "text"),
        ("list[int]", [1, "x"], "a list of items, each a whole number"),
        ("tuple[float, float]", [1], "a list of 2 items, each a number"),
        ("tuple[float, ...]", [1, 2, 3], None),
        ("dict[str, int]", [1], "a mapping"),
        ("float | Parameter", {"_target_": "x"}, None),
        ("Parameter", 3, "a Parameter (a mapping with _target_)"),
        ("Unknown", 3, None),
    ],
)
def test_a_value_that_does_not_fit_its_annotation_is_told_what_was_expected(annotation, value, expected):
    node = ast.parse(annotation, mode="eval").body
    assert mismatch(value, Parameter(node, True, False, "data2vec_train.config.check.schema")) == expected
