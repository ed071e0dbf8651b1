"""The command, and what holds for every figure: labels, nothing cut off, no traceback whatever is in a folder."""

import functools
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import FIGURES, ROOT, command, load, make_run, panels, sentence

import plots
from figures.runs import Run
from flags import get_args

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Made runs, loaded once for all figures: `loaded(arguments of make_run for each of them, …)`."""
    known = {}

    def of(*runs):
        if repr(runs) not in known:
            folder = tmp_path_factory.mktemp("runs")
            for i, options in enumerate(runs):
                make_run(folder / f"version_{i}", **options)
            known[repr(runs)] = load(folder)
        return known[repr(runs)]

    return of


@pytest.mark.parametrize("figure", FIGURES)
def test_a_run_that_died_in_its_first_epoch_is_drawn(loaded, figure):
    (run,) = loaded({"num_epochs": 0, "lr_test": True})
    figure(run).canvas.draw()


ALL = ("nc1", "dib", "rank", "clusters", "landscape", "perturb", "views")
SUBSETS = [(), ("nc1",), ("dib",), ("rank",), ("clusters",), ALL]


@pytest.mark.parametrize("measures", SUBSETS, ids=" ".join)
@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_works_with_any_measures_and_labels_its_axes(loaded, figure, measures):
    (run,) = loaded({"measures": measures})
    drawn = figure(run)
    drawn.canvas.draw()
    if sentence(drawn) is None:
        rows = drawn.axes[0].get_gridspec().nrows
        outer = [ax for ax in panels(drawn) if ax.get_subplotspec().is_last_row() or rows == 1]
        assert all(ax.get_xlabel() for ax in outer)
        assert all(ax.get_ylabel() for ax in panels(drawn) if ax.get_subplotspec().is_first_col())
    else:
        assert sentence(drawn).endswith(".")


@pytest.mark.parametrize("figure", FIGURES)
def test_settings_without_a_measure_have_a_panel_that_says_so(loaded, figure):
    whole = {"measures": SUBSETS[-1], "lr_test": True}
    bare, deeper = {"measures": (), "learning_rate": 0.1}, {"num_layers": 5, "learning_rate": 0.2}
    figure(loaded(whole, bare, deeper)).canvas.draw()


EXPRESSION_MAP = "look/grad-loss-theta-*/norm"  # which the notebook draws, too


@pytest.mark.parametrize("figure", [*FIGURES, functools.partial(plots.heat_map, measure=EXPRESSION_MAP)])
def test_an_empty_figure_says_in_one_sentence_which_flags_would_fill_it(loaded, figure):
    (run,) = loaded({"measures": ()})
    said = sentence(figure(run))
    if figure in (plots.summary, plots.training_curves):
        assert said is None  # every run has those
        return
    what, _, words = " ".join(said.split()).removesuffix(".").partition("; main.py ")
    assert what and "with --" in words
    flags = get_args(words.partition("with ")[2].split())
    assert flags != get_args([]) or words.endswith(("with --nc", "with --dib", "with --nc --dib"))  # those are defaults


LOOKS = {"short": (3, 1, 1), "long": (3, 200, 1), "deep and many": (20, 12, 4)}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("figure", FIGURES)
def test_nothing_is_cut_off_or_covered_by_the_legend(loaded, figure, look):
    num_layers, num_epochs, num_runs = LOOKS[look]
    common = {"num_layers": num_layers, "num_epochs": num_epochs, "lr_test": True, "measures": SUBSETS[-1]}
    drawn = figure(loaded(*({"seed": seed, **common} for seed in range(num_runs))))
    drawn.canvas.draw()
    page, ink = drawn.get_window_extent(), drawn.get_tightbbox().transformed(drawn.dpi_scale_trans)
    pixel = 1.0  # rounding of the letters' boxes
    assert page.x0 - pixel <= ink.x0 and ink.x1 <= page.x1 + pixel
    assert page.y0 - pixel <= ink.y0 and ink.y1 <= page.y1 + pixel
    for legend, ax in itertools.product(drawn.legends, panels(drawn)):
        assert not legend.get_window_extent().overlaps(ax.get_window_extent())
        assert not legend.get_window_extent().overlaps(drawn._suptitle.get_window_extent())


@pytest.mark.parametrize("file_format", ["png", "svg"])
def test_the_command_writes_every_figure_and_prints_its_path(tmp_path, file_format):
    folder = make_run(tmp_path / "version_0", measures=("nc1", "dib"))
    done = command(folder, "-o", tmp_path / "new" / "figures", "--format", file_format)
    assert done.returncode == 0
    paths = sorted(map(Path, done.stdout.split()))
    assert sorted((tmp_path / "new" / "figures").iterdir()) == paths
    assert {path.suffix for path in paths} == {f".{file_format}"}
    assert {"summary", "training_curves", "nc1_over_depth", "head_losses", "heat_map_dib_loss"} <= {
        p.stem for p in paths
    }
    (said,) = done.stderr.splitlines()
    assert said.startswith("plots.py: not measured, so not drawn: lr_range_test, rank_over_epochs_train")


def test_help_and_wrong_flags_are_answered_without_pandas_and_matplotlib():
    code = "import sys, plots; print({'pandas', 'matplotlib', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "set()"
    assert command("--help").returncode == 0
    for wrong in ([], ["--format", "gif", "x"], ["--frmat", "png", "x"]):
        done = command(*wrong)
        assert done.returncode == 2 and done.stderr.startswith("plots.py: error: ") and done.stderr.count("\n") == 1


def test_a_wrong_flag_is_told_by_whatever_process_is_asked_as_there_is_but_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as in a shell on the second machine of a job
    done = command("--frmat", "png", "x")
    assert done.returncode == 2 and "unknown flag --frmat" in done.stderr


def test_drawing_does_not_need_pyplot(run_folder):
    draw = f"plots.summary(plots.load([{str(run_folder)!r}]))"
    code = f"import sys, plots; {draw}; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "False"


def test_mistakes_are_told_in_one_sentence(tmp_path):
    run = make_run(tmp_path / "version_0", measures=())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for args in ([tmp_path / "empty"], [tmp_path / "missing"], [tmp_path / "file"], [run, "-o", tmp_path / "file"]):
        done = command(*args, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == ""
        *_, line = done.stderr.splitlines()
        assert line.startswith("plots.py: error: ") and str(args[-1]) in line


def test_a_closed_pipe_ends_the_command_quietly(tmp_path):
    folder = make_run(tmp_path / "version_0", measures=())
    for version in range(5):
        make_run(
            tmp_path / "more" / f"version_{version}", num_epochs=1, measures=("nc1", "rank"), learning_rate=version
        )
    args = [sys.executable, ROOT / "plots.py", folder, tmp_path / "more", "-o", tmp_path / "figures"]
    with warm.Popen(args, stdout=warm.PIPE, stderr=warm.PIPE) as process:
        assert process.stdout.readline().endswith("training_curves.png\n")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_that_lacks_letters_gets_them_escaped(tmp_path, environment):
    folder = make_run(tmp_path / "数据" / "version_0", measures=())
    done = command(folder, "-o", folder.parent / "out", env=os.environ | {"PYTHONCOERCECLOCALE": "0"} | environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert {path.name for path in (folder.parent / "out").iterdir()} == {"summary.png", "training_curves.png"}


def test_ctrl_c_ends_quietly_and_leaves_no_half_file(tmp_path):
    folder = make_run(tmp_path / "version_0", num_layers=20, num_epochs=50)
    args = [sys.executable, ROOT / "plots.py", folder, "-o", tmp_path / "figures"]
    process = warm.Popen(args, stdout=warm.PIPE, stderr=warm.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == ""
    assert not list((tmp_path / "figures").glob(".*"))


cells = st.one_of(st.floats().map(str), st.integers(-3, 3).map(str), st.text(max_size=5), st.just(""))


names = st.sampled_from(["epoch", "train_loss", "nc1/train/a", "nc1/test/a", "nc1/test/b", "dib/minimality/a"])


columns = st.lists(
    st.one_of(names, st.sampled_from(["dib/loss/b", "rank/stable/train/a", "x/a", "layer"]), st.text(max_size=4))
)


tables = st.tuples(columns, st.lists(st.lists(cells, max_size=8), max_size=5))


texts = st.one_of(
    tables.map(lambda table: "\n".join(map(",".join, [["epoch", *table[0]], *table[1], []])).encode()),
    st.binary(max_size=60),
)


flags = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)


keys = st.sampled_from(["model", "dataset", "learning_rate", "lr_range_test", "seed", "resumed_from", "provenance"])


hparams = st.one_of(
    st.dictionaries(keys, flags).map(lambda value: yaml.safe_dump(value).encode()),
    flags.map(repr).map(str.encode),
    st.binary(),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metrics=texts, heads=texts, lr_test=texts, hparams=hparams)
def test_nothing_that_a_folder_holds_ends_in_a_traceback(tmp_path, metrics, heads, lr_test, hparams):
    folder = tmp_path / "version_0"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.csv").write_bytes(metrics)
    (folder / "dib.csv").write_bytes(heads)
    (folder / "lr_range_test.csv").write_bytes(lr_test)
    (folder / "hparams.yaml").write_bytes(hparams)
    run = Run(folder)
    if not run.why_empty:
        for _, figure in plots.figures(run):
            figure.canvas.draw()
