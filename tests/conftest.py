"""One thread for each process: tests are small, and several run at once. And a place of its own for a test.

A SLURM of this machine, or the job in which the tests run, is none of theirs: they see neither. Nor do they see that a
shell which runs them in the background has them ignore Ctrl-C.
"""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, and by the processes that tests start
for name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[name]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_slurm_answers(tmp_path_factory):
    """The first `scontrol` on every test's PATH knows no job, whether or not SLURM is installed."""
    program = tmp_path_factory.mktemp("bin") / "scontrol"
    program.write_text("#!/bin/sh\necho 'no such job in tests' >&2\nexit 1\n")
    program.chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{program.parent}:{path}"
    yield
    os.environ["PATH"] = path


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """The test's working directory; afterwards signals mean again what they did before `main` ran in this process."""
    monkeypatch.chdir(tmp_path)
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF, signal.SIGUSR1)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a made run with every measure."""
    from made_runs import make_run

    return make_run(tmp_path / "version_0")
