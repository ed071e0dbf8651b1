"""`pip install .`: a package of one name, with commands, that hides no other project's modules."""

import os
import subprocess
import sys

import pytest
import warm
from processes import ROOT

import setup as building

DECOYS = ("datasets", "utils", "run", "runs", "flags", "main", "plots", "measures", "figures", "networks")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the program is installed into, beside other projects' modules of the same names."""
    folder = tmp_path_factory.mktemp("installed")
    # From a copy of what is tracked: building leaves folders behind where it builds.
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    for name in tracked.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in DECOYS:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} of another project was imported')\n")
    return folder


def run(installed, *words, cwd):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, *words]
    return warm.run(command, capture_output=True, cwd=cwd, env=env | {"PYTHONPATH": str(installed)})


def test_all_of_it_lies_under_one_name(installed):
    tops = {path.name for path in installed.iterdir() if path.suffix != ".py"} - {"__pycache__"}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"master_thesis", "bin"}
    assert {path.name for path in (installed / "bin").iterdir()} == {
        "master_thesis",
        "master_thesis_plots",
        "master_thesis_runs",
    }
    package = installed / "master_thesis"
    files = {str(path.relative_to(package)) for path in package.glob("**/*") if path.suffix in (".py", ".html")}
    assert files == {str(path.relative_to(ROOT)) for path in building.sources()} | {"__init__.py"}


def test_the_commands_train_several_seeds_and_draw_them(installed, tmp_path):
    flags = ["-e", "1", "--limit", "60", "--no-dib", "--rank", "--quiet", "--seed", "0", "1"]
    trained = run(installed, str(installed / "bin/master_thesis"), *flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "lightning_logs/version_1/summary.png").exists()
    again = run(installed, str(installed / "bin/master_thesis"), "--epoch", "1", cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("master_thesis: error: unknown flag --epoch, perhaps")
    drawn = run(installed, str(installed / "bin/master_thesis_plots"), "lightning_logs", cwd=tmp_path)
    assert drawn.returncode == 0 and "plots/nc1_over_epochs.png" in drawn.stdout, drawn.stderr
    listed = run(installed, str(installed / "bin/master_thesis_runs"), "--mean", "--csv", cwd=tmp_path)
    assert listed.stdout.startswith("model,dataset,runs,done,last,best") and "\nMLP,SZT,2,2,0." in listed.stdout


def test_its_library_is_imported_by_its_own_name_beside_others(installed, tmp_path):
    code = (
        "import sys, torch; from master_thesis.utils import hookable_layers, neural_collapse, Classifier; "
        f"print(sorted(set(sys.modules) & set({DECOYS!r})), hookable_layers(torch.nn.Sequential(torch.nn.ReLU())))"
    )
    done = run(installed, "-c", code, cwd=tmp_path)
    assert done.stdout == "[] ['0']\n", done.stderr


def test_a_run_of_the_installed_program_has_no_commit_of_a_checkout_around_it(installed, tmp_path):
    for words in (
        ["init", "--quiet"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-m", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *words], cwd=installed, check=True, capture_output=True)
    code = "from master_thesis.run.provenance import provenance; print(provenance()['git_commit'])"
    assert run(installed, "-c", code, cwd=tmp_path).stdout == "None\n"


def test_only_imports_of_the_program_get_its_name():
    code = 'import os\nfrom run import ranks, slurm  # both\n    \nif os:\n    import plots\nx = "from run import y"\n'
    expected = code.replace("from run import ranks", "from master_thesis.run import ranks")
    expected = expected.replace("    import plots", "    from master_thesis import plots")
    assert building.within_package(code) == expected
