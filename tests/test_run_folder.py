"""A run's folder: nobody else's, always whole, and read as data only."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import time

import pytest
import torch
from processes import ROOT

from run import provenance as of_module
from run.checkpoints import WholeCheckpoints, read_checkpoint
from run.errors import UserError
from run.files import write_whole
from run.provenance import provenance
from run.record import EpochTable
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


def test_table_pads_new_columns_and_reads_back_what_it_wrote(tmp_path):
    table = EpochTable(tmp_path / "t.csv", ("epoch", "loss"))
    table.add({"epoch": 0})
    table.add({"epoch": 1, "loss": 0.1, "nc1": float("nan")})
    table.add({"epoch": 2, "loss": 1 / 3})
    assert (tmp_path / "t.csv").read_text() == "epoch,loss,nc1\n0,,\n1,0.1,nan\n2,0.3333333333333333,\n"
    assert table.rows()[1] == {"epoch": "1", "loss": "0.1", "nc1": "nan"}
    assert EpochTable(tmp_path / "t.csv", ("epoch",), keep_to=1).rows() == table.rows()[:2]
    assert EpochTable(tmp_path / "t.csv", ("epoch",)).rows() == []  # a new run does not read an old one's


def test_a_resumed_table_ends_up_byte_for_byte_like_an_uninterrupted_one(tmp_path):
    rows = [{"epoch": 0, "b": 1.5}, {"epoch": 1, "a": 0.1}, {"epoch": 2, "a": 0.2, "b": 2.5, "c": 3}]
    whole = EpochTable(tmp_path / "whole.csv", ("epoch", "a"))
    whole.add(*rows)
    EpochTable(tmp_path / "cut.csv", ("epoch", "a")).add(*rows[:2], {"epoch": 2, "a": 9.9})
    EpochTable(tmp_path / "cut.csv", ("epoch", "a"), keep_to=1).add(rows[2])
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="file: No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def write_forever(path):
    letters = 0
    while True:
        letters = (letters + 1) % 26
        write_whole(path, chr(97 + letters) * 3_000_000)


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "file"
    for i in range(10):
        path.unlink(missing_ok=True)
        writer = multiprocessing.get_context("fork").Process(target=write_forever, args=(path,))
        writer.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.0037 * i)
        writer.kill()
        writer.join()
        content = path.read_text()
        assert len(content) == 3_000_000 and len(set(content)) == 1


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(Hostile.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_that_holds_code_is_refused_and_nothing_of_it_runs(tmp_path):
    Hostile.target = tmp_path / "hacked"
    torch.save({"state_dict": Hostile(), "hyper_parameters": {}, "epoch": 0}, tmp_path / "evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Hostile()))
    for name in ("evil.ckpt", "plain.ckpt"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
        with pytest.raises(UserError, match=name):
            WholeCheckpoints().load_checkpoint(tmp_path / name)
    assert not Hostile.target.exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {}, "epoch": 0}, tmp_path / "good.ckpt")
    whole = (tmp_path / "good.ckpt").read_bytes()
    cases = {"empty": b"", "text": b"not a checkpoint", "half": whole[: len(whole) // 2], "zeros": bytes(1000)}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list")
    torch.save({"epoch": 1}, tmp_path / "other")
    for name in (*cases, "list", "other", "missing"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match=str(tmp_path)):
        read_checkpoint(tmp_path)
    assert read_checkpoint(tmp_path / "good.ckpt")["epoch"] == 0


def test_without_a_checkout_the_commit_is_the_one_that_an_image_was_built_from(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert provenance()["git_commit"] == "abc"
    monkeypatch.setenv("GIT_COMMIT", "")
    assert provenance()["git_commit"] is None


def copied_checkout(folder):
    """A checkout of its own with this module in it, and its commit."""
    for name in ("provenance.py", "slurm.py"):
        shutil.copy(ROOT / "run" / name, folder)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a checkout to another user")
def test_a_checkout_of_another_user_is_known_by_its_own_commit(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    commit = copied_checkout(checkout)
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 65534, 65534)
    for name, value in {"GIT_COMMIT": "of_the_image", "HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": "/dev/null"}.items():
        monkeypatch.setenv(name, value)  # nobody's own settings trust it
    monkeypatch.setattr(of_module, "__file__", str(checkout / "provenance.py"))
    assert provenance()["git_commit"] == commit
    (checkout / "slurm.py").write_text("")
    assert provenance()["git_commit"] == commit + "+"
