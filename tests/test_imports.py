"""How the modules hang together: imports point downwards only, and no module needs another that needs it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top to the bottom; a folder stands for its modules.
FLOORS = (
    "main",
    "utils",
    "flags",
    "plots",
    "runs",
    "measures",
    "figures",
    "classifier",
    "networks",
    "slots",
    "cover",
    "whitebox_networks",
    "whitebox",
    "warps",
    "blocks",
    "datasets",
    "batches",
    "augmentation",
    "downloads",
    "image_folders",
    "decoding",
    "classes",
    "run",
)
FOLDERS = ("measures", "figures", "run")
HEAVY = {"torch", "lightning", "torchvision", "numpy", "pandas", "matplotlib", "yaml", "sklearn", "scipy"}
MODULES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))]


def name_of(path):
    """`datasets`, `run.errors`; `run` for the folder's own docstring."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """The program's modules that a module imports, except for annotations alone."""
    names = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= set(within) & ALL or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & ALL


def walk(node):
    """All nodes but those below `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from walk(child)


ALL = {name_of(path) for path in MODULES} - {"setup"}


def floor(name):
    return FLOORS.index(name.partition(".")[0])


def test_every_module_has_its_floor_and_every_folder_is_flat():
    assert {name.partition(".")[0] for name in ALL} == set(FLOORS)
    for folder in FOLDERS:
        assert not [path for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path):
    if name_of(path) != "setup":
        upwards = {name for name in imported(path) if floor(name) < floor(name_of(path))}
        assert not upwards


def test_no_module_needs_one_that_needs_it():
    needs = {name_of(path): imported(path) - {name_of(path)} for path in MODULES if name_of(path) != "setup"}
    while needs:
        free = {name for name, others in needs.items() if not others & needs.keys()}
        assert free, f"these import each other: {needs}"
        needs = {name: others for name, others in needs.items() if name not in free}


def test_the_command_line_needs_nothing_heavy():
    """Found by what is imported at the top, as an import within a function waits until it is needed."""
    files = {name_of(path): path for path in MODULES}
    seen, waiting = set(), {"flags", "run.ending", "runs"}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        tops = [node for node in ast.parse(files[name].read_text(encoding="utf-8")).body]
        roots = {node.module for node in tops if isinstance(node, ast.ImportFrom)}
        roots |= {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
        assert not {root.partition(".")[0] for root in roots} & HEAVY, name
        waiting |= {other for other in imported(files[name]) if other.startswith("run.")} - seen


# Where the tests of a module are that has no file of its own: `test_ranks` tests `run/ranks.py`, and …
TESTED_WITH = {
    "setup": "test_package",
    "utils": "test_main",
    "blocks": "test_networks",
    "warps": "test_whitebox",
    "run.between_steps": "test_whitebox_networks",
    "augmentation": "test_batches",
    "run.batch_norm": "test_ranks",
    "run.catalogue": "test_tables",
    "run.command": "test_package",
    "run.console": "test_main",
    "run.ddp": "test_ranks",
    "run.earlier": "test_sweep",
    "run.ending": "test_robustness",
    "run.errors": "test_robustness",
    "run.grid": "test_sweep",
    "run.kept_means": "test_sweep",
    "run.listed": "test_runs",
    "run.listing": "test_runs",
    "run.parser": "test_flags",
    "run.seeds": "test_classifier",
    "run.settings": "test_figures_settings",
    "run.slurm": "test_robustness",
    "run.trainer": "test_main",
    "measures.chains": "test_decodable_information",
    "measures.engines": "test_decodable_information",
    "measures.derivatives": "test_quantities",
    "measures.embedding": "test_clusters",
    "measures.grouping": "test_clusters",
    "measures.heads": "test_decodable_information",
    "measures.measure": "test_main",
    "measures.samples": "test_clusters",
    "measures.viewing": "test_look",
    "figures.kept": "test_figures_clusters",
    "figures.kept_clusters": "test_figures_clusters",
    "figures.labels": "test_figures_layerwise",
    "figures.densities": "test_figures_look",
    "figures.look_groups": "test_figures_look",
    "figures.look_matrices": "test_figures_look",
    "figures.looks": "test_figures_look",
    "figures.pages": "test_figures_style",
    "figures.slots": "test_matches",
    "run.slot_update": "test_matches",
    "figures.tiles": "test_figures_views",
}


def test_the_tests_of_every_module_are_found_by_its_name():
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    names = {name_of(path) for path in MODULES} - set(FOLDERS)
    own = {
        name
        for name in names
        if f"test_{name.removeprefix('run.').removeprefix('measures.').replace('.', '_')}" in tests
    }
    assert own | TESTED_WITH.keys() == names and not own & TESTED_WITH.keys()
    assert set(TESTED_WITH.values()) <= tests
