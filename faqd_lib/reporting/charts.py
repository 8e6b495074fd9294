"""Charts and the style of all figures. Every chart takes a DataFrame and returns a matplotlib Figure.

Figures are closed in pyplot, so that a notebook shows each figure once: as the value of a cell, or as the file that
:func:`save` wrote. Matplotlib and seaborn take seconds to import, so they are imported with the first figure.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from ..config import RunConfig
from ..runs.store import RunRecord
from ..utils.files import atomic_write
from ..utils.lazy import LazyModule
from .verdicts import CONTRADICTED, NO_DIFFERENCE, REPRODUCED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

plt, sns, ticker = (LazyModule(name) for name in ("matplotlib.pyplot", "seaborn", "matplotlib.ticker"))

Run = RunConfig | RunRecord  # both name a run
WIDTH = 9.0  # inches: the text width of a notebook
SCREEN_DPI, FILE_DPI = 100, 150
# Seaborn's colour-blind safe colours, without the pale pink, which is hard to see in thin lines on white.
PALETTE = ["#0173B2", "#DE8F05", "#029E73", "#D55E00", "#CC78BC", "#CA9161", "#949494", "#ECE133", "#56B4E9"]
RUNS_KEY, NOTE_KEY = "Runs", "Note"  # keys of a figure's metadata
# Dashes, marker and line width by kind: measured values have points, derived ones have a line only.
KINDS = {"measured": ("-", "o", 1.6), "theory": ("--", "", 1.8), "bound": (":", "", 2.2)}
MARKERS = "osD^vPX*<>"
BITS_NAMES = {1: "1 bit", 2: "2 bits\n(ternary)", 4: "4 bits", 32: "32 bits\n(float)"}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Context with the style of every figure of the project."""
    with plt.rc_context():
        sns.set_theme(
            style="whitegrid", palette=PALETTE, font_scale=0.85,
            rc={
                "figure.dpi": SCREEN_DPI, "savefig.dpi": FILE_DPI,
                "axes.titlesize": "medium", "axes.titleweight": "bold", "grid.color": "0.9",
                "legend.frameon": True, "legend.framealpha": 0.9, "legend.edgecolor": "0.85",
                "pdf.fonttype": 42,  # text stays text
            },
        )  # fmt: skip
        yield


def colours(count: int) -> list[str]:
    """``count`` colours; they repeat after nine."""
    return list(islice(cycle(PALETTE), count))


