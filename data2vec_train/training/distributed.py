"""Distributed training: every process holds the whole model (DDP), or a shard of it (FSDP2).

With FSDP2 every process holds a shard of each weight, gradient, moment and teacher weight. Checkpoints are the same as
those of one process: they are gathered when written and sharded when read, so that a run can continue with any number
of processes, sharded or not.
"""

import contextlib
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from data2vec_train.encoders.transformer import blocks_of
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.system.stopping import LOST, NEWS_S, Gone, judged, left_line, listener, lost_line


def shard(objective: Data2Vec, mesh: DeviceMesh) -> None:
    """Shard student, teacher and decoder over the processes of `mesh`, each block separately.

    Student and teacher are sharded alike, so that averaging needs no communication.
    """
    for encoder in (objective.student, objective.teacher.encoder):
        for block in blocks_of(encoder):
            fully_shard(block, mesh=mesh)
        # FSDP2 keeps the root module unsharded after forward unless reshard_after_forward is set. The teacher has no
        # backward pass that would reshard it, and would keep using the weights of the first step.
        fully_shard(encoder, mesh=mesh, reshard_after_forward=True)
        for half in ("embed", "contextualize"):  # called instead of `forward`
            register_fsdp_forward_method(encoder, half)
    fully_shard(objective.decoder, mesh=mesh, reshard_after_forward=True)


def keep_whole(module: nn.Module) -> None:
    """Unshard all weights after training, so that one process can continue alone. All processes must call this."""
    for part in [child for child in module.modules() if isinstance(child, FSDPModule)]:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


class ReplicatedStrategy(DDPStrategy):
    """Lightning's DDP, which searches for parameters without gradient only if the module says that there may be some.

    The search costs time in each step, and without it DDP fails if there are such parameters.
    """

    def configure_ddp(self) -> None:
        """Set `find_unused_parameters` if the module needs it."""
        if self.lightning_module.has_unused_parameters:
            self._ddp_kwargs["find_unused_parameters"] = True
        super().configure_ddp()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes, with our checkpoints."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning passes us the optimizer's state, as without sharding."""
        return True

    def setup_environment(self) -> None:
        """Shard over all processes; Lightning's default shards over nodes only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Check that the module has sharded itself, which only that of pretraining does.

        Raises:
            ConfigError: it has not.
        """
        if not any(isinstance(child, FSDPModule) for child in self.lightning_module.modules()):
            raise ConfigError("strategy=fsdp shards pretraining only; choose strategy=ddp")
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state, in host memory of the first process; the others get nothing."""
        return gathered(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer state, in host memory of the first process; the others get nothing."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return gathered(plain.state_dict(), keep=self.is_global_zero)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the checkpoint, in the first process only."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the whole checkpoint, in every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this process's shard."""
        module = self.lightning_module
        own = module.state_dict()
        shards = {name: _shard_of(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        module.load_state_dict(shards, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's shard."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _shard_of(value, parameters[number]) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def gathered(tree: Any, *, keep: bool) -> Any:
    """Nested containers with whole tensors on the host; without `keep`, empty ones. All processes must call this."""
    if isinstance(tree, dict):
        items = {key: gathered(value, keep=keep) for key, value in tree.items()}
        return items if keep else {}
    if isinstance(tree, list):
        items = [gathered(value, keep=keep) for value in tree]
        return items if keep else []
    if isinstance(tree, Tensor):
        whole = tree.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        return whole.cpu() if keep else None
    return tree


def _shard_of(value: Any, like: Tensor | None) -> Any:
    """This process's shard of a whole tensor, sharded as `like`; other values, such as step counts, are unchanged."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # Every process has read the whole tensor, so nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class Peers:
    """Detects that another process of the run has exited, so that this one does not wait for it.

    The processes form a ring: a thread in each waits for the exit status of the next one. If that process is killed,
    the connection to it breaks at once. A process that exits because of this passes the status on.
    """

    def __init__(self) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        self._next, self._before = (rank + 1) % size, (rank - 1) % size
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self._sent = False
        listener.accompanied = True
        self._thread = threading.Thread(target=self._wait, daemon=True, name="peers")
        self._thread.start()

    def _wait(self) -> None:
        status = torch.zeros((), dtype=torch.int64)
        try:
            dist.recv(status, src=self._next, group=self._group)
        except RuntimeError:
            gone = Gone(LOST, lost_line(self._next))
        else:
            if not status:
                return
            gone = Gone(int(status), left_line(self._next, int(status)))
        listener.lose(gone)
        self._send(gone.status)

    def _send(self, status: int) -> None:
        if not self._sent:
            self._sent = True
            with contextlib.suppress(RuntimeError):  # the receiver has exited as well
                dist.send(torch.tensor(status), dst=self._before, group=self._group)

    def leave(self, error: BaseException | None) -> None:
        """Send this process's exit status; after the end of training (None) wait for that of the next process."""
        status = 0 if error is None else judged(error)[1]
        if status == 1 and (gone := listener.verdict(NEWS_S)):
            status = gone.status
        self._send(status)
        if error is None:
            self._thread.join()
            listener.decide()
        elif judged(error)[1] != 1:
            listener.decide()
