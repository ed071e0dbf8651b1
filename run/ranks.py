"""A run in several processes, one per device: which one this is, how they add up, and that none outlives another.

Lightning starts the processes and lets them find each other; this is what measures and a run's folder need of them.
Imports nothing heavy: the program starts with it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from run import command
from run.errors import UserError

if TYPE_CHECKING:
    from subprocess import Popen

    from lightning.pytorch import Trainer
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

Thing = TypeVar("Thing")

PATIENCE = timedelta(hours=6)  # a rank waits so long for another: heads of DIB may take hours and differ by much of it
WATCH = 1.0  # seconds between two looks at whether other processes of the machine still live
PUNCTUAL = 20.0  # seconds after which it is said that not all processes are there yet
PROCESSES_PER_CPU = 4  # more of them only wait for each other
COURTESY = 3.0  # seconds for who knows better to say what went wrong
LOST = "another process of this run ended early, and so must this one"
NUMBERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")  # where launchers tell a process which one it is


class Ranks:
    """The processes that compute together: this is number `index` of `num`. All must call the same methods in turn.

    Those of a team are a part of all, `group` to torch, and number `first` of all is their first.
    """

    def __init__(self, index: int = 0, num: int = 1, *, group: ProcessGroup | None = None, first: int = 0) -> None:
        self.index, self.num, self.group, self.first = index, num, group, first
        self.advice = ""  # what to do when another one is lost

    @classmethod
    def of(cls, trainer: Trainer) -> Ranks:
        """The processes of a trainer."""
        return cls(trainer.global_rank, trainer.world_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.index == 0

    def in_teams(self, num: int) -> tuple[int, Ranks]:
        """When neighbours form `num` teams of equal size: the number of this rank's team, and the ranks in it."""
        size = self.num // num
        if size == 1:
            return self.index, ALONE
        team, index = divmod(self.index, size)
        return team, Ranks(index, size, group=_neighbours(size) if num > 1 else None, first=team * size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, bit for bit the same on each; it may take the tensor's memory."""
        if self.num == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.to(_device_of_collectives(tensor)).contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def from_first(self, thing: Thing) -> Thing:
        """What the first rank has."""
        if self.num == 1:
            return thing
        import torch.distributed as dist

        things = [thing]
        dist.broadcast_object_list(things, self.first, self.group)
        return things[0]

    def gathered(self, thing: Thing) -> list[Thing]:
        """What all ranks have, in their order, on the first one; on the others nothing."""
        if self.num == 1:
            return [thing]
        import torch.distributed as dist

        things: list[Thing | None] = [None] * self.num
        dist.gather_object(thing, things if self.is_first else None, self.first, self.group)
        return things if self.is_first else []

    def least(self, number: int) -> int:
        """The least of the numbers that the ranks have, on all of them."""
        return self.from_first(min(self.gathered(number), default=0))

    def share_buffers(self, module: nn.Module) -> None:
        """Give all ranks the first one's buffers, such as batch norm's statistics: those a checkpoint holds."""
        if self.num == 1:
            return
        import torch.distributed as dist

        for buffer in module.buffers():
            dist.broadcast(buffer, self.first, self.group)


ALONE = Ranks()
_is_ending = threading.Event()


@cache  # a group is made once, by all processes, and lasts
def _neighbours(size: int) -> ProcessGroup:
    """The process group of this process and its neighbours, when all processes form groups of this size."""
    import torch.distributed as dist

    group, _ = dist.new_subgroups(size, timeout=PATIENCE)
    return group


def _device_of_collectives(tensor: Tensor) -> object:
    """Where a tensor must lie to be sent: NCCL knows GPUs only."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.distributed.get_backend() == "nccl" else "cpu"


def assemble(trainer: Trainer, flags: Mapping[str, Any]) -> Ranks:
    """Let Lightning start the other processes, which run this same command, and connect all of them."""
    ranks, strategy = Ranks.of(trainer), trainer.strategy
    if strategy.launcher is None:
        return ranks
    if not ranks.is_first:
        warnings.simplefilter("ignore")  # the first rank has the same ones
    os.environ["STARTED_BY"] = str(os.getpid())
    os.environ["LOCAL_WORLD_SIZE"] = str(trainer.num_devices)
    _connect(trainer, ranks)
    if ranks.from_first(dict(flags)) != dict(flags):
        raise UserError("the processes of this run were started with different flags: give all the same command")
    return ranks


def _connect(trainer: Trainer, ranks: Ranks) -> None:
    """Start the others and wait for them, in a thread: within torch this one could not be interrupted."""
    import torch

    strategy, ends = trainer.strategy, []

    def launch() -> None:
        try:
            strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
            ends.append(torch.get_num_threads())
        except BaseException as error:
            ends.append(error)

    thread, started = threading.Thread(target=launch, daemon=True), []
    thread.start()
    threading.Thread(target=_end_without, args=(started, ranks), daemon=True).start()
    begin, is_told = time.monotonic(), False
    while thread.is_alive():
        thread.join(0.1)
        # Lightning's own watch kills this process without a word; it finds nothing to watch any more.
        started += _taken(getattr(strategy.launcher, "procs", []))
        if not is_told and time.monotonic() - begin > PUNCTUAL:
            where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            print(f"{command.NAME}: waiting for all {ranks.num} processes at {where}", file=sys.stderr, flush=True)
            is_told = True
    [end] = ends
    if isinstance(end, ValueError | RuntimeError) and not is_lost_rank(end):
        flags = f"--devices {trainer.num_devices} and --num-nodes {trainer.num_nodes}"
        raise UserError(f"{flags} do not work here: {' '.join(str(end).split())}")
    if isinstance(end, BaseException):
        raise end
    torch.set_num_threads(end)  # both are a thread's own: the number of threads
    strategy.accelerator.setup_device(strategy.root_device)  # and CUDA's current device


def _taken(things: list[Thing]) -> list[Thing]:
    """What was in a list, to which another thread may add meanwhile."""
    taken = []
    while things:
        taken.append(things.pop())
    return taken


def _end_without(processes: list[Popen], ranks: Ranks) -> None:
    """End this process when one that it started has failed, should it not notice itself: it may compute for hours."""
    while not any(process.poll() for process in processes):
        time.sleep(WATCH)
    time.sleep(COURTESY)
    if _is_ending.is_set():
        return
    print(f"{command.NAME}: {LOST}{ranks.advice}", file=sys.stderr, flush=True)
    os._exit(1)


def end_by_itself() -> None:
    """From now on this process is about to end, and not to be ended because another one has."""
    _is_ending.set()


def end_with_starter() -> None:
    """From now on end with the process that started this one for its own: a sweep, the first rank, torchrun."""
    starter = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else int(os.environ.get("STARTED_BY", 0))
    if starter:
        threading.Thread(target=_end_with, args=(starter,), daemon=True).start()


def _end_with(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(WATCH)
    os._exit(1)


def leave(status: int) -> NoReturn:
    """Exit. Early and with other ranks about, without libraries' farewells, which may wait for them."""
    if status and os.environ.get("STARTED_BY") == str(os.getpid()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def name_by_environment() -> str:
    """Something like `local rank 3: ` in a process that is not the first, by what its launcher set; else nothing."""
    name = next((name for name in NUMBERS if os.environ.get(name, "0") != "0"), None)
    return "" if name is None else f"{name.lower().replace('_', ' ')} {os.environ[name]}: "


def too_many_processes(num: int) -> str | None:
    """Why this machine does not start so many processes that compute on its CPUs; None where it does."""
    num_cpus = os.cpu_count() or 1
    if num <= PROCESSES_PER_CPU * num_cpus:
        return None
    return (
        f"argument --devices: {num} processes are too many for the {num_cpus} CPUs here, allowed are "
        f"{PROCESSES_PER_CPU} for each: {PROCESSES_PER_CPU * num_cpus}"
    )


def is_lost_rank(error: BaseException) -> bool:
    """Whether another process was not there any more. Like memory's end, torch tells it in a RuntimeError's words."""
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")
    words = ("closed by peer", "reset by peer", "Broken pipe", "pair closure", "Timed out waiting")
    return type(error).__name__ in kinds or any(word in str(error) for word in words)
