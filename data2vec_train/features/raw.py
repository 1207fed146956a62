"""Raw inputs as features: the baselines of the probes. All functions take (inputs, attention_mask) of a batch."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RAW_INPUT_PX = 32


def raw_pixels(inputs: Tensor, attention_mask: Tensor | None) -> np.ndarray:
    """Images (B, C, H, W) as rows of pixels; sides above 32 px are averaged down, since more pixels add only noise."""
    size = [min(side, RAW_INPUT_PX) for side in inputs.shape[-2:]]
    return F.adaptive_avg_pool2d(inputs, size).flatten(1).numpy()


def log_mel(inputs: Tensor, attention_mask: Tensor | None, *, sample_rate_hz: int) -> np.ndarray:
    """Waveforms (B, S) or (B, C, S) -> (B, F): mean and deviation over time of the log-mel spectrogram."""
    from data2vec_train.data.audio import log_mel_statistics

    full = torch.full((len(inputs),), inputs.shape[-1])
    lengths = full if attention_mask is None else attention_mask.sum(dim=1)
    return log_mel_statistics(inputs, lengths, sample_rate_hz=sample_rate_hz)


def token_counts(inputs: Tensor, attention_mask: Tensor | None, *, vocab_size: int) -> np.ndarray:
    """Ids (B, T) -> (B, F): a bag of tokens."""
    from data2vec_train.data.text import bag_of_tokens

    return bag_of_tokens(inputs, attention_mask, vocab_size=vocab_size)


def time_statistics(inputs: Tensor, attention_mask: Tensor | None) -> np.ndarray:
    """Any time series (B, S) or (B, C, S) -> (B, 2 C): mean and standard deviation of each channel."""
    x = inputs[:, None] if inputs.dim() == 2 else inputs
    real = torch.ones_like(x[:, :1]) if attention_mask is None else attention_mask[:, None].to(x.dtype)
    count = real.sum(dim=2)
    mean = (x * real).sum(dim=2) / count
    deviation = ((x - mean[..., None]).square() * real).sum(dim=2).div(count).sqrt()
    return torch.cat([mean, deviation], dim=1).numpy()
