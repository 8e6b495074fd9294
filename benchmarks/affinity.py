"""Measure time and memory of the affinity losses, forward and backward, as ratios within one run.

    python benchmarks/affinity.py                     # everything: about 20 minutes on 2 cores
    python benchmarks/affinity.py --parts targets     # the ratios in docs/benchmarks.md
    python benchmarks/affinity.py --parts sweep --device cuda

Every call computes value and gradient in float32, channels-last. The parts are

- ``targets``: shapes of a ResNet's maps, against "direct" and "plain FFA"; 5 minutes on two slow cores.
- ``ffa``: forward and backward of FFA apart; seconds.
- ``memory``: extra memory at 224×224; seconds.
- ``step``: a training step of a ResNet-20 with and without FA, also in bf16 where the hardware computes in it; minutes.
- ``rivals``: the same step with every rival of FA, for table T7; minutes.
- ``sweep``: all sizes, half as many calls; 10 minutes.

"direct" is the N×N loss and "plain FFA" the paper's fast loss, both written with autograd. The floor is the time to
read both maps and write one gradient at the measured copy bandwidth of this machine. Prints tables; writes
``affinity.json``, ``affinity-sweep.json`` and ``affinity-sweep.png`` to ``--out``, by default ``results/benchmarks``.
"""

import statistics
from collections.abc import Mapping

import pandas as pd
import torch
from reporting import announce, options, paired_ratio, parse, show, spread, write

from faqd_lib import DistillationObjective, FeatureTap, build_model, feature_affinity_loss, quantize
from faqd_lib.affinity.loss import draw_projections
from faqd_lib.reporting import charts
from faqd_lib.training.learner import precision_that_pays
from faqd_lib.utils.measure import copy_bandwidth, environment, peak_bytes, take_turns

MiB = 2**20
# (batch, C, H): (times faster than direct, at least; share of plain FFA's time, at most)
TARGETS = {(100, 16, 32): (100, 0.5), (32, 16, 64): (500, 0.6), (32, 64, 64): (50, 0.8)}
HEIGHTS = (8, 16, 32, 64, 128, 224)  # of the sweep
DIRECT_LIMIT = 6 * 2**30  # bytes that the direct loss may need: five N×N matrices for each image


def unit_pixels(features: torch.Tensor) -> torch.Tensor:
    vectors = features.permute(0, 2, 3, 1).flatten(1, 2)  # no copy for channels-last maps
    return vectors / vectors.norm(dim=2, keepdim=True).clamp_min(1e-6)


