"""The least-squares step of a uniform grid: {0..L}·s nearest to given magnitudes.

The error of a step s is ‖w‖² − ⟨w, q⟩²/⟨q, q⟩, with w the magnitudes and q the nearest levels. The best step maximises
the explained share ⟨w, q⟩²/⟨q, q⟩, which has many local maxima. Levels change only where s passes some w_i/(m − ½),
m = 1..L: one value then rises by one level. Two searches follow from that.

Exact. Sort all w_i/(m − ½) in descending order. Two cumulative sums along that order give ⟨w, q⟩ and ⟨q, q⟩ between any
two breakpoints, and the largest share is the global optimum. The search sorts n·L numbers, so it serves short rows. It
also serves longer rows of at most 128 distinct magnitudes, counted in a histogram. Weights that are quantized to 8 bits
already are such rows, and their optimum is too narrow for a scan.

Scanned. A fine histogram gives the share of any step by a few look-ups. A coarse grid of steps over thirteen octaves is
tried, then fine grids around the best four. The error comes within 1 % of the best one, unless a few magnitudes out of
hundreds hold nearly all the energy.

Nearest level and least-squares step then alternate twice on the magnitudes themselves. Devices differ in the last
digits of sums only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT = 2**13  # largest n·L of a row for the exact search
_FEW = 128  # most distinct magnitudes of a longer row for the exact search
_FOLD = 1024  # numbers that one block of CUDA adds up
_OCTAVES = 16  # range of the histogram, downward from the largest magnitude
_ROWS = 8  # rows scanned together on a CPU, so few that their tables fit into its cache


def nearest_levels(values: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """Integer level closest to values/step, within [lowest, highest]; all zero where the step is 0."""
    return (values / torch.where(step > 0, step, 1)).round_().clamp_(lowest, highest) * (step > 0)


def best_step(magnitudes: Tensor, highest: int) -> Tensor:
    """The least-squares step s (rows, 1) of {0..highest}·s for ``magnitudes`` (rows, n) ≥ 0.

    Returns:
        s in the dtype of ``magnitudes``: 0 for a row of zeros, NaN for a row that holds NaN or an infinity.
    """
    peak = magnitudes.amax(1, keepdim=True)
    unit = magnitudes.double() / torch.where(peak > 0, peak, 1)
    step = (_exact_step if unit.shape[1] * highest <= _EXACT else _scanned_step)(unit, highest)
    for _ in range(2):
        levels = nearest_levels(unit, step, 0, highest)
        energy = levels.square().sum(1, keepdim=True)
        gain = (unit * levels).sum(1, keepdim=True)
        step = torch.where(energy > 0, gain / energy.clamp_min(1), step)
    step = torch.where(step.isfinite(), step, 0)
    return (step * peak + 0 * peak).to(magnitudes.dtype)  # 0·NaN is NaN


def running_sums(rows: Tensor) -> Tensor:
    """Cumulative sums along each row of (rows, n), the same bits at every call.

    On CUDA several blocks would share a single row, and add up in an order that varies. A single row is therefore
    folded into several rows, which have one block each.
    """
    if len(rows) != 1 or rows.device.type != "cuda":
        return rows.cumsum(1)
    count = rows.shape[1]
    folded = F.pad(rows, (0, -count % _FOLD)).view(-1, _FOLD).cumsum(1)
    if len(folded) > 1:
        before = folded[:-1, -1].expand(2, -1).contiguous().cumsum(1)[0]
        folded[1:] += before.unsqueeze(1)
    return folded.view(1, -1)[:, :count]


def _exact_step(magnitudes: Tensor, highest: int, counts: Tensor | None = None) -> Tensor:
    """The best step (rows, 1) by the exact search; ``counts`` says how often each magnitude occurs, None means once."""
    # On its way down s passes these breakpoints; each raises one value from level m − 1 to m.
    m = torch.arange(1, highest + 1, device=magnitudes.device, dtype=magnitudes.dtype)
    _, order = (magnitudes.unsqueeze(2) / (m - 0.5)).flatten(1).sort(dim=1, descending=True, stable=True)
    counts = torch.ones_like(magnitudes) if counts is None else counts

    def up_to(terms: Tensor) -> Tensor:
        return running_sums(terms.flatten(1).gather(1, order))

    gain = up_to((counts * magnitudes).unsqueeze(2).expand(-1, -1, highest))
    energy = up_to(counts.unsqueeze(2) * (2 * m - 1))
    energy.clamp_min_(1)  # 0 before the first magnitude that occurs
    best = (gain.square() / energy).argmax(1, keepdim=True)
    return gain.gather(1, best) / energy.gather(1, best)


def _scanned_step(magnitudes: Tensor, highest: int) -> Tensor:
    """The best step (rows, 1) of float64 rows by the scan, or by the exact search where few magnitudes are distinct.

    Each row must be divided by its largest magnitude. A row of zeros or with NaN gets a meaningless step.
    """
    # Several rows are channels. Each row costs as much as a whole tensor, so channels get coarser grids.
    bins, spacing = (2**15, 1 / 96) if len(magnitudes) == 1 else (2**13, 1 / 32)
    device, dtype = magnitudes.device, magnitudes.dtype
    index = _bin(magnitudes, bins)
    # Integer sums do not depend on the order.
    counts = torch.zeros(len(magnitudes), bins, dtype=torch.int64, device=device)
    counts = counts.scatter_add_(1, index, torch.ones_like(index)).double()
    values = ((torch.arange(bins, device=device, dtype=dtype) + 0.5 - bins) * (_OCTAVES / bins)).exp2()
    # Number and sum of the magnitudes above each edge between two bins.
    below = F.pad(counts.cumsum(1), (1, 0))
    mass = F.pad(running_sums(values * counts), (1, 0))
    above, mass = below[:, -1:] - below, mass[:, -1:] - mass
    half = torch.arange(highest, device=device, dtype=dtype) + 0.5

    def scan(steps: Tensor, best: int) -> Tensor:
        """The ``best`` of ``steps`` (rows, steps), or (1, steps) for all rows."""
        edges = steps.unsqueeze(2) * half  # (…, L): where a value reaches level 1, 2, …
        place = torch.where(edges > 1, bins, _bin(edges, bins) + 1).flatten(1).expand(len(above), -1)
        together = _ROWS if device.type == "cpu" else len(above)
        parts = zip(*(each.split(together) for each in (above, mass, place)), strict=True)
        explained = torch.cat([_explained(*part, 2 * half) for part in parts])
        return steps.expand(len(above), -1).gather(1, explained.topk(best, dim=1).indices)

    grid = torch.arange(-12.0, 1.0, spacing, device=device, dtype=dtype)
    coarse = scan((grid.exp2() * (1 / highest)).unsqueeze(0), best=4)
    fine = torch.linspace(-spacing, spacing, 33, device=device, dtype=dtype)
    steps = scan((coarse.unsqueeze(2) * fine.exp2()).flatten(1), best=1)

    few = (counts > 0).sum(1) <= _FEW
    chosen = torch.arange(len(steps), device=steps.device)
    if magnitudes.device.type == "cpu" and not torch.compiler.is_compiling():
        chosen = chosen[few]  # elsewhere the host would wait for this choice, so all rows are searched
    for rows in chosen.split(64):
        place = counts[rows].gt(0).int().topk(_FEW, dim=1).indices
        largest = torch.zeros_like(counts[rows]).scatter_reduce_(1, index[rows], magnitudes[rows], "amax")
        exact = _exact_step(largest.gather(1, place), highest, counts[rows].gather(1, place))
        steps[rows] = torch.where(few[rows].unsqueeze(1), exact, steps[rows])
    return steps


def _explained(above: Tensor, mass: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """The share ⟨w, q⟩²/⟨q, q⟩ (rows, steps) that each step explains.

    Args:
        above, mass: (rows, bins + 1) number and sum of the magnitudes above each edge between two bins.
        place: (rows, steps·L) index of the edge above which a value has at least level 1, 2, ….
        weights: (L,) what a value adds to ⟨q, q⟩ as it reaches level 1, 2, …: 1, 3, 5, ….
    """
    shape = (len(above), -1, len(weights))
    energy = above.gather(1, place).view(shape).mul_(weights).sum(2)
    gain = mass.gather(1, place).view(shape).sum(2)
    return torch.where(energy > 0, gain.square() / energy.clamp_min(1), 0)


def _bin(values: Tensor, bins: int) -> Tensor:
    """Index of each value's bin. The ``bins`` divide the sixteen octaves below 1 evenly in the logarithm."""
    position = values.log2().mul_(bins / _OCTAVES).add_(bins)
    return position.nan_to_num_(0, 0, 0).floor_().clamp_(0, bins - 1).long()
