"""plots.ipynb, run from top to bottom in a real kernel, on runs made here."""

import ast
import base64
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from jupyter_client.manager import start_new_kernel
from made_runs import FIGURES, make_run

MEASURES = ("nc1", "nc1_chance", "dib", "rank", "clusters")
ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "plots.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
# What a test wants to know of a figure; runs in the kernel, where the figure is.
DESCRIBE = """
def describe(figure):
    return [
        {
            "labels": [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()],
            "scales": [ax.get_xscale(), ax.get_yscale()],
            "lines": {line.get_label(): [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]
                      for line in ax.get_lines()},
            "shapes": [mesh.get_array().shape for mesh in ax.collections if mesh.get_array() is not None],
            "texts": [text.get_text() for text in ax.texts],
        }
        for ax in figure.axes
    ]
"""


class Kernel:
    """A kernel in a folder, as Jupyter starts it."""

    def __init__(self, folder):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=environment)
        assert self.run(DESCRIBE)["status"] == "ok"

    def run(self, code, **expressions):
        """The reply to a cell, with all messages that it sent before under `messages`."""
        messages = []
        reply = self.client.execute_interactive(
            code, user_expressions=expressions, output_hook=messages.append, allow_stdin=False, timeout=120
        )
        return reply["content"] | {"messages": messages}

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


def run_notebook(kernel, runs=()):
    """Runs all cells with `runs` in the first; the panels of each figure by the code that drew it."""
    figures = {}
    for code in CODE:
        code = code.replace("RUNS = []", f"RUNS = {[str(run) for run in runs]}")
        draws = code.startswith("plots.")
        reply = kernel.run(code, panels="__import__('json').dumps(describe(_))" if draws else "0")
        assert reply["status"] == "ok", reply
        assert not [message for message in reply["messages"] if message["content"].get("name") == "stderr"]
        if draws:
            pictures = [message["content"]["data"]["image/png"] for message in reply["messages"] if pictured(message)]
            assert base64.b64decode(pictures[0]).startswith(b"\x89PNG") and len(pictures) == 1
            text = reply["user_expressions"]["panels"]["data"]["text/plain"]
            figures[code] = json.loads(ast.literal_eval(text))
    return figures


def pictured(message):
    return "image/png" in message["content"].get("data", {})


def test_the_notebook_is_clean_and_holds_no_logic():
    notebook = json.loads((ROOT / "plots.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code_cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells)
    assert CODE[0].startswith("RUNS = []")
    for code in CODE[2:]:
        (statement,) = ast.parse(code).body
        assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def test_the_notebook_explains_every_figure_before_it_is_drawn():
    for before, cell in itertools.pairwise(CELLS):
        if "".join(cell["source"]).startswith("plots."):
            assert before["cell_type"] == "markdown" and "look" in "".join(before["source"])
    drawn = {code.partition("(")[0].removeprefix("plots.") for code in CODE[2:]}
    assert drawn == {figure.__name__ for figure in FIGURES}


def test_by_default_the_newest_run_is_drawn_from_its_files(tmp_path, kernel):
    older, newest = (
        make_run(tmp_path / "lightning_logs" / f"version_{i}", seed=i, lr_test=True, measures=MEASURES)
        for i in range(2)
    )
    for path in older.iterdir():
        os.utime(path, (0, 0))
    figures = run_notebook(kernel)
    table = pd.read_csv(newest / "metrics.csv")
    loss, accuracy = figures["plots.training_curves(runs)"]
    np.testing.assert_allclose(loss["lines"]["test"], [table["epoch"], table["test_loss"]])
    np.testing.assert_allclose(accuracy["lines"]["train"], [table["epoch"], table["train_acc"]])
    train, test = figures["plots.nc1_over_epochs(runs)"]
    np.testing.assert_allclose(test["lines"]["avgpool"][1], table["nc1/test/avgpool"])
    assert list(train["lines"]) == ["layer1.0", "layer1.1", "avgpool"]
    assert train["scales"] == ["linear", "log"] and "NC1" in train["labels"][2]
    depth, _ = figures["plots.nc1_over_depth(runs)"]
    assert "chance, epoch 5" in depth["lines"] and any(label.startswith("5: −") for label in depth["lines"])
    (minimality,) = figures["plots.minimality_over_epochs(runs)"]
    np.testing.assert_allclose(minimality["lines"]["avgpool"][1], table["dib/minimality/avgpool"])
    assert minimality["labels"][1:] == ["epoch (0: before training)", "minimality (10⁻³ nats)"]
    assert figures['plots.heat_map(runs, "nc1/test")'][0]["shapes"] == [[3, 6]]
    assert len(figures["plots.rank_over_depth(runs)"]) == 3
    assert len(figures["plots.head_losses(runs)"]) == 3
    assert figures["plots.lr_range_test(runs)"][0]["scales"][0] == "log"
    assert len(figures["plots.summary(runs)"]) == 12
    coverage, purity = figures["plots.clusters_over_epochs(runs)"][:2]
    np.testing.assert_allclose(coverage["lines"]["avgpool"][1], table["clusters/coverage/test/avgpool"])
    assert coverage["labels"][2].startswith("coverage") and purity["labels"][2].startswith("purity of clustered")
    assert figures["plots.cka_between_epochs(runs)"][0]["shapes"] == [[2, 2]]


def test_several_runs_stand_side_by_side_and_say_what_they_did_not_measure(tmp_path, kernel):
    runs = []
    for i in range(4):
        flags = {"nonlinearity": ("tanh", "relu")[i // 2], "measures": ("nc1",)}
        runs.append(make_run(tmp_path / f"version_{i}", 20, 3, seed=i % 2, **flags))
    figures = run_notebook(kernel, runs)
    titles = [panel["labels"][0] for panel in figures["plots.nc1_over_epochs(runs)"]]
    assert titles == ["nonlinearity tanh (2 runs)", "nonlinearity relu (2 runs)", "", ""]
    assert all(len(panel["lines"]) == 20 for panel in figures["plots.nc1_over_epochs(runs)"])
    (panel,) = figures["plots.rank_over_epochs(runs)"]
    assert " ".join(panel["texts"][0].split()).endswith("main.py measures it with --rank.")


def test_a_folder_without_runs_gives_a_sentence_and_no_traceback(tmp_path, kernel):
    (tmp_path / "lightning_logs").mkdir()
    reply = kernel.run("\n".join(CODE[:2]))
    assert reply["status"] == "error"
    assert reply["traceback"] == ["there is no run to draw in lightning_logs"]
