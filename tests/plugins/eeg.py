"""EEG, .npy of (19, samples): DATA2VEC_PLUGINS=eeg python -m data2vec_train modality=eeg data=folder data.path=DIR"""

from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from torch import nn

from data2vec_train.encoders.base import EncoderOutput, ModalityEncoder, apply_mask
from data2vec_train.encoders.positions import ConvPositions
from data2vec_train.encoders.transformer import Transformer
from data2vec_train.errors import BadSample

BLOCK = {"norm_first": False, "norm_eps": 1e-5, "qkv_bias": "qkv", "layer_scale": None, "dropout": 0.0}
BLOCK |= {"attention_dropout": 0.0, "activation_dropout": 0.0, "drop_path": 0.0, "layer_drop": 0.0}


@dataclass(frozen=True)
class Windows:
    samples: int

    def __call__(self, length: int) -> int:
        return length // self.samples


class EEGEncoder(ModalityEncoder):
    """Windows of `window` samples over all channels are tokens."""

    def __init__(self, *, channels, window, dim, depth, num_heads, ffn_dim, attention) -> None:
        super().__init__()
        self.dim, self.depth, self.prenet_depth, self.num_prefix_tokens, self.grid = dim, depth, 0, 0, None
        self.window, self.token_count = window, Windows(window)
        self.embedder = nn.Conv1d(channels, dim, window, window)
        self.positions = ConvPositions(dim=dim, kernel=9, depth=2, groups=4, reference_padding=False)
        size = {"depth": depth, "dim": dim, "num_heads": num_heads, "ffn_dim": ffn_dim}
        self.transformer = Transformer(**size, **BLOCK, activation_checkpointing=False, backend=attention)

    def embed(self, inputs, attention_mask=None):
        mask = None if attention_mask is None else attention_mask[:, self.window - 1 :: self.window]
        return self.embedder(inputs).mT, mask

    def contextualize(self, tokens, attention_mask=None, *, masks=None, mode="replace", **targets):
        tokens = tokens if attention_mask is None else tokens * attention_mask[..., None]
        token = torch.zeros(self.dim, device=tokens.device)
        if masks is not None:  # positions come from visible windows only
            seen, mask = apply_mask(tokens, attention_mask, masks=masks, mode="replace", mask_token=token)
            tokens = seen + self.positions(seen, mask)
            tokens, attention_mask = apply_mask(tokens, mask, masks=masks, mode="drop", mask_token=None)
        else:
            tokens = tokens + self.positions(tokens, attention_mask)
        none = repeat(None, self.depth)
        targets = {"target_layer": None, "top_k_layers": 0} | targets
        x, layers = self.transformer(tokens, key_mask=attention_mask, biases=none, **targets)
        return EncoderOutput(prefix=x[:, :0], tokens=x, layers=layers)


def decode(path):
    recording = path if isinstance(path, np.ndarray) else np.load(path)  # an array of a Python call
    if recording.shape[0] != 19:
        raise BadSample(f"{recording.shape[0]} channels, expected 19")
    return torch.from_numpy(recording).float()


class Standardise:
    def train(self, recording):
        return (recording - recording.mean(1, keepdim=True)) / (recording.std(1, keepdim=True) + 1e-6)

    evaluate = train


RAW = {"_target_": "data2vec_train.features.raw.time_statistics", "_partial_": True}
SIZE = {name: "${size." + name + "}" for name in ("dim", "depth", "num_heads", "ffn_dim")}
ENCODER = {"_target_": "eeg.EEGEncoder", "channels": 19, "window": 25, **SIZE, "attention": "${attention.backend}"}
MODALITY = {"name": "eeg", "extensions": [".npy"], "encoder": ENCODER, "transform": {"_target_": "eeg.Standardise"}}
MODALITY |= {"decode": {"_target_": "eeg.decode", "_partial_": True}, "probe": {"raw": RAW, "raw_name": "statistics"}}
store = ConfigStore.instance().store
store(group="modality", name="eeg", node=MODALITY)
store(group="preset", name="eeg_data2vec2", package="_global_", node={"defaults": ["sequence_data2vec2"]})
