"""Files that are there whole or not at all, at whatever moment a process is killed."""

import os
from contextlib import suppress
from pathlib import Path

from run.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file's content so that at any moment the old or the new one is there, whole."""
    beside = _beside(path)
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):  # where writing fails, so may this
            beside.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise


def _beside(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def same_file(path: Path, other: Path) -> None:
    """Let a second name mean the file that is there under the first, which is never written into, only replaced."""
    beside = _beside(other)
    try:
        os.link(path, beside)
        os.replace(beside, other)
    except OSError:  # not every file system knows links
        write_whole(other, path.read_bytes())


def stamp(path: Path) -> tuple[int, int] | None:
    """Another one whenever a file was replaced; None where there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left beside the files of a folder that is ours alone."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()
