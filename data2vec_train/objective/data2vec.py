"""data2vec 1.0 and 2.0: the algorithm.

    teacher    a_k = last K layers of the EMA teacher on the whole input                 once per sample
    targets    y   = N_mean( mean_k N_layer(a_k) )                                       targets.py
    student    z   = encoder(input with some tokens hidden)                              M times per sample
    predict    p   = decoder(z) at the hidden positions
    loss       L   = s/P * sum_{hidden t} sum_c e(p_tc - y_tc)  +  w * class-token term
    teacher    theta_teacher <- tau theta_teacher + (1 - tau) theta_student              teacher.py, after each step

with e(d) = d^2 when beta = 0, else smooth L1 of width beta; s = 1/sqrt(D), 1/D or 1; P hidden positions.
The class-token term compares the student's class token, through no head, with the mean of y over all positions that
are not padding: mean over rows of s * sum_c e(.).

What makes it 1.0 or 2.0 is only this:
            hiding                                  masks per sample   decoder          class-token term
    1.0     replace by a learned vector             1                  linear or MLP    no
            (text: corrupt the token ids)
    2.0     drop: hidden tokens are not encoded     M = 8 ... 16       convolutional    images

Papers: arXiv:2202.03555 and arXiv:2212.07525. Shape letters: `encoders/base.py`.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.batch import Batch
from data2vec_train.encoders.base import EncoderOutput, MaskMode, ModalityEncoder, repeat_per_mask
from data2vec_train.errors import ConfigError
from data2vec_train.objective.decoders import Decoder
from data2vec_train.objective.targets import TargetBuilder
from data2vec_train.objective.teacher import EMATeacher, tau_at
from data2vec_train.system.constraints import checked, require

ChannelReduction = Literal["sum_over_sqrt_dim", "mean", "sum"]


@dataclass(frozen=True)
class Data2VecOutput:
    """Result of one forward pass."""

    loss: Tensor  # () float32
    terms: dict[str, Tensor]  # the summands of the loss, each () float32
    predictions: Tensor  # (P, D) float32
    targets: Tensor  # (P, D) float32


class Data2Vec(nn.Module):
    """Student, teacher and decoder with the loss between them.

    Args:
        encoder: the student.
        decoder: from student output to predictions.
        targets: from teacher layers to targets.
        mask_mode: how tokens are hidden from the student: "replace", "drop" or "corrupt".
        masks_per_sample: M.
        loss_beta: width of the smooth L1 loss; 0 = squared error.
        channel_reduction: sum over channels divided by sqrt(D), mean, or sum (s in the equations above).
        class_token_weight: w. The originals sum the term over rows instead: their 0.01 with 16 images and 16 masks per
            device is w = 2.56 (ALGORITHM.md 7, row 5).
        tau_start: EMA decay at step 0.
        tau_end: EMA decay from `tau_anneal_steps` on.
        tau_anneal_steps: optimizer steps of linear annealing.
        share_embeddings: see `EMATeacher`.
        copied: see `EMATeacher`.

    Raises:
        ConfigError: parts that do not work together.
    """

    @checked
    def __init__(
        self,
        *,
        encoder: ModalityEncoder,
        decoder: Decoder,
        targets: TargetBuilder,
        mask_mode: MaskMode,
        masks_per_sample: int,
        loss_beta: float,
        channel_reduction: ChannelReduction,
        class_token_weight: float,
        tau_start: float,
        tau_end: float,
        tau_anneal_steps: int,
        share_embeddings: bool,
        copied: list[str],
    ) -> None:
        super().__init__()
        fills_gaps = decoder.restores_dropped
        require(mask_mode=mask_mode, decoder=type(decoder).__name__, restores_dropped=fills_gaps)
        require(top_k_layers=targets.top_k_layers, depth=encoder.depth, prenet_depth=encoder.prenet_depth)
        if class_token_weight and not encoder.num_prefix_tokens:
            raise ConfigError("class_token_weight is not 0, but the encoder has no class token")
        self.student = encoder
        self.teacher = EMATeacher(encoder, share_embeddings=share_embeddings, copied=copied)
        self.decoder = decoder
        self.targets = targets
        self.mask_mode: MaskMode = mask_mode
        self.masks_per_sample = masks_per_sample
        self.loss_beta = loss_beta
        self.scale = {"sum_over_sqrt_dim": encoder.dim**-0.5, "mean": 1 / encoder.dim, "sum": 1.0}[channel_reduction]
        self.class_token_weight = class_token_weight
        self.tau = dict(start=tau_start, end=tau_end, anneal_steps=tau_anneal_steps)

    def forward(self, batch: Batch) -> Data2VecOutput:
        """Loss of one batch; `batch.masks` says what is hidden, with M masks per sample."""
        if batch.masks is None or batch.masks.masked.shape[1] != self.masks_per_sample:
            raise ValueError(f"expected a batch with {self.masks_per_sample} masks per sample")
        embedded = self.student.embed(batch.inputs, batch.attention_mask)  # tokens (B, T, D), mask (B, T) or None
        y = self.compute_targets(batch, embedded)  # (B, T, D)
        predictions, student = self.predict(batch, embedded)  # (P, D)

        num_tokens, hidden = y.shape[1], batch.masks.hidden
        # From positions in the flattened (N, T) to positions in the flattened (B, T).
        in_sample = hidden // (self.masks_per_sample * num_tokens) * num_tokens + hidden % num_tokens  # (P,)
        targets = y.flatten(0, 1).index_select(0, in_sample)  # (P, D)
        terms = {"regression": self.scale * self._error(predictions, targets).sum() / hidden.numel()}
        if self.class_token_weight:
            class_token = student.prefix[:, -1].float()  # (N, D)
            real = None if self.targets.reference_padding else embedded[1]
            summary = mean_over_time(y, real).repeat_interleave(self.masks_per_sample, dim=0)  # (N, D)
            per_row = self.scale * self._error(class_token, summary).sum(dim=1)
            terms["class_token"] = self.class_token_weight * per_row.mean()
        return Data2VecOutput(sum(terms.values()), terms, predictions, targets)

    def compute_targets(self, batch: Batch, embedded: tuple[Tensor, Tensor | None]) -> Tensor:
        """Targets of all positions, (B, T, D) float32; one teacher pass serves all masks."""
        # The teacher's weights are float32; if the student's are not, autocast lets both compute in the same precision.
        dtype = next(self.student.parameters()).dtype
        low = torch.autocast(batch.inputs.device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
        instead = batch.teacher_inputs is not None
        with low:
            output, token_mask = self.teacher(
                batch.teacher_inputs if instead else batch.inputs,
                batch.teacher_attention_mask if instead else batch.attention_mask,
                student_tokens=embedded,
                target_layer=self.targets.target_layer,
                top_k_layers=self.targets.top_k_layers,
            )
            return self.targets(output.layers, token_mask)

    def predict(self, batch: Batch, embedded: tuple[Tensor, Tensor | None]) -> tuple[Tensor, EncoderOutput]:
        """Predictions at hidden positions, (P, D) float32, and the student's output over all N rows."""
        tokens, token_mask = embedded
        num_tokens = batch.masks.masked.shape[2]
        if self.mask_mode == "corrupt":
            mask = repeat_per_mask(batch.attention_mask, self.masks_per_sample)
            tokens, _ = self.student.embed(batch.corrupted.flatten(0, 1), mask)  # (N, T, D)
        student = self.student.contextualize(tokens, token_mask, masks=batch.masks, mode=self.mask_mode)
        predictions = self.decoder(
            student.tokens,
            hidden=batch.masks.hidden,
            visible=batch.masks.visible if self.mask_mode == "drop" else None,
            num_tokens=num_tokens,
            grid=self.student.grid,
            attention_mask=repeat_per_mask(token_mask, self.masks_per_sample),
        )
        return predictions.float(), student

    def step_teacher(self, step: int, *, skip_step: Tensor | None = None) -> float:
        """Move the teacher after optimizer step number `step` (1, 2, ...); returns the decay of that step.

        `skip_step`, () bool, says that the optimizer skipped the step, so that the teacher does as well.
        """
        tau = tau_at(step, **self.tau)
        self.teacher.update(self.student, tau, skip_step=skip_step)
        return tau

    def _error(self, predictions: Tensor, targets: Tensor) -> Tensor:
        if self.loss_beta == 0:
            return (predictions - targets).square()
        return F.smooth_l1_loss(predictions, targets, reduction="none", beta=self.loss_beta)


