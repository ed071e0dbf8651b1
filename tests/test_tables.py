"""The closing table: what a person reads at a run's end."""

from run.tables import closing, epoch_line

LAYERS = ["hidden1", "features.1.0"]


def test_without_a_line_over_the_layers_nothing_is_said_of_one():
    """Two points always lie on a line: r and slope are nan in the table."""
    row = {"epoch": "0", "nc1/train/hidden1": "2", "equiseparation/train/r": "nan", "equiseparation/train/slope": "nan"}
    assert "nan" not in closing([row], LAYERS) and "equi-separation" not in closing([row], LAYERS)
    row |= {"equiseparation/test/r": "-0.9", "equiseparation/test/slope": "-0.5"}
    assert closing([row], LAYERS).endswith("equi-separation, log NC1 over the layers: test r = -0.900, slope -0.500\n")


def test_every_measure_of_layers_stands_in_the_closing_table_by_itself():
    before, after = (
        {
            "epoch": str(epoch),
            "norm/hidden1": f"{1.5 + epoch}",
            "gap/test/features.1.0": f"{epoch}",
            "nc1/test/hidden1": "3",
        }
        for epoch in (0, 2)
    )
    head, *rows = [line.split("  ") for line in closing([before, after], LAYERS).splitlines() if line]
    head, *rows = [[cell.strip() for cell in line if cell.strip()] for line in (head, *rows)]
    assert head == ["epoch 0 → 2", "NC1 test", "norm", "gap test"]
    assert rows == [["hidden1", "3 → 3", "1.5 → 3.5", "– → –"], ["features.1.0", "– → –", "– → –", "0 → 2"]]


def test_what_says_the_same_again_stays_out_of_the_closing_table():
    names = ["dib/loss", "nc1_chance/train", "rank/stable/test", "rank/means_stable/train", "time", "dib/minimality"]
    head = closing([{"epoch": "1", **{f"{name}/hidden1": "1" for name in names}}], LAYERS).splitlines()[0]
    assert head.split("  ")[-1].strip() == "DIB minimality" and "loss" not in head and "rank" not in head
    assert "chance" not in head and "time" not in head


def test_what_was_looked_at_is_in_no_layers_row_even_where_a_layer_is_called_as_a_statistic():
    row = {"epoch": "1", "nc1/train/norm": "2", "look/grad-loss-theta/norm": "3", "time/norm": "4"}
    header = closing([row], ["norm"]).splitlines()[0]
    assert "NC1 train" in header and "look" not in header and "grad" not in header


def test_the_line_of_an_epoch_says_what_it_took():
    values = {"train_loss": 0.10342, "train_acc": 0.9681, "test_loss": 0.1, "test_acc": 1.0}
    line = epoch_line(3, 10, values, 12.345)
    assert line == "epoch  3/10   train loss 0.1034  acc  96.81%   test loss 0.1000  acc 100.00%   12.3 s"
