"""One thread for each process: tests are small, and several run at once. And a place of its own for a test."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, and by the processes that tests start


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """The test's working directory; afterwards signals mean again what they did before `main` ran in this process."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a made run with every measure."""
    from made_runs import make_run

    return make_run(tmp_path / "version_0")
