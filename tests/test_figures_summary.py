"""The page of the most telling panels."""

import numpy as np
import pytest
from made_runs import lines, load, make_run, read, title

import plots

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_a_summary_says_that_it_shows_one_of_several_settings(tmp_path):
    for i in range(3):
        make_run(tmp_path / f"version_{i}", num_epochs=1, learning_rate=2.0**-i)
    assert title(plots.summary(load(tmp_path))).startswith("Summary of the first of 3 settings, learning-rate 1.0")


def test_every_panel_of_the_summary_has_a_title(run_folder):
    titles = [ax.get_title() for ax in plots.summary(load(run_folder)).axes]
    assert len(titles) == len(set(titles)) == 9 and all(titles)


@pytest.mark.parametrize("split", ["test", "train"])
def test_purity_stands_beside_coverage_on_axes_from_0_to_1(tmp_path, split):
    folder = make_run(tmp_path / "version_0", measures=("clusters",), cluster_set=split)
    panels = {ax.get_title(): ax for ax in plots.summary(load(folder)).axes if "Clusters" in ax.get_title()}
    assert list(panels) == ["Clusters: coverage", "Clusters: purity", "Clusters: purity, noise as wrong"]
    for name, ax in zip(("coverage", "purity", "purity_all"), panels.values(), strict=True):
        expected = read(folder)[f"clusters/{name}/{split}/avgpool"].dropna()
        np.testing.assert_allclose(lines(ax)["avgpool"].get_ydata(), expected)
        assert ax.get_ylim()[0] < 0 and ax.get_ylim()[1] > 1 and f"{split} set" in ax.get_ylabel().replace("\n", " ")


def test_without_any_cluster_there_is_coverage_and_no_panel_of_purity(tmp_path):
    folder = make_run(tmp_path / "version_0", num_epochs=0, measures=("clusters",))
    titles = [ax.get_title() for ax in plots.summary(load(folder)).axes]
    assert "Clusters: coverage" in titles and "Clusters: purity" not in titles
