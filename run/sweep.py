"""Several seeds of one command, each in a process and a folder of its own, and at the end their means.

    python main.py -m MLP -d MNIST --seed 0 1 2 3

The seeds run one after another; one that fails, even by a kill, does not stop the rest. In an array job of SLURM task
i runs the i-th seed instead, counted from 0.
"""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from run import command as program
from run import ranks, slurm
from run.errors import Interrupted
from run.tables import seeds_table

NOTE = "NOTE_OF_RESULTS"  # in a seed's environment: the open file in which it notes where its results lie
OUT_OF_TIME = 128 + signal.SIGUSR1


def sweep(args: Namespace, argv: Sequence[str]) -> int:
    """Run the seeds, or this task's one. Exit status: 0 all done, 1 some failed, 138 out of time and requeued."""
    seeds = slurm.own_share(args.seed)
    folders: dict[int, Path | None] = {}
    failed: dict[int, int] = {}
    try:
        for i, seed in enumerate(seeds, 1):
            say(args, f"seed {seed}, {i} of {len(seeds)}")
            status, folder = run(command(argv, args.name, seed), slurm.port_of_run(i))
            if status == OUT_OF_TIME:
                return status
            if status == 0:
                folders[seed] = folder
            else:
                failed[seed] = status
                print(f"{program.NAME}: seed {seed} failed with exit status {status}", file=sys.stderr)
    except Interrupted as signal_:
        signal_.advice = f"; finished are seeds {words(folders)} of {words(seeds)}"
        signal_.has_advanced = True  # the seed that ran has noted it where not
        raise
    finally:
        say(args, closing(folders))
    if failed:
        print(f"{program.NAME}: of seeds {words(seeds)} failed {words(failed)}", file=sys.stderr)
    return 1 if failed else 0


def say(args: Namespace, text: str) -> None:
    """Print a paragraph, once for all processes of a run."""
    if text and not args.quiet and not ranks.name_by_environment():
        print(f"{text}\n", flush=True)


def words(seeds: Sequence[int] | dict[int, object]) -> str:
    """`0 1 2`"""
    return " ".join(map(str, seeds)) or "none"


def command(argv: Sequence[str], name: str | None, seed: int) -> list[str]:
    """The command line of one seed: the last --seed and --name count."""
    own_name = [] if name is None else ["--name", f"{name}_seed{seed}"]
    return [*program.argv(), *argv, "--seed", str(seed), *own_name]


def run(line: Sequence[str], env: Mapping[str, str]) -> tuple[int, Path | None]:
    """Exit status of a run, as a shell has it, and its folder.

    It prints by itself: through a pipe its lines would come late and run into its progress bar. Signals are passed on.
    The run knows what to do about a lack of time; after any other signal, the sweep ends with it.
    """
    with tempfile.TemporaryFile() as note:
        env = os.environ | {"STARTED_BY": str(os.getpid()), NOTE: str(note.fileno())} | env
        status = status_of(subprocess.Popen(line, pass_fds=[note.fileno()], env=env))
        note.seek(0)
        folder = os.fsdecode(note.read())
    return (128 - status if status < 0 else status), Path(folder) if folder else None


def note_results(folder: Path) -> None:
    """Tell the sweep that started this run, if one did, where its results lie."""
    if NOTE in os.environ:
        os.write(int(os.environ[NOTE]), os.fsencode(folder))


def status_of(process: subprocess.Popen) -> int:
    """What a process ends with; negative for a signal."""
    try:
        return process.wait()
    except BaseException as error:
        if isinstance(error, Interrupted):
            process.send_signal(error.number)
            Interrupted.over()
        else:
            process.terminate()
        status = process.wait()
        if status != OUT_OF_TIME:
            raise
    return status


def closing(folders: dict[int, Path | None]) -> str:
    """Means over the finished seeds' last epochs, and how to draw them together; empty for fewer than two."""
    known = {seed: folder for seed, folder in folders.items() if folder is not None}
    if len(known) < 2:
        return ""
    last_rows = [last_row(folder / "metrics.csv") for folder in known.values()]
    return f"\n{seeds_table(list(known), last_rows)}\n\n{program.PLOTS_LINE} {shlex.join(map(str, known.values()))}"


def last_row(path: Path) -> dict[str, str]:
    """The last epoch of a run, empty cells left out."""
    with open(path, newline="", encoding="utf-8") as file:
        *_, row = csv.DictReader(file)
    return {name: cell for name, cell in row.items() if cell}
