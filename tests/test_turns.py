"""A SLURM job whose turns are too short ends, and one that gets on does not, however often it is queued again."""

import signal
from functools import partial
from pathlib import Path

import pytest
from processes import SHORT, finish, signal_at

from run import ranks, sweep, turns
from run.errors import Interrupted, UserError
from run.turns import FEW, turn

LOGS = Path("lightning_logs")
NOTES = LOGS / ".turns_of_job_77"
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
       "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost"}  # fmt: skip


@pytest.fixture(autouse=True)
def job(in_an_empty_folder, monkeypatch):
    for name in ranks.NUMBERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "77")


def ended_in(number, monkeypatch, *, by=signal.SIGUSR1, has_advanced=False):
    """What is said at the end of the turn of this number, which a signal ends."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
    with pytest.raises(Interrupted) as caught, turn(LOGS):
        error = Interrupted(by)
        error.has_advanced = has_advanced
        raise error
    return str(caught.value)


def test_after_a_few_turns_without_an_epoch_the_next_is_refused_and_all_before_have_said_so(monkeypatch):
    for number in range(4, 4 + FEW):
        text = ended_in(number, monkeypatch)
        assert text == (
            f"ended by SIGUSR1; this turn did no epoch: after 3 such turns the job ends, this is number {number - 3}"
        )
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(4 + FEW))
    with (
        pytest.raises(UserError, match=r"job 77 ran out of time before an epoch was done.*--time") as refused,
        turn(LOGS),
    ):
        pytest.fail("the turn began")
    assert refused.value.status == 1


def test_a_job_queued_again_by_hand_after_it_was_refused_has_as_many_turns_again(monkeypatch):
    LOGS.mkdir()
    NOTES.write_text("0\n1\n2\n")
    assert "number 1" in ended_in(4, monkeypatch)


def test_turns_that_get_on_or_end_otherwise_do_not_count(monkeypatch):
    for number in range(FEW):
        assert ended_in(number, monkeypatch, has_advanced=True) == "ended by SIGUSR1"
        assert ended_in(number, monkeypatch, by=signal.SIGTERM) == "ended by SIGTERM"
    assert not LOGS.exists()
    with turn(LOGS):
        pass


def test_a_turn_cut_off_from_outside_is_not_held_against_the_job(monkeypatch):
    for number in (0, 1, 3, 4):  # the third was preempted, say
        ended_in(number, monkeypatch)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    with turn(LOGS):
        pass


def test_something_to_go_on_from_makes_the_notes_void(monkeypatch):
    for number in range(FEW):
        ended_in(number, monkeypatch)
    turns.forget(LOGS)
    turns.forget(LOGS)
    assert not NOTES.exists()


def test_of_several_processes_the_first_one_notes(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert ended_in(0, monkeypatch) == "ended by SIGUSR1"
    assert not LOGS.exists()


def test_where_nothing_can_be_noted_the_run_ends_as_ever(monkeypatch):
    LOGS.write_text("a file")
    assert ended_in(0, monkeypatch).startswith("ended by SIGUSR1")


def test_outside_of_a_job_there_are_no_turns(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    assert ended_in(0, monkeypatch) == "ended by SIGUSR1"
    turns.forget(LOGS)
    assert not LOGS.exists()


def test_a_sweep_leaves_it_to_the_seed_that_ran_what_the_turn_was_worth(monkeypatch):
    def interrupted(*_):
        raise Interrupted(signal.SIGUSR1)

    monkeypatch.setattr(sweep, "run", interrupted)
    from flags import get_args

    with pytest.raises(Interrupted) as caught:
        sweep.sweep(get_args(["--seed", "1", "2", "--quiet"]), [], get_args)
    assert caught.value.has_advanced


def test_a_run_without_an_epoch_is_noted_and_one_more_than_a_few_is_not_begun(tmp_path):
    meddle = partial(signal_at, "classifier:Classifier.training_step", 1, signal.SIGUSR1)
    status, text = finish(SHORT, tmp_path, meddle=meddle, env=JOB)
    assert status == 138 and "version_0` goes on; this turn did no epoch" in text
    assert NOTES.read_text() == "0\n"
    NOTES.write_text("0\n1\n2\n")
    status, text = finish(SHORT, tmp_path, env=JOB | {"SLURM_RESTART_COUNT": "3"})
    assert (
        status == 1 and text.startswith("main.py: the last 3 turns of job 77 ran out of time") and text.count("\n") == 1
    )
    meddle = partial(signal_at, "classifier:Classifier.training_step", 40, signal.SIGUSR1)  # in a later epoch
    status, text = finish(SHORT, tmp_path, meddle=meddle, env=JOB | {"SLURM_RESTART_COUNT": "4"})
    assert status == 138 and "no epoch" not in text and not NOTES.exists()
