"""The ways in which a run ends early and `main.py` has a sentence for it instead of a traceback."""

import codecs
import io
import signal
import sys
from collections.abc import Callable
from typing import ClassVar

AGAIN = 1.0  # seconds of computing after which an interruption that got lost is repeated
PLAIN = {"→": "->", "–": "-", "−": "-", "×": "x", "±": "+-", "…": "..."}
TOO_LARGE = "cannot be converted to type"  # torch's words for a number beyond a tensor's type
NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # torch's words, of CUDA, CPU and libraries


class UserError(Exception):
    """A mistake in the input: its message names the flag or file, what is wrong with it and what is allowed."""

    status = 1


class WrongFlag(UserError):
    """A flag whose value only the network or the data could show to be wrong."""

    status = 2


class NotFinite(UserError):
    """Activations that are infinite or nan. With `--keep-going` the measure is left out instead."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On CPUs torch says so in a plain RuntimeError; this module does not import torch."""
    words = str(error) if isinstance(error, RuntimeError) else ""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(phrase in words for phrase in NO_MEMORY)


def is_too_large(error: BaseException) -> bool:
    """Whether torch refused a number for being beyond a tensor's number format."""
    return isinstance(error, RuntimeError) and TOO_LARGE in str(error)


class Interrupted(BaseException):
    """A signal asked the program to end. No `Exception`, so that nothing on the way takes it for a failure."""

    handlers: ClassVar[dict[int, Callable[[int, object], None]]] = {}

    def __init__(self, number: int):
        super().__init__(f"ended by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.number = number
        self.status = 128 + number
        self.advice = ""
        self.has_advanced = False  # whether the run left more to go on from than it found

    def __str__(self) -> str:
        return super().__str__() + self.advice

    @classmethod
    def on(cls, *numbers: int) -> None:
        """Let the first of these signals raise this exception, wherever the program is; others then do nothing.

        Python loses what is raised in a destructor or a callback of an import: so it is raised again until `over`.
        """
        first: list[int] = []

        def handler(number: int, frame: object) -> None:
            if first and number != signal.SIGPROF:
                return
            first.append(number)
            sys.unraisablehook = _silent_about_interruptions
            signal.setitimer(signal.ITIMER_PROF, AGAIN)
            raise cls(first[0])

        cls.handlers = dict.fromkeys((*numbers, signal.SIGPROF), handler)
        cls.take_signals()

    @classmethod
    def take_signals(cls) -> None:
        """Be the one whom the signals reach, also after a library took them."""
        for number, handler in cls.handlers.items():
            signal.signal(number, handler)

    @staticmethod
    def over(*deaf_to: int) -> None:
        """The exception, or the story, has arrived where the program ends; these signals change nothing any more.

        Nor in programs that are started from now on. A mere handler would be gone while Python ends.
        """
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number in deaf_to:
            signal.signal(number, signal.SIG_IGN)


def _silent_about_interruptions(lost: "sys.UnraisableHookArgs") -> None:
    if not isinstance(lost.exc_value, Interrupted):
        sys.__unraisablehook__(lost)


def write_what_the_terminal_can() -> None:
    """From now on letters that standard output or error do not know come out as plain ones, not as an exception."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What to write instead of the letters that an encoding lacks, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
