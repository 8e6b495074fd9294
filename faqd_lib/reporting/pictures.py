"""Pictures of images, affinities and predictions. Every function takes tensors and returns a matplotlib Figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.images import IGNORED
from .charts import WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# RGB of the classes of label maps; the first eleven are close to those that CamVid's authors use.
LABEL_COLOURS = (
    (128, 180, 230), (150, 60, 50), (200, 200, 140), (128, 64, 128), (220, 130, 200), (110, 140, 40), (230, 180, 40),
    (90, 90, 160), (40, 60, 190), (240, 110, 30), (0, 160, 170), (200, 0, 60),
)  # fmt: skip


def _cosine_colours(matrices: Iterable[torch.Tensor]) -> dict:
    """A sequential scale for cosines of at least 0, which maps after a ReLU have; otherwise a diverging one."""
    if min(float(matrix.min()) for matrix in matrices) >= 0:
        return {"vmin": 0, "vmax": 1, "cmap": "viridis"}
    return {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"}


def _picture(image: torch.Tensor) -> np.ndarray:
    """(3, height, width), uint8 or float in [0, 1], as matplotlib needs it: (height, width, 3) in [0, 1]."""
    image = image.detach().cpu()
    return (image / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)).permute(1, 2, 0).numpy()


def image_grid(rows: Sequence[torch.Tensor], row_names: Sequence[str]) -> Figure:
    """Pictures in rows: a tensor (count, 3, height, width), uint8 or float in [0, 1], and a name for each row.

    Raises:
        ValueError: there are no rows, or not one name for each row.
    """
    if len(rows) != len(row_names) or not rows:
        raise ValueError(f"{len(rows)} rows of pictures but {len(row_names)} names: give each row a name")
    columns, (height, width) = max(len(row) for row in rows), rows[0].shape[2:]
    gap = max(1, height // 16)
    # One canvas instead of an axis a picture, because many axes are slow to draw.
    canvas = np.ones((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), np.float32)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = _picture(picture)
    size = min(0.78, (WIDTH - 1.2) / columns)
    with new_figure(width=columns * size + 1.2, height=len(rows) * size + 0.1) as (figure, (axis,)):
        axis.imshow(canvas, interpolation="nearest")
        axis.set_yticks([row * (height + gap) + height / 2 for row in range(len(rows))], row_names)
        axis.set_xticks([])
        axis.tick_params(left=False)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        return figure


def label_colours(maps: torch.Tensor) -> torch.Tensor:
    """A colour for each class, grey-black where there is no label: (n, height, width) → uint8 (n, 3, height, width).

    ``maps`` has integers, :data:`~faqd_lib.data.images.IGNORED` without a label. Colours repeat after 12 classes.
    """
    colours = torch.tensor(LABEL_COLOURS, dtype=torch.uint8)
    painted = colours[maps.long().clamp_max(IGNORED) % len(colours)]
    painted[maps == IGNORED] = 30
    return painted.permute(0, 3, 1, 2)


def classified(
    images: torch.Tensor, predicted: Sequence[str], true: Sequence[str], confidence: Sequence[float]
) -> Figure:
    """Pictures, five a row, each under its predicted class. The true class stands below wrong predictions.

    Args:
        images: (n, 3, height, width), uint8.
        predicted, true: names of n classes each.
        confidence: n probabilities of the predicted classes, between 0 and 1.
    """
    columns = 5
    rows = math.ceil(len(images) / columns)
    with new_figure(rows, columns, height=2.1 * rows) as (figure, axes):
        for axis in axes:
            axis.set_axis_off()
        for axis, image, guess, name, share in zip(axes, images, predicted, true, confidence, strict=False):
            axis.imshow(_picture(image))
            right = guess == name
            title = f"{guess} {share:.0%}" + ("" if right else f"\n({name})")
            axis.set_title(title, fontsize="small", fontweight="normal", color="0.15" if right else "#b2182b")
        return figure


def affinity_matrices(matrices: Mapping[str, torch.Tensor], difference: torch.Tensor) -> Figure:
    """Affinity matrices (N×N) by name on a common scale, and a difference matrix (N×N) on a separate scale."""
    colours = _cosine_colours(matrices.values())
    with new_figure(1, len(matrices) + 1, height=3.1) as (figure, axes):
        for axis, (name, matrix) in zip(axes, matrices.items(), strict=False):
            shown = axis.imshow(matrix.detach().cpu().numpy(), interpolation="nearest", **colours)
            axis.set(title=name, xlabel="pixel $j$")
        axes[0].set_ylabel("pixel $i$")
        figure.colorbar(shown, ax=axes[: len(matrices)], label="cosine", shrink=0.85, pad=0.02)
        extent = max(float(difference.abs().max()), 1e-12)
        drawn = difference.detach().cpu().numpy()
        shown = axes[-1].imshow(drawn, vmin=-extent, vmax=extent, cmap="PuOr_r", interpolation="nearest")
        axes[-1].set(title="difference $D$", xlabel="pixel $j$")
        figure.colorbar(shown, ax=axes[-1], label="difference of cosines", shrink=0.85, pad=0.03)
        for axis in axes:
            axis.grid(visible=False)
        return figure


def pixel_affinity(
    images: torch.Tensor,
    points: Sequence[tuple[int, int]],
    maps: Mapping[str, torch.Tensor],
    row_names: Sequence[str] = (),
) -> Figure:
    """Cosine of one chosen pixel with all others, drawn over the image; one row an image.

    Args:
        images: (count, 3, height, width), uint8 or float in [0, 1].
        points: (row, column) of the chosen pixel in each image, in pixels of the map.
        maps: by name, (count, h, w): the cosines of the chosen pixel with every pixel.
        row_names: names beside the rows; none if empty.
    """
    count, columns, colours = len(images), len(maps) + 1, _cosine_colours(maps.values())
    side = min(2.35, (WIDTH + 2.0) / columns)  # inches; many maps share the width of a notebook
    size = 9 * side / 2.35  # diameter of the circles in points
    (height, width), (h, w) = images.shape[2:], next(iter(maps.values())).shape[1:]
    place = {"extent": (0, width, height, 0)}
    with new_figure(count, columns, width=side * columns + 0.8, height=0.95 * side * count + 0.3) as (figure, axes):
        for index, (image, point) in enumerate(zip(images, points, strict=True)):
            row = axes[index * columns : (index + 1) * columns]
            row[0].imshow(_picture(image), **place)
            for axis, cosines in zip(row[1:], maps.values(), strict=True):
                shown = axis.imshow(cosines[index].detach().cpu().numpy(), **place, **colours)
            y, x = (point[0] + 0.5) * height / h, (point[1] + 0.5) * width / w
            for axis in row:
                for colour, edge in (("white", 3.5), ("black", 1.5)):
                    axis.plot(x, y, "o", ms=size, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=edge)
                axis.set(xticks=[], yticks=[])
                axis.grid(visible=False)
                axis.spines[:].set_visible(False)
            if row_names:
                row[0].set_ylabel(row_names[index], fontweight="bold")
        for axis, name in zip(axes, ("image", *maps), strict=False):
            axis.set_title(name)
        figure.colorbar(shown, ax=axes, label="cosine with the circled pixel", shrink=0.8, pad=0.02)
        return figure


def confusion(teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> Figure:
    """Where the predictions of a student and its teacher differ.

    On the left: the student's predictions for the images that the teacher assigns to a class, in percent of the row.
    On the right: the student's predictions for the images of a class, minus the teacher's, in percentage points. The
    diagonal is the student's gain in accuracy.

    Args:
        teacher, student: predicted classes (N,), int64.
        labels: true classes (N,), int64.
        classes: names of the classes. More than 20 names, or long ones, are not written.
    """
    count = len(classes)

    def shares(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        table = torch.bincount(rows * count + columns, minlength=count * count).view(count, count).double()
        return 100 * table / table.sum(1, keepdim=True).clamp_min(1)

    agreement, change = shares(teacher, student), shares(labels, student) - shares(labels, teacher)
    extent = max(float(change.abs().max()), 1e-9)
    with new_figure(1, 2, height=4.0) as (figure, (left, right)):
        shown = left.imshow(agreement.numpy(), vmin=0, vmax=100, cmap="viridis")
        figure.colorbar(shown, ax=left, label="share of the row (%)", shrink=0.75)
        same = 100 * float((teacher == student).double().mean())
        title = f"same answer on {same:.1f} % of {len(labels):,} images"
        left.set(title=title, ylabel="teacher says", xlabel="student says")
        shown = right.imshow(change.numpy(), vmin=-extent, vmax=extent, cmap="PuOr_r")
        figure.colorbar(shown, ax=right, label="student − teacher (points)", shrink=0.75)
        right.set(title="student's answers minus teacher's", ylabel="true class", xlabel="taken for")
        for axis in (left, right):
            axis.grid(visible=False)
            if count <= 20 and max(map(len, classes)) <= 16:
                axis.set_xticks(range(count), classes, rotation=60, ha="right", fontsize="small")
                axis.set_yticks(range(count), classes, fontsize="small")
        if count <= 10:
            for (row, column), value in np.ndenumerate(change.numpy()):
                text = f"{value:+.0f}" if abs(value) >= 0.5 else ""
                colour = "w" if abs(value) > 0.6 * extent else "0.2"
                right.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        return figure
