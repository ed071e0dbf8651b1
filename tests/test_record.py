from run.record import EpochTable


def test_table_pads_new_columns_and_reads_back_what_it_wrote(tmp_path):
    table = EpochTable(tmp_path / "t.csv", ("epoch", "loss"))
    table.add({"epoch": 0})
    table.add({"epoch": 1, "loss": 0.1, "nc1": float("nan")})
    table.add({"epoch": 2, "loss": 1 / 3})
    assert (tmp_path / "t.csv").read_text() == "epoch,loss,nc1\n0,,\n1,0.1,nan\n2,0.3333333333333333,\n"
    assert table.rows()[1] == {"epoch": "1", "loss": "0.1", "nc1": "nan"}
    assert EpochTable(tmp_path / "t.csv", ("epoch",), keep_to=1).rows() == table.rows()[:2]
    assert EpochTable(tmp_path / "t.csv", ("epoch",)).rows() == []  # a new run does not read an old one's


def test_a_resumed_table_ends_up_byte_for_byte_like_an_uninterrupted_one(tmp_path):
    rows = [{"epoch": 0, "b": 1.5}, {"epoch": 1, "a": 0.1}, {"epoch": 2, "a": 0.2, "b": 2.5, "c": 3}]
    whole = EpochTable(tmp_path / "whole.csv", ("epoch", "a"))
    whole.add(*rows)
    EpochTable(tmp_path / "cut.csv", ("epoch", "a")).add(*rows[:2], {"epoch": 2, "a": 9.9})
    EpochTable(tmp_path / "cut.csv", ("epoch", "a"), keep_to=1).add(rows[2])
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
