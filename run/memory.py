"""How much memory is free, on a GPU or for a process, within what containers and batch jobs allow; what one keeps."""

import ctypes
import os
from pathlib import Path

import torch

# Of control groups: where they lie, by the controller's name (version 2 has none), and what their files are called.
OWN_GROUPS = Path("/proc/self/cgroup")
ROOTS = {"": "/sys/fs/cgroup", "memory": "/sys/fs/cgroup/memory"}
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
LIBC = ctypes.CDLL(None)
KEPT, PLENTY = 2**30, 2**33  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
CACHE_SHARE = 0.25  # of free memory: the rest is for the forward pass and for what else runs on the machine


def keep_freed_memory() -> None:
    """Have this process keep up to a gigabyte that it has freed for what it allocates next, if memory is plenty.

    The C library (glibc; others know no such thing) asks the system for every tensor of 32 MB or more anew, and the
    system clears its pages one by one. Kept, they lie scattered: a process may take a third more than without.
    """
    is_plenty = free_memory(torch.device("cpu")) >= PLENTY
    if is_plenty and hasattr(LIBC, "mallopt") and LIBC.mallopt(M_MMAP_THRESHOLD, KEPT):
        LIBC.mallopt(M_TRIM_THRESHOLD, KEPT)  # this alone would have it ask for more tensors anew


def give_back_freed_memory() -> None:
    """Let others, and whoever asks how much is free, have what this process keeps."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, within the limits that a batch system sets.

    Processes that share a CPU share its memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(machine_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def machine_memory() -> float:
    """Bytes that all processes together can still allocate on this machine, within the limits set for them."""
    give_back_freed_memory()
    return min(system_free_memory(), cgroup_free_memory())


def system_free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:  # not Linux: macOS tells only how much there is, so assume that half of it is in use
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cgroup_free_memory() -> float:
    """What the limits of containers and jobs (control groups of both versions) leave; infinite without any."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return float("inf")
    groups = {controllers: group.lstrip("/") for _, controllers, group in (line.split(":", 2) for line in lines)}
    places = [Path(root) / groups[name] for name, root in ROOTS.items() if name in groups]
    folders = {folder for here in places for folder in (here, *here.parents)}
    return min(map(group_free_memory, folders), default=float("inf"))


def group_free_memory(folder: Path) -> float:
    """What one group's limit leaves to it; infinite where it has none."""
    for limit_file, used_file, cached in FILES:
        try:
            limit = int((folder / limit_file).read_text())
            used = int((folder / used_file).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
        reclaimable = int(statistics[cached])  # cached files give way when memory is short
        return max(0, limit - used + reclaimable)
    return float("inf")
