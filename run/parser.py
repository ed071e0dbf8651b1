"""argparse, with errors that say where a wrong word came from and which right one it resembles."""

import argparse

from run import ranks
from run.values import perhaps


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every help text, save where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or isinstance(action, argparse._HelpAction):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says in every error where the wrong value came from: the command line or a file."""

    source = ""
    is_of_run = False  # a command that several processes are given at once, of which the first speaks

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> object:
        """All flags; a word that is none or belongs to none is an error, which knows a flag of a similar name."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                self.error(f"{unknown[0]!r} belongs to no flag; --help lists all flags")
            flags = (flag for flag in self._option_string_actions if len(flag) > 2 or len(word) == 2)
            self.error(f"unknown flag {word}" + (perhaps(word, flags) or "; --help lists all flags"))
        return values

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = ", ".join(action.choices) + perhaps(value, action.choices, "; ")
            raise argparse.ArgumentError(action, f"{value!r} is none of {allowed}")

    def error(self, message: str) -> None:
        known = self.is_of_run and ranks.name_by_environment()  # then the first rank says the same
        self.exit(2, None if known else f"{self.prog}: error: {self.source}{message}\n")
