"""Modules that are imported when they are first used."""

import sys

import pytest

from faqd_lib.utils.lazy import LazyModule


def test_a_module_is_imported_by_its_first_use(tmp_path, monkeypatch):
    (tmp_path / "faqd_slow_module.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    module = LazyModule("faqd_slow_module")
    assert "faqd_slow_module" not in sys.modules
    assert module.answer == 42
    assert sys.modules.pop("faqd_slow_module").answer == 42
    with pytest.raises(AttributeError, match="has no attribute 'question'"):
        _ = module.question
    sys.modules.pop("faqd_slow_module")


def test_a_missing_module_is_reported_by_its_first_use():
    module = LazyModule("faqd_missing_module")
    with pytest.raises(ModuleNotFoundError, match="faqd_missing_module"):
        _ = module.answer
