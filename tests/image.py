"""The `Dockerfile`, built as it is by a real engine, and `--compile` in the image: `make test-image`, given buildah.

pytest does not collect this file by itself. No registry and no conda channel are asked: the base image is a stand-in
with the accounts, variables, entry point and shell of micromamba-docker, and what its `micromamba` installs is this
machine's compiler and this Python with its packages, mounted. What an image holds beyond that is as `docker` builds it.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from test_containers import DOCKERFILE, IN_THE_IMAGE, ROOT

BASE = dict(DOCKERFILE)["FROM"]
USER = 57439
SYSTEM = [
    path for name in ("bin", "lib", "lib64", "libexec", "include", "share") if (path := Path("/usr", name)).is_dir()
]
PYTHON = Path("/opt/python")
PACKAGES = Path("/opt/packages")
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
RECIPE = f"""
FROM scratch
ADD root.tar /
ENV MAMBA_USER=mambauser MAMBA_USER_ID={USER} MAMBA_USER_GID={USER} LANG=C.UTF-8 LC_ALL=C.UTF-8
ENV ENV_NAME=base MAMBA_ROOT_PREFIX=/opt/conda MAMBA_EXE=/usr/local/bin/micromamba
ENV PATH=/usr/local/bin:/usr/bin:/bin
USER mambauser
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/_entrypoint.sh"]
CMD ["/bin/bash"]
SHELL ["/usr/local/bin/_dockerfile_shell.sh"]
"""
ACCOUNTS = {
    "etc/passwd": f"root:x:0:0::/root:/bin/bash\nmambauser:x:{USER}:{USER}::/home/mambauser:/bin/bash\n",
    "etc/group": f"root:x:0:\nmambauser:x:{USER}:\n",
}
PROGRAMS = {
    "_entrypoint.sh": '. activate.sh\nexec "$@"',
    "_dockerfile_shell.sh": '[ "${MAMBA_DOCKERFILE_ACTIVATE-}" != 1 ] || . activate.sh\nexec bash -o pipefail -c "$@"',
    "activate.sh": "export CONDA_PREFIX=/opt/conda PATH=/opt/conda/bin:$PATH CC=gcc CXX=g++",
    # An environment of conda's form whose Python and packages lie elsewhere.
    "micromamba": f"""
