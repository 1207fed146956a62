"""A model around the encoder of a plugin."""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.configs import Data2VecConfig
from data2vec_train.weights.outputs import ModelOutput


@dataclass(kw_only=True)
class PluginConfig(Data2VecConfig):
    """`encoder` holds the class, as `_target_`, and its arguments."""

    model_type: ClassVar[str] = "data2vec_train-plugin"

    @classmethod
    def own_type(cls) -> str:
        """The model type itself: transformers can read none of these files."""
        return cls.model_type


class Data2VecPluginModel(PretrainedModel):
    """Inputs of any kind that the encoder takes, to features."""

    config_class = PluginConfig
    base_model_prefix = "data2vec_plugin"
    main_input_name = "inputs"
    heads = ()

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        arguments = dict(config.encoder or {})
        self.encoder = encoder_class(arguments.pop("_target_", ""))(**arguments)

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> ModelOutput | tuple:
        """Inputs (B, ...) and their mask -> `last_hidden_state` (B, T, D) and `prefix` (B, E, D)."""
        encoded = self.encoder(inputs, attention_mask)
        return self._result(return_dict, ModelOutput(last_hidden_state=encoded.tokens, prefix=encoded.prefix))


def encoder_class(target: str) -> Any:
    """The class that a file names; it has to be imported already, so that a file cannot make code run.

    Raises:
        ConfigError: it is not imported, or not an encoder.
    """
    module, _, name = target.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, ModalityEncoder)):
        raise ConfigError(
            f"the encoder {target or '(none)'} is not loaded; import {module or 'its module'} first, or name it in "
            "DATA2VEC_PLUGINS"
        )
    return found
