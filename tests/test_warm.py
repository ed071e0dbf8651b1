"""What `warm.py` starts is, as far as a program can see, what `subprocess` starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

SEEN = """
import json, os, signal, sys
import beside
streams = [sys.stdin, sys.stdout, sys.stderr]
seen = {
    "argv": sys.argv,
    "first of path": sys.path[0],
    "in path": sys.path.index(os.path.abspath("elsewhere")),
    "main": [__name__, sys.modules["__main__"].__dict__ is globals(), __spec__, __file__],
    "streams": [s and [s.encoding, s.errors, s.line_buffering, s.mode, s.name, s.isatty()] for s in streams],
    "originals": [sys.__stdin__ is streams[0], sys.__stdout__ is streams[1], sys.__stderr__ is streams[2]],
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1] if os.path.exists("/proc") else [],
    "signals": [str(signal.getsignal(number)).partition(" at ")[0] for number in signal.valid_signals()],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "folder": os.getcwd(),
    "environment": {name: value for name, value in os.environ.items() if name != "WARM_SERVER"},
    "leads its session": os.getsid(0) == os.getpid(),
    "threads": len(os.listdir("/proc/self/task")) if os.path.exists("/proc") else 1,
}
json.dump(seen, open("seen.json", "w"))
"""
ENDINGS = {
    "well": ("print('out'); import sys; print('err', file=sys.stderr)", 0),
    "with a status": ("import sys; sys.exit(3)", 3),
    "with a text": ("import sys; sys.exit('no')", 1),
    "with an error": ("1 / 0", 1),
    "by a signal": ("import os; os.kill(os.getpid(), 9)", -9),
    "by Ctrl-C": ("import os; os.kill(os.getpid(), 2)", -2),
    "at once": ("import os; os._exit(7)", 7),
    "with a farewell": ("import atexit; atexit.register(print, 'bye')", 0),
    "after its threads": ("import threading, time; threading.Timer(0.2, print, ['late']).start()", 0),
    "with output that nobody takes": ("import os, sys; os.dup2(os.open('/dev/full', 1), 1); print('lost')", None),
}


@pytest.fixture
def script(tmp_path):
    """A script that leaves what it sees in `seen.json`, in a folder with a module beside it."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "beside.py").write_text("")
    (folder / "script.py").write_text(SEEN)
    return folder / "script.py"


@pytest.mark.parametrize("env", [{}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:replace"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"stdout": subprocess.DEVNULL, "start_new_session": True}], ids=str)
def test_a_script_sees_the_same(env, options, script, tmp_path):
    line = [sys.executable, script, "a", "--b"]
    options = {"stdout": warm.PIPE, "stderr": warm.PIPE, "cwd": tmp_path, **options}
    options["env"] = {**os.environ, "PYTHONPATH": "elsewhere", **env}
    seen = []
    for program in (warm, subprocess):
        assert program.run(line, stdin=subprocess.DEVNULL, **options).returncode == 0
        seen.append(json.loads((tmp_path / "seen.json").read_text()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_ends_the_same(ending):
    code, status = ENDINGS[ending]
    line = [sys.executable, "-c", code]
    true = subprocess.run(line, capture_output=True, text=True)
    done = warm.run(line, capture_output=True)
    assert (done.returncode, done.stdout) == (true.returncode, true.stdout)
    assert true.returncode == status or (status is None and true.returncode)  # 120, without buffers 1
    assert done.stderr.splitlines()[-1:] == true.stderr.splitlines()[-1:]


@pytest.mark.parametrize(("category", "status"), [("DeprecationWarning", 0), ("UserWarning", 1)])
def test_warnings_are_errors_if_it_is_told_so(category, status):
    line = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c"]
    line += [f"import sys, warnings; print(sys.argv, sys.warnoptions); warnings.warn('mind', {category})"]
    done = [program.run(line, stdout=warm.PIPE, stderr=warm.PIPE) for program in (warm, subprocess)]
    assert done[0].returncode == done[1].returncode == status and done[0].stdout == done[1].stdout.decode()


def test_a_closed_standard_output_is_closed():
    code = "import os, sys; sys.exit(5 if sys.stdout is None and not os.path.exists('/proc/self/fd/1') else 6)"
    assert warm.run([sys.executable, "-c", code], stdout=warm.CLOSED).returncode == 5


def test_a_module_runs_by_its_name(tmp_path):
    (tmp_path / "module.py").write_text("import sys; print(__name__, *sys.argv[1:])")
    for program in (warm, subprocess):
        done = program.run([sys.executable, "-m", "module", "a"], cwd=tmp_path, stdout=warm.PIPE)
        assert done.stdout in ("__main__ a\n", b"__main__ a\n")


def test_it_takes_signals_and_its_end_is_waited_for(tmp_path):
    code = "import pathlib, time; pathlib.Path('begun').touch(); print('here', flush=True); time.sleep(60)"
    with warm.Popen([sys.executable, "-c", code], stdout=warm.PIPE, cwd=tmp_path) as process:
        assert process.stdout.readline() == "here\n" and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == process.returncode == process.poll() == -signal.SIGTERM


def test_a_process_may_ask_for_others():
    ask = "import sys, warm; print(warm.run([sys.executable, '-c', 'print(7); 1 / 0'], capture_output=True))"
    env = {**os.environ, "PYTHONPATH": str(Path(warm.__file__).parent)}
    told = warm.run([sys.executable, "-c", ask], capture_output=True, env=env)
    assert "returncode=1, stdout='7\\n'" in told.stdout and "ZeroDivisionError" in told.stdout, told.stderr


def test_the_libraries_are_imported_already_and_the_program_is_not():
    code = "import sys; print('torch' in sys.modules, {'main', 'run', 'datasets', 'plots'} & {*sys.modules})"
    assert warm.run([sys.executable, "-c", code], capture_output=True).stdout == "True set()\n"


def test_with_a_variable_that_a_library_may_read_it_is_a_true_process():
    code = "import sys; print('torch' in sys.modules)"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "of another machine"}
    assert warm.run([sys.executable, "-c", code], capture_output=True, env=env).stdout == "False\n"


def test_none_is_left_when_nobody_can_wait_any_more(tmp_path):
    """The tests end, in whatever way: so does the server, and what it started."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(warm.__file__).parent)!r})
import warm
warm.LIBRARIES = ()
print(warm.Popen([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=warm.PIPE) as process:
        told = sorted([process.stdout.readline(), process.stdout.readline()])
        pid = int(next(line for line in told if line != b"here\n"))
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
