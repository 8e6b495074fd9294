"""Figures in one style: a DataFrame (or tensors, for pictures) in, a matplotlib Figure out.

The figures are closed for pyplot, so that a notebook shows each once, where it is the value of a cell.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

from .files import atomic_write

WIDTH = 9.0  # inches: the text width of a notebook
PALETTE = "colorblind"
RUNS_KEY = "Runs"  # of a figure's metadata
# How a series is drawn, by its kind: what was measured as points on a line, what was derived as a line alone.
KINDS = {"measured": ("-", "o", 1.6), "theory": ("--", "", 1.8), "bound": (":", "", 2.2)}
BITS_NAMES = {1: "1 bit", 2: "2 bits\n(ternary)", 4: "4 bits", 32: "32 bits\n(float)"}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The style of every figure of the project, while the block lasts."""
    with plt.rc_context():
        sns.set_theme(
            context="notebook", style="whitegrid", palette=PALETTE, font_scale=0.85,
            rc={
                "figure.dpi": 100, "savefig.dpi": 150, "axes.titlesize": "medium", "axes.titleweight": "bold",
                "grid.color": "0.9", "legend.frameon": True, "legend.framealpha": 0.9, "legend.edgecolor": "0.85",
                "pdf.fonttype": 42,  # text stays text
            },
        )  # fmt: skip
        yield


@contextlib.contextmanager
def _figure(rows: int = 1, columns: int = 1, height: float = 3.6, **options) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of the project's width and its axes in reading order."""
    with style():
        figure, axes = plt.subplots(
            rows, columns, figsize=(options.pop("width", WIDTH), height), layout="constrained", squeeze=False, **options
        )
        try:
            yield figure, list(axes.flat)
        finally:
            plt.close(figure)


class Run(Protocol):
    """A run's configuration or record."""

    @property
    def run_id(self) -> str: ...


def save(figure: Figure, folder: Path, name: str, runs: Iterable[Run] = ()) -> list[Path]:
    """Write ``<folder>/<name>.png`` and ``.pdf``, each whole or not at all; returns both paths.

    Both files name the runs behind the figure: as the PNG's text ``Runs``, as the PDF's keywords.
    """
    written, names = [], " ".join(dict.fromkeys(run.run_id for run in runs))
    for kind in ("png", "pdf"):
        # Without dates the same figure is the same file.
        metadata = {"CreationDate": None, "Keywords": names} if kind == "pdf" else {RUNS_KEY: names}

        def write(temporary: Path, kind: str = kind, metadata: dict | None = metadata) -> None:
            with style():
                figure.savefig(temporary, format=kind, metadata=metadata)

        written.append(atomic_write(Path(folder) / f"{name}.{kind}", write))
    return written


def _require(frame: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing or frame.empty:
        what = f"no column {', '.join(missing)}" if missing else "no rows"
        raise ValueError(f"the frame has {what}: expected rows with the columns {', '.join(columns)}")


def _plain_ticks(axis, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at the values that were measured, as plain numbers."""
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels; what several of them show is listed once."""
    entries = {}
    for axis in axes:
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize="small")


def _readable_decades(axis, values: pd.Series) -> None:
    """Numbers such as 0.2 and 500 on a logarithmic axis; several of a decade where there are few decades."""
    decades = math.log10(values.max() / values.min()) if len(values) else 0
    finest = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=finest if decades < 2.5 else (1,)))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if value < 1e5 else f"$10^{{{math.log10(value):g}}}$")
    )
    axis.set_minor_formatter(NullFormatter())


def _cosine_colours(matrices: Iterable[torch.Tensor]) -> dict:
    """Cosines between maps taken after a ReLU are never negative: half of a diverging scale would lie idle."""
    if min(float(matrix.min()) for matrix in matrices) >= 0:
        return {"vmin": 0, "vmax": 1, "cmap": "viridis"}
    return {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _picture(image: torch.Tensor) -> torch.Tensor:
    """(3, height, width), uint8 or float in [0, 1], as matplotlib wants it: (height, width, 3) in [0, 1]."""
    image = image.detach().cpu()
    return (image / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)).permute(1, 2, 0)


