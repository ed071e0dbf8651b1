"""A run in several processes, one per device: which one this is, how they add up, and that none outlives another.

Lightning starts the processes and lets them find each other; this is what measures and a run's folder need of them.
Imports nothing heavy: the program starts with it.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor, nn

Thing = TypeVar("Thing")

PATIENCE = timedelta(hours=6)  # a rank waits so long for another: heads of DIB may take hours and differ by much of it
WATCH = 1.0  # seconds between two looks at whether the first process of the machine still lives
COURTESY = 3.0  # seconds for the first rank to say what went wrong on all of them
LOST = "another process of this run ended early, and so must this one"
NUMBERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")  # where launchers tell a process which one it is


class Ranks:
    """The processes that compute together: this is number `index` of `num`. All must call the same methods in turn."""

    def __init__(self, index: int = 0, num: int = 1) -> None:
        self.index, self.num = index, num

    @classmethod
    def of(cls, trainer: Trainer) -> Ranks:
        """The processes of a trainer."""
        return cls(trainer.global_rank, trainer.world_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.index == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, bit for bit the same on each; it may take the tensor's memory."""
        if self.num == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.to(_device_of_collectives(tensor)).contiguous()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def from_first(self, thing: Thing) -> Thing:
        """What the first rank has."""
        if self.num == 1:
            return thing
        import torch.distributed as dist

        things = [thing]
        dist.broadcast_object_list(things)
        return things[0]

    def gathered(self, thing: Thing) -> list[Thing]:
        """What all ranks have, in their order, on the first one; on the others nothing."""
        if self.num == 1:
            return [thing]
        import torch.distributed as dist

        things: list[Thing | None] = [None] * self.num
        dist.gather_object(thing, things if self.is_first else None)
        return things if self.is_first else []

    def share_buffers(self, module: nn.Module) -> None:
        """Give all ranks the first one's buffers, such as batch norm's statistics: those a checkpoint holds."""
        if self.num == 1:
            return
        import torch.distributed as dist

        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


ALONE = Ranks()


def _device_of_collectives(tensor: Tensor) -> object:
    """Where a tensor must lie to be sent: NCCL knows GPUs only."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.distributed.get_backend() == "nccl" else "cpu"


def assemble(trainer: Trainer) -> Ranks:
    """Let Lightning start the other processes, which run this same command, and connect all of them."""
    ranks, strategy = Ranks.of(trainer), trainer.strategy
    if strategy.launcher is not None:
        try:
            strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--devices {trainer.num_devices} and --num-nodes {trainer.num_nodes} do not work here: "
                f"{' '.join(str(error).split())}"
            ) from None
    if not ranks.is_first:
        warnings.simplefilter("ignore")  # the first rank has the same ones
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    return ranks


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: it may hang in a collective for good."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)


def name_by_environment() -> str:
    """Something like `local rank 3: ` in a process that is not the first, by what its launcher set; else nothing."""
    name = next((name for name in NUMBERS if os.environ.get(name, "0") != "0"), None)
    return "" if name is None else f"{name.lower().replace('_', ' ')} {os.environ[name]}: "


def is_lost_rank(error: BaseException) -> bool:
    """Whether another process was not there any more. Like memory's end, torch tells it in a RuntimeError's words."""
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return type(error).__name__ in kinds or any(word in str(error) for word in words)
