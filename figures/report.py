"""One page of several runs that needs no server and nothing from outside: table, figures, flags, closing tables."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures.runs import Run
from figures.settings import compare
from run import listing
from run.catalogue import MEASURES, SETS
from run.errors import UserError
from run.files import write_whole
from run.listed import DONE, EARLY, MEASURED, RUNNING, Listed
from run.settings import is_number, key, value_in_words
from run.tables import measure_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html")
LARGEST_SVG = 200_000  # bytes; what has more lines than that is smaller as pixels
PLACES = re.compile(r'(?<= [dxy]=")[^"]+|translate\([^)]*\)')
IN_AN_ADDRESS = str.maketrans({'"': "'", "%": "%25", "#": "%23", "&": "&amp;"})  # and in an attribute of HTML
DIGITS = re.compile(r"(\.\d\d)\d+")
PIXELS_PER_INCH = 160
SPARK = (84, 20)  # width and height of the line of a run's accuracy in the table, in pixels
LINE_OF = "over epochs"  # the column of these lines
MAX_POINTS = 84  # of that line
MAX_WHOLE = 100  # runs whose flags are all repeated; of more, those that all share stand once
MARKS = {RUNNING: "running", DONE: "done", EARLY: "early", MEASURED: "done"}


@dataclass(frozen=True)
class Cell:
    """What stands in a table: text, by what it sorts, and what kind of text it is."""

    text: str
    by: str
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure as an image that lies in the page."""

    name: str
    title: str
    caption: str
    uri: str
    width: int
    height: int


@dataclass
class Entry:
    """A run in the page."""

    listed: Listed
    name: str
    cells: list[Cell]
    flags: list[tuple[str, str, bool]] = field(default_factory=list)  # name, value, whether it differs between runs
    facts: list[tuple[str, str]] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def mark(self) -> str:
        return MARKS.get(self.listed.state, "")

    @property
    def accuracy(self) -> str:
        return listing.in_figures("last", self.listed.value("last"))


def write_report(runs: Sequence[Run], figures: Iterable[tuple[str, Figure]], path: Path) -> Path:
    """Write the page, whole or not at all."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    subject = compare(runs).subject
    pictures = [picture(name, figure, subject) for name, figure in figures]
    write_whole(path, template.render(**content(runs, pictures)))
    return path


def content(runs: Sequence[Run], pictures: Sequence[Picture]) -> dict[str, Any]:
    """What the template needs."""
    listed = listing.newest_first(Listed(run.folder) for run in runs)
    table = without_what_all_share(listing.table(listed))
    table.columns.insert(table.columns.index("best") + 1, LINE_OF)
    limits = limits_of(listed)
    for run, row in zip(listed, table.rows, strict=True):
        row[LINE_OF] = line_of(run, *limits)
    entries = [
        Entry(run, row["name"], [cell_of(row, name) for name in table.columns])
        for run, row in zip(listed, table.rows, strict=True)
    ]
    differing = differing_flags(listed)
    shared = [] if len(listed) <= MAX_WHOLE else [pair for pair in flags_of(listed[0]) if pair[0] not in differing]
    by_folder = {run.folder: run for run in runs}
    for entry in entries:
        describe(entry, by_folder[entry.listed.folder], differing, whole=not shared)
    means = without_what_all_share(listing.means(listed))
    return {
        "title": title_of(listed),
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "num_settings": len(means.rows),
        "columns": [(name, listing.title(name), name in (*listing.WORDS, LINE_OF)) for name in table.columns],
        "hidden": table.hidden,
        "entries": entries,
        "means": means_of(means) if len(means.rows) < len(listed) else None,
        "shared": shared,
        "groups": {
            "Figures": [one for one in pictures if not one.name.startswith("heat_map_")],
            "Heat maps": [one for one in pictures if one.name.startswith("heat_map_")],
        },
        "line": LINE_OF,
        "spark_size": SPARK,
    }


def title_of(runs: Sequence[Listed]) -> str:
    """`ResNet on CIFAR10, 3 runs`"""
    about = [{str(run.value(name)) for run in runs} for name in ("model", "dataset")]
    what = " on ".join(names.pop() for names in about if len(names) == 1) or "Runs"
    return what if len(runs) == 1 else f"{what}, {len(runs)} runs"


def without_what_all_share(table: listing.Table) -> listing.Table:
    """The table without columns of a model or data that the title has already."""
    shared = {name for name in ("model", "dataset") if len({str(row[name]) for row in table.rows}) == 1}
    return replace(table, columns=[name for name in table.columns if name not in shared])


def cell_of(row: dict[str, Any], name: str) -> Cell:
    """A cell with what it sorts by: a number as it is, else its words."""
    value = row[name]
    if name == LINE_OF:
        return Cell(value, "", "line")
    by = repr(float(value)) if is_number(value) else "" if listing.is_gap(value) else value_in_words(value)
    return Cell(listing.cell(row, name), by, MARKS.get(value, "") if name == "state" else "")


def means_of(table: listing.Table) -> dict[str, Any]:
    """The table of means over seeds."""
    return {
        "columns": [(name, listing.title(name), name in listing.WORDS) for name in table.columns],
        "rows": [[cell_of(row, name) for name in table.columns] for row in table.rows],
    }


def differing_flags(runs: Sequence[Listed]) -> set[str]:
    """The flags of which not all runs have the same value, those of bookkeeping too."""
    names = {name for run in runs for name in run.flags}
    return {name for name in names if len({key(name, run.flags.get(name)) for run in runs}) > 1}


def flags_of(run: Listed) -> list[tuple[str, str]]:
    return [(str(name), value_in_words(value)) for name, value in run.flags.items()]


def describe(entry: Entry, run: Run, differing: set[str], *, whole: bool) -> None:
    """Fill in flags, versions and the closing table."""
    entry.flags = [
        (name.replace("_", "-"), value, name in differing)
        for name, value in flags_of(entry.listed)
        if whole or name in differing
    ]
    facts = {name: value for name, value in entry.listed.facts.items() if not isinstance(value, dict)}
    entry.facts = [(str(name).replace("_", " "), value_in_words(value)) for name, value in facts.items()]
    rows = rows_of(run)
    if rows:
        measured = [row for row in rows if any("/" in name and not name.startswith("time/") for name in row)]
        if measured:
            entry.head, entry.rows = measure_cells(measured[0], measured[-1], run.layers)
            entry.remarks = [text for about in MEASURES if about.remark and (text := about.remark(measured[-1]))]


def rows_of(run: Run) -> list[dict[str, str]]:
    """A run's epochs as `metrics.csv` has them, as text; empty cells left out."""
    names = [str(name) for name in run.metrics.columns]
    return [
        {"epoch": str(epoch)} | {name: repr(float(v)) for name, v in zip(names, row, strict=True) if not math.isnan(v)}
        for epoch, row in zip(run.metrics.index, run.metrics.to_numpy(dtype=float, na_value=math.nan), strict=True)
    ]


