"""A SLURM of two nodes, all on this machine and all of it in one folder, for as long as a test needs it.

The daemons run in the foreground as children of this process: nothing of the system's own SLURM, if it has one, is
read, written or ended.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "salloc", "srun", "scontrol", "scancel", "sinfo", "squeue")
DAEMONS = "/usr/sbin:/usr/local/sbin"  # which are not on every PATH
# Nodes are called by addresses, since Lightning takes the first one's name for where the ranks meet. A requeued job
# becomes eligible only when credentials of its last turn have expired, usually after two minutes; five seconds are the
# least that SLURM takes.
SETTINGS = """
ClusterName=tests
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
MpiDefault=none
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=tests Nodes=ALL Default=YES
"""


def missing() -> list[str]:
    """What this machine lacks for it, in words."""
    lacking = [name for name in PROGRAMS if program(name) is None]
    return [*lacking, *(["root's rights"] if os.geteuid() else [])]


def program(name: str) -> str | None:
    """Where one of SLURM's programs lies; `scontrol` is the one beside the others, whatever stands before it."""
    path = f"{os.environ['PATH']}:{DAEMONS}"
    found = shutil.which(name if name != "scontrol" else "scancel", path=path)
    return found and str(Path(found).with_name(name))


def directory_of(name: str) -> str | None:
    """The folder in which one of SLURM's programs lies."""
    return program(name) and str(Path(program(name)).parent)


class Cluster:
    """Within a `with` block a cluster that takes jobs; `folder` is theirs, and their log is in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = f"{directory_of('sbatch')}:{os.environ['PATH']}"
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool.127.0.0.1", "spool.127.0.0.2"):
            (self.folder / name).mkdir(parents=True)
        gpus = [self.folder / f"gpu{i}" for i in range(2)]
        for gpu in gpus:
            gpu.touch()
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        text = SETTINGS.format(folder=self.folder, host=socket.gethostname(), ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        self._daemons = [self._daemon("slurmctld"), *(self._daemon("slurmd", "-N", f"127.0.0.{i}") for i in (1, 2))]
        until(lambda: self.ask("sinfo", "-h", "-o", "%D", "-t", "idle").strip() == "2", 30, self.log)
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("scancel", "--user", "root", check=False)
        try:  # a daemon does not end while one of its jobs does not
            until(lambda: not self.ask("squeue", "-h", check=False), 60, self.log)
        finally:
            for daemon in self._daemons:
                daemon.terminate()
            for daemon in self._daemons:
                end(daemon)

    def _daemon(self, name: str, *words: str) -> subprocess.Popen:
        log = open(self.folder / f"{name}{''.join(words)}.log", "w")  # noqa: SIM115
        return subprocess.Popen([program(name), "-D", *words], env=self.env, stdout=log, stderr=log)

    def log(self) -> str:
        """What the daemons said."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("slurm*.log")))

    def ask(self, *command: str, check: bool = True) -> str:
        """What one of SLURM's programs answers."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, (command, done.stderr)
        return done.stdout

    def submit(self, *words: object, env: Mapping[str, str] | None = None) -> str:
        """The number of the job that `sbatch WORDS` makes."""
        env = {**self.env, **(env or {})}
        done = subprocess.run(["sbatch", "--parsable", *map(str, words)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: its `JobState`, `Restarts`, `ExitCode`, …"""
        return dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", "-o", number).split())

    def signal(self, number: str, name: str = "USR1") -> None:
        """As `#SBATCH --signal=SIGUSR1@90` does it: all tasks, and not the script."""
        self.ask("scancel", f"--signal={name}", number, check=False)  # it says 1 at times, and the signal arrives


def until(condition: Callable[[], bool], seconds: float, say: Callable[[], object] = str) -> None:
    """Wait for something to hold; how long at most, and what to say if it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.1)


def end(process: subprocess.Popen) -> None:
    """Wait for a process to end; in half a minute it does, or is ended."""
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(num: int) -> Sequence[int]:
    """Ports on which nobody listens."""
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
