"""Loss and accuracy over the epochs."""

import numpy as np
import pytest
from made_runs import legend_labels, lines, load, make_run, read

import plots
from figures.settings import compare

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_training_curves_show_both_sets_and_mark_the_measured_epochs(tmp_path):
    folder = make_run(tmp_path / "version_0", num_epochs=6, measured=(0, 1, 6))
    figure = plots.training_curves(load(folder))
    table = read(folder)
    for ax, quantity in zip(figure.axes, ("loss", "acc"), strict=True):
        for split in ("train", "test"):
            np.testing.assert_allclose(lines(ax)[split].get_ydata(), table[f"{split}_{quantity}"])
        assert list(lines(ax)["measured epoch"].get_xdata()) == [0, 1, 6]
    assert legend_labels(figure) == ["train", "test", "measured epoch"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["cross-entropy (nats)", "accuracy (%)"]


def test_the_axis_names_the_loss_that_the_runs_share(tmp_path):
    folders = [make_run(tmp_path / f"version_{i}", loss=loss) for i, loss in enumerate(("mse", "cross-entropy"))]
    one, both = (plots.training_curves(load(*some)).axes[0] for some in (folders[:1], folders))
    assert (one.get_ylabel(), both.get_ylabel()) == ("half the squared error", "loss")


def test_a_run_from_before_there_was_another_loss_is_of_one_setting_with_those_since(tmp_path):
    folders = make_run(tmp_path / "before"), make_run(tmp_path / "since", seed=1, loss="cross-entropy")
    assert compare(load(*folders)).num_settings == 1


@pytest.mark.parametrize(
    "num_epochs, measured, shown", [(200, None, 0), (200, range(0, 201, 2), 0), (20, (0, 1, 20), 3)]
)
def test_strokes_mark_measured_epochs_unless_these_are_all_or_a_bar(tmp_path, num_epochs, measured, shown):
    (run,) = load(make_run(tmp_path / "version_0", num_epochs=num_epochs, measured=measured, measures=("nc1",)))
    strokes = lines(plots.training_curves(run).axes[0]).get("measured epoch")
    assert (len(strokes.get_xdata()) if strokes else 0) == shown
