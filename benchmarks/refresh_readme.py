"""Puts the latest results into benchmarks/README.md, between the markers that name them.

python benchmarks/refresh_readme.py
"""

import json
import re

from common import RESULTS, ROOT, markdown

from run.files import write_whole

README = ROOT / "benchmarks" / "README.md"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    write_whole(README, re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", latest, text, flags=re.DOTALL))


def latest(section: re.Match) -> str:
    """The section with its result of the latest run, or as it is where there is none."""
    path = RESULTS / f"{section[1]}.json"
    if not path.exists():
        return section[0]
    return f"<!-- {section[1]} -->\n{markdown(json.loads(path.read_text(encoding='utf-8')))}\n<!-- end -->"


if __name__ == "__main__":
    main()
