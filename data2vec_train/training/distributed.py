"""Several processes: all with the whole model (DDP), or each with a share of it (FSDP2).

With FSDP2 every process holds a share of each weight, gradient, moment and teacher weight. Checkpoints stay those of
one process: they are put together when they are written and cut up when they are read, so that a run may go on with
any number of processes, sharded or not.
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
    """Divide student, teacher and decoder among the processes of `mesh`, each block for itself.

    Student and teacher are cut in the same places, so that averaging needs no messages.
    """
    for encoder in (objective.student, objective.teacher.encoder):
        for block in blocks_of(encoder):
            fully_shard(block, mesh=mesh)
        # Left to itself, a root stays whole after its forward pass; the teacher has no backward pass that would end
        # this, and would go on with the weights of the first step.
        fully_shard(encoder, mesh=mesh, reshard_after_forward=True)
        for half in ("embed", "contextualize"):  # which are called instead of `forward`
            register_fsdp_forward_method(encoder, half)
    fully_shard(objective.decoder, mesh=mesh, reshard_after_forward=True)


def keep_whole(module: nn.Module) -> None:
    """After training, give every process all weights, so that one can go on alone. All have to call this."""
    for part in [one for one in module.modules() if isinstance(one, FSDPModule)]:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


class ReplicatedStrategy(DDPStrategy):
    """Lightning's DDP, which asks the module whether some parameters get no gradient in a step."""

    def configure_ddp(self) -> None:
        """Looking for such parameters costs time in each step, and not looking ends a run that has some."""
        if self.lightning_module.has_unused_parameters:
            self._ddp_kwargs["find_unused_parameters"] = True
        super().configure_ddp()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes, with our checkpoints."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands us the optimizer's state, as without sharding."""
        return True

    def setup_environment(self) -> None:
        """Lightning's own default shards over nodes only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Cut the model up, which only pretraining knows how to.

        Raises:
            ConfigError: it is still whole.
        """
        if not any(isinstance(one, FSDPModule) for one in self.lightning_module.modules()):
            raise ConfigError("strategy=fsdp shards pretraining only; choose strategy=ddp")
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state, in the host's memory of the first process; the others get nothing."""
        return gathered(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As one process writes it, in the host's memory of the first process; the others get nothing."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return gathered(plain.state_dict(), keep=self.is_global_zero)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """The first process writes."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """All read, and keep their share later."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its share."""
        module = self.lightning_module
        places = module.state_dict()
        shares = {name: _share(value, places.get(name)) for name, value in checkpoint["state_dict"].items()}
        module.load_state_dict(shares, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its share."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            state = {
                number: {name: _share(value, parameters[number]) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def gathered(tree: Any, *, keep: bool) -> Any:
    """Nested containers with whole tensors on the host; without `keep` empty ones. All processes have to ask."""
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


def _share(value: Any, like: Tensor | None) -> Any:
    """This process's part of a whole tensor that belongs to `like`; step counts and the like stay as they are."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # Every process has read the whole: nothing need be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class Peers:
    """Notices that another process of the run has left, so that this one need not wait for it.

    The processes stand in a ring: each has a thread that waits for the last word of its neighbour, which is the exit
    status. A process that was killed says nothing, and the connection to it breaks at once. Who leaves for such a
    reason passes it on.
    """

    def __init__(self) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        self._next, self._before = (rank + 1) % size, (rank - 1) % size
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self._said = False
        listener.accompanied = True
        self._thread = threading.Thread(target=self._wait, daemon=True, name="peers")
        self._thread.start()

    def _wait(self) -> None:
        word = torch.zeros((), dtype=torch.int64)
        try:
            dist.recv(word, src=self._next, group=self._group)
        except RuntimeError:
            gone = Gone(LOST, lost_line(self._next))
        else:
            if not word:
                return
            gone = Gone(int(word), left_line(self._next, int(word)))
        listener.lose(gone)
        self._say(gone.status)

    def _say(self, status: int) -> None:
        if not self._said:
            self._said = True
            with contextlib.suppress(RuntimeError):  # it is gone as well
                dist.send(torch.tensor(status), dst=self._before, group=self._group)

    def leave(self, error: BaseException | None) -> None:
        """Say the last word; after the end of training (None) wait for that of the neighbour."""
        status = 0 if error is None else judged(error)[1]
        if status == 1 and (gone := listener.verdict(NEWS_S)):
            status = gone.status
        self._say(status)
        if error is None:
            self._thread.join()
            listener.decide()
        elif judged(error)[1] != 1:
            listener.decide()
