"""Runs in processes of their own that cost no import: forked from a server that has imported everything already.

They are real processes, so that they can be killed; `tests/test_robustness.py` and `tests/torture.py` use them.
"""

import itertools
import multiprocessing
import os
import pkgutil
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = ("main", "utils", "lr_range_test", "torchvision", "yaml", "pytest")
SHORT = ["-e", "6", "--rank", "--dib-epochs", "1", "--dib-save", "--save-every", "3", "--no-plots", "--quiet"]
Meddling = Callable[[], object]  # what is done in the process before the run starts


class Run:
    """`python main.py ARGV` in a folder, in the background; what it prints lies in files, read after its end."""

    def __init__(
        self, argv: Sequence[str], folder: Path, meddle: Meddling | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self._told = folder / f".told_{time.monotonic_ns()}"
        arguments = list(argv), folder, self._told, meddle, dict(env or {})
        self._process = _context().Process(target=_run, args=arguments)
        self._process.start()

    def wait(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Until something holds, which must be before the run ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.is_alive(), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def send(self, number: int) -> None:
        """Send a signal, if the process still lives."""
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def end(self, seconds: float = 240) -> tuple[int, str]:
        """Exit status (negative: by which signal it was killed) and all that was printed."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "the run does not end"
        return self._process.exitcode, self._told.read_text() if self._told.exists() else ""


def finish(argv: Sequence[str], folder: Path, **options: object) -> tuple[int, str]:
    """Run to the end."""
    return Run(argv, folder, **options).end()


def free_port() -> int:
    """A port at which nobody listens now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def task(number: int, num: int = 2, nodes: int = 1) -> dict[str, str]:
    """What SLURM tells a task of `num` on each node; nothing where Lightning is to start the others."""
    node, local = divmod(number, num)
    return {
        "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": str(nodes * num),
        "SLURM_NTASKS_PER_NODE": str(num), "SLURM_PROCID": str(number), "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node), "SLURM_JOB_NODELIST": "localhost",
    }  # fmt: skip


def start_tasks(
    argv: Sequence[str],
    folder: Path,
    num: int = 2,
    nodes: int = 1,
    env: Mapping[str, str] | None = None,
    **options: object,
) -> list[Run]:
    """`srun --nodes NODES --ntasks-per-node NUM python main.py ARGV`, without SLURM."""
    common = {"MASTER_PORT": str(free_port()), **(env or {})}
    argv = [*argv, "--devices", str(num), "--num-nodes", str(nodes), "--accelerator", "cpu"]
    tasks = [task(number, num, nodes) for number in range(nodes * num)]
    return [Run(argv, folder, env=each | common, **options) for each in tasks]


def run_tasks(argv: Sequence[str], folder: Path, **options: object) -> tuple[list[int], str]:
    """Statuses of all tasks, and all that they printed."""
    ends = [run.end() for run in start_tasks(argv, folder, **options)]
    return [status for status, _ in ends], "".join(text for _, text in ends)


def _context() -> multiprocessing.context.ForkServerContext:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, dict.fromkeys(paths))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*MODULES, "processes"])
    return context


def _run(argv: list[str], folder: Path, told: Path, meddle: Meddling | None, env: dict[str, str]) -> None:
    import main

    os.chdir(folder)
    os.environ.update(env)
    file = os.open(told, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if meddle:
        meddle()
    sys.exit(main.main(argv))


def as_nobody(folder: Path) -> None:
    """Give up root's right to write everywhere; the folder goes to the new owner."""
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        os.setgid(65534)
        os.setuid(65534)


def at_call(name: str, number: int, do: Callable[[], object], after: bool = False) -> None:
    """From now on the call of this number of a function, "module:Class.method", does something before or after."""
    owner, _, attribute = name.rpartition(".") if "." in name.partition(":")[2] else name.rpartition(":")
    holder = pkgutil.resolve_name(owner)
    original, calls = getattr(holder, attribute), itertools.count(1)

    def meddled(*args: object, **kwargs: object) -> object:
        is_due = next(calls) == number
        if is_due and not after:
            do()
        result = original(*args, **kwargs)
        if is_due and after:
            do()
        return result

    setattr(holder, attribute, meddled)


def signal_at(name: str, number: int, signal_number: int, after: bool = False) -> None:
    """The process sends itself a signal at that call, and notes when."""
    at_call(name, number, partial(_signal_itself, signal_number), after)


def _signal_itself(number: int) -> None:
    Path("signalled").write_text(str(time.time()))
    os.kill(os.getpid(), number)


def press_often() -> None:
    """Ctrl-C three times in training, and again and again while the run ends."""
    for name, number in (
        ("classifier:Classifier.training_step", 20),
        ("run.console:Console.teardown", 1),
        ("run.run_folder:RunFolder.__exit__", 1),
        ("run.ending:ended", 1),
    ):
        at_call(name, number, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(3)])


