"""What loggers get: all that `metrics.csv` has and the summary; and that a run does not depend on them."""

import csv
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

import main
from run.loggers import Loggers, refuse_missing
from run.run_folder import RunFolder

QUICK = ["-w", "6", "4", "-e", "2", "--no-dib", "--limit", "200"]
pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


class Writer:
    """In place of TensorBoard's `SummaryWriter`."""

    made: ClassVar[list["Writer"]] = []

    def __init__(self, log_dir, **options):
        self.log_dir, self.options, self.scalars, self.images = log_dir, options, {}, {}
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def add_image(self, name, pixels, step, dataformats):
        self.images[name, step] = pixels.shape, dataformats

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Wandb(types.ModuleType):
    """In place of W&B: a module, and the one run that it has."""

    run = None

    def __init__(self):
        super().__init__("wandb")
        self.options, self.logged, self.config = [], [], self
        self.fails_from = float("inf")

    def init(self, **options):
        self.options.append(options)
        return self

    def log(self, values):
        if values["trainer/global_step"] >= self.fails_from:
            raise ConnectionError("the service\nis away")
        self.logged.append(values)

    def update(self, *args, **kwargs):
        self.flags = args[0]

    def Image(self, path):
        return Path(path).name


@pytest.fixture
def tensorboard(monkeypatch):
    """Its writers."""
    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", True)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    of_sdk, of_run = types.ModuleType("wandb.sdk.lib"), types.ModuleType("wandb.wandb_run")
    of_sdk.RunDisabled, of_run.Run = type("RunDisabled", (), {}), type("Run", (), {})
    for name, other in {"wandb": module, "wandb.sdk": types.ModuleType("wandb.sdk"), "wandb.sdk.lib": of_sdk,
                        "wandb.wandb_run": of_run}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, other)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return module


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_loggers_get_every_number_of_the_table_by_epoch_and_the_summary(tensorboard, wandb):
    assert main.main([*QUICK, "--logger", "tensorboard", "wandb"]) == 0
    folder = Path("lightning_logs/version_0")
    cells = {
        (name, int(row["epoch"])): float(cell) for row in rows_of(folder) for name, cell in row.items() if cell != ""
    }
    assert ("nc1/test/hidden2", 0) in cells and ("time/epoch", 2) in cells
    scalars = {place: value for writer in tensorboard for place, value in writer.scalars.items()}
    assert {place: scalars[place] for place in cells} == pytest.approx(cells, nan_ok=True)
    assert tensorboard[0].log_dir == str(folder / "tensorboard")
    rows = [values for values in wandb.logged if "epoch" in values]
    got = {(name, values["epoch"]): value for values in rows for name, value in values.items()}
    assert {place: got[place] for place in cells} == pytest.approx(cells, nan_ok=True)
    assert all(values["trainer/global_step"] == values["epoch"] for values in rows)
    (shape, order) = tensorboard[-1].images["summary", 2]
    assert order == "HWC" and shape[2] == 3
    assert wandb.logged[-1]["summary"] == ["summary.png"] and wandb.flags["widths"] == [6, 4]
    assert wandb.options[0]["name"] == "version_0"


def test_a_logger_that_fails_on_the_way_is_left_out_and_the_run_goes_on_to_the_same_numbers(wandb, capsys):
    wandb.fails_from = 1
    with pytest.warns(UserWarning, match="--logger wandb is left out from here on: ConnectionError: the service is"):
        assert main.main([*QUICK, "--no-plots", "--logger", "wandb"]) == 0
    assert main.main([*QUICK, "--no-plots"]) == 0
    with_one, without = (rows_of(Path(f"lightning_logs/version_{i}")) for i in range(2))
    for row in (*with_one, *without):
        for name in [name for name in row if name.startswith("time/")]:
            row.pop(name)
    assert with_one == without and len(wandb.logged) == 1


def test_a_resumed_run_goes_on_in_the_same_place(tensorboard, wandb):
    folder = RunFolder.new("logs", "mine")
    Loggers(["tensorboard", "wandb"], folder, {}).row(0, {"x": 1.0, "checkpoint": "a.ckpt"})
    folder.epoch = 3
    Loggers(["tensorboard", "wandb"], folder, {}).row(4, {"x": 1.0})
    assert [writer.options for writer in tensorboard] == [{}, {"purge_step": 4}]
    first, second = (options["id"] for options in wandb.options)
    assert first == second and len(first) == 12
    assert ("checkpoint", 0) not in tensorboard[0].scalars


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_told_before_there_is_a_folder(name, monkeypatch, capsys):
    for module in ("torch.utils.tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main.main([*QUICK, "--logger", name]) == 1
    told = f"main.py: --logger {name}: {name} is not installed; `pip install {name}` does it\n"
    assert capsys.readouterr().err == told and not Path("lightning_logs").exists()
    refuse_missing(None)


def test_one_that_cannot_begin_is_an_error(wandb, capsys, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **options: [][0])
    assert main.main([*QUICK, "--logger", "wandb"]) == 1
    assert "main.py: --logger wandb cannot begin: IndexError: list index out of range" in capsys.readouterr().err
