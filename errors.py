"""The ways in which a run ends early and `main.py` has a sentence for it instead of a traceback."""

import signal


class UserError(Exception):
    """A mistake in the input: its message names the flag or file, what is wrong with it and what is allowed."""

    status = 1


class WrongFlag(UserError):
    """A flag whose value only the network or the data could show to be wrong."""

    status = 2


class Interrupted(BaseException):
    """A signal asked the program to end. No `Exception`, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int):
        super().__init__(f"ended by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.status = 128 + number
        self.advice = ""

    def __str__(self) -> str:
        return super().__str__() + self.advice

    @classmethod
    def on(cls, *numbers: int) -> None:
        """Let these signals raise this exception, wherever the program is."""

        def handler(number: int, frame: object) -> None:
            raise cls(number)

        for number in numbers:
            signal.signal(number, handler)
