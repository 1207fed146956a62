"""Models around the encoder of a plugin."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from data2vec_train.encoders.base import EncoderOutput, ModalityEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.heads.losses import classification_loss
from data2vec_train.heads.speech import UtteranceHead
from data2vec_train.system.plugins import load_plugins
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.configs import Data2VecConfig
from data2vec_train.weights.outputs import ModelOutput

# Settings of a modality that do not say how an input is prepared. What `prepare` makes of the files, such as parts of
# long recordings, differs between pretraining and other commands.
_OF_TRAINING = {
    *("encoder", "masker", "corruption", "legacy_teacher_input", "reference_padding", "prepare"),
    *("batch_size_per_device", "batching", "extensions", "column_kind", "pictures", "preprocessing", "probe"),
}
# Encoders of other libraries: imported when a file names them.
WRAPPED = ("data2vec_train.wrapped.hf", "data2vec_train.wrapped.timm")


@dataclass(kw_only=True)
class PluginConfig(Data2VecConfig):
    """`encoder` holds the class, as `_target_`, and its arguments.

    Attributes:
        modality: the name of the modality, and the settings with which the run prepared its inputs; None = unknown.
        classifier_proj_size: width of the projection in a head that classifies.
    """

    model_type: ClassVar[str] = "data2vec_train-plugin"

    modality: dict[str, Any] | None = None
    classifier_proj_size: int = 256

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

    def encoded(self, inputs: Tensor, attention_mask: Tensor | None) -> tuple[EncoderOutput, Tensor | None]:
        """The output of the encoder, and the mask of its tokens, (B, T) bool or None."""
        tokens, mask = self.encoder.embed(inputs, attention_mask)
        return self.encoder.contextualize(tokens, mask), mask

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> ModelOutput | tuple:
        """Inputs (B, ...) and their mask -> `last_hidden_state` (B, T, D) and `prefix` (B, E, D)."""
        output, _ = self.encoded(inputs, attention_mask)
        return self._result(return_dict, ModelOutput(last_hidden_state=output.tokens, prefix=output.prefix))


class Data2VecPluginForSequenceClassification(PretrainedModel):
    """A class for an input of any kind: the mean over projected tokens, then a linear layer, as for speech."""

    config_class = PluginConfig
    base_model_prefix = "data2vec_plugin"
    main_input_name = "inputs"
    heads = ("projector", "classifier")

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self.data2vec_plugin = Data2VecPluginModel(config)
        self.head = UtteranceHead(
            dim=self.get_encoder().dim, projection_dim=config.classifier_proj_size, num_labels=config.num_labels
        )

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple:
        """`logits` (B, C), and with labels (B,) the `loss`, cross entropy."""
        output, mask = self.data2vec_plugin.encoded(inputs, attention_mask)
        logits = self.head(output.tokens, mask)
        kind = "single_label_classification"
        loss = None if labels is None else classification_loss(logits, labels, problem_type=kind)
        return self._result(return_dict, ModelOutput(loss=loss, logits=logits))


def preparation_of(modality: Mapping[str, Any]) -> dict[str, Any]:
    """The name of a modality and its settings that say how inputs are prepared; those of training are left out."""
    settings = {name: value for name, value in modality.items() if name not in _OF_TRAINING}
    return {"name": settings.pop("name"), **_without_places(settings)}


def _without_places(settings: Any) -> Any:
    """The settings without folders of this machine."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: _without_places(value) for name, value in settings.items() if not name.endswith("cache_dir")}


def encoder_class(target: str) -> Any:
    """The class that a file names; only plugins that the user named are imported, so that a file cannot make code run.

    Raises:
        ConfigError: it is neither imported nor part of a plugin, or not an encoder.
    """
    module, _, name = target.rpartition(".")
    if module in WRAPPED:
        importlib.import_module(module)
    elif module not in sys.modules:
        load_plugins()
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, ModalityEncoder)):
        raise ConfigError(
            f"the encoder {target or '(none)'} is not loaded; import {module or 'its module'} first, or name it in "
            "DATA2VEC_PLUGINS"
        )
    return found
