"""How much longer a run takes with its measures: MLP on SZT as `make run` trains it, with them and without, in turn.

    python benchmarks/run_with_measures.py

Seconds are those of training, testing and measuring after start-up, from the runs' own `time/` columns. "again" is a
second run without measures: what differs there is noise.
"""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

MAIN = Path(__file__).parents[1] / "main.py"
RUNS = {
    "without": ["--no-nc", "--no-dib"],
    "again": ["--no-nc", "--no-dib"],
    "NC1": ["--no-dib"],
    "NC1 and DIB": [],
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seconds = {name: run(flags, Path(folder), name) for name, flags in RUNS.items()}
    for name, total in seconds.items():
        print(f"{name:<12} {total:7.2f} s   {total / seconds['without']:5.2f} ×")


def run(flags: list[str], folder: Path, name: str) -> float:
    """Seconds of all epochs of a run, measures included."""
    command = [sys.executable, MAIN, *flags, "--log-dir", folder, "--name", name, "--quiet", "--no-plots"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(folder / name / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return sum(float(row[column] or 0) for row in rows for column in row if column.startswith("time/"))


if __name__ == "__main__":
    main()
