"""The page of the most telling panels."""

import pytest
from made_runs import load, make_run, title

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
