"""What can be known of the images where there is neither a container engine nor a conda channel.

The lists of packages are read, the files that go in are counted, and the shell lines of both recipes run with
stand-ins for what only an image has.
"""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from stand_ins import ROOT, StandIns, tool

PYPI_NAMES = {"pytorch": "torch"}  # where conda calls a package otherwise
BY_THE_NOTEBOOK = {"ipykernel"}  # imported by nobody, named by the notebook's kernel
FOLDERS = ("figures", "measures", "run")
PROGRAM = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))]
IN_THE_IMAGE = {*(str(path.relative_to(ROOT)) for path in PROGRAM), "plots.ipynb", "environment.yaml"}
TORCH = """
import os, tempfile
from types import SimpleNamespace

version = SimpleNamespace(cuda={cuda!r})
cuda = SimpleNamespace(is_available=lambda: False)
sin = print

def ones(num, device="cpu"):
    return num

def compile(function):
    # Inductor's precompiled headers: whatever TORCHINDUCTOR_CACHE_DIR says, they lie in the temporary folder.
    os.mkdir(tempfile.gettempdir() + "/torchinductor_user")
    return function
"""
HEADER_OF_TRITON = "targets/x86_64-linux/include/cuda.h"  # below conda's environment


def dockerfile():
    """Its instructions: pairs of the word and what follows."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def definition():
    """Apptainer's file: the header, and each section by its name."""
    text = (ROOT / "master_thesis.def").read_text()
    head, *sections = re.split(r"^%(\w+)\n", text, flags=re.M)
    header = dict(line.split(": ") for line in head.splitlines() if line and not line.startswith("#"))
    return header, dict(zip(sections[::2], sections[1::2], strict=True))


DOCKERFILE = dockerfile()
HEADER, SECTIONS = definition()
RUN = [text for word, text in DOCKERFILE if word == "RUN"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yaml").read_text())


def requirements(*lines):
    """Version bounds by PyPI's name."""
    parsed = map(Requirement, (re.sub(r"^(\w+)", lambda m: PYPI_NAMES.get(m[1], m[1]), line) for line in lines))
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}


def listed(name):
    lines = (ROOT / name).read_text().splitlines()
    return requirements(*(line for line in lines if line and not line.startswith(("#", "-r"))))


CONDA = requirements(*ENVIRONMENT["dependencies"])
PIP = listed("requirements.txt")


# Packages


def test_the_environment_has_the_name_and_the_one_channel_that_are_documented():
    assert ENVIRONMENT["name"] == "master_thesis"
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert ENVIRONMENT.keys() == {"name", "channels", "dependencies"}


def test_conda_and_pip_get_the_same_packages_within_the_same_bounds():
    python = CONDA["python"]
    assert {name: bounds for name, bounds in CONDA.items() if name != "python"} == PIP
    lowest = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert set(SpecifierSet(lowest)) <= set(python)
    assert [f"3.{minor}" for minor in range(20) if python.contains(f"3.{minor}.5")] == ["3.10", "3.11", "3.12", "3.13"]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_what_is_installed_here_lies_within_the_bounds(name):
    for package, bounds in listed(name).items():
        assert bounds.contains(importlib.metadata.version(package)), package


