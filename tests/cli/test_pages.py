import pytest

from faqd_lib.cli.pages import filled, generated, pages
from faqd_lib.runs.store import ResultsError
from faqd_lib.utils.files import project_root

ROOT = project_root()


def test_generated_tables_of_the_pages_are_those_of_the_records():
    parts = generated(ROOT)
    texts = {page: page.read_text(encoding="utf-8") for page in pages(ROOT)}
    for page, text in texts.items():
        assert filled(text, parts, page.name) == text, f"{page}: run python -m faqd_lib.cli.pages"
    assert "<!-- generated: study -->" in texts[ROOT / "README.md"]
    everything = "".join(texts.values())
    assert all(f"<!-- generated: {name} -->" in everything for name in parts)


def test_a_part_is_replaced_between_its_marks_and_an_unknown_one_is_named():
    text = "before\n<!-- generated: claims -->\nold\n<!-- end -->\nafter"
    assert filled(text, {"claims": "| new |\n"}, "page") == (
        "before\n<!-- generated: claims -->\n\n| new |\n\n<!-- end -->\nafter"
    )
    with pytest.raises(ResultsError, match="page asks for 'claims'; generated are: other"):
        filled(text, {"other": ""}, "page")
