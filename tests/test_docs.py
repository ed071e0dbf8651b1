"""README.md and docs/: links lead somewhere, commands are taken, files and flags are those of the program."""

import re
import shlex
from pathlib import Path

import matplotlib
import pytest
import torch
import yaml
from made_runs import make_run
from processes import ROOT

import flags
import plots
import runs
from measures import saved
from run.arrays import Arrays
from run.catalogue import MEASURES as MEASURES_OF_RUNS
from run.catalogue import found
from run.kept_means import means_csv
from run.presets import DATASETS, DEFAULTS, MODELS, flags_of_run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS, MEASURES = ROOT / "docs" / "runs.md", ROOT / "docs" / "measures.md"
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
SPAN = re.compile(r"`([^`]+)`")
NEW_FILE = re.compile(r"[Aa]\snew\sfile,\s`([^`]+)`")
FILE = re.compile(r"(?:\w+/)*\w+\.(?:py|ipynb|sh|def|toml|txt)|environment\.yaml|Dockerfile|Makefile")
PROGRAMS = {  # what stands before a program's flags, and who reads them
    r"\bpython main\.py": flags.get_args,
    r"\bslurm/\w+\.sh": flags.get_args,
    r"^master_thesis": flags.get_args,
    r"\bpython plots\.py": plots.get_args,
    r"\bpython runs\.py": runs.get_args,
    r"^master_thesis_plots": plots.get_args,
    r"^master_thesis_runs": runs.get_args,
    r"\bpython -m measures\.clusters": saved.get_args,
}


def of_every(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


def prose(page):
    """A page without its blocks of code."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def blocks(page, language):
    """Its blocks of code in a language."""
    return [code for of, code in CODE.findall(page.read_text(encoding="utf-8")) if of == language]


def links(page):
    """Where its links and images lead but for those to other sites: a file, and a heading or nothing."""
    text = SPAN.sub("", prose(page))
    for target in re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        path, _, heading = target.partition("#")
        if not re.match(r"\w+:", target):
            yield (page.parent / path if path else page), heading


def headings(page):
    """Its headings as links write them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page):
    """The flags of every command in blocks and in back-ticks, with who reads them.

    Left out are those without flags, in prose a program's mere name, and those with a placeholder: an ellipsis, a
    shell's variable, brackets around what may be left out, or a word in capitals that is neither dataset nor model.
    """
    lines = [line for code in blocks(page, "sh") for line in code.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(" ".join(span.split()) for span in SPAN.findall(prose(page)))]:
        for program, get_args in PROGRAMS.items():
            match = re.search(rf"{program}(?: (.*)|$)", line)
            words = shlex.split(match[1] or "", comments=True) if match else []
            if words and not any(map(is_placeholder, words)):
                yield get_args, words


def is_placeholder(word):
    is_name = word.isalpha() and word.isupper() and word not in (*DATASETS, *MODELS)
    return is_name or re.search(r"[…$\[\]]", word) is not None


def make_what_is_named(words):
    """Folders and files of runs that a command names, each as a run of the bare command leaves it."""
    hparams = yaml.safe_dump(flags_of_run(flags.get_args([])) | {"provenance": {}})
    for word in ["lightning_logs/version_0", *(word for word in words if "/" in word and not word.startswith("/"))]:
        folder = Path(re.sub(r"/(hparams\.yaml|checkpoints/\w+\.ckpt)$", "", word))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hparams.yaml").write_text(hparams)


@of_every(PAGES)
def test_every_link_and_image_leads_to_a_file_and_a_heading(page):
    assert [str(path) for path, _ in links(page) if not path.exists()] == []
    assert [heading for path, heading in links(page) if heading and heading not in headings(path)] == []


# What docs/extending.md calls is a program with its additions: tests/test_how_to_add.py makes and runs it.
@of_every([page for page in PAGES if page.name != "extending.md"])
def test_every_command_is_one_that_the_program_takes(page, in_an_empty_folder, capsys):
    for get_args, words in commands(page):
        make_what_is_named(words)
        try:
            get_args(words)
        except SystemExit as end:
            assert end.code == 0, (words, capsys.readouterr().err)


