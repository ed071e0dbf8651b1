"""A run's folder as tables: pandas frames of E epochs × L layers, layers in network order.

Whatever is damaged or missing in a folder is left out, and said in a sentence.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from run.catalogue import measure_and_layer
from run.errors import UserError
from run.listed import is_run, last_written, run_folders

if TYPE_CHECKING:  # pandas takes half a second to import, which is done once there is something to read
    from pandas import DataFrame, Index

SPLITS = ("train", "test")
# Of runs that did not write down their layers.
LAYER_COLUMN = re.compile(r"(?:nc1(?:_chance)?/(?:train|test)|dib/(?:loss|minimality)|rank/\w+/(?:train|test))/(.+)")
HEAD_COLUMNS = ["epoch", "layer", "digit", "head_epoch", "cross_entropy"]
LARGEST = 1e100  # a value beyond counts as infinite: the axes of a figure would overflow


def load(
    paths: str | Path | Sequence[str | Path] = (),
    log_dir: str | Path = "lightning_logs",
    say: Callable[[str], object] = print,
) -> list[Run]:
    """The runs in `paths`, run folders or folders of such; without paths the newest run in `log_dir`.

    `say` is told, in sentences, which folders were skipped and what could not be read.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    found = [Run(folder) for path in paths for folder in _run_folders(Path(path))]
    found = found if paths else _newest(_run_folders(Path(log_dir)))
    runs = {run.folder.resolve(): run for run in found if not run.why_empty}
    successors = {ancestor.resolve(): run for run in runs.values() for ancestor in run.ancestors}
    for run in found:
        successor = successors.get(run.folder.resolve())
        if run.why_empty:
            say(f"{run.folder} is skipped: {run.why_empty}.")
        elif successor:
            say(f"{run.folder} goes on in {successor.folder}: they are drawn as one run.")
        else:
            for note in run.notes:
                say(note)
    if not runs:
        raise NoRuns(f"there is no run to draw in {', '.join(map(str, paths or [log_dir]))}")
    return [run for folder, run in runs.items() if folder not in successors]