def imports(*paths):
    """Names of the modules that these files import and neither Python nor this checkout has."""
    sources = [path.read_text() if path.suffix == ".py" else code_of(path) for path in paths]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    own = {path.stem for folder in (".", "tests", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - own - set(FOLDERS)


def code_of(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.startswith("%"))  # %matplotlib is Jupyter's, not Python


def packages(modules):
    """PyPI's names of the packages to which modules belong."""
    owners = importlib.metadata.packages_distributions()
    return {canonicalize_name(owners[module][0]) for module in modules}


def with_their_own(names):
    """Packages and those which they require themselves."""
    needed = [Requirement(line) for name in names for line in importlib.metadata.requires(name) or ()]
    return set(names) | {canonicalize_name(need.name) for need in needed if not need.marker or need.marker.evaluate()}


def test_every_import_of_the_program_is_listed_and_every_listed_package_imported():
    used = packages(imports(*(path for path in PROGRAM if path.stem != "setup"), ROOT / "plots.ipynb"))
    assert used <= with_their_own(PIP)
    assert PIP.keys() - used == BY_THE_NOTEBOOK
    assert json.loads((ROOT / "plots.ipynb").read_text())["metadata"]["kernelspec"]["name"] == "python3"


def test_every_import_of_the_tests_and_benchmarks_is_listed():
    used = packages(imports(*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")))
    assert used <= with_their_own(PIP.keys() | listed("requirements-test.txt").keys())


# What goes in


def is_ignored(path):
    """Whether .dockerignore leaves a file out: the last pattern decides that fits it or a folder above."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").split("/")
        above = [PurePosixPath(path), *PurePosixPath(path).parents][:-1]
        if line and not line.startswith("#") and any(fits(place.parts, pattern) for place in above):
            ignored = not line.startswith("!")
    return ignored


def fits(parts, pattern):
    return len(parts) == len(pattern) and all(map(fnmatch, parts, pattern))


def sources():
    """The patterns that each recipe copies."""
    copies = [text.split() for word, text in DOCKERFILE if word == "COPY"]
    docker = [source for copy in copies for source in copy[:-1] if not source.startswith("--")]
    return {
        "Dockerfile": docker,
        "master_thesis.def": [line.split()[0] for line in SECTIONS["files"].split("\n") if line],
    }


@pytest.mark.parametrize("recipe", ["Dockerfile", "master_thesis.def"])
def test_the_program_goes_into_the_image_and_nothing_else(recipe):
    found = {pattern: {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)} for pattern in sources()[recipe]}
    assert all(found.values()), found
    assert set().union(*found.values()) == IN_THE_IMAGE


def test_docker_is_sent_what_it_copies_and_no_data_results_or_history():
    assert not [name for name in IN_THE_IMAGE if is_ignored(name)]
    others = [".git/HEAD", ".venv/bin/python", "data/README.md", "data/MNIST/raw/x.py", "lightning_logs/version_0/x.py",
              "tests/conftest.py", "figures/x.png", "README.md", "master_thesis.sif"]  # fmt: skip
    assert [name for name in others if not is_ignored(name)] == []


def test_both_images_have_the_same_base_of_one_version():
    assert {"Bootstrap": "docker", "From": dict(DOCKERFILE)["FROM"]} == HEADER
    assert re.fullmatch(r"mambaorg/micromamba:\d+\.\d+\.\d+", HEADER["From"])


def test_the_base_images_activation_is_kept_and_nobody_is_root_or_without_a_home():
    words = [word for word, _ in DOCKERFILE]
    assert not {"ENTRYPOINT", "SHELL"} & set(words)
    assert words.index("ARG") < words.index("RUN", words.index("RUN") + 1)  # activation comes before the first python
    assert ("ARG", "MAMBA_DOCKERFILE_ACTIVATE=1") in DOCKERFILE
    last = [text for word, text in DOCKERFILE if word == "USER"][-1]
    assert last.split(":")[0] not in ("0", "root")
    assert ("ENV", "HOME=/tmp USER=$MAMBA_USER") in DOCKERFILE
    assert json.loads(dict(DOCKERFILE)["CMD"]) == ["python", "main.py", "--help"]


# The shell lines


@pytest.fixture
def stand_ins(tmp_path):
    programs = StandIns(tmp_path)
    programs.add("micromamba")
    programs.add("python", f'exec {sys.executable} -S "$@"')
    return programs


@pytest.fixture
def place(tmp_path):
    """An empty folder that stands for where the image's shell is, with a torch built for CUDA in it.

    Beside it are conda's environment and the image's folder for temporary files.
    """
    place = tmp_path / "place"
    place.mkdir()
    (place / "torch.py").write_text(TORCH.format(cuda="12.9"))
    header = tmp_path / "conda" / HEADER_OF_TRITON
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "tmp").mkdir()
    return place


def docker_build(stand_ins, place):
    """All RUN lines as Docker runs them, up to the first that fails: the last one's result."""
    for line in RUN:
        line = line.replace("/opt/conda", str(place.parent / "conda"))
        done = stand_ins.run("bash", "-o", "pipefail", "-c", line, cwd=place, TMPDIR=str(place.parent / "tmp"))
        if done.returncode:
            break
    return done


def apptainer_build(stand_ins, place):
    """%post and %test in the same way; the places of the code and of conda in the image are folders here."""
    for name in ("post", "test"):
        script = SECTIONS[name].replace("/opt/master_thesis", str(place))
        script = script.replace("/opt/conda/targets", str(place.parent / "conda/targets"))
        done = stand_ins.run("sh", "-c", script, cwd=place, TMPDIR=str(place.parent / "tmp"))
        if done.returncode:
            break
    return done


BUILDS = pytest.mark.parametrize("build", [docker_build, apptainer_build])


@BUILDS
def test_a_build_installs_cleans_up_and_then_asks_torch_for_cuda_and_a_compiler(build, stand_ins, place):
    done = build(stand_ins, place)
    assert done.returncode == 0, done.stderr
    install, clean, *asked = stand_ins.calls()
    assert install["argv"][:4] == ["install", "-y", "-n", "base"]
    assert install["argv"][-1].endswith("/environment.yaml")
    assert {"cxx-compiler", "cuda-compiler>=12.8.1", "git"} < set(install["argv"])
    assert clean["argv"] == ["clean", "--all", "--yes"]
    assert {call["name"] for call in asked} == {"python"}
    assert "torch.version.cuda" in asked[0]["argv"][1]
    assert all("torch.compile" in call["argv"][1] for call in asked[1:]) and asked[1:]
    assert [path.name for path in place.iterdir() if path.name != "__pycache__"] == ["torch.py"]


@BUILDS
def test_a_build_leaves_no_compiled_headers_which_another_user_could_not_replace(build, stand_ins, place):
    assert build(stand_ins, place).returncode == 0
    assert "torch.compile" in str(stand_ins.calls("python"))
    assert list((place.parent / "tmp").iterdir()) == []


@BUILDS
def test_a_build_without_the_header_that_triton_compiles_against_fails(build, stand_ins, place):
    (place.parent / "conda" / HEADER_OF_TRITON).unlink()
    done = build(stand_ins, place)
    assert done.returncode != 0 and "include/cuda.h" in done.stderr


def test_the_definitions_own_build_checks_what_the_dockerfile_checks(stand_ins, place):
    """%test can be left out (--notest), %post cannot."""
    docker_build(stand_ins, place)
    in_docker = [call["argv"] for call in stand_ins.calls("python")]
    post = SECTIONS["post"].replace("/opt/master_thesis", str(place))
    post = post.replace("/opt/conda/targets", str(place.parent / "conda/targets"))
    assert stand_ins.run("sh", "-c", post, cwd=place, TMPDIR=str(place.parent / "tmp")).returncode == 0
    assert [call["argv"] for call in stand_ins.calls("python")] == 2 * in_docker


def test_apptainers_own_test_compiles_for_a_gpu_where_there_is_one(stand_ins, place):
    torch = (place / "torch.py").read_text().replace("return num", "return device")
    (place / "torch.py").write_text(torch.replace("lambda: False", "lambda: True"))
    done = stand_ins.run("sh", "-c", SECTIONS["test"], cwd=place, TMPDIR=str(place.parent / "tmp"))
    assert (done.returncode, done.stdout) == (0, "cuda\n")


def test_both_builds_install_the_same_and_take_the_machine_for_one_with_a_gpu(stand_ins, place):
    docker_build(stand_ins, place)
    apptainer_build(stand_ins, place)
    docker, apptainer = (call for call in stand_ins.calls("micromamba") if call["argv"][0] == "install")
    assert docker["argv"][:-1] == apptainer["argv"][:-1]
    assert docker["env"]["CONDA_OVERRIDE_CUDA"] == apptainer["env"]["CONDA_OVERRIDE_CUDA"] == "12.9"


@BUILDS
def test_a_build_with_the_cpu_build_of_torch_fails(build, stand_ins, place):
    (place / "torch.py").write_text(TORCH.format(cuda=None))
    done = build(stand_ins, place)
    assert done.returncode != 0 and "this is the CPU build of pytorch" in done.stderr


@BUILDS
def test_a_build_whose_installation_fails_ends_there(build, stand_ins, place):
    stand_ins.add("micromamba", "exit 1")
    assert build(stand_ins, place).returncode != 0
    assert len(stand_ins.calls()) == 1


@BUILDS
def test_a_build_without_a_compiler_for_torch_fails(build, stand_ins, place):
    torch = (place / "torch.py").read_text().replace("return function", "raise RuntimeError('InvalidCxxCompiler')")
    (place / "torch.py").write_text(torch)
    done = build(stand_ins, place)
    assert done.returncode != 0 and "InvalidCxxCompiler" in done.stderr


def test_the_image_is_readable_and_its_folder_writable_for_every_user(stand_ins, place):
    (place / "main.py").write_text("")
    (place / "main.py").chmod(0o600)
    place.chmod(0o700)
    docker_build(stand_ins, place)
    assert place.stat().st_mode & 0o777 == 0o777
    assert (place / "main.py").stat().st_mode & 0o777 == 0o644
    workdir, run = DOCKERFILE.index(("WORKDIR", "/master_thesis")), DOCKERFILE.index(("RUN", RUN[-1]))
    assert workdir < DOCKERFILE.index(("COPY", "*.py plots.ipynb ./")) < run


HOST = {"CONDA_PREFIX": "/home/me/miniconda3", "CONDA_SHLVL": "1", "MAMBA_ROOT_PREFIX": "/home/me/micromamba",
        "MAMBA_EXE": "/home/me/micromamba", "ENV_NAME": "mine", "PYTHONPATH": "/apps/python", "PYTHONHOME": "/apps",
        "CC": "/apps/gcc", "CXX": "/apps/g++"}  # fmt: skip


def test_apptainers_environment_is_the_images_whatever_is_active_on_the_host(stand_ins, place):
    done = stand_ins.run("sh", "-euc", f"{SECTIONS['environment']}\nenv -0", cwd=place, **HOST)
    inside = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
    assert not {"CONDA_PREFIX", "CONDA_SHLVL", "PYTHONPATH", "PYTHONHOME"} & inside.keys()
    assert inside["PATH"].startswith("/opt/conda/bin:") and inside["PYTHONNOUSERSITE"] == "1"
    assert (inside["CC"], inside["CXX"]) == ("gcc", "g++")
    expected = {"MAMBA_ROOT_PREFIX": "/opt/conda", "MAMBA_EXE": "/bin/micromamba", "ENV_NAME": "base"}
    assert inside | expected == inside


@pytest.fixture
def runscript(stand_ins, tmp_path):
    """%runscript with a folder for the image's code; the base image's entry point only passes the command on."""
    stand_ins.add("_entrypoint.sh", 'exec "$@"')
    image = tmp_path / "image"
    image.mkdir()
    for name in IN_THE_IMAGE:
        (image / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, image / name)
    script = SECTIONS["runscript"].replace("/opt/master_thesis", str(image))
    script = script.replace("/usr/local/bin/_entrypoint.sh", "_entrypoint.sh")
    return lambda *argv, cwd: stand_ins.run("sh", "-euc", script, "runscript", *argv, cwd=cwd)


def test_main_py_is_the_images_outside_a_checkout_and_the_checkouts_within(runscript, stand_ins, place, tmp_path):
    stand_ins.add("python")
    image = tmp_path / "image"
    words = ["-m", "ResNet", "--log-dir", "a b", "*"]
    runscript("python", "main.py", *words, cwd=place)
    runscript("python", "plots.py", cwd=place)
    runscript(cwd=place)
    (place / "main.py").touch()
    runscript("python", "main.py", *words, cwd=place)
    runscript("python", "own.py", cwd=place)
    runscript("python", cwd=place)
    runscript("python", "-c", "pass", cwd=place)
    assert [call["argv"] for call in stand_ins.calls("python")] == [
        [f"{image}/main.py", *words],
        [f"{image}/plots.py"],
        [f"{image}/main.py", "--help"],
        ["main.py", *words],
        ["own.py"],
        [],
        ["-c", "pass"],
    ]
    assert {call["cwd"] for call in stand_ins.calls()} == {str(place)}


def test_the_images_program_finds_its_modules_and_its_status_is_passed_on(runscript, stand_ins, place):
    stand_ins.add("python", f'exec {sys.executable} "$@"')
    done = runscript("python", "main.py", "-m", "ResNet", "-d", "CIFAR10", "--help", cwd=place)
    assert done.returncode == 0 and "--dib-layers" in done.stdout, done.stderr
    assert runscript("python", "main.py", "--no-such-flag", cwd=place).returncode == 2


# Linters and documents


def test_hadolint_finds_nothing():
    done = subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_shellcheck_finds_nothing_in_apptainers_sections(name):
    command = [tool("shellcheck"), "--shell=sh", "-"]
    done = subprocess.run(command, input=SECTIONS[name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


COMMANDS = ["docker build -t master_thesis .",
            "podman build --format docker -t master_thesis .",
            "docker run -it --gpus all master_thesis python main.py -m ResNet -d CIFAR10",
            "apptainer build master_thesis.sif master_thesis.def",
            "./master_thesis.sif python main.py",
            "apptainer run --nv master_thesis.sif python main.py -m ResNet -d CIFAR10"]  # fmt: skip


def test_the_page_on_containers_has_the_commands_word_for_word():
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if command not in page] == []
    folder = dict(DOCKERFILE)["WORKDIR"]
    assert set(re.findall(r'-v "\$PWD[^:]*:([^"]*)"', page)) == {folder, f"{folder}/data", f"{folder}/lightning_logs"}