def interrupt_in_a_destructor() -> None:
    """Ctrl-C where Python loses what is raised."""
    at_call("classifier:Classifier.training_step", 20, lambda: Unlucky() and None)


class Unlucky:
    def __del__(self) -> None:
        _signal_itself(signal.SIGINT)


def limit_memory(num_bytes: int) -> None:
    """Allow that much more than the process has now, as a batch system does."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def columns_without_times(path: Path) -> list[list[str]]:
    """The cells of `metrics.csv`, character for character, without the columns time/…"""
    header, *lines = (line.split(",") for line in path.read_text().splitlines())
    kept = [i for i, name in enumerate(header) if not name.startswith("time/")]
    return [[line[i] for i in kept] for line in (header, *lines)]


def assert_same_run(run: Path, whole: Path) -> None:
    """Numbers of both tables, and weights, bit for bit; every epoch once; nothing left over."""
    import torch

    rows = columns_without_times(whole / "metrics.csv")
    assert columns_without_times(run / "metrics.csv") == rows
    assert [row[0] for row in rows[1:]] == [str(epoch) for epoch in range(len(rows) - 1)]
    if (whole / "dib.csv").exists():
        assert (run / "dib.csv").read_bytes() == (whole / "dib.csv").read_bytes()
    assert arrays_of(run) == arrays_of(whole)
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    for name in names:
        states = [torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (run, whole)]
        state, expected = (dict(tensors(content.get("state_dict", content))) for content in states)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected), name
    assert leftovers(run) == []


def arrays_of(run: Path) -> dict[Path, bytes]:
    """All files under `arrays/`, saved activations too, by their path in it."""
    return {path.relative_to(run): path.read_bytes() for path in run.glob("arrays/**/*") if path.is_file()}


def tensors(state: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """All tensors in nested dicts, by their path."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from tensors(value, f"{prefix}{name}/")
        elif hasattr(value, "shape"):
            yield prefix + name, value


def leftovers(folder: Path) -> list[Path]:
    """Files that a writer began and did not finish."""
    return list(folder.rglob("*.tmp"))


def moments(num: int, duration: float, seed: int) -> Iterator[float]:
    """Random moments, one in each of `num` equal parts of the duration."""
    draw = random.Random(seed)
    return (duration * (i + draw.random()) / num for i in range(num))


def timed_whole_run(line: Sequence[str], folder: Path) -> float:
    """Make the run `whole` that is never interrupted; the seconds from its hparams.yaml to its end."""
    run = Run([*line, "--name", "whole"], folder)
    run.wait((folder / "lightning_logs/whole/hparams.yaml").exists)
    start = time.monotonic()
    status, told = run.end()
    assert status == 0, told
    return time.monotonic() - start


def assert_killed_ends_as_whole(line: Sequence[str], folder: Path, number: int) -> None:
    """A run killed as it puts its file of this number in place, and resumed, equals one that nothing disturbed."""
    status, told = finish([*line, "--name", "whole"], folder)
    assert status == 0, told
    meddle = partial(signal_at, "run.files:os.replace", number, signal.SIGKILL)
    status, _ = Run([*line, "--name", "cut"], folder, meddle=meddle).end()
    assert status == -signal.SIGKILL
    status, told = finish(["--resume", "lightning_logs/cut"], folder)
    assert status == 0, told
    assert_same_run(folder / "lightning_logs/cut", folder / "lightning_logs/whole")


def kill_and_resume(line: Sequence[str], folder: Path, name: str, delays: Sequence[float]) -> list[int]:
    """Start a run, kill it after the first delay, resume it, kill it after the second, …; then let it end.

    Returns how many epochs stood in its table at each kill; the run must equal `whole`.
    """
    run_folder = folder / "lightning_logs" / name
    epochs = []
    for i, delay in enumerate(delays):
        run = Run(["--resume", str(run_folder)] if i else [*line, "--name", name], folder)
        run.wait((run_folder / "hparams.yaml").exists)
        time.sleep(delay)
        run.send(signal.SIGKILL)
        status, told = run.end()
        assert status in (-signal.SIGKILL, 0), told
        table = run_folder / "metrics.csv"
        epochs.append(len(table.read_text().splitlines()) - 1 if table.exists() else 0)
    status, told = finish(["--resume", str(run_folder)], folder)
    assert status == 0, told
    assert_same_run(run_folder, folder / "lightning_logs/whole")
    return epochs
