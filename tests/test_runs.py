"""The table of runs: what stands in it, which runs, in which order, and that a thousand of them take no time."""

import csv
import fcntl
import io
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_runs import change_flags, make_run, read, rewrite
from processes import ROOT

import runs
from flags import get_args
from run import listing
from run.listed import Listed, is_held
from run.run_folder import RunFolder


def note_start(folder, day):
    facts = yaml.safe_load((folder / "hparams.yaml").read_text())["provenance"]
    change_flags(folder, provenance=facts | {"started": f"2026-01-{day:02d}T12:00:00+00:00", "torch": "2.6.0"})
    return folder


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Three rates with two seeds each, a run of another model, one that ended early, and one that never began."""
    folder = tmp_path_factory.mktemp("logs")
    for i in range(6):
        run = make_run(folder / f"version_{i}", seed=i % 2, learning_rate=(0.1, 0.01, 0.001)[i // 2], note=None)
        note_start(run, 20 - i)
    other = make_run(folder / "version_6", 2, 3, model="MLP", dataset="SZT", note="by  hand", tag=["paper", "draft"])
    note_start(other, 1)
    rewrite(folder / "version_5", lambda text: "".join(text.splitlines(True)[:-2]))
    change_flags(make_run(folder / "version_7", num_epochs=0), epochs=5)
    (folder / "version_7" / "metrics.csv").unlink()
    note_start(folder / "version_7", 25)
    return folder


@pytest.fixture
def show(capsys):
    """What `python runs.py ARGV` prints, as a row of cells for each line; with `--csv` as dicts."""

    def of(*argv):
        assert runs.main([str(word) for word in argv]) == 0
        text = capsys.readouterr().out
        if "--csv" in argv:
            return list(csv.DictReader(io.StringIO(text)))
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]

    return of


def test_a_row_for_each_run_the_newest_first_with_what_differs_and_what_came_out(logs, show):
    header, *rows = show(logs)
    assert header == [
        "name",
        "model",
        "data",
        "learning-rate",
        "seed",
        "epochs",
        "state",
        "test acc",
        "best",
        "tag",
        "note",
    ]
    assert [row[0] for row in rows] == [f"version_{i}" for i in (7, 0, 1, 2, 3, 4, 5, 6)]
    accuracies = read(logs / "version_2")["test_acc"]
    last, best = f"{accuracies.iloc[-1]:.2%}", f"{accuracies.max():.2%}"
    assert rows[3] == ["version_2", "ResNet", "MNIST", "0.01", "0", "5/5", "done", last, best]
    assert rows[6][5:7] == ["3/5", "ended early"] and rows[0][5:] == ["–/5", "ended early", "–", "–"]
    assert rows[7][-2:] == ["paper draft", "by hand"]


def test_a_run_that_goes_on_is_running_and_nobody_who_looks_is_in_its_way(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "version_0")
    assert Listed(folder).state == "done" and not is_held(folder)
    with RunFolder(folder):
        assert Listed(folder).state == "running" == Listed(folder).state
    assert Listed(folder).state == "done"
    look = open(folder / ".lock")  # noqa: SIM115 - as `is_held` does, at the very moment in which a run begins
    fcntl.flock(look, fcntl.LOCK_SH)
    monkeypatch.setattr("run.run_folder.time.sleep", lambda seconds: look.close())
    with RunFolder(folder):
        assert is_held(folder)


def test_measurements_and_range_tests_have_states_of_their_own(tmp_path):
    measured = make_run(tmp_path / "version_0", num_epochs=1)
    facts = yaml.safe_load((measured / "hparams.yaml").read_text())["provenance"]
    change_flags(measured, epochs=50, provenance=facts | {"measured": ["a.ckpt", "b.ckpt"]})
    assert Listed(measured).state == "measured"
    change_flags(measured, provenance=facts | {"measured": ["a.ckpt", "b.ckpt", "c.ckpt"]})
    assert Listed(measured).state == "ended early"
    tested = make_run(tmp_path / "version_1", num_epochs=0, lr_test=True)
    change_flags(tested, epochs=50, lr_range_test="only")
    assert Listed(tested).state == "done"


def test_columns_are_measures_by_name_or_pattern_flags_and_facts(logs, show):
    rows = show(logs, "--csv", "--columns", "nc1/test/*", "torch", "nonlinearity", "--where", "model=ResNet", "epoch=5")
    assert len(rows) == 5
    for row in rows:
        table = read(Path(row["folder"]))
        assert float(row["nc1/test/avgpool"]) == table["nc1/test/avgpool"].iloc[-1]
        assert float(row["last"]) == table["test_acc"].iloc[-1] and float(row["best"]) == table["test_acc"].max()
        assert (row["torch"], row["nonlinearity"]) == ("2.6.0", "relu")


def test_a_measure_that_was_not_made_after_the_last_epoch_has_its_last_value(tmp_path, show):
    folder = make_run(tmp_path / "version_0", num_epochs=9, measured=[0, 4])
    (row,) = show(tmp_path, "--csv", "--columns", "nc1/test/avgpool")
    assert float(row["nc1/test/avgpool"]) == read(folder)["nc1/test/avgpool"][4]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["dataset=SZT"], [6]),
        (["data=MNIST", "state=done"], [0, 1, 2, 3, 4]),
        (["learning-rate<0.05", "learning_rate>=0.01", "state=done"], [2, 3, 6]),
        (["state!=done"], [7, 5]),
        (["model=*LP"], [6]),
        (["tag=paper"], [6]),
        (["note=*hand*"], [6]),
        (["seed==1"], [1, 3, 5]),
        (["best>0.5", "seed!=0", "epoch=5"], [1, 3]),
        (["name=version_[01]"], [0, 1]),
    ],
)
def test_where_keeps_the_runs_for_which_all_conditions_hold(logs, show, conditions, expected):
    assert [row["name"] for row in show(logs, "--csv", "--where", *conditions)] == [f"version_{i}" for i in expected]


def test_sorted_by_numbers_from_the_highest_and_by_words_from_a_with_gaps_last(logs, show):
    best = [(read(logs / f"version_{i}")["test_acc"].max(), f"version_{i}") for i in range(7)]
    names = [row["name"] for row in show(logs, "--csv", "--sort", "best")]
    assert names == [*(name for _, name in sorted(best, key=lambda pair: -pair[0])), "version_7"]
    names = [row["name"] for row in show(logs, "--csv", "--sort", "best", "--reverse")]
    assert names == [*(name for _, name in sorted(best, key=lambda pair: pair[0])), "version_7"]
    assert show(logs, "--csv", "--sort", "data")[-1]["dataset"] == "SZT"
    assert [row["name"] for row in show(logs, "--csv", "--reverse")][-1] == "version_7"


def test_means_and_deviations_are_those_of_the_finished_runs_of_a_setting(logs, show):
    rows = show(logs, "--csv", "--mean", "--columns", "nc1/test/avgpool", "--where", "model=ResNet", "epoch>=0")
    assert [(row["learning-rate"], row["runs"], row["done"]) for row in rows] == [
        ("0.1", "2", "2"), ("0.01", "2", "2"), ("0.001", "2", "1")
    ]  # fmt: skip
    first = [read(logs / f"version_{i}") for i in (0, 1)]
    for name, column in (("last", "test_acc"), ("nc1/test/avgpool",) * 2):
        values = [table[column].iloc[-1] for table in first]
        assert float(rows[0][name]) == statistics.mean(values)
        assert float(rows[0][f"{name} std"]) == statistics.stdev(values)
    assert rows[2]["last std"] == "" and float(rows[2]["last"]) == read(logs / "version_4")["test_acc"].iloc[-1]
    header, first, *_ = show(logs, "--mean", "--sort", "learning-rate", "--where", "model=ResNet")
    assert header[:5] == ["model", "data", "learning-rate", "runs", "done"] and first[2] == "0.1" and "±" in first[5]


def test_flags_that_differ_as_presets_have_it_are_named_but_not_shown(tmp_path, show, capsys):
    for i, model in enumerate(("MNISTNet", "MLP", "MLP")):
        flags = vars(get_args(["-m", model, "-d", "MNIST", *["--weight-decay", "0.1"] * (i == 2)]))
        change_flags(make_run(tmp_path / f"version_{i}"), **flags)
    runs.main([str(tmp_path)])
    told = capsys.readouterr()
    assert told.out.split()[:4] == ["name", "model", "data", "weight-decay"]
    assert "as presets of models have it, these differ too" in told.err and "learning-rate" in told.err


def test_two_folders_of_one_name_are_told_apart_and_none_comes_twice(tmp_path, show):
    for name in ("a", "b"):
        make_run(tmp_path / name / "version_0")
    rows = show(tmp_path / "a", tmp_path / "b", tmp_path / "a" / "version_0", "--csv")
    assert sorted(row["name"] for row in rows) == [str(tmp_path / name / "version_0") for name in ("a", "b")]


def test_damaged_files_are_said_and_spare_the_others(tmp_path, show, capsys):
    for i in range(3):
        make_run(tmp_path / f"version_{i}")
    (tmp_path / "version_0" / "hparams.yaml").write_text("a: [")
    rewrite(tmp_path / "version_1", lambda text: text[:-3])
    assert runs.main([str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "version_0/hparams.yaml is damaged" in told.err and "damaged lines, which are left out: 1." in told.err
    assert len(told.out.splitlines()) == 4 and "4/5" in told.out


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (["no/such"], 1, "error: no/such is not a folder: give the folder of a run"),
        (["{logs}", "--where", "datset=MNIST"], 2, "error: no run has 'datset', perhaps dataset"),
        (["{logs}", "--where", "dataset"], 2, "error: 'dataset' is no condition: NAME=VALUE"),
        (["{logs}", "--where", "best<high"], 2, "error: 'best<high' compares with 'high', which is no number"),
        (["{logs}", "--columns", "nc1/tset/avgpool"], 2, "no run has 'nc1/tset/avgpool', perhaps nc1/test/avgpool"),
        (["{logs}", "--sort", "bst"], 2, "no run has 'bst', perhaps best"),
        (["{empty}"], 1, "error: there is no run in "),
    ],
)
def test_mistakes_are_told_in_one_sentence(logs, tmp_path, capsys, argv, status, text):
    argv = [word.format(logs=logs, empty=tmp_path) for word in argv]
    try:
        ended = runs.main(argv)
    except SystemExit as end:
        ended = end.code
    told = capsys.readouterr()
    assert ended == status and text in told.err and told.out == ""


def test_a_thousand_runs_take_seconds_and_nothing_heavy(tmp_path):
    """Ten seconds of computing are four times what it takes, for machines that others use too."""
    folder = make_run(tmp_path / "made", num_layers=9, num_epochs=60)
    change_flags(folder, **vars(get_args(["-m", "ResNet", "-d", "CIFAR10"])))
    for i in range(1000):
        (tmp_path / "logs" / f"version_{i}").mkdir(parents=True)
        for name in ("hparams.yaml", "metrics.csv"):
            os.link(folder / name, tmp_path / "logs" / f"version_{i}" / name)
    heavy = "{'torch', 'pandas', 'numpy', 'matplotlib', 'lightning'} & set(sys.modules)"
    argv = [str(tmp_path / "logs"), "--columns", "nc1/test/*", "--mean"]
    code = f"import sys, runs; runs.main({argv!r}); assert not {heavy}, {heavy}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and " 1000 " in done.stdout, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10


def test_a_closed_pipe_ends_the_command_quietly(logs):
    line = f"{sys.executable} runs.py {logs} | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("name") and done.stderr == ""


def test_deviations_by_hand():
    assert listing.mean_of([1, 2, 6]) == (3, statistics.stdev([1, 2, 6]))
    assert listing.mean_of([2.0]) == (2.0, None) and listing.mean_of([]) == (None, None)
    assert listing.mean_of([1.0, None]) == (None, None) and listing.mean_of(["a", "a"]) == ("a", None)
