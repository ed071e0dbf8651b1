"""Activations in files: what `--save-activations` leaves, and the clusters of such a file, of another program's too.

    python -m measures.clusters svd FILE LAYER         reduce, group, hold against the labels: as the run did
    python -m measures.clusters pca FILE LAYER         the same, with the variance that each direction explains

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

MAT_BYTES = 2**31 - 1  # of an array in MATLAB's version 5
MAT_HEADER = b"MATLAB 5.0 MAT-file, activations of a layer".ljust(116)  # SciPy's has the time: never the same bytes
SETTINGS = "recipe"


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


def read(path: Path, layer: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A layer's activations (N, …), the labels (N,), and the recipe of the run that saved them, if one did."""
    content = contents(path)
    own = str(np.ravel(content["layer"])[0]) if "layer" in content and "activations" in content else None
    names = [name for name in (layer, re.sub(r"\W", "_", layer)) if name in content]
    if own == layer:
        A = content["activations"]
    elif names:
        A = content[names[0]]
    else:
        others = {"labels", "predictions", "index", "epoch", "layer", SETTINGS}
        layers = [own] if own else [name for name in content if name not in others and not name.startswith("__")]
        raise UserError(f"{path} has no layer {layer}; it has {', '.join(layers) or 'none'}")
    if "labels" not in content:
        raise UserError(f"{path} has no labels: an array of that name is needed, with a whole number for each sample")
    recipe = json.loads(str(np.ravel(content[SETTINGS])[0])) if SETTINGS in content else {}
    return as_activations(A, path, layer), as_labels(content["labels"], len(A), path), recipe


def contents(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name."""
    try:
        if path.suffix == ".mat":
            from scipy.io import loadmat

            return loadmat(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
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
    if y.dtype.kind not in "fiub" or not (y >= 0).all() or not (y == np.floor(y)).all():
        raise UserError(f"{path}: labels must be whole numbers from 0 on")
    return torch.from_numpy(y.astype(np.int64))


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
    [flags] = [about.flags for about in MEASURES if about.name == "clusters"]
    for flag in flags:
        if flag.name in Recipe._fields:
            parser.add_argument(f"--{flag.name.replace('_', '-')}", help=flag.help, **flag.options)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print what clusters the file's activations have. Exit status: 0 done, 1 error, 2 wrong flag."""
    args = vars(get_args(argv))
    try:
        A, y, recipe = read(args["file"], args["layer"])
        given = {name: args[name] for name in Recipe._fields if name in args}
        figures, arrays = of_layer(A, y, Recipe(**recipe | given), int(y.max()) + 1)
        print(summary(figures, arrays, args["decomposition"]))
        if "output" in args:
            write_whole(args["output"], as_bytes({name: array.numpy() for name, array in arrays.items()}, "npz"))
    except UserError as error:
        print(f"measures.clusters: error: {error}", file=sys.stderr)
        return 1
    return 0


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
