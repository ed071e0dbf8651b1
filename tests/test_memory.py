import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from run import memory

glibc = pytest.mark.skipif(not hasattr(memory.LIBC, "mallopt"), reason="another C library keeps what it likes")


def test_free_memory_is_positive_and_at_most_what_the_machine_has():
    free = memory.free_memory(torch.device("cpu"))
    assert 0 < free < 2**50


def test_the_limit_of_a_control_group_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert memory.group_free_memory(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.group_free_memory(tmp_path) == float("inf")


def test_the_limit_of_a_control_group_of_version_1_counts(tmp_path):
    (tmp_path / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory.usage_in_bytes").write_text("700\n")
    (tmp_path / "memory.stat").write_text("cache 250\ninactive_file 1\ntotal_inactive_file 200\n")
    assert memory.group_free_memory(tmp_path) == 500


def test_the_groups_of_a_process_are_found_whatever_their_version(tmp_path, monkeypatch):
    for name, limit in (("v1/job/step", 5000), ("v1/job", 3000), ("v2/slice", 4000)):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if "v1" in name else ("memory.max", "memory.current")
        for file, number in zip(files, (limit, 100), strict=True):
            (tmp_path / name / file).write_text(f"{number}\n")
        (tmp_path / name / "memory.stat").write_text("inactive_file 0\ntotal_inactive_file 0\n")
    (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:memory:/job/step\n0::/slice\n")
    monkeypatch.setattr(memory, "ROOTS", {"": tmp_path / "v2", "memory": tmp_path / "v1"})
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "cgroup")
    assert memory.cgroup_free_memory() == 2900


def faults_of_a_large_tensor():
    """How often the system had to find a page for 64 MB that are written and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def plenty(monkeypatch):
    """Much free memory, of which the process may keep some."""
    monkeypatch.setattr(memory, "PLENTY", 0)
    memory.keep_freed_memory()


@glibc
def test_freed_memory_is_kept_for_what_comes_next(plenty):
    """Not at once: what is freed first may lie a few bytes short of what the next needs."""
    for _ in range(10):
        faults_of_a_large_tensor()
    assert faults_of_a_large_tensor() < 2**26 // resource.getpagesize() // 10


@glibc
def test_who_asks_what_is_free_gets_what_was_kept(plenty):
    def own():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    faults_of_a_large_tensor()
    before = own()
    memory.machine_memory()
    assert before - own() > 2**25


def test_where_memory_is_scarce_nothing_is_kept(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "LIBC", SimpleNamespace(mallopt=lambda *option: asked.append(option)))
    monkeypatch.setattr(memory, "machine_memory", lambda: memory.PLENTY - 1)
    memory.keep_freed_memory()
    assert asked == []
    monkeypatch.setattr(memory, "machine_memory", lambda: memory.PLENTY)
    memory.keep_freed_memory()
    assert asked == [(memory.M_MMAP_THRESHOLD, memory.KEPT)]  # which was refused, so the other is left alone
