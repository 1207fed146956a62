"""Base of the fifteen Hugging Face classes: reading and writing files, and the settings of a model.

A model is one of our encoders under `encoder`, with heads beside it. Its tensors have our names in memory and Hugging
Face's in files; `names` is the table between the two.
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from data2vec_train.encoders.backends import NAMES
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.encoders.transformer import ForwardContext, Transformer
from data2vec_train.errors import ConfigError
from data2vec_train.weights.checks import check_size
from data2vec_train.weights.configs import Data2VecConfig
from data2vec_train.weights.names import to_theirs
from data2vec_train.weights.outputs import ModelOutput
from data2vec_train.weights.weights import SAFETENSORS_NAME, LoadReport, put_into, read_tensors, weights_file

log = logging.getLogger(__name__)

Layers = bool | int | list[int]  # which hidden states to return

# Present in some released files; unused, since they can be computed or are all zero.
COMPUTED = ("relative_position_index", "embeddings.position_ids", "embeddings.token_type_ids")


class PretrainedModel(nn.Module):
    """Base of all fifteen classes.

    Args:
        config: of the model. `config.attn_implementation` chooses the attention backend.
    """

    config_class: ClassVar[type[Data2VecConfig]]
    base_model_prefix: ClassVar[str]
    main_input_name: ClassVar[str]
    # Prefixes of Hugging Face names that a file of another class of the family may lack, or have in excess.
    heads: ClassVar[tuple[str, ...]]

    def __init__(self, config: Data2VecConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got {type(config).__name__}"
            )
        config.check()
        _check_backend(config.attn_implementation)
        self.config = config
        self.source: Path | None = None  # folder with preprocessing files
        self.preparation: tuple[Any, ...] = ()  # or preprocessors, for weights that come without such files

    # -----------------------------------------------------------------------------------------------------------------
    # Parts

    @property
    def base_model(self) -> "PretrainedModel":
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters; tied tensors count once."""
        return sum(
            parameter.numel() for parameter in self.parameters() if parameter.requires_grad or not only_trainable
        )

    def get_encoder(self) -> ModalityEncoder:
        """The encoder."""
        return self.base_model.encoder

    def freeze_base_model(self) -> None:
        """Freeze the base model, so that only the head is trained."""
        self.base_model.requires_grad_(False)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        The argument exists for compatibility with transformers; recomputation is always non-reentrant.
        """
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self._set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.get_encoder().transformer.activation_checkpointing

    def _set_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = on

    def set_attn_implementation(self, name: str) -> None:
        """Change the attention backend of all blocks.

        Raises:
            ConfigError: it does not exist.
        """
        _check_backend(name)
        for module in self.modules():
            if isinstance(module, Transformer):
                module.backend = name
        self.config.attn_implementation = name

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns inputs into tokens."""
        return self.get_encoder().embedder

    def tie_weights(self) -> None:
        """Tie the tensors that the config declares as tied; most models have none."""

    def init_weights(self) -> None:
        """Fresh weights as transformers draws them (TRANSFORMERS.md 3)."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx : module.padding_idx + 1].data)

    # -----------------------------------------------------------------------------------------------------------------
    # Names

    def encoder_names(self) -> dict[str, str]:
        """{Hugging Face's name: ours, relative to the encoder}.

        Raises:
            KeyError: the encoder has tensors that Hugging Face's models have no place for.
        """
        raise NotImplementedError

    def names(self, *, own: bool | None = None) -> dict[str, str]:
        """{name in files: name in `state_dict`} of every tensor.

        Files of models that transformers cannot build (`config.encoder` is set) have our names; `own` overrides this.
        """
        own = self.config.encoder is not None if own is None else own
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        inside = f"{prefix}encoder."
        rest = [name for name in self.state_dict() if not name.startswith(inside)]
        if own:
            encoder = {inside + name: inside + name for name in self.get_encoder().state_dict()}
        else:
            encoder = {prefix + theirs: inside + ours for theirs, ours in self.base_model.encoder_names().items()}
        return encoder | {name.removeprefix("head."): name for name in rest}

    # -----------------------------------------------------------------------------------------------------------------
    # Files

    @classmethod
    def from_config(cls, config: Data2VecConfig, **run_time: Any) -> Self:
        """A model with fresh weights; `run_time` may set `attn_implementation`, `hf_compat`, `dtype`."""
        dtype = run_time.pop("dtype", None)
        config = copy.deepcopy(config)
        for name, value in run_time.items():
            setattr(config, name, value)
        model = cls(config)
        return model if dtype is None else model.to(_dtype_of(dtype))

    _from_config = from_config

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: Data2VecConfig | None = None,
        attn_implementation: str | None = None,
        dtype: torch.dtype | str | None = "auto",
        device_map: str | int | torch.device | dict | None = None,
        hf_compat: bool = False,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **changes: Any,
    ) -> Self:
        """The model in a folder that `save_pretrained` wrote, ours or transformers'; in evaluation mode.

        The file may be of another class of the family: parts of the head that it lacks are newly initialised, those
        that this class does not have are left out, and the log names both. A file of this class has to be complete.

        Args:
            path: the folder.
            config: replaces the folder's.
            attn_implementation: attention backend.
            dtype: of the weights; "auto" = as in the file.
            device_map: "auto" = the first GPU if there is one, else the CPU; or a device, or {"": device}.
            hf_compat: see `Data2VecConfig`.
            ignore_mismatched_sizes: tensors of the head may have another shape; they are then newly initialised.
            output_loading_info: return (model, `LoadReport`).
            **changes: to fields of the config, such as `num_labels`.

        Raises:
            ConfigError: there is no such model, or a setting is not supported.
            WeightMismatch: tensors are missing, in excess, or of another shape.
        """
        dtype = changes.pop("torch_dtype", dtype)  # its name in transformers 4
        tensors = {name: tensor for name, tensor in read_tensors(path).items() if not name.endswith(COMPUTED)}
        if config is None:
            config = cls.config_class.from_pretrained(path, **changes)
        elif changes:
            raise ConfigError(f"both a config and changes to it were given: {', '.join(changes)}")
        config = copy.deepcopy(config)
        config.hf_compat = hf_compat
        config.attn_implementation = attn_implementation or config.attn_implementation
        cls._adapt(config, {name.removeprefix(f"{cls.base_model_prefix}.") for name in tensors})
        model, report = cls.from_tensors(
            config, tensors, where=str(weights_file(path)), ignore_mismatched_sizes=ignore_mismatched_sizes
        )
        model.source = Path(path)
        chosen = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
        chosen = chosen if dtype == "auto" else dtype
        model = model.placed(dtype=chosen, device_map=device_map).eval()
        if report.fresh or report.left_out:
            log.warning("%s from %s: %s", cls.__name__, path, report)
        return (model, report) if output_loading_info else model

    def placed(
        self,
        *,
        dtype: torch.dtype | str | None = "auto",
        device_map: str | int | torch.device | dict | None = None,
        attn_implementation: str | None = None,
        hf_compat: bool = False,
    ) -> Self:
        """The model with another dtype, device or attention backend; see `from_pretrained`.

        Raises:
            ConfigError: a setting is not supported; `hf_compat`, which a built model cannot change.
        """
        if hf_compat:
            raise ConfigError("hf_compat is for folders: save the model with save_pretrained, and load that folder")
        if attn_implementation is not None:
            self.set_attn_implementation(attn_implementation)
        placed = self.to(device=_device_of(device_map), dtype=None if dtype in (None, "auto") else _dtype_of(dtype))
        beyond = next((name for name, parameter in placed.named_parameters() if not parameter.isfinite().all()), None)
        if beyond is not None:
            raise ConfigError(f"dtype={dtype}: {beyond} holds numbers that are too large for it; choose float32")
        return placed

    @classmethod
    def from_tensors(
        cls,
        config: Data2VecConfig,
        tensors: dict[str, Tensor],
        *,
        where: str,
        ignore_mismatched_sizes: bool = False,
    ) -> tuple[Self, LoadReport]:
        """A model of this class with these tensors, by their names in files."""
        check_size(lambda: cls._build(config, tensors), tensors, where)
        model = cls._build(config, tensors)
        names = model.names()
        prefix = f"{cls.base_model_prefix}."
        has_prefix = any(name.startswith(prefix) for name in tensors)
        if model.base_model is model and has_prefix:
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        elif model.base_model is not model and not has_prefix:
            tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        # Tied tensors are written once, but old files hold them twice.
        for name, other in model.aliases().items():
            if other in tensors:
                tensors.setdefault(name, tensors[other])
        loose = tuple(prefix + head for head in cls.heads) + cls.heads
        # A file of this class has to have all of its tensors and no others.
        own = config.architectures == [cls.__name__]
        report = put_into(
            model,
            names,
            tensors,
            where=where,
            fresh=loose if ignore_mismatched_sizes or not own else (),
            left_out=() if own else loose,
            reshape_fresh=ignore_mismatched_sizes,
        )
        model.tie_weights()
        return model, report

    @classmethod
    def _build(cls, config: Data2VecConfig, tensors: dict[str, Tensor]) -> Self:
        """A model that fits these tensors."""
        return cls(config)

    @classmethod
    def _adapt(cls, config: Data2VecConfig, names: set[str]) -> None:
        """Set fields of the config that follow from the file's tensors and that transformers' configs lack."""

    def aliases(self) -> dict[str, str]:
        """{name in files: the name under which the same tensor is written}."""
        return {}

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write model.safetensors and config.json, which transformers reads too unless `config.encoder` is set.

        Args:
            folder: created if it does not exist.
            state_dict: tensors to write instead of the model's own.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = to_theirs(self.names(), self.state_dict() if state_dict is None else state_dict)
        written = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if name not in self.aliases()
        }
        places: set[int] = set()  # an encoder of a plugin may hold a tensor under two names, the format may not
        for name, tensor in written.items():
            place = tensor.untyped_storage().data_ptr()
            written[name] = tensor.clone() if place in places else tensor
            places.add(place)
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        partial = folder / f"{SAFETENSORS_NAME}.partial"
        save_file(written, partial, metadata={"format": "pt"})
        partial.replace(folder / SAFETENSORS_NAME)
        self.config.save_pretrained(folder)

    # -----------------------------------------------------------------------------------------------------------------
    # Forward

    def _forward_context(
        self, output_attentions: bool | None, output_hidden_states: Layers | None, **more: Any
    ) -> ForwardContext:
        """What the forward pass collects; None = as set in the config."""
        config = self.config
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return ForwardContext(
            keep_attentions=config.output_attentions if output_attentions is None else output_attentions,
            keep_hidden_states=wanted is not False,
            # transformers keeps no hidden state of a block that layer drop skips, so that it averages fewer layers than
            # it has weights for and fails (TRANSFORMERS.md, fault 5).
            omit_dropped=config.hf_compat,
            **more,
        )

    def _result(self, return_dict: bool | None, output: ModelOutput) -> ModelOutput | tuple:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def hidden_states_of(context: ForwardContext, wanted: Layers | None) -> tuple[Tensor | None, ...] | None:
    """The first block's input and every block's output, (B, S, D) each; None if they were not collected."""
    return choose_layers(context.hidden_states, wanted) if context.keep_hidden_states else None


def choose_layers(layers: Sequence[Tensor], wanted: Layers | None) -> tuple[Tensor | None, ...] | None:
    """All layers; with numbers, the other layers are replaced by None (-1 is the last). None for False."""
    if wanted is False:
        return None
    if wanted is None or wanted is True:
        return tuple(layers)
    chosen = {index % len(layers) for index in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(layer if index in chosen else None for index, layer in enumerate(layers))


def attentions_of(context: ForwardContext) -> tuple[Tensor, ...] | None:
    """Attention weights of every block, (B, H, Q, S) each; None if they were not collected."""
    return tuple(context.attentions) if context.keep_attentions else None


def _check_backend(name: str) -> None:
    if name not in (*NAMES, "auto"):
        raise ConfigError(f"attn_implementation={name!r} does not exist; choose one of {', '.join(NAMES)}, auto")


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"dtype={dtype!r} is not a floating-point type; expected float32, bfloat16, float16 or 'auto'"
        )
    return found


def _device_of(device_map: str | int | torch.device | dict | None) -> torch.device:
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ConfigError(f"device_map={device_map}: a model is never split; expected {{'': device}}")
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except RuntimeError as error:
        raise ConfigError(
            f"device_map={device_map!r} is not a device; expected 'auto' or a device such as 'cuda:0'"
        ) from error
