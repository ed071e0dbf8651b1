"""Input gradients to be looked at: beside images, of classes and units on noise; the first layer's filters; scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figures import kept
from figures.axes import band_of, chosen_epochs, draw_line, epoch_axis, thin, y_axis
from figures.pages import grid, legend_below, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import OKABE_ITO, NothingToDraw, plain
from figures.tiles import Cell, Panel, gradient_tile, image_tile, page_of_tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VIEWS = "views"
LACKING = "There are no views of the network; main.py makes them with --views."
NO_IMAGES = "The inputs are no images: what views of them there are is numbers, in metrics.csv and views.npz."
NO_PICTURES = "No images were pictured; main.py pictures as many as are asked for with --views --views-images 8."
NO_FILTERS = "The network's first layer has no filters that could be shown as images."
SCORES = ("views/stability/*", "views/agreement", "views/separation/*", "views/roughness/*")
FEW = 3  # classes of which each has a tile beside an image
MAX_CELLS = 120  # classes or units on a page
MAX_FILTERS = 600


@styled
def views_images(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, classes: Sequence[int | str] | None = None
) -> Figure:
    """The first test images, each beside its gradients: towards all classes where there are up to three.

    Else towards its own class and the wrong one of the largest logit; or towards these `classes`, by number or name.
    At the last epoch by default. Of the first run that has views.
    """
    views = _Views.of(runs, epochs, "images", "labels", "logits", "gradients", "gradients_of")
    if "gradients" not in views.arrays:
        raise NothingToDraw(NO_PICTURES)
    images, y, logits = (views.arrays[name] for name in ("images", "labels", "logits"))
    of = views.towards(classes)  # (M, K)
    names = views.class_names
    cells = []
    for i, image in enumerate(images):
        tiles = [gradient_tile(views.gradient(i, c)) for c in of[i]]
        title = names[y[i]] if views.is_same(of) else " | ".join(names[c] for c in of[i])
        cells.append(Cell([image_tile(image), *tiles], title, logits[i].argmax() != y[i]))
    towards = ", ".join(names[c] for c in of[0]) if views.is_same(of) else "its class and the strongest wrong one"
    caption = f"each: an image, its gradients towards {towards}, as g / (2 max|g|) + ½. Red: classified wrongly"
    return page_of_tiles(views.heading("Gradients on images"), [Panel(cells, "test images", caption)])


@styled
def views_classes(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """The gradients of each class on noise, two of them and the mean of all, and the mean on images; with stability."""
    views = _Views.of(runs, epochs)
    cells = views.cells("classes", views.class_names, ("noise", "images"))
    caption = (
        f"each: gradients on two inputs of noise, their mean over {views.settings['samples']}, and that over images. "
        "Numbers: stability on noise, on images"
    )
    return page_of_tiles(views.heading("Gradients of classes"), [Panel(cells, "classes", caption)])


@styled
def views_units(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """The gradients of hidden units on noise, two of them and the mean of all; with the units' stability on noise.

    Below them those of slots, if the network has any, class by class. Units and slots that are dead on every input of
    noise are left out.
    """
    views = _Views.of(runs, epochs)
    panels = [views.panel(f"units/{layer}", f"units of {layer}") for layer in views.settings["layers"]]
    panels = [panel for panel in (*panels, views.panel("slots", "slots")) if panel.cells]
    if not panels:
        raise NothingToDraw("No unit of the layers that were viewed has a gradient on noise.")
    return page_of_tiles(views.heading("Gradients of units on noise"), panels)


@styled
def views_filters(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """Every filter of the first layer: of a convolution, or the weights of a unit of a linear map on images."""
    views = _Views.of(runs, epochs, "filters")
    filters = views.arrays.get("filters", np.empty(0))
    if filters.ndim != 4:
        raise NothingToDraw(NO_FILTERS)
    shown = thin(list(filters), MAX_FILTERS)
    size = 0.5 if len(shown) <= 150 else 0.32
    some = "" if len(shown) == len(filters) else f"{len(shown)} of "
    caption = f"the weights of {some}{len(filters)} filters of the first layer, each as w / (2 max|w|) + ½"
    panel = Panel([Cell([gradient_tile(w)]) for w in shown], "filters", caption, size)
    return page_of_tiles(views.heading("Filters"), [panel])


@styled
def views_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """Stability, agreement, separation, roughness over the epochs, means over classes, a layer's units, and slots."""
    draw = _Scores()
    figure = grid(runs, "Input gradients over epochs", SCORES, draw)
    legend_below(figure, draw.legend())
    return figure


