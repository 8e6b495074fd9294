"""Charts of a study: accuracy and gain over updates, and the three failure signs. Styled as those of ``charts``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from . import signs
from .charts import _require, colours, new_figure, ticker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = {"kd": "KD", "fa": "FAQD", "ffa": "FFAQD, k = 6"}


def over_updates(arms: pd.DataFrame, gain: pd.DataFrame, metric: str = "accuracy") -> Figure:
    """Test accuracy or mean IoU over updates, and what FAQD gains over KD, with 95 % intervals.

    Args:
        arms: of :func:`faqd_lib.reporting.study_curves.arms_frame`. The chart draws KD, FAQD and FFAQD on all images at
            the fewest bits.
        gain: of :func:`faqd_lib.reporting.study_curves.gain_frame`; one line for each number of images and bits.
        metric: what ``accuracy`` is, in words (``suite.metric``).
    """
    _require(arms, "weight_bits", "images", "updates", "arm", "accuracy", "low", "high")
    _require(gain, "weight_bits", "images", "updates", "gain", "low", "high")
    fewest = min(arms["weight_bits"], key=lambda bits: int(bits.split("/")[0]))
    shown = arms[(arms["images"] == arms["images"].max()) & (arms["weight_bits"] == fewest)]
    with new_figure(1, 2, height=3.6) as (figure, axes):
        lines = {name: shown[shown["arm"] == arm] for arm, name in ARMS.items()}
        _lines(axes[0], lines, "accuracy")
        axes[0].set(ylabel=f"test {metric} (%)", title=f"{fewest}-bit students")
        groups = {
            f"{bits} bit{'s' * (bits != '1')}, {images:,} images": group
            for (bits, images), group in gain.groupby(["weight_bits", "images"], sort=False)
        }
        axes[1].axhline(0, color="0.3", linewidth=1)
        _lines(axes[1], groups, "gain")
        axes[1].set(ylabel="percentage points", title="FAQD − KD")
        for axis in axes:
            _updates(axis, gain["updates"])
        return figure


def failure_signs(gaps: pd.DataFrame, pairs: pd.DataFrame, steps: pd.DataFrame) -> Figure:
    """The three signs that :mod:`faqd_lib.reporting.signs` watches, with their thresholds as grey lines.

    Args:
        gaps: of :func:`faqd_lib.reporting.signs.gap_frame`.
        pairs: of :func:`faqd_lib.reporting.signs.estimate_frame`; may have no rows.
        steps: of :func:`faqd_lib.reporting.signs.stability_frame`.
    """
    _require(gaps, "run", "method", "progress", "gap")
    _require(steps, "run", "affinity_weight", "epoch", "norm")
    with new_figure(1, 3, height=3.2) as (figure, axes):
        _runs(axes[0], gaps, "progress", "gap", "method", "{}")
        axes[0].axhline(signs.GAP, color="0.6", linestyle=":")
        axes[0].set(xlabel="share of the epochs", ylabel="points below the teacher", title="Plateau")
        axes[1].axhspan(-signs.APART, signs.APART, color="0.93")
        axes[1].plot(pairs["ratio"], pairs["apart"], "o", color=colours(1)[0], markersize=4)
        for ratio in (1 / signs.AFFINITY_RATIO, signs.AFFINITY_RATIO):
            axes[1].axvline(ratio, color="0.6", linestyle=":")
        axes[1].set(xlabel="affinity loss, FFA / FA", ylabel="FFA − FA (points)", title="FFA is not FA")
        _runs(axes[2], steps, "epoch", "norm", "affinity_weight", "weight {:g}")
        axes[2].axhline(1, color="0.6", linestyle=":")
        axes[2].set(xlabel="epoch", ylabel="gradient norm / clipping norm", title="Instability", yscale="log")
        for axis in (axes[0], axes[2]):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small")
        return figure


def _runs(axis: Axes, frame: pd.DataFrame, x: str, y: str, by: str, label: str) -> None:
    """Draw one line a run, coloured by the column ``by``, whose values ``label`` writes into the legend."""
    values = sorted(frame[by].unique())
    hues = dict(zip(values, colours(len(values)), strict=True))
    for (_, value), rows in frame.groupby(["run", by]):
        axis.plot(rows[x], rows[y], color=hues[value], linewidth=1)
    for value, hue in hues.items():
        axis.plot([], [], color=hue, label=label.format(value))


def _lines(axis: Axes, groups: Mapping[str, pd.DataFrame], column: str) -> None:
    """Draw one line with points and intervals a group. Groups stand a little beside each other."""
    for place, (name, group) in enumerate(groups.items()):
        if group.empty:
            continue
        group = group.sort_values("updates")
        beside = group["updates"] * 1.03 ** (place - (len(groups) - 1) / 2)
        ends = [group[column] - group["low"], group["high"] - group[column]]
        axis.errorbar(
            beside, group[column], yerr=[end.fillna(0) for end in ends], marker="o", capsize=3, label=name,
            color=colours(place + 1)[place],
        )  # fmt: skip
    axis.legend()


def _updates(axis: Axes, updates: pd.Series) -> None:
    axis.set(xscale="log", xlabel="updates")
    axis.xaxis.set_major_locator(ticker.FixedLocator(sorted(set(updates))))
    axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
