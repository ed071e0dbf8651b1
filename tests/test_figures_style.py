"""Colors that stand out, alike under any style."""

import itertools

import matplotlib
import pytest
from made_runs import FIGURES, contrast, legend_labels, load, make_run

import plots
from figures.settings import compare
from figures.style import OKABE_ITO, setting_styles, shades

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_many_settings_take_their_colors_from_the_flag_that_varies_most_and_dashes_from_the_other(tmp_path):
    for i, (rate, nonlinearity) in enumerate(itertools.product((1.0, 0.1, 0.01, 0.001), ("relu", "tanh", "gelu"))):
        flags = {"learning_rate": rate, "nonlinearity": nonlinearity}
        make_run(tmp_path / f"version_{i}", num_epochs=1, measures=(), **flags)
    styles = setting_styles(compare(load(tmp_path)).settings)
    colors = [style["color"] for style in styles]
    assert all(len(set(colors[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert [contrast(color) for color in colors] == sorted((contrast(color) for color in colors), reverse=True)
    assert len({str(style) for style in styles}) == 12


@pytest.mark.parametrize("num_layers", [2, 30])
def test_every_line_stands_out_against_white(tmp_path, num_layers):
    make_run(tmp_path / "version_0", num_layers, num_epochs=8, lr_test=True)
    runs = load(tmp_path)
    drawn = [line for figure in FIGURES for ax in figure(runs).axes for line in ax.get_lines()]
    assert min(contrast(line.get_color()) for line in drawn) >= 2.5
    assert min(map(contrast, OKABE_ITO)) >= 2.5


@pytest.mark.parametrize("name", ["viridis", "plasma"])
@pytest.mark.parametrize("num", [1, 2, 30])
def test_shades_run_from_light_to_dark_and_none_is_too_light(name, num):
    contrasts = list(map(contrast, shades(name, num)))
    assert contrasts == sorted(contrasts) and min(contrasts) >= 2.5


def test_names_from_outside_are_drawn_as_they_are(tmp_path):
    folder = make_run(tmp_path / "version_0", dataset="/data/$a_$b/数据_100%")
    for name in ("metrics.csv", "dib.csv", "hparams.yaml"):
        path = folder / name
        path.write_text(path.read_text().replace("layer1.0", "_$x").replace("layer1.1", "$\\frac$"))
    for figure in FIGURES:
        drawn = figure(load(folder))
        drawn.canvas.draw()  # warnings are errors in the command line's test; a broken formula raises here
    assert legend_labels(plots.nc1_over_epochs(load(folder)))[0] == r" _\$x"


def test_figures_look_the_same_under_a_dark_style_and_leave_it_alone(run_folder):
    with matplotlib.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        figure = plots.training_curves(load(run_folder))
        assert dict(matplotlib.rcParams) == before
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert figure.axes[0].xaxis.label.get_color() == "black"