echo "$CONDA_OVERRIDE_CUDA $*" >> /opt/conda/calls
[ "$1" = install ] || exit 0
while [ "$1" != -f ]; do shift; done
grep -q pytorch "$2"
cd /opt/conda
mkdir -p bin lib/{VERSION} targets/x86_64-linux/include
touch targets/x86_64-linux/include/cuda.h
ln -s {PYTHON}/bin/{VERSION} bin/python
ln -s {PACKAGES} lib/{VERSION}/site-packages
echo "home = {PYTHON}/bin" > pyvenv.cfg""",
}


def missing() -> list[str]:
    """What this machine lacks for it, in words."""
    lacking = [name for name in ("buildah", "g++", "bash") if shutil.which(name) is None]
    reasons = {"root's rights": os.geteuid() != 0, "torch's CUDA build": torch.version.cuda is None}
    return [*lacking, *(reason for reason, holds in reasons.items() if holds)]


pytestmark = pytest.mark.timeout(900)
if lacking := missing():
    why = f"an image cannot be built without {', '.join(lacking)} (on Debian: buildah, g++)"
    pytest.skip(why, allow_module_level=True)


class Engine:
    """buildah with a storage of its own below a folder, which needs nothing of the system's configuration."""

    def __init__(self, folder: Path):
        storage = f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
        (folder / "storage.conf").write_text(storage)
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.folder = folder
        self.env = {**os.environ, "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf", "TMPDIR": str(folder)}
        mounts = {path: path for path in SYSTEM}
        mounts |= {Path(sys.base_prefix): PYTHON, Path(sysconfig.get_path("purelib")): PACKAGES}
        self.options = ["--isolation", "chroot", "--network", "host"]
        self.options += [f"--volume={here}:{there}:ro" for here, there in mounts.items()]

    def __call__(self, *words: object, check: bool = True) -> subprocess.CompletedProcess:
        """`buildah WORDS`"""
        line = ["buildah", *map(str, words)]
        done = subprocess.run(line, env=self.env, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0 or not check, (line, done.stdout, done.stderr)
        return done

    def build(self, name: str, recipe: Path, context: Path) -> None:
        policy = ["--signature-policy", self.folder / "policy.json", "--pull-never"]
        self("build", "--format", "docker", *policy, *self.options, "--tag", name, "--file", recipe, context)

    def run(self, image: str, *command: str, user: str | None = None) -> subprocess.CompletedProcess:
        """As `docker run --rm --user USER IMAGE COMMAND`; buildah leaves the entry point to who calls it."""
        policy = ["--signature-policy", self.folder / "policy.json", "--pull-never"]
        container = self("from", *policy, image).stdout.strip()
        entry = self.config(image)["Entrypoint"]
        as_user = [] if user is None else ["--user", user]
        done = self("run", *self.options, *as_user, container, "--", *entry, *command, check=False)
        self("rm", container)
        return done

    def config(self, image: str) -> dict:
        """What an image says of itself."""
        return json.loads(self("inspect", "--type", "image", image).stdout)["Docker"]["config"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine that has built the stand-in for the base image, and from it the `Dockerfile`, as `image`."""
    engine = Engine(tmp_path_factory.mktemp("storage"))
    context = tmp_path_factory.mktemp("base")
    make_root(context / "root")
    shutil.make_archive(context / "root", "tar", context / "root")  # unlike COPY it keeps owners
    (context / "Dockerfile").write_text(RECIPE)
    engine.build(f"docker.io/{BASE}", context / "Dockerfile", context)
    engine.build("image", ROOT / "Dockerfile", ROOT)
    return engine


def make_root(root):
    """The base image's files."""
    for name, mode, owner in (("tmp", 0o1777, 0), ("opt/conda", 0o755, USER), ("home/mambauser", 0o755, USER)):
        (root / name).mkdir(parents=True)
        (root / name).chmod(mode)
        os.chown(root / name, owner, owner)
    for place in [*(path.relative_to("/") for path in SYSTEM), "opt/python", "opt/packages", "usr/local/bin", "etc"]:
        (root / place).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for name, text in ACCOUNTS.items():
        (root / name).write_text(text)
    for name, lines in PROGRAMS.items():
        program = root / "usr/local/bin" / name
        program.write_text(f"#!/usr/bin/env bash\nset -e\n{lines}\n")
        program.chmod(0o755)


def test_the_image_is_what_the_dockerfile_says_and_keeps_the_bases_entry(engine):
    config, base = engine.config("image"), engine.config(f"docker.io/{BASE}")
    assert config["User"] == f"{USER}:{USER}" and config["WorkingDir"] == "/master_thesis"
    assert config["Cmd"] == ["python", "main.py", "--help"]
    assert config["Entrypoint"] == base["Entrypoint"] and config["Shell"] == base["Shell"]
    assert {"HOME=/tmp", "USER=mambauser"} < set(config["Env"])


def test_it_holds_the_program_and_nothing_is_left_of_the_build(engine):
    done = engine.run("image", "bash", "-c", "find . -type f; find /tmp -mindepth 1; cat /opt/conda/calls")
    *files, install, clean = done.stdout.splitlines()
    assert {*files} == {f"./{name}" for name in IN_THE_IMAGE - {"environment.yaml"}} | {"/tmp/environment.yaml"}
    assert install.startswith("12.9 install -y -n base") and clean.split() == ["clean", "--all", "--yes"]


def test_without_a_command_it_shows_the_flags(engine):
    done = engine.run("image", *engine.config("image")["Cmd"])
    assert done.returncode == 0 and "--dib-layers" in done.stdout, done.stderr


@pytest.mark.parametrize("user", [None, "12345:12345"])
def test_compiled_runs_go_as_the_images_user_and_as_any_other(user, engine):
    flags = "-m MLP -d SZT -e 1 --limit 200 --compile --no-dib --no-plots --quiet --accelerator cpu"
    line = f"python main.py {flags} && stat -c %u lightning_logs/version_0/metrics.csv"
    done = engine.run("image", "bash", "-c", line, user=user)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == (user or str(USER)).partition(":")[0]
