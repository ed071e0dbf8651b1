"""Programs that stand in for those not at hand: each notes how it was called, then does what it is told."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class StandIns:
    """A folder of programs, the only ones a script finds beside the system's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        self._log = folder / "calls"

    def add(self, name: str, then: str = "") -> None:
        """A program of this name: shell lines for what it does after its note."""
        note = shlex.join([sys.executable, "-SE", __file__, str(self._log), name])
        (self.folder / name).write_text(f'#!/bin/sh\n{note} "$@"\n{then}\n')
        (self.folder / name).chmod(0o755)

    def calls(self, name: str | None = None) -> list[dict]:
        """Every call so far, in order, or those of one program: its `name`, `argv`, `env` and `cwd`."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [call for call in map(json.loads, lines) if name in (None, call["name"])]

    def run(self, *command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
        """Run a command that finds these programs, in a clean environment."""
        env = {"PATH": f"{self.folder}:/usr/bin:/bin", "HOME": str(cwd), **env}
        return subprocess.run([*command], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def tool(name: str) -> str:
    """A program that pip installed beside this interpreter."""
    return str(Path(sys.executable).with_name(name))


if __name__ == "__main__":
    _, log, name, *argv = sys.argv
    with open(log, "a") as file:
        file.write(json.dumps({"name": name, "argv": argv, "env": dict(os.environ), "cwd": os.getcwd()}) + "\n")
