"""Several runs of one command, each in a process and a folder of its own, and at the end their means.

    python main.py -m MLP -d MNIST --seed 0 1 2 3
    python main.py -m MLP -d MNIST --seed 0 1 2 3 --sweep learning-rate 1e-3 1e-2 --sweep batch-norm yes no

They run one after another; one that fails, even by a kill, does not stop the rest. The same command takes a sweep up
where it stopped: what is finished is left as it is, what was killed goes on. In an array job of SLURM the tasks share
the runs out, counted from 0.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from run import command as program
from run import kept_means, listing, ranks, slurm
from run.earlier import FREE, EarlierRuns, identity, is_finished
from run.errors import Interrupted, WrongFlag
from run.grid import Point, points, words_for
from run.listed import RUNNING, Listed
from run.presets import DEFAULTS, OF_ONE_CALL, flags_of_run
from run.tables import seeds_table
from run.tables import table as as_text

NOTE = "NOTE_OF_RESULTS"  # in a seed's environment: the open file in which it notes where its results lie
OUT_OF_TIME = 128 + signal.SIGUSR1


def sweep(args: Namespace, argv: Sequence[str], get_args: Callable[[list[str]], Namespace]) -> int:
    """Do the runs, or this task's share. Exit status: 0 all done, 1 some failed, 138 out of time and requeued."""
    return Sweep(args, argv, get_args).run()


