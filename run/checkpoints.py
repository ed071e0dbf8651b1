"""Checkpoints, written whole and read as data alone."""

import io
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from run.errors import UserError, WrongFlag
from run.files import write_whole

KEPT = re.compile(r"(last|best|epoch\d{4,})\.ckpt")  # beside them may lie the heads of DIB


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, read as data: one that holds code is refused and nothing of it runs."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint of this program: it holds more than numbers and names") from None
    except Exception as error:  # torch answers broken files with a dozen kinds of exceptions
        raise UserError(f"{path} is no checkpoint, or not a whole one: {' '.join(str(error).split())[:150]}") from None
    parts = {"state_dict": dict, "hyper_parameters": dict, "epoch": int}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in parts.items()):
        raise UserError(f"{path} is no checkpoint of this program: it has no {', '.join(parts)}")
    return content


def checkpoints_in(names: Sequence[str], one_for: str | None = None) -> dict[str, int]:
    """{path: epoch after which it was saved} of checkpoints, in the order given.

    A run's folder stands for the checkpoints that it keeps, in the order of their epochs. All are read: a bad one is
    told here, before anything is done with the others; and several, where a flag `one_for` takes one.
    """
    found: dict[str, int] = {}
    for name in names:
        more = kept_in(name) if os.path.isdir(name) else {name: epoch_of(name)}
        known = {os.path.realpath(path) for path in found}
        twice = [path for path in more if os.path.realpath(path) in known]
        if twice:
            raise UserError(f"--measure: {twice[0]} comes twice")
        found |= more
    if one_for and len(found) > 1:
        raise WrongFlag(f"argument {one_for}: takes one checkpoint of --measure at a time, and here are {len(found)}: "
                        f"{', '.join(found)}")  # fmt: skip
    return found


def kept_in(run: str) -> dict[str, int]:
    """{path: epoch} of the checkpoints in a run's folder, each epoch once, under the name that says the most."""
    folder = Path(run) / "checkpoints"
    paths = [folder / name for name in sorted(os.listdir(folder) if folder.is_dir() else ()) if KEPT.fullmatch(name)]
    if not paths:
        raise UserError(f"--measure: {run} is no run's folder with checkpoints: none lies in {folder}")
    by_name = sorted(paths, key=lambda path: ("last.ckpt", "best.ckpt", path.name).index(path.name))
    of_epoch = {epoch_of(path): str(path) for path in by_name}  # of an epoch, epoch0003.ckpt comes last and counts
    return {path: epoch for epoch, path in sorted(of_epoch.items())}


def epoch_of(path: str | Path) -> int:
    """After how many epochs a checkpoint was saved."""
    return read_checkpoint(path)["epoch"] + 1


def save_whole(path: Path, content: Any) -> None:
    """`torch.save` into a file that is there whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        path.parent.mkdir(exist_ok=True)  # without its parents: a run's folder that is gone is not made again
    except OSError as error:
        raise UserError(f"cannot make {path.parent}: {error.strerror}") from error
    write_whole(path, buffer.getvalue())


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, there whole or not at all (its own pass through another disk), read as data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_whole(Path(path), checkpoint)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(path)
