"""What the benchmarks share: timing side by side, made-up data, and how a result is printed and kept."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import datasets
from run.files import write_whole
from run.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = Mapping[str, Any]


def arguments(doc: str, **extra: Mapping[str, Any]) -> argparse.Namespace:
    """The flags of every benchmark, and `extra` ones, {name: options of add_argument}."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its figures mean nothing")
    parser.add_argument("--output", type=Path, help=f"folder for the JSON (default: {RESULTS.relative_to(ROOT)})")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


class Times(dict[str, list[float]]):
    """Seconds of each candidate, one per round."""

    def median(self, name: str) -> float:
        return statistics.median(self[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over the rounds of one's seconds over the other's: what slows a whole round cancels."""
        return statistics.median(a / b for a, b in zip(self[name], self[to], strict=True))


def side_by_side(candidates: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> Times:
    """Seconds of each candidate, once per round, after a round that does not count."""
    return timed_by({name: partial(seconds_of, run, device) for name, run in candidates.items()}, rounds)


def timed_by(clocks: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: bool = True) -> Times:
    """The same for candidates that say themselves how many seconds they took. Every second round runs backwards."""
    for clock in clocks.values() if warm_up else ():
        clock()
    times = Times({name: [] for name in clocks})
    for i in range(rounds):
        for name in reversed(clocks) if i % 2 else clocks:
            times[name].append(clocks[name]())
    return times


def seconds_of(run: Callable[[], Any], device: str = "cpu") -> float:
    """How long one call takes, on a GPU until its work is done."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def cpu_seconds_of(run: Callable[[], Any]) -> float:
    """How long one call keeps CPUs busy, all threads together."""
    start = time.process_time()
    run()
    return time.process_time() - start


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def made_up(num_train: int, num_test: int, shape: Sequence[int] = (3, 32, 32)) -> datasets.Dataset:
    """Random images of 10 classes with CIFAR-10's augmentation: they cost what real ones do."""
    generator = torch.Generator().manual_seed(0)

    def half(num: int) -> datasets.Split:
        images = torch.randint(256, (num, *shape), dtype=torch.uint8, generator=generator)
        return datasets.Split(images, torch.arange(num) % 10)

    offset, scale = torch.full((shape[0],), 127.5), torch.full((shape[0],), 1 / 73.9)
    classes = tuple("0123456789")
    return datasets.Dataset(
        "made up", classes, half(num_train), half(num_test), offset, scale, datasets.IMAGE_SHIFT, True
    )


def in_fresh_process(*command: object, **env: str) -> subprocess.CompletedProcess:
    """This Python with these arguments, its output kept."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=os.environ | env)


def report(name: str, tables: Mapping[str, Sequence[Row]], args: argparse.Namespace) -> None:
    """Print the tables as they stand in the README, and leave them with their provenance in a JSON file."""
    now = {"date": time.strftime("%Y-%m-%d"), "command": command(), "hardware": hardware()}
    made_with = provenance() | {"git_commit": git_commit()}
    result = {"benchmark": name, "quick": args.quick, **now, **made_with, "tables": dict(tables)}
    print(markdown(result))
    if args.quick and not args.output:
        return
    folder = args.output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def markdown(result: Mapping[str, Any]) -> str:
    """A result as the README holds it: when, where and by which command, then its tables."""
    made_with = [f"{name} {result[name]}" for name in ("python", "torch", "torchvision", "lightning")]
    where = ", ".join([result["date"], result["hardware"], *made_with, f"commit {result['git_commit']}"])
    parts = [f"`{result['command']}`: {where}"]
    for title, rows in result["tables"].items():
        parts += [f"**{title}**", table(rows)]
    return "\n\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Three digits of a number."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def command() -> str:
    """What was typed, without this machine's paths."""
    threads = os.environ.get("OMP_NUM_THREADS")
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return " ".join([f"OMP_NUM_THREADS={threads}", *words] if threads else words)


def hardware() -> str:
    threads = torch.get_num_threads()
    cpu = f"{cpu_name()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str | None:
    """The commit in short, with a `+` where the program differs from it; results written meanwhile do not count."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks", ":!docs"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + "+" * bool(changed.stdout.strip())
