"""How long the program takes to answer, and to begin.

    OMP_NUM_THREADS=1 python benchmarks/startup.py

Claims: `--help` and a mistyped flag take less than 0.5 s; from `python main.py` to the first training step it takes at
most 1.3 times the bare import of lightning and torchvision. Each is a process of its own from start to end; those that
import torch leave without taking it down. "again" is the bare import a second time: what differs from 1 there is noise.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial

from common import ROOT, arguments, in_fresh_process, report, seconds_of, timed_by

BARE_IMPORT = "import lightning, torchvision, os; os._exit(0)"
FIRST_STEP = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import main, classifier
classifier.Classifier.training_step = lambda *_: os._exit(0)
main.main()
"""


def main() -> None:
    args = arguments(__doc__)
    rounds = 1 if args.quick else 3
    with tempfile.TemporaryDirectory() as log_dir:
        first_step = ("-c", FIRST_STEP, ROOT, "--accelerator", "cpu", "--quiet", "--log-dir", log_dir)
        ways = {
            "import lightning, torchvision": process("-c", BARE_IMPORT),
            "again": process("-c", BARE_IMPORT),
            "main.py to the first training step": process(*first_step, "--no-nc", "--no-dib"),
            "the same, with the measures before training": process(*first_step),
            "main.py --help": process(ROOT / "main.py", "--help"),
            "main.py --epoch 3": process(ROOT / "main.py", "--epoch", "3", status=2),
        }
        if args.quick:
            ways = dict(list(ways.items())[::2])
        times = timed_by({way: partial(seconds_of, run) for way, run in ways.items()}, rounds, warm_up=not args.quick)
    bare = next(iter(ways))
    rows = [{"": way, "seconds": times.median(way), "ratio": times.ratio(way, bare)} for way in ways]
    report("startup", {"Start-up": rows}, args)


def process(*command: object, status: int = 0) -> Callable[[], None]:
    """A run of Python that ends with that status."""

    def run() -> None:
        done = in_fresh_process(*command)
        if done.returncode != status:
            sys.exit(f"{command} ended with {done.returncode}: {done.stderr}")

    return run


if __name__ == "__main__":
    main()
