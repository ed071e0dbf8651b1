"""A table of runs, newest first: what each one is, how far it is, and what came out.

    python runs.py                                            the runs in lightning_logs
    python runs.py lightning_logs --where dataset=MNIST state=done --sort best --columns nc1/test/hidden2
    python runs.py lightning_logs --mean                      means and deviations over seeds
    python runs.py lightning_logs --csv > runs.csv            for other programs

Columns are the flags in which the runs differ, the epochs that are done, the last and the best accuracy on the test
set. It reads `hparams.yaml` and `metrics.csv` alone and imports nothing heavy.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from run import command, listing
from run.errors import UserError, write_what_the_terminal_can
from run.listed import Listed, run_folders
from run.parser import Parser
from run.presets import DEFAULTS
from run.tables import table as as_text

MAX_NOTES = 10  # on what cannot be read


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of `python runs.py`."""
    parser = Parser(prog=command.RUNS_NAME, description="A table of runs, newest first.", allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("folders", nargs="*", default=[DEFAULTS["log_dir"]], metavar="FOLDER",
        help=f"folder of a run, or a folder that holds such folders (default: {DEFAULTS['log_dir']})")
    add("--columns", nargs="+", default=[], metavar="NAME",
        help="show these too: columns of metrics.csv (their last values; shell patterns: 'nc1/test/*'), flags, facts")
    add("--where", nargs="+", action="extend", default=[], metavar="CONDITION",
        help="only runs for which all hold: dataset=MNIST, model=*Net, 'learning-rate<0.1', state!=done, tag=paper")
    add("--sort", metavar="NAME", help="order by any column: numbers from the highest, words from A; else newest first")
    add("--reverse", action="store_true", help="the other way round")
    add("--mean", action="store_true", help="a row for each setting: mean ± standard deviation over its finished runs")
    add("--csv", action="store_true", help="as CSV, with all digits")
    # fmt: on
    args = parser.parse_args(argv)
    args.complain = parser.error
    return args


def main(argv: list[str] | None = None) -> int:
    """Print the table. Exit status: 0 done, 1 error, 2 wrong flag, 130 Ctrl-C, 141 closed pipe."""
    args = get_args(argv)
    write_what_the_terminal_can()
    try:
        _print(_chosen(args), args)
        sys.stdout.flush()
    except UserError as error:
        _say(f"error: {error}")
        return 1
    except listing.WrongName as error:
        args.complain(str(error))
    except BrokenPipeError:  # nobody listens any more, as behind `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141
    except KeyboardInterrupt:
        return 130
    return 0


def _chosen(args: argparse.Namespace) -> list[Listed]:
    """The runs that are asked for, the newest first."""
    folders = {folder.resolve(): folder for path in args.folders for folder in run_folders(Path(path))}
    runs = [Listed(folder) for folder in folders.values()]
    notes = [note for run in runs for note in run.notes]
    for note in notes[:MAX_NOTES]:
        _say(note)
    if len(notes) > MAX_NOTES:
        _say(f"… and so in {len(notes) - MAX_NOTES} more files.")
    if not runs:
        raise UserError(f"there is no run in {', '.join(args.folders)}")
    return listing.where(listing.newest_first(runs), args.where)


def _table(runs: Sequence[Listed], args: argparse.Namespace) -> listing.Table:
    """What is asked for of them, in the order that is."""
    by = listing.known_name(runs, args.sort) if args.sort and runs else None
    columns = listing.expanded(runs, args.columns)
    if args.mean:
        table = listing.means(runs, [*columns, *([by] if by and by not in listing.means(runs).columns else [])])
        rows = listing.ordered(table.rows, lambda row: row.get(by), reverse=args.reverse) if by else table.rows
    else:
        if by:
            runs = listing.ordered(runs, lambda run: run.value(by), reverse=args.reverse)
        table = listing.table(runs, columns)
        rows = table.rows
    return replace(table, rows=rows[::-1] if args.reverse and not by else rows)


def _print(runs: Sequence[Listed], args: argparse.Namespace) -> None:
    table = _table(runs, args)
    if args.csv:
        _print_csv(table)
        return
    if not runs:
        _say(f"no run is as --where has it: {' '.join(args.where)}")
        return
    print(as_text(*listing.texts(table)))
    if table.hidden:
        _say(f"as presets of models have it, these differ too; --columns shows them: {', '.join(table.hidden)}")


def _print_csv(table: listing.Table) -> None:
    spreads = [f"{name} ±" for name in table.columns if any(f"{name} ±" in row for row in table.rows)]
    extra = [name for name in ("epochs", "folder", "seeds") if any(name in row for row in table.rows)]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = list(dict.fromkeys([*table.columns, *spreads, *extra]))
    writer.writerow([name.replace(" ±", " std") for name in names])
    writer.writerows([["" if row.get(name) is None else _plain(row[name]) for name in names] for row in table.rows])


def _plain(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _say(sentence: str) -> None:
    print(f"{command.RUNS_NAME}: {sentence}", file=sys.stderr)


def from_shell() -> None:
    """The table, as it is asked for from a shell."""
    sys.exit(main())


if __name__ == "__main__":
    from_shell()
