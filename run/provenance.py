"""With what a run is made: versions, commit, time."""

import platform
from datetime import datetime
from typing import Any

import lightning
import torch
import torchvision

from run import command, slurm


def provenance() -> dict[str, Any]:
    """With what a run is made: versions, commit, time."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "lightning": lightning.__version__,
        "git_commit": command.commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **({"slurm_job": slurm.job_id()} if slurm.job_id() else {}),
    }
