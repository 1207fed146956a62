"""The teacher: an exponential moving average of the student, in float32.

    teacher <- tau(n) * teacher + (1 - tau(n)) * student      once, after optimizer step n = 1, 2, ...

Which parts are averaged depends on modality and version (ALGORITHM.md 1.1). The others are either copied from the
student, or shared: the teacher then starts from the student's token embeddings.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from data2vec_train.encoders.base import EncoderOutput, ModalityEncoder, TargetLayer


def tau_at(step: int, *, start: float, end: float, anneal_steps: int) -> float:
    """EMA decay after `step` optimizer steps: linear from `start` to `end`, then constant.

    Source: data2vec, section 3.3 (arXiv:2202.03555); constants in `configs/preset` and `recipes`.
    """
    if step >= anneal_steps:
        return end
    return end - (end - start) * (1 - step / anneal_steps)


class EMATeacher(nn.Module):
    """An averaged copy of the student, without gradients, dropout or drop path.

    Weights are float32 whatever the student's dtype: with 1 - tau = 2e-4 an update is below bfloat16's resolution and
    the teacher would not change.

    Args:
        student: the encoder to copy.
        share_embeddings: the teacher has no embedding of its own and takes the student's tokens (speech, text), which
            include the student's embedding dropout, as in the originals.
        copied: names or prefixes of parameters that are copied from the student at each update, not averaged.

    Raises:
        ValueError: a prefix in `copied` matches no parameter.
    """

    def __init__(self, student: ModalityEncoder, *, share_embeddings: bool, copied: list[str]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(student).float().requires_grad_(False).eval()
        self.share_embeddings = share_embeddings
        if share_embeddings:
            self.encoder.embedder = None
        names = [name for name, _ in self.encoder.named_parameters()]
        for prefix in copied:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(f"teacher.copied: no parameter starts with {prefix!r}; there are {', '.join(names)}")
        frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
        self.copied = [name for name in names if name in frozen or name.startswith(tuple(copied))]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EMATeacher":
        """Move to another device with the rest of the model, but keep the floating-point type."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep_type, recurse)

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in evaluation mode: targets are computed without dropout and drop path."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: ModalityEncoder, tau: float, *, skip_step: Tensor | None = None) -> None:
        """One averaging step towards `student`; at tau >= 1 averaged weights do not change.

        If `skip_step`, () bool, is True, the teacher does not change; on a GPU, the host does not read the flag.
        """
        on_host = skip_step is None or skip_step.device.type == "cpu"
        if on_host and skip_step:
            return
        sources = dict(student.named_parameters())
        averaged, towards = [], []
        for name, parameter in self.encoder.named_parameters():
            if name in self.copied:
                _local(parameter).copy_(_local(sources[name]))
            else:
                averaged.append(_local(parameter))
                towards.append(_local(sources[name]).float())
        if tau < 1.0 and on_host:
            torch._foreach_lerp_(averaged, towards, 1.0 - tau)
        elif tau < 1.0:
            weight = torch.where(skip_step, 0.0, 1.0 - tau)
            torch._foreach_lerp_(averaged, towards, [weight] * len(averaged))
        # Buffers are copied: averaging an integer buffer can shift an index by one (ALGORITHM.md 7, row 8).
        buffers = dict(student.named_buffers())
        for name, buffer in self.encoder.named_buffers():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        *,
        student_tokens: tuple[Tensor, Tensor | None],
        target_layer: TargetLayer,
        top_k_layers: int,
    ) -> tuple[EncoderOutput, Tensor | None]:
        """Encode the whole input.

        Args:
            inputs: (B, ...), uncorrupted.
            attention_mask: of the inputs, before `embed`.
            student_tokens: result of the student's `embed`, used if embeddings are shared.
            target_layer: see `ModalityEncoder.contextualize`.
            top_k_layers: as there.

        Returns:
            The encoder's output, and the attention mask at token rate, (B, T) or None.
        """
        tokens, token_mask = student_tokens if self.share_embeddings else self.encoder.embed(inputs, attention_mask)
        return self.encoder.contextualize(
            tokens, token_mask, target_layer=target_layer, top_k_layers=top_k_layers
        ), token_mask


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; teacher and student are sharded alike (`training.distributed.shard`)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
