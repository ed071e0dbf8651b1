"""With what a run is made: versions, commit, time."""

import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision

from run import slurm


def provenance() -> dict[str, Any]:
    """With what a run is made: versions, commit, time."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "lightning": lightning.__version__,
        "git_commit": _git_commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **({"slurm_job": slurm.job_id()} if slurm.job_id() else {}),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that this is, with a `+` where files differ from it."""
    # In a container the checkout is mounted, of an owner whom git does not trust by itself.
    git = ["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent)]
    try:
        # An installed program may lie within somebody else's checkout.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout: an image, which may know, or an archive
        return os.environ.get("GIT_COMMIT") or None
    return commit + ("+" if changed.stdout.strip() else "")
