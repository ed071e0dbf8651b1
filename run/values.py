"""What a flag's value may be: numbers within bounds, text, epochs; and which name a mistyped one resembles."""

import argparse
import difflib
import reprlib
from collections.abc import Callable, Iterable

MAX_EPOCHS = 10**6  # the epochs to measure are listed
MAX_COUNT = 10**9  # of samples, units of a layer, gigabytes: beyond what any machine holds
MAX_RATE = 1e30  # rates and decays: float32 ends at 3e38, and optimizers multiply
MAX_SCALE = 1e6
MAX_NODES = 10**4
MAX_IMAGE_SIZE = 10**4  # pixels
MAX_THREADS = 10**4
MAX_DIB = 10**9  # head epochs or steps: beyond it no computer comes to an end


def number(
    kind: type, low: float, high: float = MAX_COUNT, *, open_low: bool = False, open_high: bool = False
) -> Callable:
    """A converter for a number in [low, high]; without the bound that is open."""
    word = "whole number" if kind is int else "number"
    lowest, highest = (f"{bound:g}" if isinstance(bound, float) else f"{bound}" for bound in (low, high))
    least, most = "above" if open_low else "of at least", "below" if open_high else "at most"
    allowed = f"a {word} {least} {lowest} and {most} {highest}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not {allowed}") from None
        if not low <= value <= high or (open_low and value == low) or (open_high and value == high):
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not {allowed}")
        return value + 0  # makes 0 of -0.0

    return convert


def odd(low: int, high: int, *, or_none: bool = False) -> Callable:
    """A converter for an odd number in [low, high]; with `or_none` also for 0."""
    allowed = f"an odd number from {low} to {high}{', nor 0' if or_none else ''}"

    def convert(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not (low <= value <= high and value % 2) and not (or_none and value == 0):
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is {'neither' if or_none else 'not'} {allowed}")
        return value

    return convert


def batch_size() -> Callable:
    """A converter for the samples of a step: a number of them, or `all` for the whole training set."""
    convert = number(int, 1)

    def convert_or_all(text: str) -> int | str:
        if text == "all":
            return text
        try:
            return convert(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or all") from None

    return convert_or_all


def rate() -> Callable:
    """A converter for a learning rate."""
    return number(float, 0, MAX_RATE, open_low=True)


def text(text: str) -> str:
    """Text that can name a file and stand in `hparams.yaml`."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"{text!r} holds what is no text in UTF-8")
    return text


def epoch(text: str) -> str:
    """An epoch, or `log:N` for about N epochs at even steps of the logarithm."""
    digits = text.removeprefix("log:")
    least = 2 if text.startswith("log:") else 0
    if not (digits.isascii() and digits.isdigit() and least <= int(digits) <= MAX_EPOCHS):
        raise argparse.ArgumentTypeError(
            f"{reprlib.repr(text)} is neither an epoch (0, 1, …) nor log:N with N of at least 2, up to {MAX_EPOCHS}"
        )
    return text


def parts(text: str) -> str:
    """`pca:K` or `nmf:K`."""
    kind, _, k = text.partition(":")
    if kind not in ("pca", "nmf") or not (k.isascii() and k.isdigit() and 1 <= int(k) <= 1000):
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is neither pca:K nor nmf:K with K from 1 to 1000")
    return text


def transform(text: str) -> str:
    """`flip` or `rotD`, a rotation by ±D degrees."""
    degrees = text.removeprefix("rot")
    is_whole = degrees.isascii() and degrees.isdigit() and not degrees.startswith("0")  # rot015 would be rot15 again
    is_rotation = text.startswith("rot") and is_whole and int(degrees) < 180
    if not (is_rotation or text == "flip"):
        raise argparse.ArgumentTypeError(
            f"{reprlib.repr(text)} is neither flip nor rotD, a rotation by D degrees, D a whole number from 1 to 179"
        )
    return text


def falling(text: str) -> str:
    """`1:0.1`: a temperature's first value and its last."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) != 2 or not all(1e-3 <= value <= MAX_SCALE for value in values):
        raise argparse.ArgumentTypeError(
            f"{reprlib.repr(text)} is no first and last temperature, as 1:0.1, both from 0.001 to {MAX_SCALE:g}"
        )
    return text


class OneOrSeveral(argparse.Action):
    """A single value as itself, several as a list without repetitions."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: list, flag: str | None = None) -> None:
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise argparse.ArgumentError(self, f"{twice[0]} comes twice")
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def perhaps(word: str, names: Iterable[str], comma: str = ", ") -> str:
    """`, perhaps NAME` with the name that a mistyped word resembles most, whatever its case; else nothing."""
    by_letters = {name.lstrip("-").lower(): name for name in names}
    close = difflib.get_close_matches(word.lstrip("-").lower(), by_letters, n=1)
    return f"{comma}perhaps {by_letters[close[0]]}" if close else ""