def image_grid(rows: Sequence[torch.Tensor], row_names: Sequence[str]) -> Figure:
    """Pictures in rows: each entry of ``rows`` is (count, 3, height, width), uint8 or float in [0, 1]."""
    if len(rows) != len(row_names) or not rows:
        raise ValueError(f"{len(rows)} rows of pictures but {len(row_names)} names: give each row a name")
    columns, (height, width) = max(len(row) for row in rows), rows[0].shape[2:]
    gap = max(1, height // 16)
    # One canvas instead of an axis for each picture: a hundred axes take seconds to draw.
    canvas = torch.ones(len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = _picture(picture)
    size = min(0.78, (WIDTH - 1.2) / columns)
    with _figure(width=columns * size + 1.2, height=len(rows) * size + 0.1) as (figure, (axis,)):
        axis.imshow(canvas.numpy(), interpolation="nearest")
        axis.set_yticks([row * (height + gap) + height / 2 for row in range(len(rows))], row_names)
        axis.set_xticks([])
        axis.tick_params(left=False)
        axis.grid(visible=False)
        sns.despine(ax=axis, left=True, bottom=True)
        return figure


def classified(
    images: torch.Tensor, predicted: Sequence[str], true: Sequence[str], confidence: Sequence[float]
) -> Figure:
    """Pictures, five a row, each under what a network took it for; where it is wrong, what it is stands below.

    Args:
        images: (n, 3, height, width), uint8.
        predicted, true: n names of classes each.
        confidence: n probabilities of the predictions.
    """
    columns = 5
    with _figure(math.ceil(len(images) / columns), columns, height=2.1 * math.ceil(len(images) / columns)) as (
        figure,
        axes,
    ):
        for axis in axes:
            axis.set_axis_off()
        for axis, image, guess, name, share in zip(axes, images, predicted, true, confidence, strict=False):
            axis.imshow(_picture(image))
            right = guess == name
            title = f"{guess} {share:.0%}" if right else f"{guess} {share:.0%}\n({name})"
            axis.set_title(title, fontsize="small", fontweight="normal", color="0.15" if right else "#b2182b")
        return figure


def affinity_matrices(matrices: Mapping[str, torch.Tensor], difference: torch.Tensor) -> Figure:
    """Affinity matrices (N×N) by name on one scale, and a difference matrix on a scale of its own."""
    colours = _cosine_colours(matrices.values())
    with _figure(1, len(matrices) + 1, height=3.1) as (figure, axes):
        for axis, (name, matrix) in zip(axes, matrices.items(), strict=False):
            shown = axis.imshow(matrix.detach().cpu(), interpolation="nearest", **colours)
            axis.set(title=name, xlabel="pixel $j$")
        axes[0].set_ylabel("pixel $i$")
        figure.colorbar(shown, ax=axes[: len(matrices)], label="cosine", shrink=0.85, pad=0.02)
        extent = max(float(difference.abs().max()), 1e-12)
        drawn = difference.detach().cpu()
        shown = axes[-1].imshow(drawn, vmin=-extent, vmax=extent, cmap="PuOr_r", interpolation="nearest")
        axes[-1].set(title="difference $D$", xlabel="pixel $j$")
        figure.colorbar(shown, ax=axes[-1], label="difference of cosines", shrink=0.85, pad=0.03)
        for axis in axes:
            axis.grid(visible=False)
        return figure


def pixel_affinity(images: torch.Tensor, points: Sequence[tuple[int, int]], maps: Mapping[str, torch.Tensor]) -> Figure:
    """Cosine of one chosen pixel with all others, drawn over the image; a row an image.

    Args:
        images: (count, 3, height, width), uint8 or float in [0, 1].
        points: (row, column) of the chosen pixel, in pixels of the map, one an image.
        maps: by name, (count, h, w): the cosines of the chosen pixel with every pixel.
    """
    count, colours = len(images), _cosine_colours(maps.values())
    with _figure(count, len(maps) + 1, width=2.35 * (len(maps) + 1) + 0.6, height=2.2 * count + 0.3) as (figure, axes):
        for index in range(count):
            row = axes[index * (len(maps) + 1) : (index + 1) * (len(maps) + 1)]
            height, width = images.shape[2:]
            row[0].imshow(_picture(images[index]), extent=(0, width, height, 0))
            for axis, (name, cosines) in zip(row[1:], maps.items(), strict=True):
                shown = axis.imshow(cosines[index].detach().cpu(), extent=(0, width, height, 0), **colours)
                axis.set_title(name if index == 0 else "")
            row[0].set_title("image" if index == 0 else "")
            h, w = next(iter(maps.values())).shape[1:]
            y, x = (points[index][0] + 0.5) * height / h, (points[index][1] + 0.5) * width / w
            for axis in row:
                axis.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor="white", markeredgewidth=3.5)
                axis.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.5)
                axis.axis("off")
        figure.colorbar(shown, ax=axes, label="cosine with the circled pixel", shrink=0.8, pad=0.02)
        return figure


