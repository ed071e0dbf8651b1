import os
import pickle

import pytest
import torch

from run.checkpoints import WholeCheckpoints, read_checkpoint
from run.errors import UserError


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(Hostile.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_that_holds_code_is_refused_and_nothing_of_it_runs(tmp_path):
    Hostile.target = tmp_path / "hacked"
    torch.save({"state_dict": Hostile(), "hyper_parameters": {}, "epoch": 0}, tmp_path / "evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Hostile()))
    for name in ("evil.ckpt", "plain.ckpt"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
        with pytest.raises(UserError, match=name):
            WholeCheckpoints().load_checkpoint(tmp_path / name)
    assert not Hostile.target.exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {}, "epoch": 0}, tmp_path / "good.ckpt")
    whole = (tmp_path / "good.ckpt").read_bytes()
    cases = {"empty": b"", "text": b"not a checkpoint", "half": whole[: len(whole) // 2], "zeros": bytes(1000)}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list")
    torch.save({"epoch": 1}, tmp_path / "other")
    for name in (*cases, "list", "other", "missing"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match=str(tmp_path)):
        read_checkpoint(tmp_path)
    assert read_checkpoint(tmp_path / "good.ckpt")["epoch"] == 0