def direct(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The definition, with autograd."""
    x, y = unit_pixels(student), unit_pixels(teacher)
    return (x @ x.mT - y @ y.mT).square().mean((1, 2)).mean()


def plain_ffa(student: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    """The fast loss, with autograd."""
    x, y = unit_pixels(student), unit_pixels(teacher)
    z = draw_projections(x.shape[1], k).to(x.device)
    return (x @ (x.mT @ z) - y @ (y.mT @ z)).square().sum((1, 2)).mean() / (k * x.shape[1] ** 2)


def pair(batch: int, channels: int, height: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(batch, channels, height, height, generator=generator).relu()
        .to(device, memory_format=torch.channels_last)
        for _ in range(2)
    )  # fmt: skip
    return student.requires_grad_(), teacher


def candidates(student: torch.Tensor, teacher: torch.Tensor) -> dict:
    """Value and gradient by every way of computing them."""

    def both(loss):
        return lambda: torch.autograd.grad(loss(), student)

    return {
        "direct": both(lambda: direct(student, teacher)),
        "plain FFA, k = 15": both(lambda: plain_ffa(student, teacher, 15)),
        "pairwise": both(lambda: feature_affinity_loss(student, teacher, "pairwise")),
        "exact (auto)": both(lambda: feature_affinity_loss(student, teacher)),
        "FFA, k = 6": both(lambda: feature_affinity_loss(student, teacher, "projection", k=6)),
        "FFA, k = 15": both(lambda: feature_affinity_loss(student, teacher, "projection", k=15)),
    }


def measure(calls: dict, rounds: int, device: str, against: str | None = None, **labels) -> list[dict]:
    """One row a candidate: median and interquartile range of its times, its peak memory.

    ``against`` names a candidate. Each row then has ``time / NAME``: the median over turns of its time divided by that
    candidate's time, with a 95 % interval.
    """
    times = take_turns(calls, rounds, device)
    rows = []
    for name, call in calls.items():
        row = {**labels, "loss": name, **spread(times[name]), "peak_MiB": peak_bytes(call, device) / MiB}
        if against is not None:
            ratio, low, high = paired_ratio(times[name], times[against])
            row |= {f"time / {against}": ratio, "ratio low": low, "ratio high": high}
        rows.append(row)
    return rows


def direct_bytes(batch: int, height: int) -> int:
    return 5 * batch * height**4 * 4


def targets(device: str, rounds: int) -> pd.DataFrame:
    """The shapes of a ResNet's maps: ratios to the direct loss and to plain FFA."""
    rows = []
    for (batch, channels, height), (least, most) in TARGETS.items():
        student, teacher = pair(batch, channels, height, device)
        calls = candidates(student, teacher)
        calls.pop("pairwise")
        slow = calls.pop("direct")
        shape = {"batch": batch, "C": channels, "H": height}
        found = measure(calls, rounds, device, **shape)
        # The direct loss takes seconds: three rounds, between calls of the exact one.
        again = take_turns({"direct": slow, "exact (auto)": calls["exact (auto)"]}, 3, device)
        reference = statistics.median(again["direct"])
        found.append(
            {**shape, "loss": "direct", "n": 3, "median_ms": 1e3 * reference,
             "iqr_ms": 1e3 * (max(again["direct"]) - min(again["direct"])),
             "peak_MiB": peak_bytes(slow, device) / MiB}
        )  # fmt: skip
        plain = next(row["median_ms"] for row in found if row["loss"] == "plain FFA, k = 15")
        for row in found:
            own = statistics.median(again["exact (auto)"]) if row["loss"] == "exact (auto)" else row["median_ms"] / 1e3
            row["times faster than direct"] = reference / own
            row["time / plain FFA"] = row["median_ms"] / plain
            if row["loss"] == "exact (auto)":
                row["wanted"] = f"≥ {least}, ≤ {most}"
                row["met"] = row["times faster than direct"] >= least and row["time / plain FFA"] <= most
        rows += found
    return pd.DataFrame(rows)


def ffa_backward(device: str, rounds: int) -> pd.DataFrame:
    """Forward and backward of FFA, k = 15, apart: ours computes the gradient in the forward pass."""
    student, teacher = pair(100, 16, 32, device)
    losses = {
        "plain autograd": lambda: plain_ffa(student, teacher, 15),
        "hand-written": lambda: feature_affinity_loss(student, teacher, "projection", k=15),
    }
    calls, graphs = {}, {name: loss() for name, loss in losses.items()}
    for name, loss in losses.items():
        calls[f"{name}, forward and backward"] = lambda loss=loss: torch.autograd.grad(loss(), student)
        calls[f"{name}, backward alone"] = lambda name=name: torch.autograd.grad(
            graphs[name], student, retain_graph=True
        )
    frame = pd.DataFrame(measure(calls, rounds, device, batch=100, C=16, H=32))
    plain = frame[frame["loss"].str.startswith("plain")].set_index(frame["loss"].str.split(", ").str[1].iloc[:2])
    frame["times faster than plain"] = plain["median_ms"].reindex(frame["loss"].str.split(", ").str[1]).to_numpy()
    frame["times faster than plain"] /= frame["median_ms"]
    frame["wanted"] = ["", "", "≥ 2", "≥ 2"]
    frame["met"] = [None, None, *(frame["times faster than plain"].iloc[2:] >= 2)]
    return frame


def large_map(device: str) -> pd.DataFrame:
    """(4, 64, 224): extra memory of the exact loss, in units of its two inputs."""
    student, teacher = pair(4, 64, 224, device)
    inputs = 2 * student.numel() * 4
    rows = measure(
        {"exact (auto)": lambda: torch.autograd.grad(feature_affinity_loss(student, teacher), student)},
        2, device, batch=4, C=64, H=224,
    )  # fmt: skip
    rows[0]["peak / inputs"] = rows[0]["peak_MiB"] * MiB / inputs
    rows[0]["one N×N matrix (GiB)"] = 224**4 * 4 / 2**30
    rows[0] |= {"wanted": "≤ 3", "met": rows[0]["peak / inputs"] <= 3}
    return pd.DataFrame(rows)


def sweep(device: str, rounds: int, bandwidth: float) -> pd.DataFrame:
    """Every H from 8 to 224 and C from 16 to 512, with the batch that fills about 8 MiB a map."""
    rows = []
    for channels in (16, 64, 128, 512):
        for height in HEIGHTS:
            batch = max(1, min(64, 2**21 // (channels * height**2)))
            if batch * channels * height**2 > 2**24:  # maps that no network has: 224² with 512 channels
                continue
            student, teacher = pair(batch, channels, height, device)
            calls = candidates(student, teacher)
            calls.pop("plain FFA, k = 15")
            if height > 64:
                calls.pop("pairwise")  # minutes
            if direct_bytes(batch, height) > DIRECT_LIMIT or height > 64:
                calls.pop("direct")
            few = max(2, rounds // 4) if height >= 64 or channels >= 512 else rounds
            found = measure(calls, few, device, batch=batch, C=channels, H=height)
            floor = 3 * student.numel() * 4 / bandwidth * 1e3
            reference = next((row["median_ms"] for row in found if row["loss"] == "direct"), None)
            for row in found:
                row["floor_ms"] = floor
                row["times faster than direct"] = reference / row["median_ms"] if reference else float("nan")
            rows += found
            print(f"  C = {channels}, H = {height}, batch {batch}", flush=True)
    return pd.DataFrame(rows)


STEPS = {"logits": ("none", 6), "logits + FA": ("fa", 6), "logits + FFA, k = 6": ("ffa", 6)}
# By the names of table T7. SQuaT needs quantized activations, so its step is another one.
RIVAL_STEPS = {"KD": ("none", 6), "FA": ("fa", 6), **{f"FFA, k = {k}": ("ffa", k) for k in (1, 3, 6, 15)}} | {
    name: (affinity, 6)
    for name, affinity in {"SP": "sp", "AT": "at", "FitNet": "hint", "CKA": "cka", "CWD": "channel"}.items()
}


def step_overhead(
    device: str, batch: int, rounds: int, precision: str, kinds: Mapping[str, tuple[str, int]] = STEPS
) -> pd.DataFrame:
    """A training step of a 1-bit ResNet-20 with each kind of loss between maps and k; the first kind has none.

    There is no teacher pass.
    """
    teacher = build_model("resnet20", 10, image_size=32, seed=0).to(device, memory_format=torch.channels_last).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    with FeatureTap(teacher, teacher.feature_names) as tap, torch.no_grad():
        logits = teacher(images)
        maps = list(tap.features)
    calls = {}
    for name, (affinity, k) in kinds.items():
        model = build_model("resnet20", 10, image_size=32, seed=1)
        model = quantize(model.to(device, memory_format=torch.channels_last), weight_bits=1).train()
        weight = 0 if affinity == "none" else 30
        objective = DistillationObjective("mse", affinity, affinity_weight=weight, k=k).to(device)
        # So slow that no loss diverges, however often the step is repeated on these images of noise.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

        def step(model=model, objective=objective, optimizer=optimizer):
            with (
                FeatureTap(model, model.feature_names) as own,
                torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"),
            ):
                output = model(images)
                total = objective(output, own.features, logits, maps)["total"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

        calls[name] = step
    first = next(iter(calls))
    rows = measure(calls, rounds, device, first, batch=batch, precision=precision)
    for row in rows:
        row["time / logits"] = row.pop(f"time / {first}")
        row["extra_MiB"] = row["peak_MiB"] - rows[0]["peak_MiB"]
    rows[1] |= {"wanted": "≤ 1.2", "met": rows[1]["time / logits"] <= 1.2}
    return pd.DataFrame(rows)


def figure_of(frame: pd.DataFrame):
    """Time against H, a panel for each C, with the floor."""
    # Batches differ between heights: shown is the time of one image.
    per_image = frame.assign(y=frame["median_ms"] / frame["batch"], x=frame["H"], series=frame["loss"], kind="measured")
    floor = per_image.drop_duplicates(["C", "H"]).assign(series="memory floor", kind="bound")
    floor = floor.assign(y=floor["floor_ms"] / floor["batch"])
    both = pd.concat([per_image, floor])
    both["panel"] = "C = " + both["C"].astype(str)
    return charts.scaling(both, "height H of the map (pixels)", "time an image (ms)")


PARTS = ("targets", "ffa", "memory", "step", "rivals", "sweep")


def main() -> None:
    parser = options(__doc__, rounds=30)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which parts (all)")
    parser.add_argument("--batch", type=int, default=128, help="images of a training step, part step (128)")
    arguments = parse(parser)
    device, rounds = arguments.device, arguments.rounds
    machine = environment(device)
    bandwidth = copy_bandwidth(device)
    announce(machine | {"copy bandwidth (GB/s)": f"{bandwidth / 1e9:.1f}"})
    parts = {
        "targets": lambda: targets(device, rounds),
        "ffa": lambda: ffa_backward(device, rounds),
        "memory": lambda: large_map(device),
        "step": lambda: pd.concat(
            [
                step_overhead(device, arguments.batch, rounds, p)
                for p in dict.fromkeys(("float32", precision_that_pays(device)))
            ]
        ),
        "rivals": lambda: step_overhead(device, arguments.batch, rounds, "float32", RIVAL_STEPS),
        "sweep": lambda: sweep(device, max(2, rounds // 2), bandwidth),
    }
    result = {"environment": machine, "copy_bandwidth": bandwidth}
    for name in arguments.parts:
        frame = parts[name]()
        if name == "sweep":
            print(*charts.save(figure_of(frame), arguments.out, "affinity-sweep"))
            write(arguments.out, "affinity-sweep", {"environment": machine, name: show(name, frame)})
        else:
            result[name] = show(name, frame)
            write(arguments.out, "affinity", result)


if __name__ == "__main__":
    main()