# ---------------------------------------------------------------------------------------------------------------------
# Scaling laws


def scaling(
    frame: pd.DataFrame,
    x_label: str,
    y_label: str,
    *,
    panel_titles: Mapping[str, str] | None = None,
    x_scale: Literal["log", "linear"] = "log",
) -> Figure:
    """Power laws on log-log axes (exponentials with a linear x axis), a panel for each value of ``panel``.

    Args:
        frame: columns ``x``, ``y``, ``series``, ``kind`` (measured, theory or bound) and optionally ``panel`` and
            ``y_label`` (of its panel). Values that are not positive cannot be shown on a logarithmic axis and are
            left out.
        x_label, y_label: with units.
        x_scale: of the x axis; the y axis is logarithmic.
        panel_titles: a title by panel; the panel's own name if left out.
    """
    _require(frame, "x", "y", "series", "kind")
    frame = frame if "panel" in frame else frame.assign(panel="")
    panels = list(frame["panel"].unique())
    colours = dict(zip(frame["series"].unique(), sns.color_palette(PALETTE, frame["series"].nunique()), strict=True))
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _figure(rows, columns, height=3.9 if rows == 1 else 3.2 * rows + 0.6) as (figure, axes):
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(axes[: len(panels)], panels, strict=True):
            part = frame[(frame["panel"] == panel) & (frame["y"] > 0)]
            for (series, kind), line in part.groupby(["series", "kind"], sort=False):
                dashes, marker, width = KINDS[kind]
                axis.plot(
                    line["x"], line["y"], dashes, marker=marker, markersize=5, linewidth=width, color=colours[series],
                    label=series if kind == "measured" else f"{series}, {kind}",
                )  # fmt: skip
            axis.set(xscale=x_scale, yscale="log", xlabel=x_label, title=(panel_titles or {}).get(panel, panel))
            axis.set_ylabel(part["y_label"].iloc[0] if "y_label" in part else y_label)
            measured = part.loc[part["kind"] == "measured", "x"]
            if x_scale == "log" and measured.nunique() <= 8:
                _plain_ticks(axis.xaxis, measured)
            elif x_scale == "log":
                _readable_decades(axis.xaxis, measured)
            _readable_decades(axis.yaxis, part["y"])
        if len(panels) == 1:
            axes[0].legend(fontsize="small")
        else:
            _legend_below(figure, axes[: len(panels)])
        return figure


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers


def convergence(frame: pd.DataFrame, exact: float, deviation: float) -> Figure:
    """Running means of independent estimates against how many there are, around the exact value.

    Args:
        frame: columns ``k``, ``estimate`` and ``draw``, one line for each value of the last.
        exact: what is estimated.
        deviation: standard deviation of one estimate; the band is the exact value ± deviation/√k.
    """
    _require(frame, "k", "estimate", "draw")
    colours = sns.color_palette(PALETTE)
    with _figure(height=3.8) as (figure, (axis,)):
        k = frame["k"].drop_duplicates().sort_values()
        half = deviation / k**0.5
        axis.fill_between(k, exact - half, exact + half, color="0.85", label="± one standard deviation, theory")
        for index, (_, line) in enumerate(frame.groupby("draw", sort=False)):
            axis.plot(line["k"], line["estimate"], linewidth=1.3, color=colours[index % len(colours)])
        axis.axhline(exact, color="black", linewidth=1.4, linestyle="--", label="exact affinity loss")
        axis.set(xscale="log", xlabel="projections $k$", ylabel="mean of $k$ estimates", xlim=(k.min(), k.max()))
        axis.set_ylim(max(0.0, exact - 2.5 * deviation), exact + 2.5 * deviation)
        _readable_decades(axis.xaxis, k)
        axis.legend(fontsize="small", loc="upper right")
        return figure


def _bits_title(bits: int | str) -> str:
    return bits if isinstance(bits, str) else BITS_NAMES.get(bits, f"{bits} bits").replace("\n", " ")


