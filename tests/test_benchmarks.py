"""The benchmarks run and leave what they promise. No figure is looked at: a test machine may have other work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = {"common", "one_nc1", "refresh_readme"}  # no benchmarks of their own
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - PARTS)
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
    return subprocess.run([sys.executable, BENCHMARKS / command[0], *command[1:]], capture_output=True, text=True)