def limits_of(runs: Sequence[Listed]) -> tuple[float, float]:
    """Between which accuracies all runs lie."""
    values = [value for run in runs for value in run.accuracies]
    return min(values, default=0.0), max(values, default=0.0)


def line_of(run: Listed, low: float, high: float) -> str:
    """The points of a line of its test accuracy over epochs, between these limits; nothing where there is none."""
    values = run.accuracies
    if len(values) < 2 or low == high:
        return ""
    values = values[:: -math.ceil(len(values) / MAX_POINTS)][::-1]  # the last one among them
    width, height = SPARK
    step = (width - 2) / max(1, len(values) - 1)
    heights = (1 + (height - 2) * (high - value) / (high - low) for value in values)
    return " ".join(f"{1 + i * step:.1f},{y:.1f}" for i, y in enumerate(heights))


def picture(name: str, figure: Figure, subject: str = "") -> Picture:
    """A figure without paper, so that the page shines through; its heading, but for `subject`, is the page's text."""
    title, *about = " ".join(figure.get_suptitle().split()).split(" · ")
    for split in SETS:
        if name.endswith(f"_{split}") and f"{split} set" not in title:
            title = f"{title}, {split} set"
    figure.suptitle("")
    for ax in figure.axes:
        if tuple(ax.get_facecolor()[:3]) == (1.0, 1.0, 1.0):
            ax.set_facecolor("none")
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    caption = " · ".join(part for part in about if part != subject)
    return Picture(name, title[:1].upper() + title[1:], caption, image_of(figure), width, height)


def image_of(figure: Figure) -> str:
    """A figure as the address of an image: lines where they are few, else pixels."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        svg = shorter(_saved(figure, format="svg", metadata={"Date": None}).decode())
    if len(svg) <= LARGEST_SVG:
        return "data:image/svg+xml," + svg.translate(IN_AN_ADDRESS)
    png = _fewer_colors(_saved(figure, format="png", dpi=PIXELS_PER_INCH))
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def shorter(svg: str) -> str:
    """The same drawing with coordinates to a hundredth of a point, without remarks, in half the letters."""
    svg = re.sub(r"<!--.*?-->|<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = PLACES.sub(lambda match: DIGITS.sub(r"\1", match[0]), svg)
    return re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg)).strip()


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, facecolor="none", **options)
    return buffer.getvalue()


def _fewer_colors(png: bytes) -> bytes:
    """With 256 colors a drawing is a third of the size and looks the same."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png)).quantize(256, method=Image.Quantize.FASTOCTREE)
    image.save(buffer, format="png", optimize=True)
    return min(png, buffer.getvalue(), key=len)
