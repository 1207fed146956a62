"""Features of recordings, images and texts as arrays, from trained weights; without Hydra and Lightning.

Letters as in `encoders.base`. Layer 0 is the input of the first block, layer n the output of block n.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.encoders.transformer import ForwardContext
from data2vec_train.errors import BadSample, ConfigError
from data2vec_train.weights.convert import load_pretrained
from data2vec_train.weights.plugin import PluginConfig

Pooling = Literal["mean", "mean_std", "none"]


@torch.no_grad()
def layer_tokens(
    encoder: ModalityEncoder, inputs: Tensor, attention_mask: Tensor | None, layers: Sequence[int]
) -> tuple[list[Tensor], Tensor | None]:
    """Tokens of `layers`, (B, T, D) float32 each, without class token; and their mask (B, T) or None.

    The last layer is the output of the encoder, including its final norm, if it has one.

    Raises:
        ConfigError: the encoder of a plugin does not give such a layer: without the argument `context` it gives the
            outputs of the blocks that can be targets.
    """
    tokens, mask = encoder.embed(inputs, attention_mask)
    depth, prefix = encoder.depth, encoder.num_prefix_tokens
    if _takes_context(encoder):
        context = ForwardContext(keep_hidden_states=True)
        last = encoder.contextualize(tokens, mask, context=context).tokens
        inner = {number: layer[:, prefix:] for number, layer in enumerate(context.hidden_states)}
    else:
        count = depth - encoder.prenet_depth
        output = encoder.contextualize(tokens, mask, target_layer="block", top_k_layers=count)
        last, inner = output.tokens, dict(zip(range(depth - count + 1, depth + 1), output.layers, strict=True))
    absent = next((layer for layer in layers if layer != depth and layer not in inner), None)
    if absent is not None:
        raise ConfigError(
            f"layers={absent}: {type(encoder).__name__}.contextualize takes no context, and so gives layers "
            f"{encoder.prenet_depth + 1} to {depth}"
        )
    return [(last if layer == depth else inner[layer]).float() for layer in layers], mask


def _takes_context(encoder: ModalityEncoder) -> bool:
    """Whether the encoder hands a `ForwardContext` on to its transformer, as all of this package do."""
    found = inspect.signature(encoder.contextualize).parameters.values()
    return any(parameter.name == "context" or parameter.kind is parameter.VAR_KEYWORD for parameter in found)


def pool(tokens: Tensor, mask: Tensor | None, pooling: Literal["mean", "mean_std"]) -> Tensor:
    """Tokens (B, T, D) -> their mean (B, D), or mean and standard deviation (B, 2 D); padding is left out."""
    real = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
    weight = (real / real.sum(dim=1, keepdim=True))[..., None]  # (B, T, 1)
    mean = (tokens * weight).sum(dim=1)
    if pooling == "mean":
        return mean
    deviation = ((tokens - mean[:, None]).square() * weight).sum(dim=1).sqrt()
    return torch.cat([mean, deviation], dim=1)


def layer_numbers(layers: Literal["last", "all"] | int | Sequence[int], depth: int) -> list[int]:
    """Numbers of layers from 0 to `depth`; negative ones count from the end.

    Raises:
        ConfigError: there is no such layer.
    """
    wanted = {"last": [depth], "all": list(range(depth + 1))}.get(layers) if isinstance(layers, str) else layers
    wanted = [wanted] if isinstance(wanted, int) else wanted
    if not wanted or any(not -depth - 1 <= number <= depth for number in wanted):
        raise ConfigError(f"layers={layers}: expected last, all, or numbers from 0 to {depth}")
    return [number % (depth + 1) for number in wanted]


@dataclass(frozen=True)
class Embedder:
    """Features of prepared inputs.

    Attributes:
        encoder: in evaluation mode.
        layers: numbers of the layers.
        pooling: "mean" or "mean_std" over the tokens, "none" = every token.
        pad_value: appended to shorter inputs.
        budget: largest size of a padded batch, in units of the inputs' last axis.
        max_batch: most inputs in a batch.
    """

    encoder: ModalityEncoder
    layers: tuple[int, ...]
    pooling: Pooling
    pad_value: float = 0.0
    budget: int = 960_000
    max_batch: int = 64

    def __call__(self, inputs: Sequence[Tensor]) -> list[list[np.ndarray]]:
        """For each input the features of each layer, (D,), (2 D,) or (T, D) float32.

        Inputs are batched by length, so the batch of an input depends on the list; its features depend on the batch
        only by rounding.
        """
        found: list[list[np.ndarray]] = [[] for _ in inputs]
        for rows in self._batches([tensor.shape[-1] for tensor in inputs]):
            batch, mask = self._stack([inputs[row] for row in rows])
            device = next(self.encoder.parameters()).device
            moved = None if mask is None else mask.to(device)
            layers, token_mask = layer_tokens(self.encoder, batch.to(device), moved, self.layers)
            counts = None if token_mask is None else token_mask.sum(dim=1).tolist()
            for tokens in layers:
                if self.pooling == "none":
                    arrays = tokens.cpu().numpy()
                    for place, row in enumerate(rows):
                        found[row].append(arrays[place] if counts is None else arrays[place, : counts[place]])
                else:
                    for row, vector in zip(rows, pool(tokens, token_mask, self.pooling).cpu().numpy(), strict=True):
                        found[row].append(vector)
        return found

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for row in np.argsort(lengths, kind="stable"):
            if batch and (len(batch) == self.max_batch or (len(batch) + 1) * lengths[row] > self.budget):
                yield batch
                batch = []
            batch.append(int(row))
        if batch:
            yield batch

    def _stack(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        sizes = torch.tensor([tensor.shape[-1] for tensor in inputs])
        longest = int(sizes.max())
        if bool((sizes == longest).all()):
            return torch.stack(list(inputs)), None
        stacked = inputs[0].new_full((len(inputs), *inputs[0].shape[:-1], longest), self.pad_value)
        for row, tensor in zip(stacked, inputs, strict=True):
            row[..., : tensor.shape[-1]] = tensor
        return stacked, torch.arange(longest) < sizes[:, None]


def embed_inputs(
    path: str | Path,
    inputs: Sequence[Any],
    *,
    layers: Literal["last", "all"] | int | Sequence[int] = "last",
    pooling: Pooling = "mean",
    device: str = "cpu",
) -> list[list[np.ndarray]]:
    """Features of files, arrays or texts from trained weights; `python -m data2vec_train.embed` as a Python call.

    Args:
        path: anything that `load_pretrained` reads, with its preprocessor or tokenizer beside it.
        inputs: recordings (files, or waveforms (S,) at the model's rate), images (files, or 8-bit arrays (H, W, C)),
            or texts, which are cut to the number of positions of the encoder.
        layers: "last", "all", or numbers.
        pooling: see `Embedder`.
        device: where to compute.

    Returns:
        For each input a list with the features of each layer: (D,), with "mean_std" (2 D,), with "none" (T, D).

    Raises:
        ConfigError: the weights cannot be read, or the preparation of inputs is unknown.
        BadSample: an input cannot be used.
    """
    from data2vec_train.encoders.spectrogram import SpectrogramEncoder
    from data2vec_train.encoders.text import TextEncoder
    from data2vec_train.encoders.waveform import WaveformEncoder, multiply_convolutions

    model = load_pretrained(path)
    multiply_convolutions(model)
    encoder = model.get_encoder().to(device).eval()
    numbers = tuple(layer_numbers(layers, encoder.depth))
    if isinstance(encoder, TextEncoder):
        from data2vec_train.weights.tokenizers import TextTokenizer

        if model.source is None:
            raise ConfigError(f"{path} has no tokenizer beside it")
        tokenizer = TextTokenizer.from_pretrained(model.source)
        tokenizer.check_fits(model.config)
        # Without the token that ends a text, as in pretraining and in the embed command.
        found = [tokenizer.beginning(text, encoder.max_tokens) for text in _texts(inputs)]
        tensors = [torch.tensor(ids) for ids in found]
        return Embedder(encoder, numbers, pooling, pad_value=tokenizer.pad_token_id, budget=16_384)(tensors)
    if isinstance(model.config, PluginConfig):
        raise ConfigError(f"{path} has an encoder of a plugin, whose inputs data2vec_train.embed prepares")
    source = model.source
    if isinstance(encoder, SpectrogramEncoder):
        from data2vec_train.data.audio import decode_audio
        from data2vec_train.weights.sound import SpectrogramExtractor

        described = SpectrogramExtractor
        how = described.from_pretrained(source) if source is not None else _prepared_by(model, described, path)
        transform = how.transform()
        options = {"sample_rate_hz": how.sampling_rate, "channels": 1, "min_seconds": 0.0}
        options |= {"min_level": 0.0, "max_level": float("inf")}
        decoded = (_decoded(decode_audio, value, number, options) for number, value in enumerate(inputs))
        return Embedder(encoder, numbers, pooling)([transform.evaluate(wave) for wave in decoded])
    if isinstance(encoder, WaveformEncoder):
        from data2vec_train.data.audio import AudioTransform, decode_audio
        from data2vec_train.weights.preprocessing import AudioFeatureExtractor as Described

        how = Described.from_pretrained(source) if source is not None else _prepared_by(model, Described, path)
        rate = how.sampling_rate
        transform = AudioTransform(normalise=how.do_normalize, sample_rate_hz=rate, max_seconds=float("1e9"))
        options = {"sample_rate_hz": rate, "channels": encoder.channels, "min_seconds": 0.0}
        options |= {"min_level": 0.0, "max_level": float("inf")}
        waves = [transform.train(_decoded(decode_audio, value, number, options)) for number, value in enumerate(inputs)]
        return Embedder(encoder, numbers, pooling)(waves)
    from data2vec_train.data.image import ImageTransform, decode_image
    from data2vec_train.weights.preprocessing import ImageProcessor

    how = ImageProcessor.from_pretrained(source) if source is not None else _prepared_by(model, ImageProcessor, path)
    channels = encoder.embedder.project.in_channels
    plain = {"crop_scale": None, "crop_ratio": None, "shift_px": 0, "horizontal_flip": 0.0, "color_jitter": None}
    transform = ImageTransform(
        image_px=encoder.image_size,
        channels=channels,
        interpolation="bicubic",
        mean=how.image_mean or [0.0],
        std=how.image_std or [1.0],
        fit=how.fit,
        **plain,
    )
    options = {"channels": channels, "max_pixels": 89_478_485, **how.notes}
    tensors = [
        transform.evaluate(_decoded(decode_image, value, number, options)) for number, value in enumerate(inputs)
    ]
    return Embedder(encoder, numbers, pooling)(tensors)


def _decoded(decode: Callable[..., np.ndarray], value: Any, number: int, options: Mapping[str, Any]) -> np.ndarray:
    try:
        return decode(Path(value).expanduser() if isinstance(value, str) else value, **options)
    except BadSample as error:
        raise BadSample(f"{value if isinstance(value, (str, Path)) else f'input {number}'}: {error}") from error


def _texts(inputs: Sequence[Any]) -> list[str]:
    wrong = next((value for value in inputs if not isinstance(value, str)), None)
    if wrong is not None:
        raise BadSample(f"{type(wrong).__name__}, not a text")
    return list(inputs)


def _prepared_by(model: Any, kind: type, path: str | Path) -> Any:
    found = next((candidate for candidate in model.preparation if isinstance(candidate, kind)), None)
    if found is None:
        raise ConfigError(f"{path} has no preprocessor_config.json beside it, which is needed to prepare inputs")
    return found
