"""Files that are there whole or not at all, at whatever moment a process is killed."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Lets one process through at a time; the system frees the lock of one that dies."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever had the lock has removed the file, and a third may hold a new one by now: start over.
            if not _is_at(file.fileno(), lock):
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
