"""Which classes of a dataset: `--classes`, by name or by number."""

import reprlib
from collections import Counter
from collections.abc import Sequence

from run.errors import WrongFlag
from run.values import perhaps

MOST_NAMES = 20  # in an error's list


def chosen(wanted: Sequence[str] | None, names: Sequence[str], dataset: str) -> list[int]:
    """The numbers of the classes that `wanted` names, in the dataset's order, whatever theirs; all where it is None.

    A word is looked for among the names first and is a number only where it is none of them: a folder may call its
    classes 3 and 8.

    >>> chosen(["dog", "0"], ["ape", "bee", "dog"], "zoo")
    [0, 2]
    """
    if wanted is None:
        return list(range(len(names)))
    numbers = [_number(word, names, dataset) for word in wanted]
    twice = [number for number, count in Counter(numbers).items() if count > 1]
    if twice:
        words = [word for word, number in zip(wanted, numbers, strict=True) if number == twice[0]]
        raise WrongFlag(f"argument --classes: {names[twice[0]]} comes twice, as {' and '.join(words)}")
    if len(numbers) < 2:
        raise WrongFlag(f"argument --classes: {names[numbers[0]]} is one class, at least 2 are needed")
    return sorted(numbers)


def _number(word: str, names: Sequence[str], dataset: str) -> int:
    if word in names:
        return names.index(word)
    if word.isascii() and word.isdigit() and int(word) < len(names):
        return int(word)
    listed = ", ".join(names[:MOST_NAMES]) + ", …" * (len(names) > MOST_NAMES)
    raise WrongFlag(
        f"argument --classes: {reprlib.repr(word)} is no class of {dataset}{perhaps(word, names)}; its classes are "
        f"{listed}, or by number 0 to {len(names) - 1}"
    )
