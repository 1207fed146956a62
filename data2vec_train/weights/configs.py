"""Configurations of Hugging Face's Data2Vec models: the same names, defaults and files.

Fields are those of transformers 5.23 (TRANSFORMERS.md 2). Other entries of a config.json are kept and written back.
Four fields are ours:

    encoder          arguments of our encoder, for models that the other fields cannot describe (data2vec 2.0)
    attn_implementation, hf_compat, keep_mask_token      how to run the model; never written
"""

import functools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from data2vec_train.errors import ConfigError
from data2vec_train.weights.checks import check_values
from data2vec_train.weights.files import read_json, write_json

CONFIG_NAME = "config.json"


@dataclass(kw_only=True)
class Data2VecConfig:
    """Base of the three configs.

    Attributes:
        hf_compat: behave as transformers 5.23 even where that is wrong or surprising; each place says what it changes.
        keep_mask_token: whether the encoder has a vector for hidden tokens; None = as the config's other fields say.
    """

    model_type: ClassVar[str]

    num_labels: int = 2
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    return_dict: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    chunk_size_feed_forward: int = 0  # saves memory in transformers; results do not depend on it
    architectures: list[str] | None = None
    dtype: str | None = None
    encoder: dict[str, Any] | None = None
    attn_implementation: str = "sdpa"
    hf_compat: bool = False
    keep_mask_token: bool | None = None
    unknown: dict[str, Any] = field(default_factory=dict)  # other entries of the file

    def __post_init__(self) -> None:
        self.check()
        if self.id2label is not None:
            self.id2label = _numbered(self.id2label)
            self.num_labels = len(self.id2label)
        else:
            self.id2label = {number: f"LABEL_{number}" for number in range(self.num_labels)}
        if self.label2id is None or len(self.label2id) != self.num_labels:
            self.label2id = {name: number for number, name in self.id2label.items()}

    def check(self) -> None:
        """Check every field, before anything is built from the config.

        Raises:
            ConfigError: a value of another type, or one that no model can have.
        """
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        check_values(values, _hints(type(self)), type(self).__name__)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Data2VecConfig":
        """A config from the content of a config.json.

        Raises:
            ConfigError: it is of another model type.
        """
        found = content.get("model_type", cls.model_type)
        if found not in (cls.model_type, cls.own_type()):
            raise ConfigError(f"a config of model type {found!r}; {cls.__name__} reads {cls.model_type!r}")
        known = {setting.name for setting in fields(cls)} - _RUN_TIME
        given = {name: value for name, value in content.items() if name in known}
        skipped = {"model_type", "torch_dtype", *known}
        if "dtype" not in given and content.get("torch_dtype"):
            given["dtype"] = content["torch_dtype"]
        rest = {name: value for name, value in content.items() if name not in skipped}
        if "num_labels" in given and "id2label" not in given:
            given.pop("label2id", None)
        return cls(**given, unknown=rest)

    @classmethod
    def own_type(cls) -> str:
        """The model type of files that transformers cannot read."""
        return cls.model_type.replace("data2vec", "data2vec_train")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> "Data2VecConfig":
        """The config in `folder`/config.json, with `changes` to its fields.

        Raises:
            ConfigError: there is none, it cannot be read, or a change names an unknown field.
        """
        content = read_config(folder)
        unknown = set(changes) - {setting.name for setting in fields(cls)}
        if unknown:
            raise ConfigError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
        run_time = {name: changes.pop(name) for name in _RUN_TIME & set(changes)}
        if "num_labels" in changes and "id2label" not in changes:
            content = {name: value for name, value in content.items() if name not in ("id2label", "label2id")}
        try:
            config = cls.from_dict(content | changes)
        except ConfigError as error:
            raise ConfigError(f"{Path(folder) / CONFIG_NAME}: {error}") from error
        for name, value in run_time.items():
            setattr(config, name, value)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json."""
        content = {
            setting.name: getattr(self, setting.name) for setting in fields(self) if setting.name not in _RUN_TIME
        }
        if self.encoder is None:
            del content["encoder"]
        del content["num_labels"]  # follows from id2label
        content["id2label"] = {str(number): name for number, name in self.id2label.items()}
        return {"model_type": self.model_type if self.encoder is None else self.own_type()} | self.unknown | content

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/config.json."""
        write_json(Path(folder) / CONFIG_NAME, dict(sorted(self.to_dict().items())))


