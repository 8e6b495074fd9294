"""The first cells of a notebook, and controls for its figures.

The parameters cell holds lines ``name: type = literal  # help``. Papermill overrides them in a cell that it injects
below. The next cell calls :func:`start` with all parameters.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from IPython import get_ipython

from ..config import ConfigurationError
from ..data import datasets
from ..data.sources import SOURCES
from ..runs.profile import Profile
from ..runs.suite import Suite
from ..utils import progress
from ..utils.lazy import LazyModule
from ..utils.messages import did_you_mean
from . import environment

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure
else:
    ipywidgets = LazyModule("ipywidgets")  # its import takes half a second, and headless runs need no controls

INJECTED_HEAD = "# Parameters"  # the first line of the cell that papermill injects


def start(
    *,
    profile: str,
    dataset: str,
    data_root: str,
    results_dir: str,
    seeds: int,
    dense: bool = False,
    **extra: object,
) -> Suite:
    """Open the suite that the parameters of a notebook describe, and print a summary of it.

    Args:
        profile, dataset, data_root, seeds: see :meth:`faqd_lib.runs.suite.Suite.open`; empty or 0 for the default.
        dense: whether the notebook is about a class for each pixel. Another dataset then gives way to CamVid if it is
            on disk and the profile shows results, else to the strokes of the digits. A profile without networks for it
            borrows those of ``quick`` or ``smoke``. Both are printed; see :func:`dense_choice`.
        results_dir: where suite folders live; empty for ``$FAQD_RESULTS``, then ``results/`` in the project.
        extra: further parameters of the notebook, named here so that they count as known.

    Raises:
        ConfigurationError: a parameter has the wrong type or value, or is unknown (papermill alone would accept an
            unknown one), or the dataset has a class for each pixel and the notebook is about one class an image.
    """
    texts = {"profile": profile, "dataset": dataset, "data_root": data_root, "results_dir": results_dir}
    check_injected({*texts, "seeds", *extra})
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ConfigurationError(f"parameter {name} must be a text, got {value!r}")
    results = results_dir or environment.results()
    engine, bar = environment.engine(), environment.progress_bar()
    chosen = Profile.load(profile or "quick")
    if dense:
        chosen, dataset, lines = dense_choice(chosen, dataset, data_root)
        print("".join(f"{line}\n" for line in lines), end="")
    else:
        _refuse_dense(chosen, dataset)
    suite = Suite.open(chosen, dataset, data_root, results, seeds, engine=engine, bar=bar)
    chosen = suite.profile
    # On few images, too few updates leave a network untrained.
    updates = "; ".join(
        f"{who} {schedule.epochs} × {suite.state.training_count // schedule.batch_size:,} (epochs × batches)"
        for who, schedule in (("teacher", chosen.teacher_schedule), ("student", chosen.student_schedule))
    )
    compiled = ", compiled" if chosen.compile else ""
    print(f"images:  {suite.caption}")
    print(f"profile: {chosen.name}, {chosen.seeds} seed(s), {suite.precision} on {suite.device}{compiled}")
    print(f"updates: {updates}")
    print(f"results: {suite.folder}")
    if not chosen.shows_results:
        print("This profile tests the machinery; its numbers mean nothing.")
    return suite


def _refuse_dense(profile: Profile, dataset: str) -> None:
    """ConfigurationError if the dataset is not for a notebook about one class an image."""
    name = dataset or profile.dataset
    if name in SOURCES and SOURCES[name].dense:
        raise ConfigurationError(
            f"dataset {name} has a class for each pixel, and this notebook is about one class an image: choose another "
            "dataset, or notebook 14"
        )


def dense_choice(profile: Profile, dataset: str, data_root: str | Path | None) -> tuple[Profile, str, list[str]]:
    """What a notebook about a class for each pixel works on, where ``dataset`` is asked for; empty for the profile's.

    Returns:
        The profile with networks for the dataset, the dataset's name, and lines that say what was replaced and why.
    """
    asked, lines = dataset or profile.dataset, []
    name = asked
    if asked not in SOURCES or not SOURCES[asked].dense:
        there = datasets.on_disk("camvid", data_root or None)
        name = "camvid" if profile.shows_results and there else "digit-strokes"
        rejected = "this profile shows no results" if there else "camvid is not on disk"
        reason = "found on disk" if name == "camvid" else f"made from scikit-learn's digits, because {rejected}"
        replaced = "no dataset was named" if asked == "auto" else f"{asked} has no label maps that this project reads"
        lines.append(f"dataset: {name} ({reason}), because {replaced}")
    fitted, lender = profile.with_dense_networks(name)
    if lender:
        chosen = fitted.for_dataset(name)
        lines.append(
            f"networks: teacher {chosen.teachers[0]}, student {chosen.student}, with the settings of the profile "
            f"{lender} for {name}, because {profile.name} has no networks with a class for each pixel"
        )
    return fitted, name, lines


def injected_names(cells: list[str]) -> list[str]:
    """Names assigned in the latest cell that papermill injected, in order; an empty list without such a cell."""
    injected = [cell for cell in cells if cell.lstrip().startswith(INJECTED_HEAD)]
    statements = ast.parse(injected[-1]).body if injected else []
    targets = [target for statement in statements if isinstance(statement, ast.Assign) for target in statement.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def check_injected(known: set[str]) -> None:
    """Raise ConfigurationError if papermill injected a parameter that is not ``known`` to the notebook."""
    shell = get_ipython()
    for name in injected_names([] if shell is None else shell.user_ns.get("In", [])):
        if name not in known:
            raise ConfigurationError(
                f"unknown parameter {name!r}{did_you_mean(name, known)}. This notebook has: {', '.join(sorted(known))}"
            )


def explore(draw: Callable[..., Figure], **controls: ipywidgets.ValueWidget) -> ipywidgets.Widget | Figure:
    """A figure with controls that redraw it. In a headless run, the figure alone, drawn from the initial values.

    Args:
        draw: makes the figure from the controls' values, given by name.
        controls: widgets; see :func:`slider` and :func:`choice`.
    """
    bar = environment.progress_bar()
    if progress.headless() if bar is None else not bar:
        return draw(**{name: control.value for name, control in controls.items()})
    shown = ipywidgets.interactive(draw, {"auto_display": True}, **controls)
    shown.children = (ipywidgets.HBox(shown.children[:-1], layout={"flex_flow": "row wrap"}), shown.children[-1])
    return shown


def slider(label: str, low: float, high: float, start: float, step: float | None = None) -> ipywidgets.ValueWidget:
    """A slider over whole numbers, or over multiples of ``step``. The figure is redrawn when the slider is released."""
    look = {"description": label, "continuous_update": False, "style": {"description_width": "initial"}}
    if step is None:
        return ipywidgets.IntSlider(start, low, high, **look)
    return ipywidgets.FloatSlider(start, min=low, max=high, step=step, **look)


def choice(label: str, options: list[str]) -> ipywidgets.ValueWidget:
    """A menu, with the first option chosen."""
    return ipywidgets.Dropdown(options=options, description=label, style={"description_width": "initial"})
