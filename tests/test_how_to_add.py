"""docs/extending.md, word for word: its additions, put where it says, make a program that runs."""

import ast
import csv
import re
import shutil
import sys

import pytest
import warm
from processes import ROOT

import networks
from run.errors import UserError
from run.presets import IMAGE_MODELS, MODELS

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
STEPS = (  # how the page says where a piece of code goes
    re.compile(r"In\s`(?P<file>[\w/.]+)`,\sbefore\s`(?P<before>\w+)`:\n\n```python\n(?P<block>.*?)```", re.S),
    re.compile(r"A\snew\sfile,\s`(?P<file>[\w/.]+)`:\n\n```python\n(?P<block>.*?)```", re.S),
    re.compile(r"`(?P<entry>[^`\n]+)`\sinto\s`(?P<into>\w+)`\sof\s`(?P<file>[\w/.]+)`"),
    re.compile(r"this\sinto\s`(?P<into>\w+)`\sof\s`(?P<file>[\w/.]+)`:\n\n```python\n(?P<entry>.*?)```", re.S),
)


@pytest.fixture
def program(tmp_path):
    """A copy of the program, to add to."""
    program = tmp_path / "program"
    program.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, program)
    for folder in ("figures", "measures", "run"):
        shutil.copytree(ROOT / folder, program / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return program


def add(what, program):
    """Do all that the page says on how to add this."""
    text = PAGE.partition(f"\n## A {what}\n")[2].partition("\n## ")[0]
    steps = [match.groupdict() for step in STEPS for match in step.finditer(text)]
    assert len(steps) == text.count("```python") + len(STEPS[2].findall(text)) > 1
    for step in steps:
        path = program / step["file"]
        content = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(changed(content, **step), encoding="utf-8")


def changed(content, file, block="", before="", into="", entry=""):
    """A file's content with a block put before an assignment, or an entry at the end of its value."""
    if not before and not into:
        assert not content, f"{file} is no new file"
        return block
    [node] = [node for node in ast.parse(content).body if (before or into) in assigned(node)]
    if before:
        lines = content.splitlines(keepends=True)
        return "".join([*lines[: node.lineno - 1], f"{block}\n\n", *lines[node.lineno - 1 :]])
    literal = ast.get_source_segment(content, node.value)
    return content.replace(literal, f"{literal[:-1].rstrip().removesuffix(',')}, {entry.strip()}{literal[-1]}", 1)


def assigned(node):
    """The names that a statement gives a value."""
    targets = {ast.Assign: lambda: node.targets, ast.AnnAssign: lambda: [node.target]}.get(type(node), list)()
    return [target.id for target in targets if isinstance(target, ast.Name)]


def output(program, *argv):
    """What `python ARGV` prints in that program; it must end well and complain of nothing."""
    done = warm.run([sys.executable, *argv], cwd=program, capture_output=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_the_network_of_the_page_trains_on_vectors_and_is_measured(program):
    add("network", program)
    told = output(program, "main.py", "-m", "TwoLayers", "-d", "SZT", "-e", "2", "--dib-epochs", "1", "--no-plots")
    assert "TwoLayers: 962 parameters, measured at hidden" in told and "nan" not in told


def test_the_dataset_of_the_page_is_learnt(program):
    add("dataset", program)
    told = output(program, "main.py", "-m", "MLP", "-d", "TwoMoons", "-e", "20", "--no-dib", "--no-nc", "--no-plots")
    assert "data     TwoMoons: 1,000 training and 1,000 test samples, 2 classes" in told
    # A line between the moons is right for seven points in eight.
    assert float(re.search(r"at best (.*)% after", told)[1]) > 95


def test_the_measure_of_the_page_has_flag_column_title_and_figures(program):
    add("measure", program)
    help_text = output(program, "main.py", "--help")
    assert re.search(r"--length, --no-length\s+mean length of the activations", help_text)
    told = output(program, "main.py", "--length", "--log-dir", "length", "-e", "1", "--no-dib", "--no-nc", "--no-plots")
    assert re.search("^epoch 0 → 1 +length test$", told, re.M)
    first, last = csv.DictReader((program / "length/version_0/metrics.csv").open(encoding="utf-8"))
    # The last layer has three units between -1 and 1.
    assert all(
        0 < float(row[f"length/{split}/hidden5"]) < 3**0.5 for row in (first, last) for split in ("train", "test")
    )
    assert "time/length" in last
    assert {"plots/length_over_epochs.png", "plots/heat_map_length_test.png"} <= set(
        output(program, "plots.py", "length").split()
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_models_refused_on_vectors_are_those_that_cannot_take_them(model):
    if model in IMAGE_MODELS:
        with pytest.raises(UserError, match="needs images"):
            networks.build_network(model, (12,), 2)
    else:
        networks.build_network(model, (12,), 2)
