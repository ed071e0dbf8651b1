"""Checkpoints, written whole and read as data alone."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from run.errors import UserError
from run.files import write_whole


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
