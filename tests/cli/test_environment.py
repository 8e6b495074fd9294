"""Environment variables of the command line and JupyterLab."""

import ast
import re
from pathlib import Path

import pytest
import torch

import faqd_lib
from faqd_lib.cli import environment
from faqd_lib.config import ConfigurationError
from faqd_lib.runs.local import train_here
from faqd_lib.runs.ray import EngineError, RayEngine


def test_runs_are_trained_in_this_process_by_default(monkeypatch):
    assert environment.engine() is train_here
    monkeypatch.setenv("FAQD_ENGINE", "local")
    assert environment.engine() is train_here


def test_ray_is_chosen_with_its_settings(monkeypatch):
    monkeypatch.setenv("FAQD_ENGINE", "ray")
    assert environment.engine() == RayEngine(None, 1, 0.25 if torch.cuda.is_available() else 0.0)
    for name, value in {"ADDRESS": "head:6379", "CPUS": "4", "GPUS": "2"}.items():
        monkeypatch.setenv(f"FAQD_RAY_{name}", value)
    assert environment.engine() == RayEngine("head:6379", 4, 2.0)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FAQD_ENGINE", "rey", r"local, ray, got 'rey' \(did you mean 'ray'\?\)"),
        ("FAQD_RAY_CPUS", "many", "FAQD_RAY_CPUS must be a number, got 'many'"),
        ("FAQD_RAY_CPUS", "1.5", "FAQD_RAY_CPUS must be a whole number, got 1.5"),
        ("FAQD_RAY_GPUS", "1.5", "got 1.5"),
    ],
)
def test_a_bad_engine_setting_is_named(monkeypatch, variable, value, message):
    monkeypatch.setenv("FAQD_ENGINE", "ray")
    monkeypatch.setenv(variable, value)
    with pytest.raises(EngineError, match=message):
        environment.engine()


def test_progress_is_text_or_a_bar(monkeypatch):
    assert environment.progress_bar() is None
    for style, is_bar in (("text", False), ("bar", True)):
        monkeypatch.setenv("FAQD_PROGRESS", style)
        assert environment.progress_bar() is is_bar
    monkeypatch.setenv("FAQD_PROGRESS", "loud")
    with pytest.raises(ConfigurationError, match="FAQD_PROGRESS must be one of text, bar, got 'loud'"):
        environment.progress_bar()


def test_only_the_command_line_reads_settings_from_the_environment():
    """Below ``cli``, the only variables are those that say where images are."""
    root = Path(faqd_lib.__file__).parent
    found = {
        path.relative_to(root).parts[0]: node.value
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and re.fullmatch(r"FAQD_[A-Z_]+", str(node.value))
        if node.value not in ("FAQD_DATA", "FAQD_CACHE")
    }
    assert set(found) == {"cli"}, found
