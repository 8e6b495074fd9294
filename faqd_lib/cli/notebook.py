"""What every notebook of the series begins with: parameters checked, one suite opened.

The parameters cell holds ``name: type = literal  # help`` lines; papermill overrides them in a cell of its own. The
cell after it calls :func:`start` with all of them.
"""

import ast
import difflib
import os
from collections.abc import Callable

import ipywidgets
from IPython import get_ipython
from matplotlib.figure import Figure

from ..config import ConfigurationError
from ..runs.suite import Suite
from ..utils.progress import headless

INJECTED_HEAD = "# Parameters"  # the first line of the cell that papermill injects


def start(*, profile: str, dataset: str, data_root: str, results_dir: str, seeds: int, **extra: object) -> Suite:
    """Open the suite that the parameters of a notebook describe, and print what it is in a few lines.

    Args:
        profile, dataset, data_root, seeds: see :meth:`faqd_lib.runs.suite.Suite.open`; empty or 0 for the default.
        results_dir: where suite folders live; empty for ``$FAQD_RESULTS``, then ``results/`` in the project.
        extra: further parameters of the notebook; named here so that they count as known.

    Raises:
        ConfigurationError: a parameter was injected that the notebook does not have (papermill itself lets a
            misspelled one pass), or one has the wrong type or value.
    """
    known = {"profile", "dataset", "data_root", "results_dir", "seeds", *extra}
    check_injected(known)
    for name, value in {
        "profile": profile,
        "dataset": dataset,
        "data_root": data_root,
        "results_dir": results_dir,
    }.items():
        if not isinstance(value, str):
            raise ConfigurationError(f"parameter {name} must be a text, got {value!r}")
    suite = Suite.open(
        profile or "quick",
        dataset,
        data_root or None,
        results_dir or os.environ.get("FAQD_RESULTS") or None,
        seeds,
    )
    print(f"images:  {suite.caption}")
    print(
        f"profile: {suite.profile.name}, {suite.profile.seeds} seed(s), {suite.precision} on {suite.device}"
        f"{', compiled' if suite.profile.compile else ''}"
    )
    print(f"updates: {_updates(suite)}")
    print(f"results: {suite.folder}")
    if not suite.profile.shows_results:
        print("This profile tests the machinery; its numbers mean nothing.")
    return suite


def _updates(suite: Suite) -> str:
    """How long networks learn: what decides whether they learn anything, on few images above all."""
    profile = suite.profile
    schedules = {"teacher": profile.teacher_schedule, "student": profile.student_schedule}
    return "; ".join(
        f"{who} {schedule.epochs} × {suite.state.training_count // schedule.batch_size:,} (epochs × batches)"
        for who, schedule in schedules.items()
    )


def injected_names(cells: list[str]) -> list[str]:
    """Names assigned in the latest cell that papermill injected, in their order; none if there is no such cell."""
    injected = [cell for cell in cells if cell.lstrip().startswith(INJECTED_HEAD)]
    if not injected:
        return []
    statements = ast.parse(injected[-1]).body
    return [target.id for s in statements if isinstance(s, ast.Assign) for target in s.targets if hasattr(target, "id")]


def check_injected(known: set[str]) -> None:
    """Refuse injected parameters that the notebook does not know."""
    shell = get_ipython()
    cells = [] if shell is None else shell.user_ns.get("In", [])
    for name in injected_names(list(cells)):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigurationError(f"unknown parameter {name!r}{hint} This notebook has: {', '.join(sorted(known))}")


def explore(draw: Callable[..., Figure], **controls: ipywidgets.ValueWidget) -> ipywidgets.Widget | Figure:
    """A figure under controls that redraw it; where nobody watches (run headless), the figure alone, as they stand.

    Args:
        draw: makes the figure from the controls' values, given by name.
        controls: widgets; see :func:`slider` and :func:`choice`.
    """
    if headless():
        return draw(**{name: control.value for name, control in controls.items()})
    shown = ipywidgets.interactive(draw, {"auto_display": True}, **controls)
    shown.children = (ipywidgets.HBox(shown.children[:-1], layout={"flex_flow": "row wrap"}), shown.children[-1])
    return shown


def slider(label: str, low: float, high: float, start: float, step: float | None = None) -> ipywidgets.ValueWidget:
    """A slider over whole numbers, or with ``step`` over others; it acts when it is let go."""
    look = {"description": label, "continuous_update": False, "style": {"description_width": "initial"}}
    if step is None:
        return ipywidgets.IntSlider(start, low, high, **look)
    return ipywidgets.FloatSlider(start, min=low, max=high, step=step, **look)


def choice(label: str, options: list[str]) -> ipywidgets.ValueWidget:
    """A menu; the first option is chosen at first."""
    return ipywidgets.Dropdown(options=options, description=label, style={"description_width": "initial"})