class NoRuns(UserError):
    """There is nothing to draw. A notebook shows the sentence alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def _run_folders(path: Path) -> list[Path]:
    try:
        return run_folders(path)
    except UserError as error:
        raise NoRuns(str(error)) from None


def _newest(folders: Iterable[Path]) -> list[Run]:
    """The newest run that is not empty, behind the empty ones that are newer still."""
    runs = []
    for folder in sorted(folders, key=last_written, reverse=True):
        runs.append(Run(folder))
        if not runs[-1].why_empty:
            break
    return runs


class Run:
    """What a run's folder tells, as far as it can be read; `notes` has a sentence for what cannot.

    `metrics` is `metrics.csv` with a row per epoch (the index), `heads` is `dib.csv`, `lr_test` is
    `lr_range_test.csv`; they are empty where there is no such file. A run that was resumed from another
    folder begins with that folder's epochs.
    """

    def __init__(self, folder: str | Path, _descendants: tuple[Path, ...] = ()) -> None:
        self.folder = Path(folder)
        self.notes: list[str] = []
        self.ancestors: tuple[Path, ...] = ()
        self.hparams = self._read_hparams()
        rows = self._read_csv("metrics.csv")
        if "checkpoint" in rows and rows["epoch"].dropna().duplicated().any():
            self.notes.append(f"{self.folder} holds several networks of one epoch: the last of them is drawn.")
        self.metrics = _by_epoch(rows)
        heads = self._read_csv("dib.csv").reindex(columns=HEAD_COLUMNS)
        self.heads = heads.dropna(subset=["epoch", "layer", "digit", "head_epoch"])
        lr_test = self._read_csv("lr_range_test.csv").reindex(columns=["lr", "loss", "smoothed"])
        self.lr_test = lr_test.dropna(subset=["lr"])
        self._continue_parent((*_descendants, self.folder.resolve()))

    def _read_hparams(self) -> dict:
        import yaml

        path = self.folder / "hparams.yaml"
        try:
            hparams = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.notes.append(f"{path} cannot be read ({error.strerror}): the run's flags are unknown.")
            return {}
        except (yaml.YAMLError, ValueError, RecursionError):
            hparams = None
        if not isinstance(hparams, dict):
            self.notes.append(f"{path} is damaged: the run's flags are unknown.")
            return {}
        return hparams

    def _read_csv(self, name: str) -> DataFrame:
        """The undamaged lines of a file: those with an end, and with as many cells as the header."""
        path = self.folder / name
        try:
            *lines, rest = path.read_bytes().replace(b"\r", b"").split(b"\n")
        except FileNotFoundError:
            return _parse_csv([])
        except OSError as error:
            self.notes.append(f"{path} cannot be read ({error.strerror}).")
            return _parse_csv([])
        whole = [line for line in lines if line.count(b",") == lines[0].count(b",")]
        num_damaged = len(lines) - len(whole) + (rest != b"")  # without its end a line may stop within a number
        if num_damaged:
            self.notes.append(f"{path} has damaged lines, which are left out: {num_damaged}.")
        return _parse_csv(whole)

    def _continue_parent(self, known: tuple[Path, ...]) -> None:
        """Puts the epochs of the run that this one resumed before its own; `known`: folders already read."""
        folder = self._parent_folder(known)
        if folder is None:
            return
        parent = Run(folder, known)
        start = min(self.metrics.index, default=math.inf)  # what the parent did from here on was done anew
        self.metrics = concat([parent.metrics[parent.metrics.index < start], self.metrics])
        self.heads = concat([parent.heads[parent.heads["epoch"] < start], self.heads])
        self.ancestors = (folder, *parent.ancestors)
        self.notes += parent.notes

    def _parent_folder(self, known: tuple[Path, ...]) -> Path | None:
        """Where `resumed_from` (a run, or a checkpoint in it) says, or beside this run if both were moved."""
        source = self.hparams.get("resumed_from")
        if not isinstance(source, str):
            return None
        named = Path(source)
        for folder in (named, *list(named.parents)[:2], *(self.folder.parent / part for part in named.parts)):
            if is_run(folder) and folder.resolve() not in known:
                return folder
        self.notes.append(f"{self.folder} lacks its first epochs: {source}, which it resumed, is not there.")
        return None

    @property
    def why_empty(self) -> str:
        """Why there is nothing to draw; an empty string if there is something."""
        if len(self.metrics) or len(self.lr_test):
            return ""
        exists = (self.folder / "metrics.csv").exists()
        return "its metrics.csv has no epoch" if exists else "it has no metrics.csv"

    @property
    def provenance(self) -> dict:
        """What the run wrote down about its data and its network."""
        provenance = self.hparams.get("provenance")
        return provenance if isinstance(provenance, dict) else {}

    @functools.cached_property
    def layers(self) -> list[str]:
        """The measured layers in network order: those with a column MEASURE/LAYER."""
        columns = self.metrics.columns
        network = self.provenance.get("layers")
        named = [layer for layer in network if isinstance(layer, str)] if isinstance(network, list) else []
        measured = [layer for layer in named if any(measure_and_layer(column, [layer]) for column in columns)]
        matches = filter(None, map(LAYER_COLUMN.fullmatch, columns))
        return list(dict.fromkeys([*measured, *(match[1] for match in matches)]))

    @property
    def measures(self) -> list[str]:
        """Everything that was measured layer by layer: nc1/train, nc1/test, dib/loss, …"""
        found = filter(None, (measure_and_layer(column, self.layers) for column in self._filled))
        return list(dict.fromkeys(measure for measure, _ in found))

    @property
    def looks(self) -> list[str]:
        """The columns of what was looked at, look/NAME/STATISTIC and look/NAME/GROUP/STATISTIC."""
        return [column for column in self._filled if column.startswith("look/")]

    @property
    def _filled(self) -> Index:
        return self.metrics.columns[self.metrics.notna().any()]

    def table(self, measure: str) -> DataFrame:
        """Epochs × layers of a measure, epochs × splits of `loss` or `acc`, epochs × 1 of a single column.

        A star stands for what columns have in its place, without a slash: look/grad-loss-theta-*/norm has a column for
        each tensor.
        """
        names = {measure: measure} if "*" not in measure else self._matching(measure)
        names |= {f"{split}_{measure}": split for split in SPLITS}
        names |= {f"{measure}/{layer}": layer for layer in self.layers}
        present = [column for column in names if column in self.metrics]
        return self.metrics[present].rename(columns=names).dropna(how="all")

    def _matching(self, pattern: str) -> dict[str, str]:
        """What the star stands for, by column."""
        expression = re.compile("([^/]+)".join(map(re.escape, pattern.split("*"))))
        matches = filter(None, map(expression.fullmatch, self._filled))
        return {match[0]: " ".join(match.groups()) for match in matches}

    @property
    def head_epochs(self) -> list[int]:
        """The epochs whose DIB heads left their losses."""
        return sorted(map(int, self.heads["epoch"].unique()))

    def head_losses(self, epoch: int) -> DataFrame:
        """Cross-entropy of the DIB heads after each of H head epochs, mean over the digits: (H, L)."""
        heads = self.heads[self.heads["epoch"] == epoch]
        losses = heads.groupby(["head_epoch", "layer", "digit"])["cross_entropy"].last().unstack("digit")
        # Where one head diverged, a mean of the others would look like an improvement: skipna=False.
        losses = losses.mean(axis=1, skipna=False).unstack("layer")
        return losses[[layer for layer in self.layers if layer in losses]]


def _parse_csv(lines: Sequence[bytes]) -> DataFrame:
    """Lines as floats, save in the column `layer`; cells that hold no finite number are nan."""
    import pandas as pd

    options = {"index_col": False, "quoting": csv.QUOTE_NONE, "low_memory": False, "encoding_errors": "replace"}
    try:
        table = pd.read_csv(io.BytesIO(b"\n".join(lines)), **options)
    except ValueError:  # not even a header
        return pd.DataFrame()
    for name in table.columns.difference(["layer"]):
        numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
        table[name] = numbers.where(numbers.abs() < LARGEST)
    return table


def _by_epoch(rows: DataFrame) -> DataFrame:
    """One row per epoch, of every column the last value; rows without an epoch are left out."""
    if "epoch" not in rows:
        return rows.iloc[:0, :0]
    rows = rows[(rows["epoch"] >= 0) & (rows["epoch"] % 1 == 0)]
    return rows.astype({"epoch": int}).groupby("epoch").last()


def concat(tables: Sequence[DataFrame]) -> DataFrame:
    """The rows of all tables that have any."""
    import pandas as pd

    return pd.concat([table for table in tables if not table.empty] or tables[:1])


def number(value: object) -> float:
    """A number from a file, nan if it is none."""
    return float(value) if isinstance(value, int | float) else math.nan
