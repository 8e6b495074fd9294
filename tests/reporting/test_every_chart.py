"""Every chart drawn once from a small frame, and its marks counted."""

import inspect
from collections.abc import Callable
from itertools import product

import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from faqd_lib.reporting import charts, pictures, study_charts

ARMS = study_charts.ARMS


def lines(axis: Axes) -> int:
    return sum(len(line.get_xdata()) > 0 for line in axis.lines)


def areas(axis: Axes) -> int:
    """Scatters that have points, bands, and groups of bars."""
    return sum(len(c.get_offsets()) > 0 if isinstance(c, PathCollection) else True for c in axis.collections)


def scaling() -> Figure:
    rows = [
        ("left", "FA", "measured", 8, 1.0), ("left", "FA", "measured", 16, 4.0),
        ("left", "FA", "theory", 8, 1.1), ("left", "FA", "theory", 16, 4.4),
        ("right", "FFA", "measured", 8, 2.0), ("right", "FFA", "measured", 16, 0.0),
    ]  # fmt: skip
    return charts.scaling(pd.DataFrame(rows, columns=["panel", "series", "kind", "x", "y"]), "pixels", "ms")


def convergence() -> Figure:
    rows = [(k, draw, 2 + draw / k) for draw, k in product((1, -1, 0.5), (1, 2, 4))]
    return charts.convergence(pd.DataFrame(rows, columns=["k", "draw", "estimate"]), 2.0, 0.5)


def staircases() -> Figure:
    rows = [(name, x, round(x), 1.0) for name in ("1 bit", "4 bits") for x in (-1.0, 0.2, 1.0)]
    return charts.staircases(pd.DataFrame(rows, columns=["quantizer", "input", "output", "gradient"]))


def weight_histograms() -> Figure:
    weights = [-1.0, -0.5, 0.25, 1.0]
    rows = [(bits, weight, weight / abs(weight)) for bits in (1, 2, "own") for weight in weights]
    return charts.weight_histograms(pd.DataFrame(rows, columns=["bits", "weight", "quantized"]))


def scale_scan() -> Figure:
    columns = ["bits", "scale", "error"]
    frame = pd.DataFrame(
        [(bits, scale, (scale - 1) ** 2) for bits in (1, 2) for scale in (0.5, 1.0, 2.0)], columns=columns
    )
    chosen = pd.DataFrame(
        [(1, 1.0, 0.0, "best"), (1, 0.9, 0.01, "mean"), (2, 1.0, 0.0, "best")], columns=[*columns, "rule"]
    )
    return charts.scale_scan(frame, chosen, x_label="step α")


def learning_curves() -> Figure:
    rows = [
        (run, epoch, 50 + epoch + seed, measure)
        for run, epoch, seed, measure in product(
            ("KD", "FAQD"), (1, 2, 3), (0, 1), ("accuracy (%)", "loss", "time (s)")
        )
    ]
    return charts.learning_curves(pd.DataFrame(rows, columns=["run", "epoch", "value", "measure"]))


def by_class() -> Figure:
    rows = [("sky", "KD", 90.0), ("sky", "KD", 91.0), ("pole", "KD", 2.0), ("sky", "FA", 92.0)]
    return charts.by_class(pd.DataFrame(rows, columns=["class", "arm", "value"]), "IoU (%)")


def accuracy_by_bits() -> Figure:
    rows = [(1, "KD", 80.0, 1), (1, "KD", 81.0, 2), (1, "FAQD", 82.0, 1), (2, "FAQD", 84.0, 1)]
    frame = pd.DataFrame(rows, columns=["bits", "method", "accuracy", "seed"])
    return charts.accuracy_by_bits(frame, {"teacher": 90.0, "float student": 88.0})


def accuracy_and_size() -> Figure:
    rows = [("32W32A", "KD", 90.0, 1000.0), ("1W32A", "KD", 80.0, 50.0), ("1W32A", "FAQD", 82.0, 50.0)]
    return charts.accuracy_and_size(pd.DataFrame(rows, columns=["bits", "method", "accuracy", "size_kB"]))


def affinity_frontier() -> Figure:
    rows = [("none", 80.0, 10.0), ("FA", 82.0, 20.0), ("FA", 83.0, 21.0), ("FFA k=6", 82.0, 15.0)]
    return charts.affinity_frontier(pd.DataFrame(rows, columns=["loss", "accuracy", "step_milliseconds"]))


def forest() -> Figure:
    rows = [("one", 0.4, 0.1, 0.7, 0.0, "reproduced"), ("two", -0.2, -0.4, 0.0, 0.5, "inconclusive")]
    return charts.forest(pd.DataFrame(rows, columns=["claim", "mean", "low", "high", "margin", "verdict"]))


def over_updates() -> Figure:
    arms = [("1", images, updates, arm, 50.0, 49.0, 51.0) for images in (50, 99) for updates in (2, 4) for arm in ARMS]
    gain = [("1", 50, 2, 3.0, 2.0, 4.0), ("1", 99, 2, 3.0, 2.0, 4.0), ("1", 99, 4, 3.0, 2.0, 4.0)]
    place = ["weight_bits", "images", "updates"]
    return study_charts.over_updates(
        pd.DataFrame(arms, columns=[*place, "arm", "accuracy", "low", "high"]),
        pd.DataFrame(gain, columns=[*place, "gain", "low", "high"]),
    )


