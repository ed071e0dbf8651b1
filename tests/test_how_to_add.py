"""The README's "How to add", word for word: its snippets, put where it says, make a program that runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from processes import ROOT

import networks
from run.errors import UserError
from run.presets import IMAGE_MODELS, MODELS

SHORT = ["-e", "1", "--dib-epochs", "1", "--no-plots"]


@pytest.fixture
def program(tmp_path):
    """A copy of the program, to add to."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def section(what):
    """What the README says on how to add this, and its snippet."""
    how_to_add = (ROOT / "README.md").read_text(encoding="utf-8").partition("## How to add")[2].partition("\n## ")[0]
    [(text, snippet)] = re.findall(rf"\*\*A {what}\*\*:(.*?)```python\n(.*?)```", how_to_add, re.S)
    return " ".join(text.split()), snippet


def insert(path, before, text):
    """Put text before the first place where the file has these words."""
    content = path.read_text(encoding="utf-8")
    assert before in content
    path.write_text(content.replace(before, text + before, 1), encoding="utf-8")


def output(program, *argv):
    """What `python main.py ARGV` prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "main.py", *argv, *SHORT], cwd=program, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_network_of_the_readme_trains_on_vectors(program):
    text, snippet = section("network")
    assert "to `NETWORKS` there and to `MODELS` in `flags.py`" in text
    insert(program / "networks.py", "NETWORKS = {", f"{snippet}\n\n")
    insert(program / "networks.py", '"MLP": MLP', '"TwoLayers": TwoLayers, ')
    insert(program / "flags.py", '"MLP", "MNISTNet"', '"TwoLayers", ')
    told = output(program, "-m", "TwoLayers", "-d", "SZT")
    assert "measured at hidden" in told and "nan" not in told


def test_the_dataset_of_the_readme_is_trained_on(program):
    text, snippet = section("dataset")
    assert "named in `DATASETS` there and in `flags.py`" in text
    insert(program / "datasets.py", "DATASETS: dict", f"{snippet}\n\n")
    insert(program / "datasets.py", '"SZT": lambda', '"HalfMoons": _half_moons, ')
    insert(program / "flags.py", '"SZT", "MNIST"', '"HalfMoons", ')
    assert "data     HalfMoons: 1,000 training" in output(program, "-m", "MLP", "-d", "HalfMoons")


def test_the_measure_of_the_readme_stands_in_table_and_closing_table(program):
    text, snippet = section("measure")
    module, imported, added = re.search(r"`(\w+\.py)`.*?`(from [^`]*)`.*?`(chosen\.append[^`]*)`", text).groups()
    (program / module).write_text(snippet, encoding="utf-8")
    insert(program / "utils.py", "from rank import", f"{imported}\n")
    insert(program / "utils.py", "    return chosen\n", f"    {added}\n")
    told = output(program, "--no-dib")
    [head] = [line for line in told.splitlines() if line.startswith("epoch 0 → 1")]
    assert head.split()[-1] == "norm"
    header = (program / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"norm/hidden1", "norm/hidden5", "time/norm"} <= set(header)


@pytest.mark.parametrize("model", MODELS)
def test_the_models_refused_on_vectors_are_those_that_cannot_take_them(model):
    if model in IMAGE_MODELS:
        with pytest.raises(UserError, match="needs images"):
            networks.build_network(model, (12,), 2)
    else:
        networks.build_network(model, (12,), 2)
