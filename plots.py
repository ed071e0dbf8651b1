"""Figures of runs: what training, neural collapse, decodable information and rank did, layer by layer.

    python plots.py lightning_logs/version_3                  every figure of one run, in plots/
    python plots.py lightning_logs -o paper --format pdf      all runs: seeds averaged, settings side by side
    python plots.py lightning_logs --html report.html         one page: a table of the runs, the figures, the flags

From Python, or in `plots.ipynb`: `plots.nc1_over_depth(plots.load(["lightning_logs/version_3"]))`.

Every figure takes one run or several. Runs whose flags differ in nothing but the seed are one setting: lines
are means over its runs (geometric where the axis is logarithmic), bands reach from the lowest to the highest.
Different settings stand side by side. What was not measured is left out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from figures.clusters import (
    alignment_of_classes,
    cka_of_layers,
    clusters_over_epochs,
    directions_over_epochs,
    singular_values,
    tsne_maps,
)
from figures.collapse import nc1_over_depth, nc1_over_epochs
from figures.decodable import head_losses, minimality_over_epochs, nc1_against_minimality, sufficiency_minimality
from figures.heat_maps import heat_map
from figures.labels import family_of, is_known, label_of
from figures.landscape import channel_importance, landscape_curves, landscape_maps, perturbation_curves
from figures.layerwise import measure_over_epochs
from figures.look import eigenvalues_over_epochs, look_over_epochs, ntk_spectrum, spectra
from figures.look_groups import spectra_by_group, spectra_of_average
from figures.look_matrices import gradient_cosines, jacobian_singular_values, matrices, path
from figures.looks import families
from figures.pages import write
from figures.range_test import lr_range_test
from figures.rank import rank_over_depth, rank_over_epochs
from figures.report import write_report
from figures.runs import Run, load
from figures.settings import compare
from figures.similarity import cka_between_epochs, cka_between_runs
from figures.slots import accuracy_by_slots, slot_pictures, slots_over_epochs, uncovered_samples
from figures.summary import summary
from figures.training import training_curves
from figures.views import views_classes, views_filters, views_images, views_over_epochs, views_units
from run import command
from run.catalogue import MEASURES, found
from run.errors import UserError
from run.parser import Parser

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = [
    "accuracy_by_slots", "alignment_of_classes", "channel_importance", "cka_between_epochs", "cka_between_runs",
    "cka_of_layers", "clusters_over_epochs", "directions_over_epochs", "eigenvalues_over_epochs", "figures",
    "gradient_cosines", "head_losses", "heat_map", "jacobian_singular_values", "landscape_curves", "landscape_maps",
    "load", "look_over_epochs", "lr_range_test", "main", "matrices", "measure_over_epochs",
    "minimality_over_epochs", "nc1_against_minimality", "nc1_over_depth", "nc1_over_epochs", "ntk_spectrum", "path",
    "perturbation_curves", "rank_over_depth", "rank_over_epochs", "singular_values", "slot_pictures",
    "slots_over_epochs", "spectra", "spectra_by_group", "spectra_of_average", "sufficiency_minimality", "summary",
    "training_curves", "tsne_maps",
    "uncovered_samples", "views_classes", "views_filters", "views_images", "views_over_epochs", "views_units",
    "write",
]  # fmt: skip


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of `python plots.py`."""
    parser = Parser(prog=command.PLOTS_NAME, description="Figures of a run, or of several.", allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder that holds such folders")
    add("-o", "--output", default="plots", metavar="FOLDER", help="where to write (default: plots)")
    add("--html", metavar="FILE", help="instead one page with a table of the runs and all figures, such as report.html")
    add("--format", choices=("png", "pdf", "svg"), default="png", help="file format (default: png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the figures, print their paths. Exit status: 0 done, 1 error, 2 wrong flag, 130 Ctrl-C, 141 closed pipe."""
    args = get_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters that a path has
    try:
        runs = load(args.runs, say=_say)
        if args.html:
            print(write_report(runs, _drawn(runs), Path(args.html)))
        else:
            for name, figure in _drawn(runs):
                print(write(figure, Path(args.output) / f"{name}.{args.format}"), flush=True)
    except UserError as error:
        _say(f"error: {error}")
        return 1
    except BrokenPipeError:  # nobody listens any more, as behind `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141
    except KeyboardInterrupt:
        return 130
    return 0


def figures(runs: Run | Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """Every figure with a name for its file: of training, of each measure in the catalogue, of all other columns."""
    settings = compare(runs).settings
    for draw in [*([summary] if len(settings) == 1 else []), training_curves, lr_range_test]:
        yield draw.__name__, draw(runs)
    for reference in (reference for about in MEASURES for reference in about.figures):
        draw = found(reference)
        for name, options in getattr(draw, "variants", {draw.__name__: {}}).items():
            yield name, draw(runs, **options)
    measures = [measure for setting in settings for measure in setting.measures if not label_of(measure).aside]
    for measure in [*dict.fromkeys(measures), *families(settings)]:
        yield f"heat_map_{_file_name(measure)}", heat_map(runs, measure)
    for family in dict.fromkeys(family_of(measure) for measure in measures if not is_known(measure)):
        yield f"{_file_name(family)}_over_epochs", measure_over_epochs(runs, family)


def shows_something(figure: Figure) -> bool:
    """Whether it is more than a sentence."""
    return any(ax.axison for ax in figure.axes)


def _file_name(measure: str) -> str:
    return re.sub("[^A-Za-z0-9_.-]", "_", measure.replace("*", "each"))


def _drawn(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """The figures that show something, by name; says which do not, and what all of them leave out."""
    left_out = compare(runs).left_out
    if left_out:
        _say(f"every figure shows {left_out}")
    missing = []
    for name, figure in figures(runs):
        if shows_something(figure):
            yield name, figure
        else:
            missing.append(name)
    if missing:
        _say(f"not measured, so not drawn: {', '.join(missing)}")


def _say(sentence: str) -> None:
    print(f"{command.PLOTS_NAME}: {sentence}", file=sys.stderr)


def from_shell() -> None:
    """The figures, as they are asked for from a shell."""
    sys.exit(main())


if __name__ == "__main__":
    from_shell()