@contextlib.contextmanager
def new_figure(
    rows: int = 1, columns: int = 1, height: float = 3.6, width: float = WIDTH, **options
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Context with a new figure and its ``rows`` × ``columns`` axes, in reading order.

    ``height`` and ``width`` are in inches; ``options`` go to ``plt.subplots``.
    """
    with style():
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
        )
        try:
            yield figure, list(axes.flat)
        finally:
            plt.close(figure)


class SavedFigure(NamedTuple):
    """The files of a figure. A notebook shows the PNG, so what is seen is what was saved."""

    png: Path
    pdf: Path

    def __repr__(self) -> str:
        return f"{self.png.name}, {self.pdf.name}"  # without the machine's folders

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        """The PNG for IPython, as wide as the figure is on the screen."""
        data = self.png.read_bytes()
        width = int.from_bytes(data[16:20], "big") * SCREEN_DPI // FILE_DPI  # the PNG's header has its pixels
        return {"image/png": base64.b64encode(data).decode()}, {"image/png": {"width": width}}


def save(figure: Figure, folder: Path, name: str, runs: Iterable[Run] = (), note: str = "") -> SavedFigure:
    """Write ``<folder>/<name>.png`` and ``.pdf``, each whole or not at all.

    Args:
        runs: behind the figure; written into the metadata, as ``Runs`` of the PNG and keywords of the PDF.
        note: a remark on the figure's origin; written into the metadata, as ``Note`` of the PNG and subject of the PDF.
    """
    names = " ".join(dict.fromkeys(run.run_id for run in runs))
    # Without dates, the same figure gives the same bytes.
    metadata = {
        "png": {RUNS_KEY: names, NOTE_KEY: note},
        "pdf": {"CreationDate": None, "Keywords": names, "Subject": note},
    }
    paths = []
    with style():
        for kind, about in metadata.items():
            write = partial(figure.savefig, format=kind, metadata=about)
            paths.append(atomic_write(Path(folder) / f"{name}.{kind}", write))
            figure.set_layout_engine("none")  # keep the layout: finding it takes half the time of drawing
    return SavedFigure(*paths)


def _require(frame: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing or frame.empty:
        what = f"no column {', '.join(missing)}" if missing else "no rows"
        raise ValueError(f"the frame has {what}: expected rows with the columns {', '.join(columns)}")


def _legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """Draw one legend for all panels, with each label once."""
    entries = {}
    for axis in axes:
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize="small")


def _readable_decades(axis, values: pd.Series) -> None:
    """Label a logarithmic axis with numbers such as 0.2 and 500, several a decade where there are few decades."""
    decades = math.log10(values.max() / values.min()) if len(values) else 0
    finest = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)
    axis.set_major_locator(ticker.LogLocator(subs=finest if decades < 2.5 else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e5 else f"$10^{{{math.log10(value):g}}}$")
    axis.set_minor_formatter(ticker.NullFormatter())


def scaling(
    frame: pd.DataFrame,
    x_label: str,
    y_label: str,
    *,
    panel_titles: Mapping[str, str] | None = None,
    x_scale: Literal["log", "linear"] = "log",
) -> Figure:
    """Power laws on log-log axes, or exponentials with a linear x axis; one panel for each value of ``panel``.

    Args:
        frame: columns ``x``, ``y``, ``series``, ``kind`` (measured, theory or bound), and optionally ``panel`` and
            the panel's ``y_label``. Values of ``y`` that are not positive are left out.
        x_label, y_label: with units.
        x_scale: of the x axis; the y axis is logarithmic.
        panel_titles: a title by panel; the panel's own name if left out.
    """
    _require(frame, "x", "y", "series", "kind")
    frame = frame if "panel" in frame else frame.assign(panel="")
    panels = frame["panel"].nunique()
    hues = dict(zip(frame["series"].unique(), colours(frame["series"].nunique()), strict=True))
    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    with new_figure(rows, columns, height=3.9 if rows == 1 else 3.2 * rows + 0.6) as (figure, axes):
        for axis in axes[panels:]:
            axis.set_axis_off()
        for axis, (panel, part) in zip(axes, frame.groupby("panel", sort=False), strict=False):
            part = part[part["y"] > 0]
            for (series, kind), line in part.groupby(["series", "kind"], sort=False):
                dashes, marker, width = KINDS[kind]
                axis.plot(
                    line["x"], line["y"], dashes, marker=marker, markersize=5, linewidth=width, color=hues[series],
                    label=series if kind == "measured" else f"{series}, {kind}",
                )  # fmt: skip
            axis.set(xscale=x_scale, yscale="log", xlabel=x_label, title=(panel_titles or {}).get(panel, panel))
            axis.set_ylabel(part["y_label"].iloc[0] if "y_label" in part else y_label)
            measured = part.loc[part["kind"] == "measured", "x"]
            if x_scale == "log" and measured.nunique() <= 8:
                # Ticks stand at the measured values, if these are few, as plain numbers.
                axis.xaxis.set_major_locator(ticker.FixedLocator(sorted(set(measured))))
                axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
                axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            elif x_scale == "log":
                _readable_decades(axis.xaxis, measured)
            _readable_decades(axis.yaxis, part["y"])
        if panels == 1:
            axes[0].legend(fontsize="small")
        else:
            _legend_below(figure, axes)
        return figure


def convergence(frame: pd.DataFrame, exact: float, deviation: float) -> Figure:
    """Running means of independent estimates against their number, around the exact value.

    Args:
        frame: columns ``k``, ``estimate`` and ``draw``; one line for each draw.
        exact: the exact value.
        deviation: standard deviation of one estimate; the band is the exact value ± deviation/√k.
    """
    _require(frame, "k", "estimate", "draw")
    hues = colours(frame["draw"].nunique())
    with new_figure(height=3.8) as (figure, (axis,)):
        k = frame["k"].drop_duplicates().sort_values()
        half = deviation / k**0.5
        axis.fill_between(k, exact - half, exact + half, color="0.85", label="± one standard deviation, theory")
        for hue, (_, line) in zip(hues, frame.groupby("draw", sort=False), strict=True):
            axis.plot(line["k"], line["estimate"], linewidth=1.3, color=hue)
        axis.axhline(exact, color="black", linewidth=1.4, linestyle="--", label="exact affinity loss")
        axis.set(xscale="log", xlabel="projections $k$", ylabel="mean of $k$ estimates", xlim=(k.min(), k.max()))
        axis.set_ylim(max(0.0, exact - 2.5 * deviation), exact + 2.5 * deviation)
        _readable_decades(axis.xaxis, k)
        axis.legend(fontsize="small", loc="upper right")
        return figure


def _bits_title(bits: int | str) -> str:
    return bits if isinstance(bits, str) else BITS_NAMES.get(bits, f"{bits} bits").replace("\n", " ")


def staircases(frame: pd.DataFrame) -> Figure:
    """Output (above) and gradient (below) of quantizers against their input; one column a quantizer.

    ``frame``: columns ``quantizer``, ``input``, ``output``, ``gradient``.
    """
    _require(frame, "quantizer", "input", "output", "gradient")
    count = frame["quantizer"].nunique()
    with new_figure(2, count, height=4.4, sharex="col", sharey="row") as (figure, axes):
        quantizers = frame.groupby("quantizer", sort=False)
        for above, below, (name, part) in zip(axes[:count], axes[count:], quantizers, strict=True):
            part = part.sort_values("input")
            above.plot(part["input"], part["input"], "--", color="0.6", linewidth=1)
            above.plot(part["input"], part["output"], color=PALETTE[0], drawstyle="steps-mid")
            below.plot(part["input"], part["gradient"], color=PALETTE[3], drawstyle="steps-mid")
            above.set_title(name)
            below.set(xlabel="input", ylim=(-0.1, 1.2), yticks=(0, 1))
        axes[0].set_ylabel("output (forward)")
        axes[count].set_ylabel("gradient (backward)")
        return figure


def weight_histograms(frame: pd.DataFrame) -> Figure:
    """A histogram of float weights, and their quantized values as stems; one panel a bit-width.

    ``frame``: columns ``bits``, ``weight`` (float) and ``quantized``.
    """
    _require(frame, "bits", "weight", "quantized")
    extent = 1.05 * float(frame["weight"].abs().quantile(0.999))
    with new_figure(1, frame["bits"].nunique(), height=3.0, sharey=True) as (figure, axes):
        for axis, (bits, part) in zip(axes, frame.groupby("bits", sort=False), strict=True):
            axis.hist(
                part["weight"], bins=80, range=(-extent, extent), weights=[100 / len(part)] * len(part),
                color="0.75", label="float", linewidth=0,
            )  # fmt: skip
            shares = part["quantized"].value_counts(normalize=True).mul(100)
            axis.vlines(shares.index, 0, shares, color=PALETTE[0], linewidth=2.5, label="quantized", capstyle="butt")
            axis.plot(shares.index, shares, "o", color=PALETTE[0], markersize=4.5)
            axis.set(title=_bits_title(bits), xlabel="weight", xlim=(-extent, extent))
        axes[0].set_ylabel("share of the weights (%)")
        axes[-1].legend(fontsize="small", loc="upper right")
        figure.get_layout_engine().set(wspace=0.04)
        return figure


def scale_scan(frame: pd.DataFrame, chosen: pd.DataFrame, x_label: str = "scale") -> Figure:
    """Squared error of quantized values against the scale, or step, and the chosen ones.

    Args:
        frame: columns ``bits`` (a number, or the panel's title), ``scale`` and ``error``.
        chosen: the same columns, and ``rule``: the formula that chose the scale.
        x_label: what the scale is called.
    """
    _require(frame, "bits", "scale", "error")
    _require(chosen, "bits", "scale", "error", "rule")
    hues = dict(zip(chosen["rule"].unique(), PALETTE[1:], strict=False))
    markers = dict(zip(hues, MARKERS, strict=False))
    with new_figure(1, frame["bits"].nunique(), height=3.2, sharey=True) as (figure, axes):
        for axis, (bits, part) in zip(axes, frame.groupby("bits", sort=False), strict=True):
            axis.plot(part["scale"], part["error"], color="0.35", label="scan")
            for point in chosen[chosen["bits"] == bits].itertuples():
                axis.plot(
                    point.scale, point.error, markers[point.rule], color=hues[point.rule], markersize=8, linestyle="",
                    label=point.rule, clip_on=False,
                )  # fmt: skip
            axis.set(title=_bits_title(bits), xlabel=x_label, ylim=(0, None))
        axes[0].set_ylabel("squared error / squared norm")
        _legend_below(figure, axes)
        return figure


def learning_curves(frame: pd.DataFrame) -> Figure:
    """Histories of runs, one panel a measure.

    ``frame``: columns ``run`` (its name in the legend), ``epoch``, ``value`` and ``measure`` (the panel's vertical
    label, with unit). Several values of one run and epoch, such as seeds, are drawn as mean and range.
    """
    _require(frame, "run", "epoch", "value", "measure")
    count, runs = frame["measure"].nunique(), list(frame["run"].unique())
    columns = min(2, count)
    rows = math.ceil(count / columns)
    with new_figure(rows, columns, height=3.3 * rows + 0.3 + 0.2 * (len(runs) // 3)) as (figure, axes):
        for axis, (measure, part) in zip(axes, frame.groupby("measure", sort=False), strict=False):
            sns.lineplot(
                part, x="epoch", y="value", hue="run", style="run", hue_order=runs, style_order=runs,
                markers=frame["epoch"].nunique() <= 30, dashes=False, ax=axis, errorbar=("pi", 100),
                palette=colours(len(runs)), legend=axis is axes[0],
            )  # fmt: skip
            axis.set(xlabel="epoch", ylabel=measure)
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in axes[count:]:
            axis.remove()
        axes[0].get_legend().remove()
        _legend_below(figure, axes[:1], columns=min(3, len(runs)))
        return figure


def _columns(axis: Axes, names: Sequence[str]) -> None:
    """Divide an axis into named columns, with lines between them."""
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.grid(visible=False, axis="x")
    for edge in range(1, len(names)):
        axis.axvline(edge - 0.5, color="0.85", linewidth=1, zorder=0)


def by_class(frame: pd.DataFrame, x_label: str) -> Figure:
    """A row of points for each class, one point an arm, in the order of the rows.

    Args:
        frame: columns ``class``, ``arm`` and ``value``. Several values of a class and arm, such as seeds, are averaged.
        x_label: with unit.
    """
    _require(frame, "class", "arm", "value")
    classes, arms = list(frame["class"].unique()), list(frame["arm"].unique())
    means = frame.groupby(["class", "arm"])["value"].mean()
    with new_figure(height=0.3 * len(classes) + 1.2) as (figure, (axis,)):
        for arm, hue, marker in zip(arms, colours(len(arms)), cycle(MARKERS), strict=False):
            places = [index for index, name in enumerate(classes) if (name, arm) in means]
            values = [means[classes[index], arm] for index in places]
            axis.plot(values, places, marker, color=hue, markersize=7, alpha=0.85, label=arm)
        axis.set_yticks(range(len(classes)), classes)
        axis.set(xlabel=x_label, ylim=(len(classes) - 0.5, -0.5))
        _legend_below(figure, [axis])
        return figure


def accuracy_by_bits(frame: pd.DataFrame, references: Mapping[str, float] | None = None) -> Figure:
    """Test accuracy of students by bits and method. Every seed is a point, the mean a bar.

    Args:
        frame: columns ``bits`` (a number or 1W4A), ``method``, ``accuracy`` (percent), ``seed``.
        references: accuracies drawn as horizontal lines, by name (teacher, float student).
    """
    _require(frame, "bits", "method", "accuracy", "seed")
    grid, methods = list(dict.fromkeys(frame["bits"])), list(frame["method"].unique())
    step, handles = 0.8 / len(methods), []
    with new_figure(height=4.2) as (figure, (axis,)):
        for index, (method, colour, marker) in enumerate(zip(methods, colours(len(methods)), cycle(MARKERS))):
            for bits, values in frame[frame["method"] == method].groupby("bits", sort=False)["accuracy"]:
                x = grid.index(bits) + (index - (len(methods) - 1) / 2) * step
                spread = 0.35 * step if len(values) > 1 else 0
                axis.plot(
                    np.linspace(x - spread, x + spread, len(values)), values, marker, color=colour, markersize=6.5,
                    markeredgecolor="white", markeredgewidth=0.5,
                )  # fmt: skip
                axis.hlines(values.mean(), x - 0.4 * step, x + 0.4 * step, color=colour, linewidth=2.5)
            handles.append(plt.Line2D([], [], color=colour, marker=marker, linewidth=2.5, label=method))
        for dashes, (name, accuracy) in zip(("--", ":", "-."), (references or {}).items(), strict=False):
            line = axis.axhline(accuracy, color="0.25", linestyle=dashes, linewidth=1.4, zorder=1.5, label=name)
            handles.append(line)
        _columns(axis, [BITS_NAMES.get(bits, str(bits)) for bits in grid])
        axis.set_ylabel("test accuracy (%)")
        figure.legend(handles=handles, loc="outside right upper", fontsize="small")
        return figure


def accuracy_and_size(frame: pd.DataFrame) -> Figure:
    """Test accuracy against bits. The area of a mark is the size of the weights; seeds are points within it.

    ``frame``: columns ``bits`` (names in axis order), ``method``, ``accuracy`` (percent), ``size_kB``.
    """
    _require(frame, "bits", "method", "accuracy", "size_kB")
    grid, methods = list(dict.fromkeys(frame["bits"])), list(frame["method"].unique())
    largest = float(frame["size_kB"].max())
    area = 1400 / largest  # points² for a kB
    handles = []
    with new_figure(height=4.4) as (figure, (axis,)):
        for index, (method, colour) in enumerate(zip(methods, colours(len(methods)), strict=True)):
            for (bits, size), part in frame[frame["method"] == method].groupby(["bits", "size_kB"], sort=False):
                x = grid.index(bits) + 0.8 * ((index + 0.5) / len(methods) - 0.5)
                axis.scatter(x, part["accuracy"].mean(), s=area * size, color=colour, alpha=0.4, linewidth=0)
                axis.scatter([x] * len(part), part["accuracy"], s=9, color=colour)
            handles.append(plt.Line2D([], [], linestyle="", marker="o", color=colour, label=method))
        for size in (largest / 4, largest / 16):  # the largest mark does not fit into the legend
            handles.append(axis.scatter([], [], s=area * size, color="0.7", linewidth=0, label=f"{size:.2g} kB"))
        sizes = frame.groupby("bits")["size_kB"].unique().map(sorted)
        _columns(axis, [f"{bits}\n{'–'.join(f'{kB:.0f}' for kB in sizes[bits])} kB" for bits in grid])
        axis.set(ylabel="test accuracy (%)", xlabel="bits of weights and activations")
        axis.margins(y=0.12)
        figure.legend(
            handles=handles, loc="outside right upper", fontsize="small", labelspacing=1.3, title_fontsize="small",
            title="area: size of the\nweights",
        )  # fmt: skip
        return figure


def affinity_frontier(frame: pd.DataFrame) -> Figure:
    """Accuracy against the time of a training step. Every affinity loss is a large point, its seeds are small ones.

    ``frame``: columns ``loss`` (none, FA, FFA k=1, …), ``accuracy`` (percent), ``step_milliseconds``.
    """
    _require(frame, "loss", "accuracy", "step_milliseconds")
    losses = frame.groupby("loss", sort=False)
    with new_figure(height=4.0) as (figure, (axis,)):
        for (loss, part), colour, marker in zip(losses, colours(len(losses)), cycle(MARKERS), strict=False):
            mean = part[["step_milliseconds", "accuracy"]].mean()
            if len(part) > 1:
                axis.plot(part["step_milliseconds"], part["accuracy"], marker, color=colour, markersize=4, alpha=0.5)
            axis.plot(*mean, marker, color=colour, markersize=10, label=loss, linestyle="", markeredgecolor="white")
        axis.set(xlabel="time of a training step (ms)", ylabel="test accuracy (%)")
        axis.margins(0.1, 0.15)
        figure.legend(loc="outside right upper", fontsize="small", title="affinity loss")
        return figure


def forest(frame: pd.DataFrame, metric: str = "accuracy") -> Figure:
    """Claims with their intervals, one line each; grey bars reach from 0 to −margin.

    Args:
        frame: columns ``claim``, ``mean``, ``low``, ``high`` and ``margin`` in percentage points, and ``verdict``. See
            :func:`faqd_lib.reporting.study_claims.forest_frame`.
        metric: what differs, in words (``suite.metric``).
    """
    _require(frame, "claim", "mean", "low", "high", "margin", "verdict")
    with new_figure(height=0.8 + 0.62 * len(frame), width=6.0) as (figure, (axis,)):
        axis.axvline(0, color="0.3", linewidth=1)
        for place, row in enumerate(frame.itertuples()):
            if row.margin > 0:
                axis.barh(place, -row.margin, height=0.5, color="0.88")
            settled = row.verdict.startswith((REPRODUCED, CONTRADICTED, NO_DIFFERENCE.partition("{")[0]))
            hue = PALETTE[0] if settled else "0.55"
            axis.plot([row.low, row.high], [place, place], color=hue, linewidth=2.5)
            axis.plot(row.mean, place, marker="o", color=hue, markersize=7)
            axis.annotate(
                f"{row.claim}: {row.verdict}", (0, place), xycoords=("axes fraction", "data"), xytext=(2, 9),
                textcoords="offset points", fontsize="small",
            )  # fmt: skip
        axis.set(yticks=[], ylim=(len(frame) - 0.3, -0.9), xlabel=f"difference of {metric} (percentage points)")
        return figure
