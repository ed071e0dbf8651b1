"""How much memory is free, on a GPU or for a process, within what containers and batch jobs allow."""

import os
from pathlib import Path

import torch

CACHE_SHARE = 0.25  # of free memory: the rest is for the forward pass and for what else runs on the machine


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, within the limits that a batch system sets.

    Processes that share a CPU share its memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(system_free_memory(), cgroup_free_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def system_free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:  # not Linux: macOS tells only how much there is, so assume that half of it is in use
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cgroup_free_memory() -> float:
    """What the limits of containers and jobs (control groups, version 2) leave; infinite without any."""
    try:
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].partition("::")[2].lstrip("/")
    except OSError:
        return float("inf")
    here = Path("/sys/fs/cgroup") / group
    return min((group_free_memory(folder) for folder in (here, *here.parents)), default=float("inf"))


def group_free_memory(folder: Path) -> float:
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return float("inf")
    reclaimable = int(statistics["inactive_file"])  # cached files give way when memory is short
    return max(0, limit - used + reclaimable)