class Sweep:
    """All runs of a command; `flags` are those of each."""

    def __init__(self, args: Namespace, argv: Sequence[str], get_args: Callable[[list[str]], Namespace]):
        self.args, self.argv = args, argv
        self.points = points(args.sweep or [], args.seed)
        # A wrong value is told here, before anything runs.
        self.flags = {point: get_args(point.argv(argv, args.name)) for point in self.points}
        self._refuse_repetitions()
        self.earlier = EarlierRuns(args.log_dir)
        self.folders: dict[Point, Path | None] = {}
        self.failed: dict[Point, int] = {}
        self.elsewhere: list[Point] = []

    def _refuse_repetitions(self) -> None:
        """Two values in other words, as 0.01 and 1e-2, would be one run done twice."""
        labels: dict[Hashable, str] = {}
        for point, args in self.flags.items():
            same = labels.setdefault(identity(flags_of_run(args) | {"name": None}), point.label)
            if same != point.label:
                raise WrongFlag(f"argument --sweep: {same} and {point.label} are the same run")

    def run(self) -> int:
        """Do this process's share of the runs; the exit status."""
        share = slurm.own_share(self.points)
        try:
            for i, point in enumerate(share, 1):
                status = self._run(point, i, len(share))
                if status == OUT_OF_TIME:
                    return status
        except Interrupted as signal_:
            done = f"seeds {_seeds(self.folders)} of {_seeds(share)}"
            done = f"{len(self.folders)} of {len(share)} runs" if self.args.sweep else done
            signal_.advice = f"; finished are {done}; the same command goes on"
            signal_.has_advanced = True  # the run that ran has noted it where not
            raise
        finally:
            self._conclude()
        if self.failed:
            failed = "; ".join(p.label for p in self.failed) if self.args.sweep else _seeds(self.failed)
            of = f"{len(share)} runs" if self.args.sweep else f"seeds {_seeds(share)}"
            print(f"{program.NAME}: of {of} failed {failed}", file=sys.stderr)
        return 1 if self.failed else 0

    def _run(self, point: Point, i: int, num: int) -> int:
        """Do a run, or what is left of it."""
        label, earlier = point.label, self._earlier(point)
        if earlier and self._is_finished(point, earlier):
            self.folders[point] = earlier.folder
            say(self.args, f"{label}, {i} of {num}: done already in {earlier.folder}{_elsewhen(earlier)}")
            return 0
        if earlier and earlier.state == RUNNING:
            self.elsewhere.append(point)
            say(self.args, f"{label}, {i} of {num}: goes on in {earlier.folder}, in another process")
            return 0
        line = self._resumed(point, earlier) if earlier else command(point, self.argv, self.args.name)
        say(self.args, f"{label}, {i} of {num}" + (f": goes on in {earlier.folder}" if earlier else ""))
        status, folder = run(line, slurm.port_of_run(i))
        if status == 0:
            self.folders[point] = folder
        elif status != OUT_OF_TIME:
            self.failed[point] = status
            print(f"{program.NAME}: {label} failed with exit status {status}", file=sys.stderr)
        return status

    def _earlier(self, point: Point) -> Listed | None:
        """What there is of a run; a measurement is made anew."""
        return None if self.args.measure else self.earlier.find(flags_of_run(self.flags[point]))

    def _is_finished(self, point: Point, run: Listed) -> bool:
        return is_finished(run, vars(self.flags[point]))

    def _resumed(self, point: Point, earlier: Listed) -> list[str]:
        """The command line that goes on with a run where and how this command wants it."""
        flags = vars(self.flags[point])
        stored = DEFAULTS | earlier.flags
        changed = [name for name in flags if name in FREE and name not in (*OF_ONE_CALL, "log_dir")]
        changed = [name for name in changed if flags[name] is not None and flags[name] != stored[name]]
        words = [word for name in changed for word in words_for(name, flags[name])]
        return [*program.argv(), "--resume", str(earlier.folder), *words, *["--quiet"] * self.args.quiet]

    def _conclude(self) -> None:
        """Keep the means of all finished runs, those of other tasks too, and say them."""
        for point in self.points:
            earlier = None if point in self.folders else self._earlier(point)
            if earlier and self._is_finished(point, earlier):
                self.folders[point] = earlier.folder
        if ranks.name_by_environment():  # the first process does it
            return
        known = {point: self.folders[point] for point in self.points if self.folders.get(point)}
        if len(known) < 2:
            return
        path = Path(self.args.log_dir) / f"{self._stem()}_means.csv"
        kept_means.keep(path, [(point.values, point.seed, folder) for point, folder in known.items()])
        say(self.args, f"\n{self._table(known)}\n\nmeans in {path}\n{_plots_line(list(known.values()))}")

    def _table(self, known: Mapping[Point, Path]) -> str:
        """Means over the finished seeds' last epochs; of more settings than one, accuracies in a row for each."""
        if not self.args.sweep:
            rows = [kept_means.last_row(folder / "metrics.csv") for folder in known.values()]
            return seeds_table([point.seed for point in known], rows)
        table = listing.means([Listed(folder) for folder in known.values()])
        return as_text(*listing.texts(table))

    def _stem(self) -> str:
        """What to call the table of means: the same whenever the same flags are swept, for whatever values."""
        if self.args.name is not None:
            return self.args.name
        swept = {axis.flag.replace("-", "_") for axis in self.args.sweep or []}
        flags = {name: value for name, value in vars(self.args).items() if name not in (*FREE, *swept, "seed")}
        about = repr((sorted(flags.items()), sorted(swept), self.args.measure))
        return f"sweep_{hashlib.sha256(about.encode()).hexdigest()[:6]}"


def _seeds(some: Iterable[Point]) -> str:
    return " ".join(str(point.seed) for point in some) or "none"


def _plots_line(folders: Sequence[Path]) -> str:
    return f"{program.PLOTS_LINE} {shlex.join(map(str, folders))}"


def _elsewhen(run: Listed) -> str:
    """With which commit a run was made, if that is another one than now."""
    now, then = program.commit(), run.facts.get("git_commit")
    return f" (by commit {str(then)[:9]}; this is {now[:9]})" if now and then and now != then else ""


def say(args: Namespace, text: str) -> None:
    """Print a paragraph, once for all processes of a run."""
    if text and not args.quiet and not ranks.name_by_environment():
        print(f"{text}\n", flush=True)


def command(point: Point, argv: Sequence[str], name: str | None) -> list[str]:
    """The command line of one run."""
    return [*program.argv(), *point.argv(argv, name)]


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
