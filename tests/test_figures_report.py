"""The page of runs: whole in one file, what stands in it, and how it behaves in a real browser, where one is found."""

import html
import json
import re
import shutil
import subprocess

import pytest
import yaml
from made_runs import change_flags, make_run, read

import plots
from figures.report import MAX_POINTS, line_of, shorter
from run import listing
from run.listed import Listed

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NOTE = "\"quoted\" & <script>document.title = 'hacked'</script>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two settings of two seeds, one of which ended early and has a note that would break a careless page."""
    logs = tmp_path_factory.mktemp("logs")
    runs = [
        make_run(logs / f"version_{i}", 3, 4, seed=i % 2, measures=("nc1",), learning_rate=(0.5, 0.25)[i // 2])
        for i in range(4)
    ]
    for i, run in enumerate(runs):
        facts = yaml.safe_load((run / "hparams.yaml").read_text())["provenance"]
        change_flags(run, provenance=facts | {"torch": "2.6.0", "started": f"2026-01-0{i + 1}T00:00:00+00:00"})
    change_flags(runs[3], epochs=9, note=NOTE, tag=["paper"])
    return runs


@pytest.fixture(scope="module")
def page(folders):
    path = folders[0].parent / "new" / "report.html"
    assert plots.main([str(folders[0].parent), "--html", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def text(page):
    return page.read_text()


def sections(text):
    """The parts of the page by their names."""
    return dict(re.findall(r'<section id="([\w-]+)">(.*?)</section>', text, re.S))


def cells(table):
    """The texts of a table, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    return [
        [
            html.unescape(re.sub("<[^>]+>", "", cell)).strip()
            for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S)
        ]
        for row in rows
    ]


def test_the_page_needs_nothing_from_outside_and_is_small(text):
    outer = re.sub(r'"data:image/svg\+xml,[^"]*"', '"data:"', text)
    assert "//" not in re.sub(r"^\s*//.*$", "", outer, flags=re.M) and "@import" not in outer and "url(" not in outer
    assert all(target.startswith(("#", "data:")) for target in re.findall(r'(?:src|href)="([^"]*)"', outer))
    assert len(text) < 3e6


def test_its_tables_are_those_of_the_command(folders, text):
    runs = listing.newest_first(map(Listed, folders))
    for table, name in ((listing.table(runs), "runs"), (listing.means(runs), "means")):
        columns = [column for column in table.columns if column not in ("model", "dataset")]  # the title has them
        shown = cells(sections(text)[name])
        line = shown[0].index("over epochs") if "over epochs" in shown[0] else None
        shown = [row[:line] + row[line + 1 :] if line is not None else row for row in shown]
        assert shown[0] == [listing.title(column) for column in columns]
        assert shown[1:] == [[listing.cell(row, column) for column in columns] for row in table.rows]
    assert "<title>ResNet on MNIST, 4 runs</title>" in text and "hacked" in text and NOTE not in text


def test_every_run_has_its_flags_versions_and_closing_table(folders, text):
    parts = re.findall(r'<details class="box" id="run-\d+".*?</details>', sections(text)["details"], re.S)
    assert len(parts) == 4
    for folder, part in zip(reversed(folders), parts, strict=True):
        flags = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", part))
        assert flags["seed"] == folder.name[-1].translate(str.maketrans("23", "01")) and flags["torch"] == "2.6.0"
        assert re.findall(r"<div class=differs><dt>learning-rate</dt>", part)
        assert not re.findall(r"<div class=differs><dt>model</dt>", part)
        first, last = (read(folder)["nc1/test/avgpool"].iloc[i] for i in (0, -1))
        (row,) = [row for row in cells(part) if row[:1] == ["avgpool"]]
        assert f"{first:.4g} → {last:.4g}" in row


def test_it_holds_every_figure_that_the_other_command_writes(text):
    drawn = ["training_curves", "nc1_over_epochs", "nc1_over_depth", "heat_map_nc1_train", "heat_map_nc1_test"]
    assert re.findall(r'<figure class="box" id="(\w+)">', text) == drawn
    assert text.count('src="data:image/svg+xml,<svg ') == len(drawn)
    assert "NC1 over epochs" in sections(text)["figures"] and "lines: mean over runs" in sections(text)["figures"]


def test_a_shorter_drawing_has_the_same_places_to_a_hundredth():
    svg = '<?xml version="1.0"?>\n<!-- a -->\n<path d="M 1.23456 -0.001234\nL 3 4 "\n  transform="scale(0.015625)"/>\n'
    assert shorter(svg) == '<path d="M 1.23 -0.00 L 3 4 " transform="scale(0.015625)"/>'


def test_the_line_of_a_run_ends_with_its_last_accuracy_and_is_not_long(tmp_path):
    folder = make_run(tmp_path / "version_0", 2, 1000, measures=())
    points = [tuple(map(float, pair.split(","))) for pair in line_of(Listed(folder), 0.0, 1.0).split()]
    assert len(points) <= MAX_POINTS and points[-1][0] == 83
    assert points[-1][1] == pytest.approx(1 + 18 * (1 - read(folder)["test_acc"].iloc[-1]), abs=0.051)


def test_a_place_where_no_page_can_be_is_told(folders, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert plots.main([str(folders[0]), "--html", str(tmp_path / "file" / "report.html")]) == 1
    assert f"plots.py: error: cannot write {tmp_path}/file/report.html" in capsys.readouterr().err


WATCH = """
<script>
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)], page = document.documentElement;
  const rows = () => all("#table tbody tr").filter((row) => !row.hidden).map((row) => row.cells[0].textContent.trim());
  const filter = document.getElementById("filter");
  const type = (text) => {
    filter.value = text;
    filter.dispatchEvent(new Event("input"));
    return rows();
  };
  const click = (name) => {
    document.querySelector(`#table th[data-name="${name}"] button`).click();
    return rows();
  };
  const found = { asked: rows(), all: type(""), seeds: type("seed=1"), early: type("ended 0.25") };
  Object.assign(found, { low: type("learning-rate<0.3"), none: type("nothing") });
  type("");
  Object.assign(found, { best: click("best"), worst: click("best"), names: click("name"), notes: click("note") });
  found.overflow = page.scrollWidth - innerWidth;
  found.width = innerWidth;
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.loaded = loaded.filter((name) => !name.startsWith("data:"));
  found.broken = [...document.images].filter((image) => image.loading !== "lazy" && !image.naturalWidth).length;
  const color = () => getComputedStyle(document.body).backgroundColor;
  found.colors = [color()];
  document.getElementById("theme").click();
  found.colors.push(color());
  location.hash = "run-2";
  setTimeout(() => {
    found.open = document.getElementById("run-2").open;
    found.title = document.title;
    parent.postMessage(found, "*");
  }, 50);
});
</script>
"""

FRAME = """
<iframe style="border: 0; width: {width}px; height: 900px" src="{address}"></iframe><pre id="result"></pre>
<script>
addEventListener("message", (event) => (document.getElementById("result").textContent = JSON.stringify(event.data)));
</script>
"""


def browse(page, tmp_path, width, asked):
    """What the page says of itself in a frame of that width: a window cannot be as narrow as a phone."""
    watched = tmp_path / "watched.html"
    watched.write_text(page.read_text().replace('loading="lazy" ', "") + WATCH)
    outer = tmp_path / "outer.html"
    outer.write_text(FRAME.format(width=width, address=f"watched.html#{asked.replace('&', '&amp;')}"))
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1500,1000", "--virtual-time-budget=5000",
            "--dump-dom", f"file://{outer}"]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    return json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)[1]))


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.parametrize(("width", "theme"), [(400, "dark"), (1400, "light")])
def test_in_a_browser_the_table_sorts_and_filters_and_the_page_fits(page, folders, tmp_path, width, theme):
    found = browse(page, tmp_path, width, f"theme={theme}&filter=seed=0&sort=name")
    names = [f"version_{i}" for i in range(4)]
    best = {name: read(folders[0].parent / name)["test_acc"].max() for name in names}
    assert found["asked"] == ["version_0", "version_2"] and sorted(found["all"]) == names
    assert found["seeds"] == ["version_1", "version_3"] and found["early"] == ["version_3"]
    assert found["low"] == ["version_2", "version_3"] and found["none"] == []
    assert [best[name] for name in found["best"]] == sorted(best.values(), reverse=True)
    assert [best[name] for name in found["worst"]] == sorted(best.values()) and found["names"] == names
    assert found["notes"][0] == "version_3"  # the others have none
    assert found["overflow"] <= 0 and found["width"] == width
    assert found["loaded"] == [] and found["broken"] == 0
    light, dark = "rgb(246, 247, 248)", "rgb(15, 18, 21)"
    assert found["colors"] == ([light, dark] if theme == "light" else [dark, light])
    assert found["open"] and found["title"] == "ResNet on MNIST, 4 runs"
