"""Processes that need not import torch: forked from a server that has imported it, and otherwise as if just started.

`run` and `Popen` are called as those of `subprocess`, with `[sys.executable, SCRIPT, …]`, or `-c CODE` or `-m MODULE`.
What comes is a process with its own signals, streams, session, folder, environment and exit status, in which the script
runs as `__main__`, imports all modules of the program anew, and which ends as Python ends. It differs from one that
`subprocess` starts in this: the libraries are imported already, strings hash as in the server, and the server is its
parent. So what happens while the program starts is tested with `subprocess`. So is what depends on an environment
variable that is not in `FREE`, since a library may read it as it is imported: with such a one `Popen` starts a true
process.
"""

from __future__ import annotations

import atexit
import builtins
import codecs
import gc
import importlib
import io
import json
import locale
import os
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO

LIBRARIES = (
    *("torch", "torch.distributed", "torch.func", "torchvision", "lightning.pytorch", "numpy", "yaml", "tqdm"),
    *("pandas", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.mathtext", "sklearn.cluster"),
)
FREE = re.compile(
    r"WARM_SERVER|SLURM_\w+|MASTER_(ADDR|PORT)|NODE_RANK|STARTED_BY|LOCAL_WORLD_SIZE|PATH|PYTHONPATH|PYTEST_\w+|"
    r"PYTHON(IOENCODING|UNBUFFERED|DONTWRITEBYTECODE)|"
    # Lightning sets the first, the program takes it away, torch and scikit-learn set the others: all after the start.
    r"PYTORCH_NVML_BASED_CUDA_CHECK|TORCHINDUCTOR_CACHE_DIR|KMP_DUPLICATE_LIB_OK|KMP_INIT_AT_FORK"
)
CLOSED = -10  # for `stdout`: as after the shell's `>&-`
NUM_FILTERS = len(warnings.filters)  # before a library is imported


class Popen:
    """As `subprocess.Popen`, whose methods of the same names these are. Streams are text."""

    def __new__(cls, args: Sequence[str | Path], **options: object) -> Popen | subprocess.Popen:
        env = options.get("env") or os.environ
        if all(FREE.fullmatch(name) for name in _different(env)):
            return super().__new__(cls)
        if options.get("stdout") == CLOSED:
            options |= {"stdout": None, "preexec_fn": lambda: os.close(1)}
        return subprocess.Popen(args, **{"encoding": "utf-8", **options})

    def __init__(
        self,
        args: Sequence[str | Path],
        *,
        stdin: int | None = None,
        stdout: int | IO | None = None,
        stderr: int | IO | None = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        encoding: str = "utf-8",
    ) -> None:
        assert stdin in (None, DEVNULL)
        self.args, self.returncode, self._encoding = args, None, encoding
        python, *words = map(os.fspath, args)
        assert python == sys.executable
        warn = []
        while words[0] == "-W":
            warn.append(words[1])
            del words[:2]
        self.stdout, out = _ends(stdout, 1)
        self.stderr, err = _ends(stderr, 2)
        self._socket, its_end = socket.socketpair()
        request = {
            "argv": words,
            "warn": warn,
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": dict(env or os.environ),
            "session": start_new_session,
            "closed": [number for number, end in ((1, out), (2, err)) if end is None],
        }
        with open(os.devnull) as nothing:
            fds = [end if end is not None else nothing.fileno() for end in (out, err)]
            socket.send_fds(_server(), [b"!"], [nothing.fileno(), *fds, its_end.fileno()])
        its_end.close()
        for given, end in ((stdout, out), (stderr, err)):
            if given in (PIPE, DEVNULL):
                os.close(end)
        self._told = self._socket.makefile("r")
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        return self.wait(0, must_end=False)

    def wait(self, timeout: float | None = None, *, must_end: bool = True) -> int | None:
        if self.returncode is None:
            if select.select([self._socket], [], [], timeout)[0]:
                self.returncode = int(self._told.readline())
                self._told.close()
                self._socket.close()
            elif must_end:
                raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it printed since, until all who hold its streams have closed them; and it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        told = {stream: b"" for stream in (self.stdout, self.stderr) if stream and not stream.closed}
        waiting = set(told)
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], deadline and max(0, deadline - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout)
            for stream in ready:
                piece = stream.buffer.read1(1 << 16)
                told[stream] += piece
                if not piece:
                    waiting.remove(stream)
        self.wait(deadline and max(0, deadline - time.monotonic()))
        texts = {stream: piece.decode(self._encoding) for stream, piece in told.items()}
        for stream in told:
            stream.close()
        return texts.get(self.stdout), texts.get(self.stderr)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in filter(None, (self.stdout, self.stderr)):
            stream.close()
        self.wait()


def run(
    args: Sequence[str | Path], *, capture_output: bool = False, timeout: float | None = None, **options: object
) -> subprocess.CompletedProcess:
    """As `subprocess.run` with `text=True`."""
    if capture_output:
        options |= {"stdout": PIPE, "stderr": PIPE}
    process = Popen(args, **options)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def _different(env: Mapping[str, str]) -> set[str]:
    """The names of variables that are not as this process has them, and with it the server."""
    _server()
    return {name for name, _ in {*env.items()} ^ {*_SERVERS_ENV.items()}}


