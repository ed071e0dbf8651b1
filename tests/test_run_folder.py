"""A run's folder: nobody else's, always whole, and read as data only."""

import multiprocessing
import os

import pytest

from run.errors import UserError
from run.run_folder import RunFolder


def test_new_folders_count_up_and_leave_gaps_alone(tmp_path):
    (tmp_path / "version_4").mkdir()
    (tmp_path / "version_x").mkdir()
    assert [RunFolder.new(tmp_path).path.name for _ in range(2)] == ["version_5", "version_6"]


def make_folders(log_dir, num, names):
    names.put([RunFolder.new(log_dir).path.name for _ in range(num)])


def test_folders_made_at_the_same_instant_differ(tmp_path):
    context = multiprocessing.get_context("fork")
    names = context.Queue()
    workers = [context.Process(target=make_folders, args=(tmp_path, 20, names)) for _ in range(8)]
    for worker in workers:
        worker.start()
    made = [name for _ in workers for name in names.get(timeout=60)]
    assert sorted(made) == sorted(f"version_{i}" for i in range(160))


@pytest.mark.parametrize("name", ["hparams.yaml", "metrics.csv", "notes", ".hidden"])
def test_a_name_that_is_taken_is_refused(name, tmp_path):
    (RunFolder.new(tmp_path, "mine").path / name).touch()
    with pytest.raises(UserError, match="mine exists"):
        RunFolder.new(tmp_path, "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]


def test_a_name_whose_run_was_killed_before_it_began_is_free(tmp_path):
    killed = RunFolder.new(tmp_path, "mine").path
    for name in (".lock", ".hparams.yaml.123.tmp"):
        (killed / name).touch()
    with RunFolder.new(tmp_path, "mine") as folder:
        assert [path.name for path in folder.path.iterdir()] == [".lock"]
        folder.write_hparams({"seed": 0}, {})
        with pytest.raises(UserError, match="mine exists"):
            RunFolder.new(tmp_path, "mine")


def enter(log_dir, both_are_here, outcomes):
    folder = RunFolder.new(log_dir, "mine")
    both_are_here.wait(timeout=60)
    try:
        with folder:
            folder.write_hparams({"seed": os.getpid()}, {})
    except UserError as error:
        outcomes.put(str(error))
    else:
        outcomes.put("")


def test_of_runs_that_take_a_name_at_the_same_instant_one_has_it(tmp_path):
    """All find the folder without a run; also who comes when the first has finished must notice."""
    context = multiprocessing.get_context("fork")
    barrier, outcomes = context.Barrier(4), context.Queue()
    workers = [context.Process(target=enter, args=(tmp_path, barrier, outcomes)) for _ in range(4)]
    for worker in workers:
        worker.start()
    told = sorted(outcomes.get(timeout=60) for _ in workers)
    assert told[0] == "" and all("mine exists already" in text for text in told[1:])


def test_a_log_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match="logs"):
        RunFolder.new(tmp_path / "logs")


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path):
    with RunFolder(tmp_path), pytest.raises(UserError, match="still going on"), RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):
        pass
