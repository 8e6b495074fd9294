"""The report: everything is in it, it needs no network, and it names the runs behind what it shows."""

import base64
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_tables import save

from faqd_lib.reporting import charts, grids, report, tables
from faqd_lib.runs.suite import Suite


class Page(HTMLParser):
    """Addresses that a browser would fetch, links, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.links, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if tag == "a":
            self.links.append(found.get("href", ""))
        else:
            self.fetched += [found[name] for name in ("src", "href", "srcset", "data") if found.get(name)]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def suite(tmp_path):
    return Suite.open("quick", "digits", results=tmp_path)


def write_notebook(suite, *cells) -> None:
    (suite.folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), suite.folder / "notebooks" / "02_fast_feature_affinity.ipynb")


def test_everything_is_on_one_page_that_fetches_nothing(suite):
    teacher, student = suite.teacher(), suite.student("FAQD", weight_bits=1)
    save(suite, teacher, 91.0)
    save(suite, student, 81.25)
    figure = plt.figure()
    charts.save(figure, suite.folder / "figures", "05_accuracy_by_bits", [teacher, student])
    plt.close(figure)
    write_notebook(suite, new_markdown_cell("# Fast"))
    path = report.write_report(suite)
    assert path == suite.folder / "report" / "index.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert len(page.fetched) == 1  # the figure
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert not re.search(r"url\(|@import", path.read_text())
    expected = ["81.25", "T1 Weight quantization, digits", "Notebook 05: accuracy by bits", "2 run records", "not run"]
    torch_version = suite.store.records()[0].environment["torch"]
    for text in [*expected, student.run_id, suite.caption, "1 seed", torch_version]:
        assert text in page.text, text
    inside = [link for link in page.links if not link.startswith(("#", "https://arxiv.org/"))]
    assert inside == ["notebooks/02_fast_feature_affinity.html"]
    assert all((path.parent / link).is_file() for link in inside)
    ids = set(re.findall(r'id="([^"]+)"', path.read_text()))
    assert {link[1:] for link in page.links if link.startswith("#")} <= ids


def test_an_empty_suite_has_a_report_too(suite):
    page = Page(report.write_report(suite).read_text())
    assert "No notebook has drawn one yet." in page.text
    assert "0 runs" in page.text
    assert page.text.count("None of its runs is there yet") == len(tables.all_tables(suite)) + 1  # with failure signs


def test_the_picture_of_the_claims_stands_before_their_cards(suite):
    save(suite, suite.student("FAQD", weight_bits=1), 80.0)
    save(suite, suite.student("KD", weight_bits=1), 70.0)
    text = report.write_report(suite).read_text()
    head, _, cards = text.partition('<div class="cards">')
    assert head.count("data:image/png") == 1
    assert "data:image/png" not in cards
    assert "exploratory: +10.00 points (+" in cards
    assert "From 2 runs" in Page(head).text


def test_a_notebook_that_was_cut_short_is_named_and_left_out(suite, capsys):
    write_notebook(suite, new_markdown_cell("# Fast"))
    path = suite.folder / "notebooks" / "03_quantizers.ipynb"
    path.write_text('{"cells": [{"cell_')
    links = Page(report.write_report(suite).read_text()).links
    assert "notebooks/02_fast_feature_affinity.html" in links
    assert "notebooks/03_quantizers.html" not in links
    out = capsys.readouterr().out
    assert str(path) in out
    assert "--only 03" in out


def test_smoke_numbers_are_not_shown(tmp_path):
    suite = Suite.open("smoke", "digits", results=tmp_path)
    for config in grids.everything(suite):
        save(suite, config, 98.7654)
    text = report.write_report(suite).read_text()
    assert "98.7" not in text
    assert "its numbers mean nothing" in text


def test_a_notebook_is_a_page_without_scripts_and_with_formulas(suite):
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    outputs = [
        new_output("stream", name="stdout", text="a < b & c\n"),
        new_output("display_data", {"image/png": picture, "text/plain": "<Figure>"}),
        new_output("execute_result", {"text/html": "<table><tr><td>1</td></tr></table>"}, execution_count=1),
    ]
    write_notebook(
        suite,
        new_markdown_cell("The loss $\\lVert D\\rVert_F^2$ costs *five* `$5`:\n\n$$ \\frac1k \\sum_{j=1}^k x_j $$"),
        new_code_cell('print("a < b & c")  # $x$', outputs=outputs, execution_count=1),
    )
    report.write_report(suite)
    text = (suite.folder / "report" / "notebooks" / "02_fast_feature_affinity.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("math") == 2
    assert 'display="block"' in text
    assert "FORMULA" not in text
    assert "<code>$5</code>" in text
    assert "<em>five</em>" in text
    assert "a &lt; b &amp; c" in text
    assert page.fetched == [f"data:image/png;base64,{picture}"]
    assert page.links[0] == "../index.html"


def test_every_formula_of_the_series_becomes_mathml():
    from faqd_lib.cli.run_all import select

    count = 0
    for path in select([]):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "markdown":
                for match in report._MATHS.finditer(cell.source):
                    if match["code"]:
                        continue
                    formula = match["display"] or match["inline"]
                    shown = report.mathml(formula, bool(match["display"]))
                    assert shown.startswith("<math"), (path.name, formula)
                    assert "\\" not in re.sub(r"<[^>]+>", "", shown), (path.name, formula, shown)
                    count += 1
    assert count > 100


def test_figures_name_their_runs(suite, tmp_path):
    figure = plt.figure()
    saved = png, pdf = charts.save(figure, tmp_path, "x", [suite.teacher(), suite.teacher()])
    plt.close(figure)
    shown, about = DisplayFormatter().format(saved)
    assert base64.b64decode(shown["image/png"]) == png.read_bytes()
    assert about["image/png"]["width"] == 640  # 6.4 inches
    assert shown["text/plain"] == "x.png, x.pdf"
    assert report.Picture.read(png).runs == [suite.teacher().run_id]
    assert suite.teacher().run_id.encode() in pdf.read_bytes()


def test_a_figure_says_when_it_was_trained_and_what_is_gone(suite):
    teacher, student = suite.teacher(), suite.student("FAQD", weight_bits=1)
    save(suite, teacher, 91.0)
    save(suite, student, 81.25)
    figure = plt.figure()
    charts.save(figure, suite.folder / "figures", "01_x", [teacher, student], "Trained here and there.")
    plt.close(figure)
    records = {record.run_id: record for record in suite.store.records()}
    picture = report.Picture.read(suite.folder / "figures" / "01_x.png")
    day = records[teacher.run_id].finished[:10]
    assert picture.origin(records) == f"Trained here and there. From 2 runs, seed 1 (n = 1), trained {day}."
    del records[student.run_id]
    assert "From 1 run, trained" in picture.origin(records)
    assert "1 of its runs no longer exist" in picture.origin(records)
    (suite.store.run_folder(student) / "record.json").unlink()
    assert picture.origin(records) in Page(report.write_report(suite).read_text()).text
