"""`pip install .`: the checkout's modules as one package, `master_thesis`; all else about it is in pyproject.toml.

In a checkout the modules import each other by their own names, `datasets` or `utils`, which others have taken too.
Installed they lie together under one name, so while they are copied the imports between them are given that name.
"""

import ast
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "master_thesis"
FOLDERS = ("figures", "measures", "run")
KINDS = ("*.py", "*.html")
OWN = {path.stem for path in ROOT.glob("*.py")} - {"setup"} | set(FOLDERS)  # names that mean modules of this program


class OnePackage(build_py):
    """Copies every module into the package."""

    def run(self) -> None:
        target = Path(self.build_lib) / PACKAGE
        for source in sources():
            copy = target / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8")
            copy.write_text(within_package(text) if source.suffix == ".py" else text, encoding="utf-8")
        (target / "__init__.py").write_text(f'"""{self.distribution.metadata.description}."""\n', encoding="utf-8")

    def get_source_files(self) -> list[str]:
        """What an archive of the sources needs."""
        return [str(source.relative_to(ROOT)) for source in sources()]


def sources() -> list[Path]:
    """All modules of the program, and the pages that they fill in."""
    top = [path for path in sorted(ROOT.glob("*.py")) if path.stem != "setup"]
    return top + [path for folder in FOLDERS for kind in KINDS for path in sorted((ROOT / folder).glob(kind))]


def within_package(code: str) -> str:
    """A module's code with imports of other modules of the program from the package.

    >>> within_package("from run import ranks  # why\\nimport plots\\nimport torch\\n")
    'from master_thesis.run import ranks  # why\\nfrom master_thesis import plots\\nimport torch\\n'
    """
    lines = code.splitlines(keepends=True)
    for node in ast.walk(ast.parse(code)):
        i = getattr(node, "lineno", 1) - 1
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in OWN:
            lines[i] = lines[i].replace(f"from {node.module} ", f"from {PACKAGE}.{node.module} ", 1)
        elif isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in OWN for alias in node.names):
            [alias] = node.names  # one a line, as the linter has it
            assert "." not in alias.name, f"write `from … import …` instead of `import {alias.name}`"
            lines[i] = lines[i].replace(f"import {alias.name}", f"from {PACKAGE} import {alias.name}", 1)
    return "".join(lines)


if __name__ == "__main__":
    setup(cmdclass={"build_py": OnePackage}, packages=[PACKAGE])
