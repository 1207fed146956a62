"""Probes on each layer of a frozen encoder: k nearest neighbours, a linear and an attentive classifier."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.batch import Batch
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.features.embedding import layer_tokens, pool
from data2vec_train.features.measures import knn_hits, linear_hits
from data2vec_train.training.callbacks.probe import Pooling

Batches = Callable[[int], Iterable[Batch]]  # number of the pass -> its batches


@torch.no_grad()
def layer_features(
    encoder: ModalityEncoder, batches: Iterable[Batch], layers: Sequence[int], pooling: Pooling
) -> tuple[list[np.ndarray], np.ndarray]:
    """Pooled features of every layer, (n, D) float32 each, and the classes (n,)."""
    encoder.eval()
    device = next(encoder.parameters()).device
    rows: list[list[np.ndarray]] = [[] for _ in layers]
    labels = []
    for batch in batches:
        moved = batch.to(device)
        tokens, mask = layer_tokens(encoder, moved.inputs, moved.attention_mask, layers)
        for row, layer in zip(rows, tokens, strict=True):
            row.append(pool(layer, mask, pooling).cpu().numpy())
        labels.append(batch.labels.numpy())
    return [np.concatenate(row) for row in rows], np.concatenate(labels)


def simple_probes(
    fit: tuple[Sequence[np.ndarray], np.ndarray],
    test: tuple[Sequence[np.ndarray], np.ndarray],
    *,
    neighbours: int,
    l2: float,
) -> dict[str, list[np.ndarray]]:
    """Which test records `knn` and `linear` classify correctly, (m,) bool for each layer (`features/measures.py`)."""
    pairs = list(zip(fit[0], test[0], strict=True))
    knn = [
        knn_hits(fit_features, fit[1], test_features, test[1], neighbours=neighbours)
        for fit_features, test_features in pairs
    ]
    linear = [linear_hits(fit_features, fit[1], test_features, test[1], l2=l2) for fit_features, test_features in pairs]
    return {"knn": knn, "linear": linear}


class AttentiveProbe(nn.Module):
    """One learned query that attends to all tokens, then a linear classifier.

    Source: the attentive probe of V-JEPA (arXiv:2404.08471), with a single layer.

    Args:
        dim: D, the width of the tokens.
        num_heads: attention heads.
        num_classes: C.
    """

    def __init__(self, *, dim: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (B, T, D) and their mask (B, T) -> logits (B, C)."""
        x = self.norm(tokens)
        query = self.query.expand(len(x), -1, -1)
        mixed, _ = self.attention(query, x, x, key_padding_mask=None if mask is None else ~mask, need_weights=False)
        return self.classifier(mixed[:, 0])


def attentive_probes(
    encoder: ModalityEncoder,
    fit: Batches,
    test: Batches,
    layers: Sequence[int],
    *,
    num_classes: int,
    num_heads: int,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
) -> list[np.ndarray]:
    """Which test records an `AttentiveProbe` classifies correctly, (m,) bool for each layer.

    All probes are trained in the same passes over the data, each on its own layer, so that tokens need not be stored.
    Each batch of the encoder is split into optimizer steps of `batch_size` records, so that the training of the probes
    does not depend on the encoder's batch size.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList(
            AttentiveProbe(dim=encoder.dim, num_heads=num_heads, num_classes=num_classes) for _ in layers
        ).to(device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, weight_decay=weight_decay)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        for batch in fit(epoch):
            moved = batch.to(device)
            tokens, mask = layer_tokens(encoder, moved.inputs, moved.attention_mask, layers)
            for rows in torch.arange(len(batch), device=device).split(batch_size):
                seen = None if mask is None else mask[rows]
                # The losses share no parameters, so the gradient of the sum is the gradient of each head's own loss.
                loss = sum(
                    F.cross_entropy(head(layer[rows], seen), moved.labels[rows])
                    for head, layer in zip(heads, tokens, strict=True)
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    hits: list[list[np.ndarray]] = [[] for _ in layers]
    heads.eval()
    with torch.no_grad():
        for batch in test(0):
            moved = batch.to(device)
            tokens, mask = layer_tokens(encoder, moved.inputs, moved.attention_mask, layers)
            for row, head, layer in zip(hits, heads, tokens, strict=True):
                row.append((head(layer, mask).argmax(dim=-1) == moved.labels).cpu().numpy())
    return [np.concatenate(row) for row in hits]