def _ends(stream: int | IO | None, number: int) -> tuple[IO | None, int | None]:
    """What to read from here, if anything, and the descriptor that the process gets."""
    if stream == PIPE:
        ours, its = os.pipe()
        return open(ours), its
    if stream == DEVNULL:
        return None, os.open(os.devnull, os.O_WRONLY)
    if stream == CLOSED:
        return None, None
    if stream is None:
        return None, number
    return None, stream if isinstance(stream, int) else stream.fileno()


_SERVERS: list[socket.socket] = []
_SERVERS_ENV: dict[str, str] = {}
PLACE = "WARM_SERVER"  # where a process that is warm itself finds the server


def _server() -> socket.socket:
    """The connection to the server that this process has started, and that ends with it; or that started this one."""
    if not _SERVERS and PLACE in os.environ:
        _SERVERS.append(socket.socket(socket.AF_UNIX))
        _SERVERS[0].connect(os.environ[PLACE])
        _SERVERS_ENV.update(os.environ)
    if not _SERVERS:
        ours, its = socket.socketpair()
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONIOENCODING")}
        command = [sys.executable, __file__, str(its.fileno()), *LIBRARIES]
        server = subprocess.Popen(command, env=env, pass_fds=[its.fileno()], start_new_session=True)
        its.close()
        atexit.register(lambda: (ours.close(), server.wait()))
        _SERVERS.append(ours)
        _SERVERS_ENV.update(os.environ)
    return _SERVERS[0]


# In the server


def serve(owner: socket.socket) -> list[str] | None:
    """Fork for each request until the owner can ask no more. In a process that was asked for: the words to run."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    folder = tempfile.mkdtemp()
    door = socket.socket(socket.AF_UNIX)
    door.bind(os.path.join(folder, "door"))
    door.listen()
    asking = [owner]
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([woken, door, *asking], [], [])
        if woken in ready:
            os.read(woken, 1 << 12)
            _tell_ends(running)
        if door in ready:
            asking.append(door.accept()[0])
        for who in set(asking) & set(ready):
            message, fds, _, _ = socket.recv_fds(who, 1, 4)
            if not message and who is owner:
                shutil.rmtree(folder)
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                return None
            if not message:
                asking.remove(who)
                who.close()
                continue
            *streams, end = fds
            connection = socket.socket(fileno=end)
            request = json.loads(connection.makefile("r").readline())
            pid = os.fork()
            if not pid:
                for held in (door, connection, *asking, *running.values()):
                    held.close()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(woken)
                os.close(wake)
                request["env"][PLACE] = os.path.join(folder, "door")
                _begin(streams, **request)
                return request["argv"]
            for fd in streams:
                os.close(fd)
            running[pid] = connection
            connection.sendall(b"%d\n" % pid)


def _tell_ends(running: dict[int, socket.socket]) -> None:
    """Tell who waits for a process that has ended its exit status."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as connection, suppress(BrokenPipeError):  # nobody may wait any more
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _begin(
    streams: list[int],
    argv: list[str],
    warn: list[str],
    cwd: str,
    env: Mapping[str, str],
    session: bool,
    closed: list[int],
) -> None:
    """What Python does before it runs a script."""
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    for number in closed:
        os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, _stream(number, name))
        setattr(sys, f"__{name}__", getattr(sys, name))
    sys.dont_write_bytecode = bool(env.get("PYTHONDONTWRITEBYTECODE"))
    sys.warnoptions[:] = warn
    of_libraries = warnings.filters[:-NUM_FILTERS]  # stand before those of -W, as they come later
    del warnings.filters[:-NUM_FILTERS]
    for action, _, category in (option.partition("::") for option in warn):
        warnings.simplefilter(action, getattr(builtins, category or "Warning"))
    warnings.filters[:0] = of_libraries
    sys.path[0] = "" if argv[0] in ("-c", "-m") else str(Path(argv[0]).resolve().parent)
    sys.path[1:1] = map(os.path.abspath, filter(None, env.get("PYTHONPATH", "").split(os.pathsep)))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _stream(number: int, name: str) -> io.TextIOWrapper | None:
    """A standard stream as Python opens it; None if it is closed."""
    try:
        os.fstat(number)
    except OSError:
        return None
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    errors = errors or ("strict" if encoding else getattr(sys, name).errors)
    is_buffered = not os.environ.get("PYTHONUNBUFFERED")
    buffer = open(number, "wb" if number else "rb", -1 if is_buffered or not number else 0, closefd=False)  # noqa: SIM115
    raw = getattr(buffer, "raw", buffer)
    raw.name = f"<{name}>"
    stream = io.TextIOWrapper(
        buffer,
        codecs.lookup(encoding or locale.getpreferredencoding(False)).name,
        "backslashreplace" if name == "stderr" else errors,
        newline="\n",
        line_buffering=is_buffered and (name == "stderr" or raw.isatty()),
        write_through=not is_buffered,
    )
    stream.mode = "w" if number else "r"
    return stream


def _execute(words: list[str]) -> None:
    """Run what `python WORDS` runs, as `__main__`."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        code = compile(words[1], "<string>", "exec")
    else:
        sys.argv = words
        module.__file__ = words[0]
        code = compile(Path(words[0]).read_bytes(), words[0], "exec")
    exec(code, module.__dict__)


if __name__ == "__main__":
    for library in sys.argv[2:]:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # else the first collection of every process would copy what they share
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1, "what a thread holds would not survive a fork"
    if argv := serve(socket.socket(fileno=int(sys.argv[1]))):
        _execute(argv)