def staircases(frame: pd.DataFrame) -> Figure:
    """What quantizers do forward (above) and which gradient passes backward (below), a column each.

    ``frame``: columns ``quantizer``, ``input``, ``output``, ``gradient``.
    """
    _require(frame, "quantizer", "input", "output", "gradient")
    names = list(frame["quantizer"].unique())
    colour = sns.color_palette(PALETTE)
    with _figure(2, len(names), height=4.4, sharex="col", sharey="row") as (figure, axes):
        for index, name in enumerate(names):
            part = frame[frame["quantizer"] == name].sort_values("input")
            above, below = axes[index], axes[len(names) + index]
            above.plot(part["input"], part["input"], "--", color="0.6", linewidth=1)
            above.plot(part["input"], part["output"], color=colour[0], drawstyle="steps-mid")
            below.plot(part["input"], part["gradient"], color=colour[3], drawstyle="steps-mid")
            above.set_title(name)
            below.set(xlabel="input", ylim=(-0.1, 1.2), yticks=(0, 1))
        axes[0].set_ylabel("output (forward)")
        axes[len(names)].set_ylabel("gradient (backward)")
        return figure


def weight_histograms(frame: pd.DataFrame) -> Figure:
    """Float weights as a histogram, and the values that quantizers put in their place; a panel for each.

    ``frame``: columns ``bits``, ``weight`` (float) and ``quantized``.
    """
    _require(frame, "bits", "weight", "quantized")
    grid = list(frame["bits"].unique())
    colour = sns.color_palette(PALETTE)
    extent = 1.05 * float(frame["weight"].abs().quantile(0.999))
    with _figure(1, len(grid), height=3.0, sharey=True) as (figure, axes):
        for axis, bits in zip(axes, grid, strict=True):
            part = frame[frame["bits"] == bits]
            axis.hist(
                part["weight"], bins=80, range=(-extent, extent), weights=[100 / len(part)] * len(part),
                color="0.75", label="float", linewidth=0,
            )  # fmt: skip
            shares = part["quantized"].value_counts(normalize=True).mul(100)
            stems = axis.vlines(shares.index, 0, shares, color=colour[0], linewidth=2.5, label="quantized")
            stems.set_capstyle("butt")
            axis.plot(shares.index, shares, "o", color=colour[0], markersize=4.5)
            axis.set(title=_bits_title(bits), xlabel="weight")
            axis.set_xlim(-extent, extent)
        axes[0].set_ylabel("share of the weights (%)")
        axes[-1].legend(fontsize="small", loc="upper right")
        figure.get_layout_engine().set(wspace=0.04)
        return figure


def scale_scan(frame: pd.DataFrame, chosen: pd.DataFrame) -> Figure:
    """Squared error against the scale, and the scales that were chosen.

    ``frame``: columns ``bits`` (a number, or the panel's title), ``scale``, ``error``; ``chosen``: the same and
    ``rule`` (which formula chose it).
    """
    _require(frame, "bits", "scale", "error")
    _require(chosen, "bits", "scale", "error", "rule")
    grid = list(frame["bits"].unique())
    colours = dict(zip(chosen["rule"].unique(), sns.color_palette(PALETTE)[1:], strict=False))
    markers = dict(zip(colours, "osD^v", strict=False))
    with _figure(1, len(grid), height=3.2, sharey=True) as (figure, axes):
        for axis, bits in zip(axes, grid, strict=True):
            part = frame[frame["bits"] == bits]
            axis.plot(part["scale"], part["error"], color="0.35", label="scan")
            for _, point in chosen[chosen["bits"] == bits].iterrows():
                rule = point["rule"]
                axis.plot(
                    point["scale"], point["error"], markers[rule], color=colours[rule], markersize=8, linestyle="",
                    label=rule, clip_on=False,
                )  # fmt: skip
            axis.set(title=_bits_title(bits), xlabel="scale", ylim=(0, None))
        axes[0].set_ylabel("squared error / squared norm")
        _legend_below(figure, axes)
        return figure


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def learning_curves(frame: pd.DataFrame) -> Figure:
    """Histories of runs, a panel a measure.

    ``frame``: long form, columns ``run`` (name in the legend), ``epoch``, ``value`` and ``measure`` (the panel's
    vertical label, with its unit). Several values of one run and epoch (seeds) are drawn as mean and range.
    """
    _require(frame, "run", "epoch", "value", "measure")
    measures, runs = list(frame["measure"].unique()), list(frame["run"].unique())
    columns = min(2, len(measures))
    rows = -(-len(measures) // columns)
    epochs = frame["epoch"].nunique()
    with _figure(rows, columns, height=3.3 * rows + 0.3 + 0.2 * (len(runs) // 3)) as (figure, axes):
        for axis, measure in zip(axes, measures, strict=False):
            sns.lineplot(
                frame[frame["measure"] == measure], x="epoch", y="value", hue="run", style="run", hue_order=runs,
                style_order=runs, markers=epochs <= 30, dashes=False, ax=axis, errorbar=("pi", 100),
                palette=sns.color_palette(PALETTE, len(runs)), legend=axis is axes[0],
            )  # fmt: skip
            axis.set(xlabel="epoch", ylabel=measure)
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in axes[len(measures) :]:
            axis.remove()
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].get_legend().remove()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(runs)), fontsize="small")
        return figure


