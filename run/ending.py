"""How the program ends: with which exit status, and with which sentence when it ends early."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from run import command, ranks, slurm
from run.errors import Interrupted, UserError, is_out_of_memory, is_too_large, write_what_the_terminal_can

FORMAT = warnings.formatwarning


def status_of(story: Callable[[], int]) -> int:
    """Do it, and say in a sentence why if it cannot be done. 0 done, 1 error, 2 wrong flag, 128 + a signal's number."""
    Interrupted.on(signal.SIGINT, signal.SIGTERM, *slurm.time_out_signals())
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    write_what_the_terminal_can()
    warnings.formatwarning = in_a_sentence
    ranks.end_with_starter()
    try:
        status = attempt(story)
        Interrupted.over(*slurm.time_out_signals())  # who has ended needs no more time
        return status
    except Interrupted as signal_:
        is_out_of_time = signal_.number == signal.SIGUSR1
        # SLURM ends the others' remains, and a job that it queues again, by SIGTERM: also who still asks it for that.
        Interrupted.over(*([signal.SIGUSR1, signal.SIGTERM] if is_out_of_time else []))
        ranks.end_by_itself()
        if ranks.name_by_environment():
            time.sleep(ranks.COURTESY)  # the first rank says it, and asks SLURM for another turn
            return signal_.status
        ended(signal_, signal_.status)
        return ended(slurm.requeue(), signal_.status) if is_out_of_time else signal_.status


def attempt(story: Callable[[], int]) -> int:
    """Its exit status, or that of what went wrong."""
    try:
        status = story()
        sys.stdout.flush()
        return status
    except UserError as error:
        return ended(error, error.status)
    except OSError as error:  # what the system refuses elsewhere than in the run's folder
        if error.filename is None:
            sys.stdout = sys.stderr  # the full disk or closed pipe is asked no more
        return ended(f"{error.filename or 'standard output'}: {error.strerror}", 1)
    except (RuntimeError, MemoryError) as error:
        if ranks.is_lost_rank(error):
            return ended(ranks.LOST, 1)
        if is_too_large(error):
            flags = "-lr/--learning-rate, --bias-lr-scale, --weight-decay or --dib-lr"
            return ended(f"a step became too large for --precision: lower {flags}", 1)
        raise


def in_a_sentence(
    message: Warning | str, category: type[Warning], file: str, number: int, line: str | None = None
) -> str:
    """How a warning is printed: the program's own by itself, as where in the code it is raised helps nobody."""
    within = file.removeprefix(str(Path(__file__).parents[1]))
    is_own = within != file and "site-packages" not in within  # the checkout may hold an environment
    if is_own and category is UserWarning:
        return f"{command.NAME}: warning: {message}\n"
    return FORMAT(message, category, file, number, line)


@contextmanager
def memory_for(batch_size: int | str) -> Iterator[None]:
    """Inside, memory that runs out is the user's to mend: says how."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        ways = f"a smaller -b/--batch-size than {batch_size}, a smaller network, or --precision bf16-mixed"
        raise UserError(f"out of memory: try {ways}") from error


def ended(why: object, status: int) -> int:
    """Say why the program ends early; the exit status.

    Ranks behind the first speak later: where all end for the same reason, their launcher has mostly ended them by then.
    """
    rank = ranks.name_by_environment()
    if rank:
        time.sleep(ranks.COURTESY)
    print(f"{command.NAME}: {rank}{why}", file=sys.stderr)
    return status
