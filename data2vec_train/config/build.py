"""Objects from configs."""

import functools
import sys
from collections.abc import Mapping

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from data2vec_train.config import resolvers  # noqa: F401
from data2vec_train.config.check.security import nodes_of, target_fault
from data2vec_train.errors import ConfigError
from data2vec_train.system.moved import with_current_names


def build(node: DictConfig | ListConfig | Mapping | None, **supplied: object) -> object:
    """What a config node with `_target_` describes: nested nodes first, plain dicts and lists inside; None for None.

    Args:
        node: One object, or a mapping or list of them. With `_partial_: true` the result is a `functools.partial`.
        **supplied: Arguments that no config can hold (a model, parameters); handed on as they are, never copied.

    Raises:
        ConfigError: The node names something that a config may not call, or Lightning refuses its arguments.
    """
    if node is None:
        return None
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if plain != (renamed := with_current_names(plain)):
        plain = node = renamed
    targets = [value for path, value in nodes_of(plain) if path.split(".")[-1] == "_target_"]
    refused = [fault for target in targets if (fault := target_fault(target))]
    if refused:
        raise ConfigError("; ".join(refused))
    try:
        if "_target_" not in plain:
            return instantiate(node, _convert_="all")
        # Called here and not by hydra, which would copy what is supplied and turn dataclasses into configs. Hydra's own
        # partials judge their target anew at each call, which takes longer than decoding a small image.
        made = instantiate(node, _convert_="all", _partial_=True)
        made = functools.partial(made.func, *made.args, **made.keywords)
        return functools.partial(made, **supplied) if plain.get("_partial_", False) else made(**supplied)
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    except _refusals_of_lightning() as error:  # more GPUs than there are, a strategy that needs one, ...
        raise ConfigError(" ".join(str(error).split())) from error


def _refusals_of_lightning() -> tuple[type[Exception], ...]:
    module = sys.modules.get("lightning.fabric.utilities.exceptions")  # not loaded: then it has refused nothing
    return (module.MisconfigurationException,) if module else ()