@functools.cache
def _hints(kind: type[Data2VecConfig]) -> dict[str, Any]:
    return get_type_hints(kind)


def _numbered(names: dict[Any, Any]) -> dict[int, str]:
    """Class names by number, from a JSON object, whose keys are texts.

    Raises:
        ConfigError: the numbers are not 0 to n - 1, or a name is not a text.
    """
    numbers = {str(number): number for number in range(len(names))}
    if {str(key) for key in names} != set(numbers) or not all(isinstance(name, (str, int)) for name in names.values()):
        raise ConfigError(f"id2label must name the classes 0 to n - 1, each by a text; got {str(names)[:60]}")
    return {numbers[str(key)]: name for key, name in names.items()}


_RUN_TIME = {"attn_implementation", "hf_compat", "keep_mask_token", "unknown"}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of `folder`/config.json.

    Raises:
        ConfigError: there is none, or it is not a JSON object.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} has no {CONFIG_NAME}; expected a folder that save_pretrained wrote")
    return read_json(path)


@dataclass(kw_only=True)
class Data2VecAudioConfig(Data2VecConfig):
    """Speech models. `num_conv_pos_embeddings` is the number of positional convolutions, whatever its name says."""

    model_type: ClassVar[str] = "data2vec-audio"

    vocab_size: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    layerdrop: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    feat_extract_activation: str = "gelu"
    conv_dim: list[int] = field(default_factory=lambda: [512] * 7)
    conv_stride: list[int] = field(default_factory=lambda: [5, 2, 2, 2, 2, 2, 2])
    conv_kernel: list[int] = field(default_factory=lambda: [10, 3, 3, 3, 3, 2, 2])
    conv_bias: bool = False
    num_conv_pos_embedding_groups: int = 16
    conv_pos_kernel_size: int = 19
    num_conv_pos_embeddings: int = 5
    num_feat_extract_layers: int | None = None
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    tdnn_dim: list[int] = field(default_factory=lambda: [512, 512, 512, 512, 1500])
    tdnn_kernel: list[int] = field(default_factory=lambda: [5, 3, 3, 1, 1])
    tdnn_dilation: list[int] = field(default_factory=lambda: [1, 2, 3, 1, 1])
    xvector_output_dim: int = 512
    pad_token_id: int = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    add_adapter: bool = False
    adapter_kernel_size: int = 3
    adapter_stride: int = 2
    num_adapter_layers: int = 3
    output_hidden_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_hidden_size is None:
            self.output_hidden_size = self.hidden_size
        self.num_feat_extract_layers = len(self.conv_dim)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples from one frame to the next."""
        ratio = 1
        for stride in self.conv_stride:
            ratio *= stride
        return ratio


@dataclass(kw_only=True)
class Data2VecTextConfig(Data2VecConfig):
    """Text models. The defaults are BERT's; the released model has the values in `RELEASED`."""

    model_type: ClassVar[str] = "data2vec-text"
    RELEASED: ClassVar[dict[str, Any]] = {
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True


@dataclass(kw_only=True)
class Data2VecVisionConfig(Data2VecConfig):
    """Image models. Released pretrained ones have a shared bias and no mean pooling, fine-tuned ones the opposite."""

    model_type: ClassVar[str] = "data2vec-vision"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | list[int] = 224
    patch_size: int | list[int] = 16
    num_channels: int = 3
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    out_indices: list[int] = field(default_factory=lambda: [3, 5, 7, 11])
    pool_scales: list[int] = field(default_factory=lambda: [1, 2, 3, 6])
    use_auxiliary_head: bool = True
    auxiliary_loss_weight: float = 0.4
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    semantic_loss_ignore_index: int = 255


CONFIGS: tuple[type[Data2VecConfig], ...] = (Data2VecAudioConfig, Data2VecTextConfig, Data2VecVisionConfig)


def config_class_of(
    content: dict[str, Any], classes: tuple[type[Data2VecConfig], ...] = CONFIGS
) -> type[Data2VecConfig]:
    """The config class for the content of a config.json.

    Raises:
        ConfigError: it belongs to another kind of model.
    """
    found = content.get("model_type")
    for kind in classes:
        if found in (kind.model_type, kind.own_type()):
            return kind
    known = ", ".join(kind.model_type for kind in classes)
    raise ConfigError(f"a model of type {found!r}; expected one of {known}")
