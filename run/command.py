"""How the program is called: `python main.py` in a checkout, `master_thesis` where it is installed."""

import functools
import os
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


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this is, with a `+` where files differ from it."""
    import subprocess

    # In a container the checkout is mounted, of an owner whom git does not trust by itself.
    git = ["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent)]
    try:
        # An installed program may lie within somebody else's checkout.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout: an image, which may know, or an archive
        return os.environ.get("GIT_COMMIT") or None
    return commit + ("+" if changed.stdout.strip() else "")