def accuracy_by_bits(frame: pd.DataFrame, references: Mapping[str, float] | None = None) -> Figure:
    """Test accuracy of students by bits and method: every seed a point, the mean of a method a bar across them.

    Args:
        frame: columns ``bits`` (a number or a name such as 1W4A), ``method``, ``accuracy`` (percent), ``seed``.
        references: accuracies drawn as horizontal lines, by name (teacher, float student).
    """
    _require(frame, "bits", "method", "accuracy", "seed")
    grid, methods = list(dict.fromkeys(frame["bits"])), list(frame["method"].unique())
    colours, markers = sns.color_palette(PALETTE, len(methods)), "osD^vPX*<>"
    step = 0.8 / len(methods)
    with _figure(height=4.2) as (figure, (axis,)):
        for index, (method, colour) in enumerate(zip(methods, colours, strict=True)):
            for column, bits in enumerate(grid):
                values = frame[(frame["method"] == method) & (frame["bits"] == bits)]["accuracy"]
                if values.empty:
                    continue
                x = column + (index - (len(methods) - 1) / 2) * step
                spread = [x + 0.35 * step * (2 * i / max(1, len(values) - 1) - 1) for i in range(len(values))]
                axis.plot(
                    spread if len(values) > 1 else [x], values, markers[index % len(markers)], color=colour,
                    markersize=6.5, markeredgecolor="white", markeredgewidth=0.5,
                )  # fmt: skip
                axis.hlines(values.mean(), x - 0.4 * step, x + 0.4 * step, color=colour, linewidth=2.5)
        handles = [
            plt.Line2D([], [], color=colour, marker=markers[i % len(markers)], linewidth=2.5, label=method)
            for i, (method, colour) in enumerate(zip(methods, colours, strict=True))
        ]
        for dashes, (name, accuracy) in zip(("--", ":", "-."), (references or {}).items(), strict=False):
            handles.append(
                axis.axhline(accuracy, color="0.25", linestyle=dashes, linewidth=1.4, zorder=1.5, label=name)
            )
        axis.set_xticks(range(len(grid)), [BITS_NAMES.get(bits, str(bits)) for bits in grid])
        axis.set(xlim=(-0.5, len(grid) - 0.5), ylabel="test accuracy (%)")
        axis.grid(visible=False, axis="x")
        for edge in range(1, len(grid)):
            axis.axvline(edge - 0.5, color="0.9", linewidth=1, zorder=0)
        figure.legend(handles=handles, loc="outside right upper", fontsize="small")
        return figure


def affinity_frontier(frame: pd.DataFrame) -> Figure:
    """Accuracy against the time of a training step, one point an affinity loss; seeds as small points around it.

    ``frame``: columns ``loss`` (none, FA, FFA k=1, …), ``accuracy`` (percent), ``step_milliseconds``.
    """
    _require(frame, "loss", "accuracy", "step_milliseconds")
    losses = list(frame["loss"].unique())
    with _figure(height=4.0) as (figure, (axis,)):
        for loss, colour, marker in zip(losses, sns.color_palette(PALETTE, len(losses)), "osD^vPX*<>", strict=False):
            part = frame[frame["loss"] == loss]
            mean = part[["step_milliseconds", "accuracy"]].mean()
            if len(part) > 1:
                axis.plot(part["step_milliseconds"], part["accuracy"], marker, color=colour, markersize=4, alpha=0.5)
            axis.plot(*mean, marker, color=colour, markersize=10, label=loss, linestyle="", markeredgecolor="white")
        axis.set(xlabel="time of a training step (ms)", ylabel="test accuracy (%)")
        axis.margins(0.1, 0.15)
        figure.legend(loc="outside right upper", fontsize="small", title="affinity loss")
        return figure
