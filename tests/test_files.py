import multiprocessing
import os
import time

import pytest

from run.errors import UserError
from run.files import write_whole


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="file: No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def write_forever(path):
    letters = 0
    while True:
        letters = (letters + 1) % 26
        write_whole(path, chr(97 + letters) * 3_000_000)


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "file"
    for i in range(10):
        path.unlink(missing_ok=True)
        writer = multiprocessing.get_context("fork").Process(target=write_forever, args=(path,))
        writer.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.0037 * i)
        writer.kill()
        writer.join()
        content = path.read_text()
        assert len(content) == 3_000_000 and len(set(content)) == 1
