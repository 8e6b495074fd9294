"""Imports run one way: between the floors of the house, and between the modules of a package."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import faqd_lib

ROOT = Path(faqd_lib.__file__).parent
FLOORS = (
    {"utils"},
    {"affinity", "quantization"},
    {"config", "data", "models"},
    {"training", "export"},
    {"runs"},
    {"reporting"},
    {"compression"},
    {"cli"},
)
FLOOR = {package: number for number, floor in enumerate(FLOORS) for package in floor}


def modules() -> dict[str, ast.Module]:
    """Every module of the library by its dotted name; the packages' own ``__init__`` left out."""
    paths = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
    }


def imported(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the library that a module imports, at its head or within a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "faqd_lib" for alias in node.names), name
        if not isinstance(node, ast.ImportFrom) or (node.level == 0 and node.module.split(".")[0] != "faqd_lib"):
            continue
        base = [] if node.level == 0 else name.split(".")[: -node.level]
        target = ".".join([*base, *(node.module or "").removeprefix("faqd_lib").lstrip(".").split(".")]).strip(".")
        if target in known:
            found.add(target)
        else:  # "from ..package import module"
            within = {f"{target}.{alias.name}".lstrip(".") for alias in node.names}
            assert within <= known, f"{name} imports {within - known}, which is no module"
            found |= within
    return found


def test_every_package_stands_on_a_floor():
    assert {name.split(".")[0] for name in modules()} == set(FLOOR)


def test_imports_run_one_way():
    trees = modules()
    graph = {name: imported(name, tree, set(trees)) for name, tree in trees.items()}
    assert sum(map(len, graph.values())) > 100  # the reader finds imports at all
    for name, used in graph.items():
        package = name.split(".")[0]
        for other in used:
            below = other.split(".")[0]
            assert below == package or FLOOR[below] < FLOOR[package], f"{name} imports {other}"
    list(TopologicalSorter(graph).static_order())  # raises CycleError for modules that import each other


def test_no_public_function_hides_a_module():
    for name in faqd_lib.__all__:
        assert not (ROOT / f"{name}.py").exists(), name
        assert not (ROOT / name).is_dir(), name
