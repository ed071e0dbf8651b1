"""Activations in files: what `--save-activations` leaves, and the clusters of such a file, of another program's too.

    python -m measures.clusters svd FILE LAYER         reduce, group, hold against the labels: as the run did
    python -m measures.clusters pca FILE LAYER         the same, with the variance that each direction explains

Numbers are printed, and a page of figures written into plots/, or where --figures says.

FILE is `arrays/epoch0003/activations/test/LAYER.npz` of a run, or `.mat`, in MATLAB's version 5; or a file of either
kind with an array per layer, samples first, and `labels`. A name that MATLAB does not allow has _ for other letters.

Letters: N samples, d dimension of a layer's activations.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from measures.grouping import Recipe, of_layer
from run.catalogue import MEASURES
from run.errors import UserError
from run.files import write_whole
from run.parser import Help, Parser
from run.tables import table
from run.values import perhaps

MAT_BYTES = 2**31 - 1  # of an array in MATLAB's version 5
MAT_HEADER = b"MATLAB 5.0 MAT-file, activations of a layer".ljust(116)  # SciPy's has the time: never the same bytes
SETTINGS = "recipe"
OTHERS = {"labels", "predictions", "index", "epoch", "layer", "set", SETTINGS}  # arrays that are no layers
MOST_NAMES = 20
MOST_CLASSES = 10_000  # whose pairs are aligned: 800 MB


class Saved(NamedTuple):
    """Where a run saves activations, in which format, and the recipe of its clusters."""

    folder: Path
    file_format: str
    recipe: Recipe

    def write(
        self, A: Tensor, y: Tensor, predictions: Tensor, index: Tensor, layer: str, epoch: int, split: str
    ) -> None:
        """Save activations (N, d) and, of each sample, label, prediction and index in its set."""
        size = A.numel() * max(A.element_size(), 4)
        if self.file_format == "mat" and size > MAT_BYTES:
            raise UserError(
                f"--activations-format mat: {layer} takes {size / 2**30:.1f} GiB, and arrays of a .mat file end at 2 "
                "GiB: lower --cluster-samples or take npz"
            )
        content = {
            "activations": (A if A.element_size() >= 4 else A.float()).cpu().numpy(),
            "labels": y.cpu().numpy(),
            "predictions": predictions.flatten().cpu().numpy(),
            "index": index.cpu().numpy(),
            "layer": layer,
            "epoch": epoch,
            "set": split,
            SETTINGS: json.dumps(self.recipe._asdict()),
        }
        folder = self.folder / f"epoch{epoch:04d}" / "activations" / split
        try:
            self.folder.mkdir(exist_ok=True)  # without its parents: a run's folder that is gone is not made again
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error
        write_whole(folder / f"{layer}.{self.file_format}", as_bytes(content, self.file_format))


def as_bytes(content: Mapping[str, Any], file_format: str) -> bytes:
    """A file with these arrays."""
    buffer = io.BytesIO()
    if file_format == "npz":
        np.savez(buffer, **content)
    else:
        from scipy.io import savemat

        savemat(buffer, content)
        buffer.getbuffer()[: len(MAT_HEADER)] = MAT_HEADER
    return buffer.getvalue()


class Found(NamedTuple):
    """A layer in a file: its activations (N, …), labels (N,), and of which set and epoch, by which recipe, if known."""

    activations: Tensor
    labels: Tensor
    recipe: dict[str, Any]
    split: str | None
    epoch: int | None


def read(path: Path, layer: str) -> Found:
    """A layer of a file."""
    content = contents(path)
    own = text(content, "layer") if "activations" in content else None
    names = [name for name in (layer, re.sub(r"\W", "_", layer)) if name in content]
    if own == layer:
        A = content["activations"]
    elif names:
        A = content[names[0]]
    else:
        layers = [own] if own else [name for name in content if name not in OTHERS and not name.startswith("__")]
        raise UserError(f"{path} has no layer {layer}" + (perhaps(layer, layers) or f"; it has {in_short(layers)}"))
    if "labels" not in content:
        raise UserError(f"{path} has no labels: an array of that name is needed, with a whole number for each sample")
    A = as_activations(A, path, layer)
    y = as_labels(content["labels"], len(A), path)
    split, epoch = (text(content, name) if own else None for name in ("set", "epoch"))
    recipe = as_recipe(text(content, SETTINGS), path)
    return Found(A, y, recipe, split, int(epoch) if epoch and epoch.isdigit() else None)


def text(content: Mapping[str, np.ndarray], name: str) -> str | None:
    """A word or number that a file has beside its arrays; MATLAB's has it in an array."""
    return str(np.ravel(content[name])[0]) if name in content and content[name].size else None


def in_short(layers: list[str]) -> str:
    """Their names, as many as a sentence holds."""
    more = f" and {len(layers) - MOST_NAMES} more" if len(layers) > MOST_NAMES else ""
    return (", ".join(layers[:MOST_NAMES]) or "none") + more


