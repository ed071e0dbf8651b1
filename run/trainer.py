"""Lightning's Trainer as a run wants it, and with how many threads torch computes."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import nn

from run import command, ranks, slurm
from run.checkpoints import WholeCheckpoints
from run.console import OwnSignals, silence_libraries
from run.ddp import SteadyDDP
from run.errors import UserError, WrongFlag

SMALL = 10_000  # parameters: below, a second thread takes longer to wake than it saves


def new_trainer(args: Namespace, **options: Any) -> Trainer:
    """Lightning's Trainer, without the logs, bars, checkpoints and samplers for which we bring our own."""
    silence_libraries()
    if not torch.cuda.is_available():
        # Lightning has torch look for the driver anew whenever it is asked for a GPU; Adam asks at every step.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    options = {
        "accelerator": args.accelerator,
        "devices": args.devices,
        "num_nodes": args.num_nodes,
        "strategy": new_strategy(args),
        "precision": args.precision,
        "deterministic": args.deterministic,
        "max_epochs": args.epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "plugins": [WholeCheckpoints()],
        **options,
        "callbacks": [OwnSignals(), *options.get("callbacks", ())],
    }
    crowd = (
        ranks.too_many_processes(args.devices) if args.accelerator == "auto" and not torch.cuda.is_available() else None
    )
    if crowd:
        raise WrongFlag(crowd)
    try:
        if slurm.started_several():  # in an allocation too, from whose name Lightning concludes that nobody did
            os.environ["SLURM_JOB_NAME"] = command.NAME
        if SLURMEnvironment.detect():  # else four tasks with --devices 1 would be four runs
            SLURMEnvironment().validate_settings(args.devices, args.num_nodes)
        return Trainer(**options)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        flags = "--accelerator, --devices, --num-nodes, --strategy, --precision"
        raise UserError(f"one of {flags} does not fit this machine: {' '.join(str(error).split())}") from None


def new_strategy(args: Namespace) -> Strategy | str:
    """How several processes train together; a single one needs nothing of it."""
    if args.strategy == "auto" and args.devices * args.num_nodes == 1:
        return "auto"
    return SteadyDDP(timeout=ranks.PATIENCE, find_unused_parameters=args.strategy == "ddp_find_unused_parameters_true")


def use_threads(flags: Mapping[str, Any], network: nn.Module) -> None:
    """Have torch compute with `--threads`. Without: a small network with one, others with all, shared by processes.

    One that grows is not small.

    To be called before anything is computed, as the last digits of sums depend on it.
    """
    num = flags["threads"]
    if (
        num is None
        and flags.get("head") != "slots"
        and sum(parameter.numel() for parameter in network.parameters()) < SMALL
    ):
        num = 1
    elif num is None:
        shares = 1 if "OMP_NUM_THREADS" in os.environ else flags["devices"]
        num = max(1, torch.get_num_threads() // shares)
    torch.set_num_threads(num)
    os.environ.setdefault("OMP_NUM_THREADS", str(num))  # else Lightning chooses for several processes
