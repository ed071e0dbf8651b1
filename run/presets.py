"""The value of every flag when nothing else is said: defaults, and what a model's preset puts in their place.

Plain data: names that the command line knows before torch is imported, `DEFAULTS`, `PRESETS`, and which flags a resumed
run may change.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from run.catalogue import MEASURES

WHITE_BOXES = ("DisjConj", "Directions", "Gumbel", "Positive")
IMAGE_MODELS = ("MNISTNet", "CIFARNet", "ConvNeXt", "ResNet", *WHITE_BOXES)  # others get what the data are
MODELS = ("MLP", *IMAGE_MODELS)
DATASETS = ("SZT", "MNIST", "FashionMNIST", "CIFAR10")
NONLINEARITIES = ("tanh", "relu", "gelu", "silu", "sigmoid", "leaky_relu", "elu", "identity")
LOSSES = ("cross-entropy", "mse")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
HEADS = ("linear", "prototypes", "slots")
POOLS = ("softmax", "max")
SLOT_NORMS = ("none", "batch")
NORMS = ("batch", "iternorm", "percentile")
FIRST_CONVS = ("plain", "scaled", "perspective", "projective")
LOGGERS = ("tensorboard", "wandb")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")

DEFAULTS = {
    # run
    "config": None,
    "resume": None,
    "measure": None,
    "list_layers": None,
    "log_dir": "lightning_logs",
    "name": None,
    "note": None,
    "tag": None,
    "seed": 0,
    "sweep": None,
    "accelerator": "auto",
    "devices": 1,
    "num_nodes": 1,
    "threads": None,
    "strategy": "auto",
    "sync_batch_norm": False,
    "precision": "32-true",
    "compile": False,
    "channels_last": False,
    "deterministic": False,
    "save_every": None,
    "keep_going": False,
    "plots": True,
    "logger": None,
    "quiet": False,
    # data
    "dataset": "SZT",
    "data_dir": "data",
    "classes": None,
    "limit": None,
    "image_size": None,
    "in_memory": None,
    "augment": True,
    "alternate_flip": False,
    # network
    "model": "MLP",
    "widths": [512, 256],
    "nonlinearity": "relu",
    "batch_norm": False,
    "stem": None,
    "head": "linear",
    "augmax": None,
    "branches": 1,
    "norm": "batch",
    "first_conv": "plain",
    "topk": 1,
    "tau": "1:0.1",
    "slot_scale": 30.0,
    "slot_lr": 20.0,
    "slot_prune": 5,
    "slot_pool": "softmax",
    "slot_norm": "none",
    "slot_update": False,
    "target_acc": None,
    # optimisation
    "epochs": 20,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "loss": "cross-entropy",
    "optimizer": "adam",
    "momentum": 0.9,
    "betas": [0.9, 0.999],
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "schedule": "cosine",
    "warmup": 0.0,
    "start_factor": 0.1,
    "end_factor": 0.0,
    "bias_lr_scale": 1.0,
    "whiten_epochs": 3,
    "lookahead": False,
    "tta": False,
    "lr_range_test": None,
    # measures
    **{about.flag: None if about.takes else about.is_default for about in MEASURES},
    "measure_every": 1,
    "measure_at": None,
    "layers": None,
    "measure_sets": ["train", "test"],
    "cache_gb": None,
    **{flag.name: flag.default for about in MEASURES for flag in about.flags},
}

# What makes the bare command good. A pair (model, dataset) goes before the model alone. Steps of the heads are head
# epochs times batches: 118 of 512 on MNIST, 98 on CIFAR-10, 28 of 128 on SZT.
MLP = {"epochs": 10, "learning_rate": 2e-3, "warmup": 0.2, "dib_steps": 5 * 118}
WHITE_BOX = {
    "epochs": 14,
    "batch_size": 128,
    "optimizer": "adamw",
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "warmup": 0.3,
    "start_factor": 0.04,
    "dib_steps": 2 * 98,
}
PRESETS = {
    **{(model,): WHITE_BOX for model in WHITE_BOXES},
    ("MLP",): MLP,
    ("MLP", "MNIST"): MLP | {"dib_steps": 15 * 118},
    ("MLP", "SZT"): {
        "widths": [10, 7, 5, 4, 3],
        "nonlinearity": "tanh",
        "epochs": 200,
        "learning_rate": 1e-2,
        "warmup": 0.1,
        "dib_steps": 10 * 28,
        "dib_lr": 3e-2,
        "dib_batch_size": 128,
    },
    ("MNISTNet",): {
        "epochs": 3,
        "learning_rate": 1e-2,
        "betas": [0.7, 0.9],
        "warmup": 0.3,
        "augment": False,
        "dib_steps": 2 * 118,
    },
    ("CIFARNet",): {
        "epochs": 10,
        "batch_size": 1024,
        "optimizer": "sgd",
        "learning_rate": 1.5,
        "momentum": 0.85,
        "weight_decay": 1.33e-3,
        "label_smoothing": 0.2,
        "schedule": "linear",
        "warmup": 0.23,
        "start_factor": 0.2,
        "end_factor": 0.07,
        "bias_lr_scale": 64.0,
        "lookahead": True,
        "tta": True,
        "alternate_flip": True,
    },
    ("ResNet",): {
        "epochs": 60,
        "batch_size": 512,
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "weight_decay": 5e-4,
        "warmup": 0.15,
        "measure_at": ["log:12"],
        "dib_layers": ["layer2.1", "layer3.1", "layer4.1", "avgpool"],
        "dib_steps": 2 * 98,
    },
    ("ConvNeXt",): {
        "epochs": 80,
        "batch_size": 256,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "warmup": 0.1,
        "measure_at": ["log:12"],
        "dib_layers": ["features.3.2", "features.5.8", "features.7.2", "classifier.1"],
        "dib_steps": 2 * 98,
    },
}

# With --head slots on the raw input, where nothing else is trained.
SLOTS_ALONE = {"epochs": 8, "batch_size": 1000, "augment": False, "slot_scale": 20.0, "slot_lr": 5.0}
SLOTS_ALONE_ON = {"MNIST": SLOTS_ALONE | {"slot_lr": 20.0}}
# Behind a backbone, which learns from what is left of the loss when a batch has been memorised: more at a low scale.
SLOTS_BEHIND = {"slot_scale": 10.0, "slot_lr": 10.0}

# Measured layers that pool a feature map: gone where the head works on the map.
POOLED = {"ResNet": "avgpool", "ConvNeXt": "classifier.1", "CIFARNet": "pool"}

# Flags of a single call: they say what to do, not what the run is.
OF_ONE_CALL = ("config", "resume", "measure", "list_layers", "quiet", "sweep")
# What a resumed run may change without becoming another run.
FREE_ON_RESUME = (*OF_ONE_CALL, "accelerator", "compile", "data_dir", "devices", "epochs", "in_memory", "log_dir",
                  "logger", "note", "num_nodes", "plots", "slot_update", "strategy", "tag", "target_acc",
                  "threads")  # fmt: skip
OF_SEVERAL = ("tag", "logger", "seed", "classes", "widths", "augmax", "betas", "measure_at", "layers", "measure_sets",
              *(about.flag for about in MEASURES if "nargs" in about.takes),
              *(flag.name for about in MEASURES for flag in about.flags if "nargs" in flag.options))  # fmt: skip


def preset(model: str, dataset: str, head: str = "linear", widths: Sequence[object] | None = None) -> dict:
    """The flags that the preset of a model on a dataset sets; `widths` as they are given."""
    flags = PRESETS.get((model, dataset), PRESETS.get((model,), {}))
    if are_raw(model, head, widths):
        return flags | SLOTS_ALONE_ON.get(dataset, SLOTS_ALONE)
    return flags | SLOTS_BEHIND if head == "slots" else flags


def are_raw(model: str, head: str, widths: Sequence[object] | None) -> bool:
    """Whether these are slots on the raw input, with nothing else to train."""
    return model == "MLP" and head == "slots" and widths is not None and len(widths) == 0


def merged(*levels: dict[str, Any]) -> dict[str, Any]:
    """Flags from several places: a later one counts, also against earlier ones that exclude it."""
    flags: dict[str, Any] = {}
    for level in levels:
        for about in MEASURES:
            if any(level.get(name) is not None for name in about.instead):
                flags |= dict.fromkeys(about.instead)
        flags |= level
    return flags


def rivals(name: str) -> tuple[str, ...]:
    """The flags of which only one is given, this one among them; else it alone."""
    return next((about.instead for about in MEASURES if name in about.instead), (name,))


def flags_of_run(args: Namespace) -> dict:
    """What `hparams.yaml` keeps: every flag but those of a single call."""
    return {name: value for name, value in vars(args).items() if name not in OF_ONE_CALL}