def contents(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the file of a layer")
    if path.suffix != ".mat" and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no file of NumPy's, .npz, and .mat are MATLAB's")
    try:
        if path.suffix == ".mat":
            from scipy.io import loadmat

            return loadmat(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except NotImplementedError:
        raise UserError(f"{path} is of MATLAB's version 7.3: save it with -v7") from None
    except Exception as error:  # a broken file answers with a dozen kinds of exceptions
        kind = "MATLAB" if path.suffix == ".mat" else "NumPy"
        raise UserError(f"{path} is no file of {kind}'s: {' '.join(str(error).split())}") from None


def as_activations(A: np.ndarray, path: Path, layer: str) -> Tensor:
    if A.dtype.kind not in "fiub" or A.ndim < 2 or not A.size:
        raise UserError(f"{path}: {layer} must be numbers, samples × features; it is {A.dtype} of shape {A.shape}")
    if not np.isfinite(A).all():
        raise UserError(f"{path}: {layer} has values that are infinite or nan")
    return torch.from_numpy(np.ascontiguousarray(A.astype(A.dtype.newbyteorder("="))))


def as_labels(labels: np.ndarray, num_samples: int, path: Path) -> Tensor:
    y = np.ravel(labels)
    if len(y) != num_samples:
        raise UserError(f"{path} has {len(y)} labels for {num_samples} samples")
    if y.dtype.kind not in "fiub" or not ((y >= 0) & (y < MOST_CLASSES)).all() or not (y == np.floor(y)).all():
        raise UserError(f"{path}: labels must be whole numbers from 0 to {MOST_CLASSES - 1}")
    return torch.from_numpy(y.astype(np.int64))


def as_recipe(words: str | None, path: Path) -> dict[str, Any]:
    try:
        recipe = json.loads(words or "{}")
        Recipe(**recipe)
    except (ValueError, TypeError):
        raise UserError(f"{path}: its {SETTINGS} is not that of a run") from None
    return recipe


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The words and flags of the command; flags that are not given are not there."""
    parser = Parser(
        prog="measures.clusters",
        description="Clusters of saved activations, held against the labels.",
        formatter_class=Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("decomposition", choices=("svd", "pca"), help="the same scores; pca tells the variances too")
    parser.add_argument("file", type=Path, metavar="FILE", help="activations, .npz or .mat")
    parser.add_argument("layer", metavar="LAYER", help="the layer's name in that file")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep scores, clusters, … in this .npz")
    figures = parser.add_argument_group("figures").add_mutually_exclusive_group()
    figures.add_argument("--figures", type=Path, default=Path("plots"), metavar="FOLDER", help="where to draw them")
    figures.add_argument("--no-figures", dest="figures", action="store_const", const=None, help="draw nothing")
    [flags] = [about.flags for about in MEASURES if about.name == "clusters"]
    for flag in flags:
        if flag.name in Recipe._fields:
            parser.add_argument(f"--{flag.name.replace('_', '-')}", help=flag.help, **flag.options)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print what clusters the file's activations have, and draw them. Exit status: 0 done, 1 error, 2 wrong flag."""
    args = vars(get_args(argv))
    try:
        found = read(args["file"], args["layer"])
        given = {name: args[name] for name in Recipe._fields if name in args}
        recipe = Recipe(**found.recipe | given)
        figures, arrays = of_layer(found.activations, found.labels, recipe, int(found.labels.max()) + 1)
        print(summary(figures, arrays, args["decomposition"]))
        arrays = {name: array.numpy() for name, array in arrays.items()}
        if "output" in args:
            write_whole(args["output"], as_bytes(arrays, "npz"))
        if args["figures"]:
            print(f"\nfigures in {draw(args, found, figures, arrays)}")
    except UserError as error:
        print(f"measures.clusters: error: {error}", file=sys.stderr)
        return 1
    return 0


def draw(args: Mapping[str, Any], found: Found, figures: Mapping[str, float], arrays: Mapping[str, np.ndarray]) -> Path:
    """A page of figures in a file, whose name has set, epoch and layer."""
    from figures.grouped import clusters_of_layer  # only here: a measure draws nothing
    from figures.pages import write

    layer, decomposition, folder = args["layer"], args["decomposition"], args["figures"]
    split, epoch = found.split, found.epoch
    words = [f"Clusters of {layer}", split and f"{split} set", None if epoch is None else f"epoch {epoch}"]
    title = " · ".join(filter(None, [*words, args["file"].name]))
    page = clusters_of_layer(title, figures, arrays, found.labels.numpy(), with_variance=decomposition == "pca")
    places = [split, None if epoch is None else f"epoch{epoch:04d}", layer, decomposition]
    name = re.sub(r"[^\w.-]", "_", "_".join(filter(None, places)))
    return write(page, folder / f"{name}.png")


def summary(figures: Mapping[str, float], arrays: Mapping[str, Tensor], decomposition: str) -> str:
    """The figures, and a line for each of the first directions."""
    sigma = arrays["singular_values"]
    shares = sigma**2 / (sigma**2).sum() * figures["energy"]
    columns = {"direction": [str(i + 1) for i in range(len(sigma))], "S": [f"{s:.6g}" for s in sigma]}
    if decomposition == "pca":
        columns["variance"] = [f"{s**2 / (len(arrays['scores']) - 1):.6g}" for s in sigma]
        columns["share"] = [f"{share:.6g}" for share in shares]
    columns["energy"] = [f"{energy:.6g}" for energy in shares.cumsum(0)]
    rows = list(zip(*columns.values(), strict=True))
    head = table(["figure", "value"], [[name, repr(value)] for name, value in figures.items()])
    return f"{head}\n\n{table(list(columns), rows)}"


def from_shell() -> None:
    """The command, as it is called from a shell."""
    sys.exit(main())
