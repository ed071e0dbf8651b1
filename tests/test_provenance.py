import os
import shutil
import subprocess

import pytest
from processes import ROOT

from run import command
from run.provenance import provenance


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """Git is asked once for each process: here, once for each question."""
    monkeypatch.setattr(command, "commit", command.commit.__wrapped__)


def test_without_a_checkout_the_commit_is_the_one_that_an_image_was_built_from(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert provenance()["git_commit"] == "abc"
    monkeypatch.setenv("GIT_COMMIT", "")
    assert provenance()["git_commit"] is None


def copied_checkout(folder):
    """A checkout of its own with this module in it, and its commit."""
    for name in ("command.py", "slurm.py"):
        shutil.copy(ROOT / "run" / name, folder)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a checkout to another user")
def test_a_checkout_of_another_user_is_known_by_its_own_commit(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    commit = copied_checkout(checkout)
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 65534, 65534)
    for name, value in {"GIT_COMMIT": "of_the_image", "HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": "/dev/null"}.items():
        monkeypatch.setenv(name, value)  # nobody's own settings trust it
    monkeypatch.setattr(command, "__file__", str(checkout / "command.py"))
    assert provenance()["git_commit"] == commit
    (checkout / "slurm.py").write_text("")
    assert provenance()["git_commit"] == commit + "+"
