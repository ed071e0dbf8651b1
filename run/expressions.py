"""The language of `--look`: what of a network is asked for, as `hess(loss, theta(fc))` or `grad(f(output), f(input))`.

    EXPRESSION = QUANTITY | grad(QUANTITY, PLACE) | hess(QUANTITY, PLACE) | hess(QUANTITY, PLACE, PLACE) | a short name
    QUANTITY   = loss | f(LAYER) | f(LAYER)[I, …]
    PLACE      = f(LAYER) | f(LAYER)[I, …] | theta | theta(NAME) | theta(NAME)[I, …]

A place alone is an expression as well: activations, parameters. Which layers and parameters there are only a network
can tell; what is wrong before that is told here, with a mark under the place. Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import re
import reprlib
from dataclasses import dataclass, field

from run.errors import UserError
from run.values import perhaps

SHORT = {
    "gradients": "norms of the gradients with respect to every parameter tensor and measured layer",
    "jacobian": "grad(f(output), f(input))",
    "hessian": "hess(loss, theta)",
    "ntk": "grad(f(output), theta)",
    "parameters": "every parameter tensor, and theta",
}
WORDS = ("loss", "f", "theta", "grad", "hess")
INPUT, OUTPUT = "input", "output"  # layers that every network has
MAX_INDEX = 10**9
SHOWN = 60  # letters of an expression on either side of a mistake
TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z_0-9]*|\d+|\S)")


class ExpressionError(UserError):
    """What is wrong with an expression, and a mark under the place where; of a long one, what is around it."""

    def __init__(self, message: str, text: str, place: int) -> None:
        first = max(0, place - SHOWN)
        before, shown = "…" if first else "", text[first : place + SHOWN]
        after = "…" if len(text) > place + SHOWN else ""
        super().__init__(f"{message}\n    {before}{shown}{after}\n    {' ' * (len(before) + place - first)}^")


@dataclass(frozen=True)
class Name:
    """`loss`, `f(LAYER)` or `theta(NAME)`, with indices; `theta` alone has no name. `place`: where it stands."""

    kind: str
    name: str = ""
    index: tuple[int, ...] = ()
    place: int = field(default=0, compare=False)

    def __str__(self) -> str:
        name = f"({self.name})" if self.name else ""
        index = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return f"{self.kind}{name}{index}"

    @property
    def math(self) -> str:
        """The same in TeX, without dollars."""
        index = "".join(str(i) + "," for i in self.index).rstrip(",")
        if self.kind == "loss":
            return "L"
        if self.kind == "f" and self.name == INPUT:
            return f"x_{{{index}}}" if index else "x"
        letter = "f" if self.kind == "f" else r"\theta"
        name = "" if self.kind == "f" and self.name == OUTPUT else upright(self.name)
        if self.kind == "f":
            return letter + (f"^{{{name}}}" if name else "") + (f"_{{{index}}}" if index else "")
        below = ", ".join(filter(None, [name, index]))
        return letter + (f"_{{{below}}}" if below else "")


@dataclass(frozen=True)
class Expression:
    """A quantity (`of` alone), its gradient or Jacobian (`grad`), or its Hessian (`hess`) at one place or two.

    `norms_only`: of a short name that asks for no more.
    """

    of: Name
    derivative: str = ""
    at: tuple[Name, ...] = ()
    text: str = field(default="", compare=False)
    norms_only: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.derivative}({', '.join(map(str, (self.of, *self.at)))})" if self.derivative else str(self.of)

    @property
    def column(self) -> str:
        """The name in `metrics.csv`.

        >>> parse("hess(loss, theta(layer1.0.conv1))").column
        'hess-loss-theta-layer1.0.conv1'
        """
        return re.sub(r"[^A-Za-z0-9_.]+", "-", str(self)).strip("-")

    @property
    def math(self) -> str:
        """The same as in papers, in TeX.

        >>> parse("hess(loss, theta)").math
        '$\\\\nabla^2_{\\\\theta} L$'
        """
        if not self.derivative:
            return f"${self.of.math}$"
        places = " ".join(place.math for place in self.at)
        if self.derivative == "grad" and self.of.kind != "loss":
            return rf"$\partial {self.of.math} / \partial {places}$"
        power = "^2" if self.derivative == "hess" else ""
        return rf"$\nabla{power}_{{{places}}} {self.of.math}$"


def parse(text: str) -> Expression | str:
    """The expression that a text means; a short name is given back as it is.

    >>> str(parse("grad( f(output)[3],theta(fc.weight) )"))
    'grad(f(output)[3], theta(fc.weight))'
    """
    if text.strip() in SHORT:
        return text.strip()
    return _Reader(text).expression()


def expression(text: str) -> str:
    """What `--look` can be asked for, as it was written."""
    try:
        parse(text)
    except ExpressionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def upright(name: str) -> str:
    """A name in TeX's upright letters."""
    return rf"\mathrm{{{name.replace('_', chr(92) + '_')}}}" if name else ""