def failure_signs() -> Figure:
    gaps = [("a", "KD", 0.5, 20.0), ("a", "KD", 1.0, 10.0), ("b", "FAQD", 1.0, 9.0)]
    steps = [("a", 0.0, 1, 0.5), ("a", 0.0, 2, 0.2), ("b", 30.0, 1, 2.0)]
    return study_charts.failure_signs(
        pd.DataFrame(gaps, columns=["run", "method", "progress", "gap"]),
        pd.DataFrame([(6, 0.2, 1.1)], columns=["k", "apart", "ratio"]),
        pd.DataFrame(steps, columns=["run", "affinity_weight", "epoch", "norm"]),
    )


def image_grid() -> Figure:
    return pictures.image_grid([torch.rand(3, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], ["real", "black"])


def classified() -> Figure:
    names = ["cat", "dog", "cat", "dog", "cat", "dog"]
    return pictures.classified(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), names, names[::-1], [0.5] * 6)


def affinity_matrices() -> Figure:
    return pictures.affinity_matrices({"teacher": torch.eye(4), "student": torch.ones(4, 4)}, torch.eye(4) - 1)


def pixel_affinity() -> Figure:
    return pictures.pixel_affinity(torch.rand(2, 3, 8, 8), [(0, 1), (3, 3)], {"teacher": torch.rand(2, 4, 4)})


def confusion() -> Figure:
    labels = torch.tensor([0, 1, 2, 0])
    return pictures.confusion(labels, labels.flip(0), labels, ["cat", "dog", "owl"])


# For each chart and each of its panels: lines, areas, bars, images. Colour bars follow the panels.
MARKS: dict[Callable[[], Figure], list[tuple[int, int, int, int]]] = {
    scaling: [(2, 0, 0, 0), (1, 0, 0, 0)],
    convergence: [(3 + 1, 1, 0, 0)],  # an estimate a draw and the exact value; the band
    staircases: [(2, 0, 0, 0)] * 2 + [(1, 0, 0, 0)] * 2,
    weight_histograms: [(1, 1, 80, 0)] * 3,
    scale_scan: [(1 + 2, 0, 0, 0), (1 + 1, 0, 0, 0)],  # the scan and the chosen scales
    learning_curves: [(2, 2, 0, 0)] * 3,  # means and ranges of two runs
    by_class: [(2, 0, 0, 0)],  # the points of two arms
    accuracy_by_bits: [(3 + 2 + 1, 3, 0, 0)],  # seeds of three cells, two references, a separator; three means
    accuracy_and_size: [(1, 3 * 2, 0, 0)],  # a separator; the size and the seeds of three cells
    affinity_frontier: [(3 + 1, 0, 0, 0)],  # means of three losses; the seeds of one
    forest: [(1 + 2 * 2, 0, 1, 0)],  # zero; an interval and a point for each claim; one margin
    # Points, and two caps, of each arm; zero and the same for each number of images; a band of bars for each.
    over_updates: [(3 * 3, 3, 0, 0), (1 + 2 * 3, 2, 0, 0)],
    # A curve a run and a threshold; pairs, two thresholds and a band; a curve a run and a threshold.
    failure_signs: [(2 + 1, 0, 0, 0), (1 + 2, 0, 1, 0), (2 + 1, 0, 0, 0)],
    image_grid: [(0, 0, 0, 1)],
    classified: [(0, 0, 0, 1)] * 6 + [(0, 0, 0, 0)] * 4,
    affinity_matrices: [(0, 0, 0, 1)] * 3,
    pixel_affinity: [(2, 0, 0, 1)] * 4,
    confusion: [(0, 0, 0, 1)] * 2,
}  # fmt: skip


@pytest.mark.parametrize("draw", MARKS, ids=lambda draw: draw.__name__)
def test_marks_of(draw):
    figure = draw()
    figure.draw_without_rendering()
    expected = MARKS[draw]
    panels = figure.axes[: len(expected)]
    assert [(lines(axis), areas(axis), len(axis.patches), len(axis.images)) for axis in panels] == expected


def test_more_kinds_than_colours_and_markers_are_all_drawn():
    kinds = [f"kind {number:02}" for number in range(12)]
    costs = pd.DataFrame([(kind, 50.0, 1.0) for kind in kinds], columns=["loss", "accuracy", "step_milliseconds"])
    (axis,) = charts.affinity_frontier(costs).axes
    assert lines(axis) == 12
    gaps = pd.DataFrame([(kind, kind, 1.0, 9.0) for kind in kinds], columns=["run", "method", "progress", "gap"])
    steps = pd.DataFrame(
        [(kind, float(weight), 1, 0.5) for weight, kind in enumerate(kinds)],
        columns=["run", "affinity_weight", "epoch", "norm"],
    )
    pairs = pd.DataFrame(columns=["k", "apart", "ratio"])
    for axis in study_charts.failure_signs(gaps, pairs, steps).axes[::2]:
        assert len(axis.get_legend_handles_labels()[1]) == 12


def test_every_public_chart_is_drawn_here():
    public = {
        name
        for module in (charts, pictures, study_charts)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
        if inspect.signature(function).return_annotation == "Figure"
    }
    assert public == {draw.__name__ for draw in MARKS}


def test_a_scan_names_what_it_scans():
    assert {axis.get_xlabel() for axis in scale_scan().axes} == {"step α"}