def test_commands_and_wrong_ones_are_found(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("`python main.py --no-such\nflag`\n\n```sh\ndocker run x python main.py \\\n  -e 3  # three\n"
                    "python main.py -c FILE\nsbatch --array=0-3 slurm/run.sh -m MLP\n```\n")  # fmt: skip
    found = [words for _, words in commands(page)]
    assert found == [["-e", "3"], ["-m", "MLP"], ["--no-such", "flag"]]
    with pytest.raises(SystemExit, match="2"):
        flags.get_args(found[2])


@of_every(PAGES)
def test_every_file_of_the_program_is_there(page):
    new = NEW_FILE.findall(prose(page))
    named = [span for span in SPAN.findall(prose(page)) if FILE.fullmatch(span) and span not in new]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_table_of_flags_has_every_flag_and_no_other():
    table = "".join(re.findall(r"^\| (?:run|data|network|optimisation|measures) \|(.*)$", prose(RUNS), re.M))
    listed = re.findall(r"`(?:-\w+/)?(--[\w-]+)`", table)
    assert sorted(listed) == sorted(f"--{name.replace('_', '-')}" for name in DEFAULTS)


def test_the_examples_on_runs_work_as_they_stand(in_an_empty_folder, capsys):
    matplotlib.use("agg")
    folder = make_run(Path("lightning_logs/version_0"))
    Arrays(folder).path.mkdir()
    Arrays(folder).write(3, "rank", {"singular_values/test/hidden1": torch.tensor([2.0, 1.0])}, {"seed": 0})
    names = {}
    for code in blocks(RUNS, "python"):
        if "master_thesis" not in code:  # the package as it is installed: tests/test_package.py
            exec(code, names)
    matplotlib.pyplot.close("all")
    assert len(names["metrics"]) == 6 and names["arrays"].keys() == {"singular_values/test/hidden1"}
    assert names["sigma"].tolist() == [2.0, 1.0] and names["settings"]["seed"] == 0
    assert set(names["nc1"]) == set(names["stable"]) == set(names["layers"]) == {"0", "1", "2", "3", "4"}
    assert set(names["dib"].minimality) == {"hidden1", "hidden2"}


def test_the_example_on_many_runs_works_as_it_stands(in_an_empty_folder, capsys):
    Path("lightning_logs").mkdir()
    values = [((("learning-rate", rate), ("widths", "128")), 0, Path("lightning_logs")) for rate in ("1e-2", "1e-3")]
    Path("lightning_logs/metrics.csv").write_text("epoch,test_acc\n1,0.5\n")
    Path("lightning_logs/grid_means.csv").write_text(means_csv(values))
    [code] = blocks(ROOT / "docs" / "many_runs.md", "python")
    exec(code, {})
    assert capsys.readouterr().out.split() == ["learning-rate", "0.001", "0.010", "widths", "128", "0.5", "0.5"]


def test_the_example_of_clusters_works_as_it_stands(capsys):
    names = {}
    [code] = blocks(MEASURES, "python")
    exec(code, names)
    assert len(capsys.readouterr().out.splitlines()) == 3 and names["layers"] == ["0", "1", "2"]
    assert names["groups"].labels.shape == (300,) and -1 <= names["similarity"] <= 1
    assert names["aligned"].shape == (3, 3) and names["reduced"].scores.shape[0] == 300


def test_every_figure_of_clusters_is_in_the_docs():
    [about] = [about for about in MEASURES_OF_RUNS if about.name == "clusters"]
    draws = [found(reference) for reference in about.figures]
    names = {name for draw in draws for name in getattr(draw, "variants", [draw.__name__])}
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", prose(MEASURES), re.M)))
    assert names <= {*listed}
    assert {name.removeprefix("clusters/") for name in about.columns} - {"cka"} <= {*listed}


def test_the_example_of_slots_works_as_it_stands(capsys):
    [code] = blocks(ROOT / "docs/slots.md", "python")
    names = {}
    exec(code, names)
    slots, h, y = names["slots"], names["h"], names["y"]
    assert len(slots) < 300 and (slots.predict(h[1500:]) == y[1500:]).double().mean() > 0.95
    assert capsys.readouterr().out


def test_every_column_and_figure_of_slots_is_in_the_docs():
    [about] = [about for about in MEASURES_OF_RUNS if about.name == "slots"]
    listed = prose(ROOT / "docs/slots.md")
    assert all(f"`{name}/" in listed for name in about.columns)
    assert all(f"`{reference.partition(':')[2]}`" in listed for reference in about.figures)


def test_the_example_of_views_works_as_it_stands(capsys):
    names = {}
    [code] = blocks(ROOT / "docs/views.md", "python")
    exec(code, names)
    assert "tensor" in capsys.readouterr().out and names["units"].shape == (64, 2, 3, 32, 32)


def test_every_picture_and_flag_of_views_is_in_the_docs():
    [about] = [about for about in MEASURES_OF_RUNS if about.name == "views"]
    listed = prose(ROOT / "docs/views.md")
    assert all(f"`{name}.png`" in listed for name in about.pictures)
    assert all(f"`--{flag.name.replace('_', '-')}`" in listed for flag in about.flags)
