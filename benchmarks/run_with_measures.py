"""How much longer a run takes with its measures: MLP on SZT as `make run` trains it, with them and without, in turn.

    OMP_NUM_THREADS=1 python benchmarks/run_with_measures.py

Seconds are those of training, testing and measuring after start-up, from the runs' own `time/` columns. "again" is a
second run without measures: what differs from 1 there is noise.
"""

import csv
import tempfile
from pathlib import Path

from common import ROOT, arguments, in_fresh_process, report, timed_by

RUNS = {
    "none": ["--no-nc", "--no-dib"],
    "none, again": ["--no-nc", "--no-dib"],
    "NC1 of all layers, every epoch": ["--no-dib"],
    "NC1 and DIB of all layers, every epoch": [],
}


def main() -> None:
    args = arguments(__doc__)
    epochs, rounds = (1, 1) if args.quick else (50, 2)
    runs = dict(list(RUNS.items())[:1]) if args.quick else RUNS
    clocks = {name: lambda flags=flags: seconds([*flags, "-e", str(epochs)]) for name, flags in runs.items()}
    times = timed_by(clocks, rounds, warm_up=False)
    rows = [{"measures": name, "seconds": times.median(name), "ratio": times.ratio(name, "none")} for name in runs]
    report("run_with_measures", {f"MLP on SZT, {epochs} epochs": rows}, args)


def seconds(flags: list[str]) -> float:
    """Of all epochs of a run, measures included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / "main.py", *flags, "--accelerator", "cpu", "--log-dir", folder, "--quiet", "--no-plots"]
        done = in_fresh_process(*command)
        assert done.returncode == 0, done.stderr
        with open(Path(folder) / "version_0" / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    return sum(float(row[column] or 0) for row in rows for column in row if column.startswith("time/"))


if __name__ == "__main__":
    main()
