"""The benchmarks run and leave what they promise. No figure is looked at: a test machine may have other work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import warm

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
PARTS = {"common", "one_nc1", "refresh_readme"}  # no benchmarks of their own
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - PARTS)
# Those that look neither at how a process starts nor at its memory start warm ones (`warm.py`).
ASK_FOR_RUNS = {"devices.py", "quantities.py", "run_with_measures.py"}
WITH_WARM_PROCESSES = """
import os, runpy, sys
tests, script = sys.argv[1:3]
sys.path[:0] = [os.path.dirname(script), tests]
import common, warm
def in_warm_process(*command, **env):
    return warm.run([sys.executable, *map(str, command)], capture_output=True, env=os.environ | env)
common.in_fresh_process = in_warm_process
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""
KEYS = {"benchmark", "quick", "date", "command", "hardware", "python", "torch", "torchvision", "lightning",
        "git_commit", "tables"}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs_and_leaves_a_json_file_with_its_provenance(script, tmp_path):
    done = run(f"{script}.py", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{script}.json").read_text(encoding="utf-8"))
    assert set(result) >= KEYS and result["benchmark"] == script and result["quick"]
    for title, rows in result["tables"].items():
        assert rows and all(row.keys() == rows[0].keys() for row in rows)
        assert title in done.stdout


def test_the_readme_has_a_section_for_every_benchmark():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert all(f"<!-- {script} -->" in text and f"{script}.py" in text for script in SCRIPTS)


def run(*command: str) -> subprocess.CompletedProcess:
    asks = ("-c", WITH_WARM_PROCESSES, TESTS) if command[0] in ASK_FOR_RUNS else ()
    return warm.run([sys.executable, *asks, BENCHMARKS / command[0], *command[1:]], capture_output=True)
