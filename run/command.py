"""How the program is called: `python main.py` in a checkout, `master_thesis` where it is installed."""

import sys
from pathlib import Path

PACKAGE, _, _ = __package__.rpartition(".")  # empty in a checkout
NAME, LINE = (PACKAGE, PACKAGE) if PACKAGE else ("main.py", "python main.py")
RUNS_NAME = f"{PACKAGE}_runs" if PACKAGE else "runs.py"
PLOTS_NAME, PLOTS_LINE = (f"{PACKAGE}_plots",) * 2 if PACKAGE else ("plots.py", "python plots.py")


def argv() -> list[str]:
    """The words before the flags that start the program in a process of its own."""
    if PACKAGE:
        return [sys.executable, "-m", f"{PACKAGE}.main"]
    return [sys.executable, str(Path(__file__).parents[1] / "main.py")]
