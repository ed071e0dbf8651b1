import torch

from run import memory


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