def mean_over_time(x: Tensor, real: Tensor | None) -> Tensor:
    """Mean of x (B, T, D) over its real positions, those where `real` (B, T) is True; None = all. -> (B, D)."""
    if real is None:
        return x.mean(dim=1)
    return (x * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)


def relative_std(x: Tensor, real: Tensor | None = None) -> Tensor:
    """How far samples differ at the same position, relative to the size of the features: x (B, T, D) -> ().

    The root mean square of the deviations from the mean over samples, divided by that of the features themselves.
    0 = all samples have the same features. Unlike a standard deviation over positions or channels, it is not restored
    to 1 by a norm over them. NaN for a single sample.

    Args:
        x: features before any normalisation.
        real: (B, T) bool, False = padding, which is left out; None = no padding.
    """
    x = x.float()
    if len(x) < 2:
        return torch.full((), float("nan"), device=x.device)
    weight = x.new_ones(x.shape[:2]) if real is None else real.to(x.dtype)
    weight = weight[..., None]  # (B, T, 1)
    count = weight.sum(dim=0)  # (T, 1)
    mean = (x * weight).sum(dim=0) / count.clamp(min=1)  # (T, D)
    variance = ((x - mean) * weight).square().sum(dim=0).mean(dim=1) / (count[:, 0] - 1).clamp(min=1)  # (T,)
    several = count[:, 0] > 1
    spread = (variance * several).sum() / several.sum().clamp(min=1)
    power = (x * weight).square().sum() / (weight.sum() * x.shape[-1])
    return (spread / power.clamp(min=1e-30)).sqrt()


def std_over_rows(x: Tensor, *, everywhere: bool = False) -> Tensor:
    """Mean over channels of the standard deviation over rows: x (P, D) -> (). Near 0 = collapsed.

    With `everywhere` the rows are those of all processes, and every process must call it.

    Source: `compute_var` of the originals (ALGORITHM.md 1.4), where it is called a variance.
    """
    if not everywhere:
        return (x.float().var(dim=0) + 1e-6).sqrt().mean()
    x = x.double()
    sums = torch.stack([torch.ones_like(x).sum(dim=0), x.sum(dim=0), x.square().sum(dim=0)])  # (3, D)
    torch.distributed.all_reduce(sums)
    count, first, second = sums
    variance = (second - first.square() / count).clamp_min(0) / (count - 1)
    return (variance + 1e-6).sqrt().mean().float()
