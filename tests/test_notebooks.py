"""The form of every notebook: short cells, a check after its picture, one sentence of what is known."""

import ast

import nbformat
import pytest

from faqd_lib.utils.files import project_root

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))
MOST_LINES = 25


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request) -> list[nbformat.NotebookNode]:
    return nbformat.read(request.param, as_version=4).cells


def asserts(source: str) -> bool:
    """Whether a cell asserts anything itself; what its functions assert does not count."""

    def visit(node: ast.AST) -> bool:
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            return False
        return isinstance(node, ast.Assert) or any(map(visit, ast.iter_child_nodes(node)))

    return visit(ast.parse(source))


def test_one_cell_of_parameters_and_no_outputs(cells):
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_no_code_cell_is_long(cells):
    lengths = [
        len([line for line in cell.source.splitlines() if line.strip()]) for cell in cells if cell.cell_type == "code"
    ]
    assert max(lengths) <= MOST_LINES


def test_what_is_asserted_is_said_first(cells):
    before = None
    for cell in cells:
        if cell.cell_type == "code" and asserts(cell.source):
            assert before == "check", cell.source
        if cell.cell_type == "markdown":
            before = "check" if cell.source.startswith("**Check.**") else "text"


def test_every_section_ends_with_what_is_known(cells):
    sections: list[list[nbformat.NotebookNode]] = []
    for cell in cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            sections.append([])
        if sections:
            sections[-1].append(cell)
    taught = [section for section in sections if any(cell.cell_type == "code" for cell in section)]
    assert taught
    for section in taught:
        last = [cell.source for cell in section if cell.cell_type == "markdown"][-1]
        assert any(line.startswith("**Now known:**") for line in last.splitlines()), section[0].source


def test_the_first_chapter_is_short():
    cells = nbformat.read(project_root() / "notebooks" / "01_feature_affinity.ipynb", as_version=4).cells
    assert sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown") <= 1200