class _Views(NamedTuple):
    """What a run keeps of an epoch."""

    run: Run
    setting: Setting
    epoch: int
    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]

    @classmethod
    def of(cls, runs: Run | Sequence[Run], epochs: Sequence[int] | None, *names: str) -> _Views:
        """Of the first run that has any, these arrays (else all) of the last epoch, or the first of those wanted."""
        for setting in compare(runs).settings:
            for run in setting.runs:
                found = kept.epochs_of(run, VIEWS)
                if found:
                    epoch = chosen_epochs(found, epochs, 1, lambda first, last, num: np.array([last]))[0]
                    arrays, settings = kept.read(kept.file_of(run, epoch, VIEWS), names or None)
                    if settings["white_roughness"] is None:
                        raise NothingToDraw(NO_IMAGES)
                    return cls(run, setting, epoch, arrays, settings)
        raise NothingToDraw(LACKING)

    def heading(self, what: str) -> str:
        return f"{what} · {self.setting.label} · {self.run.folder.resolve().name} · epoch {self.epoch}"

    @property
    def class_names(self) -> list[str]:
        return self.settings["classes"] or [f"class {c}" for c in range(10_000)]

    def cells(self, of: str, names: Sequence[str], kinds: Sequence[str], only_alive: bool = False) -> list[Cell]:
        """A cell for each pictured class or unit: examples on noise, and the means over inputs of some kinds."""
        cells = []
        for row, i in self.pictured(of):
            if only_alive and self.arrays[f"{of}/zeros/noise"][i] == 1:
                continue
            gradients = *self.arrays[f"{of}/examples"][row], *(self.arrays[f"{of}/mean/{kind}"][row] for kind in kinds)
            stabilities = ", ".join(f"{self.arrays[f'{of}/stability/{kind}'][i]:.2f}" for kind in kinds)
            cells.append(Cell([gradient_tile(g) for g in gradients], f"{names[i]} · {stabilities}"))
        return cells

    @property
    def names_of_slots(self) -> list[str]:
        label, index = (self.arrays.get(f"slots/{name}", ()) for name in ("label", "index"))
        return [f"{self.class_names[c]}: slot {i}" for c, i in zip(label, index, strict=True)]

    def panel(self, of: str, label: str) -> Panel:
        """The units of a layer, or the slots, that are not dead on noise; perhaps none."""
        names = [f"unit {i}" for i in self.arrays.get(f"{of}/index", ())]
        if of == "slots":
            names = self.names_of_slots
        cells = self.cells(of, names, ("noise",), only_alive=True)
        return Panel(cells, label, self.about_units(of, len(cells)))

    def pictured(self, of: str) -> list[tuple[int, int]]:
        """Of the classes or units that have pictures, as many as a page holds: positions there, and among all."""
        return thin(list(enumerate(self.arrays.get(f"{of}/pictured", ()))), MAX_CELLS)

    def about_units(self, of: str, num_shown: int) -> str:
        """What stands below a page of units, `num_shown` of them."""
        num = len(self.pictured(of))
        dead = f". {num - num_shown} of {num} are dead and left out" if num_shown < num else ""
        inputs = f"two inputs of noise, their mean over {self.settings['samples']}"
        return f"each: gradients on {inputs}. Numbers: stability on noise{dead}"

    def towards(self, classes: Sequence[int | str] | None) -> np.ndarray:
        """The classes whose gradients stand beside each image, (M, K)."""
        y, logits, known = (self.arrays[name] for name in ("labels", "logits", "gradients_of"))
        num = logits.shape[1]
        if classes is not None:
            numbers = [self.class_names.index(c) if c in self.class_names else c for c in classes]
            if not numbers or any(c not in range(num) for c in numbers) or len(known.T) < num:
                raise NothingToDraw(f"There are no gradients towards {classes} for every image.")
            return np.tile(numbers, (len(y), 1))
        if num <= FEW:
            return known
        wrong = logits.copy()
        wrong[np.arange(len(y)), y] = -np.inf
        return np.stack([y, wrong.argmax(1)], axis=1)

    def gradient(self, i: int, c: int) -> np.ndarray:
        """The gradient of an image towards a class."""
        [k] = np.flatnonzero(self.arrays["gradients_of"][i] == c)
        return self.arrays["gradients"][i, k]

    @staticmethod
    def is_same(of: np.ndarray) -> bool:
        """Whether the tiles are of the same classes for every image."""
        return bool((of == of[:1]).all()) and (len(of) > 1 or of.shape[1] != 2)


class _Scores:
    """Draws a score of one setting: of classes and of units in colors, on noise without a break, on images dashed."""

    def __init__(self) -> None:
        self.drawn: dict[str, str] = {}  # what has a color

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        score = measure.split("/")[1]
        self._lines(ax, setting, measure, "classes")
        if score == "agreement":
            self._lines(ax, setting, "views/units/agreement/*", None)
            self._lines(ax, setting, "views/slots/agreement", "slots")
        elif score != "separation":
            self._lines(ax, setting, f"views/slots/{score}/*", "slots")
        for kind in ("noise", "images"):
            self._lines(ax, setting, f"views/units/{score}/{kind}/*", None, kind)
        white = self._white(setting) if score == "roughness" else None
        if white is not None:
            ax.axhline(white, color="0.5", linestyle=":", linewidth=1)
        epoch_axis(ax, band_of(setting, measure).mean.index)
        y_axis(ax, measure)

    def _lines(self, ax: Axes, setting: Setting, measure: str, name: str | None, kind: str = "") -> None:
        if not setting.has(measure):
            return
        band = band_of(setting, measure)
        for column in band.mean:
            color = self.drawn.setdefault(name or f"units of {column}", OKABE_ITO[len(self.drawn) % len(OKABE_ITO)])
            line = "--" if "images" in (kind, column) else "-"
            draw_line(ax, band, column, color=color, linestyle=line, label=f"{name or column} {kind or column}")

    @staticmethod
    def _white(setting: Setting) -> float | None:
        found = [run for run in setting.runs if kept.epochs_of(run, VIEWS)]
        if not found:
            return None
        epoch = kept.epochs_of(found[0], VIEWS)[-1]
        return kept.read(kept.file_of(found[0], epoch, VIEWS), ())[1]["white_roughness"]

    def legend(self) -> list:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color=color, label=plain(name)) for name, color in self.drawn.items()]
        styles = {"on noise, and agreement": "-", "on images": "--", "white noise": ":"}
        return lines + [Line2D([], [], color="0.3", linestyle=style, label=label) for label, style in styles.items()]