class _Reader:
    """Reads an expression from left to right; `place` is where it is."""

    def __init__(self, text: str) -> None:
        self.text, self.place = " ".join(text.split()), 0

    def expression(self) -> Expression:
        word, start = self._word()
        if word in ("grad", "hess"):
            expression = self._derivative(word)
        elif word == "loss" or word in ("f", "theta"):
            expression = Expression(self._name(word, start), text=self.text)
        else:
            raise self._unknown(word, start, (*WORDS, *SHORT))
        rest, place = self._peek()
        if rest:
            raise self._error(f"nothing may follow here, but there is {reprlib.repr(rest)}", place)
        return expression

    def _derivative(self, word: str) -> Expression:
        self._expect("(", f"must follow {word}")
        of_word, start = self._word()
        if of_word == "theta":
            raise self._error(f"{word} is of loss or f(LAYER), with respect to theta, not of theta", start)
        if of_word not in ("loss", "f"):
            raise self._unknown(of_word, start, ("loss", "f"))
        of = self._name(of_word, start)
        self._expect(",", f"must follow, and with respect to what, as in {word}({of}, theta)")
        places = [self._at()]
        token, start = self._peek()
        if token == "," and word == "hess":
            self._expect(",")
            places.append(self._at())
        elif token == ",":
            raise self._error("grad is with respect to one place; only hess takes two", start)
        self._expect(")", "is missing at the end")
        if word == "hess" and of.kind == "f" and not of.index:
            raise self._error(f"hess is of a number: say which of the outputs, as {of}[0]", of.place)
        if len(places) == 2 and "f" in (places[0].kind, places[1].kind):
            raise self._error("two places are both of theta", places[[p.kind for p in places].index("f")].place)
        if of.kind == "f" and of.name == INPUT:
            raise self._error("the input depends on nothing", of.place)
        return Expression(of, word, tuple(places), self.text)

    def _at(self) -> Name:
        word, start = self._word()
        if word == "loss":
            raise self._error("derivatives are with respect to theta or f(LAYER), not to the loss", start)
        if word not in ("f", "theta"):
            raise self._unknown(word, start, ("theta", "f"))
        return self._name(word, start)

    def _name(self, word: str, start: int) -> Name:
        name = ""
        token, place = self._peek()
        if word == "loss":
            if token == "(" or token == "[":
                raise self._error(f"loss takes no {token!r}", place)
            return Name("loss", place=start)
        if token == "(":
            self._expect("(")
            end = self.text.find(")", self.place)
            inside = self.text[self.place : end if end >= 0 else len(self.text)]
            name = inside.strip()
            what = "a layer" if word == "f" else "a module or a parameter"
            if not name:
                raise self._error(f"the name of {what} is missing", self.place)
            odd = re.search(r"[\s(,]", name)
            if odd:
                at = self.place + inside.index(name) + odd.start()
                raise self._error(f"a name ends with ')', and in it is {odd[0]!r}", at)
            if end < 0:
                raise self._error("')' is missing after the name", len(self.text))
            start, self.place = self.place + inside.index(name), end + 1
        elif word == "f":
            raise self._error("f needs a layer, as f(output) or f(input)", place)
        index = self._index() if self._peek()[0] == "[" else ()
        if word == "theta" and index and not name:
            raise self._error("an index needs a tensor, as in theta(fc.weight)[2, 7]", start)
        return Name(word, name, index, start)

    def _index(self) -> tuple[int, ...]:
        self._expect("[")
        index = []
        while True:
            token, place = self._peek()
            if not token.isascii() or not token.isdigit() or int(token) > MAX_INDEX:
                raise self._error(f"an index is a whole number from 0 on{self._not(token)}", place)
            self._expect(token)
            index.append(int(token))
            token, place = self._peek()
            if token not in (",", "]"):
                raise self._error(f"',' or ']' must follow an index{self._not(token)}", place)
            self._expect(token)
            if token == "]":
                return tuple(index)

    def _word(self) -> tuple[str, int]:
        token, place = self._peek()
        if not re.fullmatch(r"[A-Za-z_]\w*", token):
            raise self._error(f"one of {', '.join(WORDS)} must stand here{self._not(token)}", place)
        self.place = place + len(token)
        return token, place

    def _expect(self, token: str, why: str = "is missing") -> None:
        found, place = self._peek()
        if found != token:
            raise self._error(f"{token!r} {why}{self._not(found)}", place)
        self.place = place + len(token)

    def _peek(self) -> tuple[str, int]:
        """The next token and where it begins; an empty one at the end."""
        match = TOKEN.match(self.text, self.place)
        return (match[1], match.start(1)) if match else ("", len(self.text))

    def _not(self, token: str) -> str:
        return f", not {reprlib.repr(token)}" if token else ""

    def _unknown(self, word: str, place: int, names: tuple[str, ...]) -> ExpressionError:
        return self._error(f"{reprlib.repr(word)} is none of {', '.join(names)}{perhaps(word, names)}", place)

    def _error(self, message: str, place: int) -> ExpressionError:
        return ExpressionError(message, self.text, place)
