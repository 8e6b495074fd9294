"""Measure training steps and images a second: alone, side by side, and against a plain implementation.

    python benchmarks/training.py                          # about 20 minutes on 2 slow cores
    python benchmarks/training.py --parts steps cohorts --teachers resnet20
    python benchmarks/training.py --device cuda --batch 128

The parts are

- ``steps``: a ResNet-20 student's step as parts are added (float, quantization, KD, FA or FFA), and the share of data.
- ``cohorts``: 1, 2, 4 and 8 students with one teacher's pass.
- ``plain``: one FAQD student and eight against an implementation that follows the authors' released code. That one
  uses NCHW float32, transforms image by image through a DataLoader, N×N affinity matrices with the L1 norm, weights
  swapped for quantized ones at every step, and batches of 100.

Images are scikit-learn's digits, enlarged. Weights are random, because time does not depend on them. Prints tables;
writes ``training.json`` and ``training.png`` to ``--out``, by default ``results/benchmarks``.
"""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from reporting import announce, options, parse, show, spread, write
from torch import nn
from torch.utils.data import DataLoader, Dataset

from faqd_lib import FeatureTap, build_model
from faqd_lib.config import RunConfig
from faqd_lib.data.batches import Batch, Batches
from faqd_lib.data.datasets import Images
from faqd_lib.reporting import charts
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.suite import Suite
from faqd_lib.training.cuda_graphs import own_stream
from faqd_lib.training.loop import Cohort
from faqd_lib.utils.measure import Stopwatch, environment, exact_kernels, peak_bytes, take_turns
from faqd_lib.utils.torchvision_import import torchvision

STAGES = ("layer1", "layer2", "layer3")
COHORTS = (1, 2, 4, 8)
# Wanted images a second with a ResNet-110 teacher, in multiples of the plain implementation's, by number of students.
LEAST_AGAINST_PLAIN = {1: 9, 8: 18}
MOST_OF_SEPARATE = {"resnet110": 0.58, "resnet20": 0.9}
MOST_FOR_DATA = 0.05
PLAIN_BATCH = 100  # of the released code


def suite_in(folder: Path, batch: int, device: str) -> Suite:
    schedule = {"epochs": 1000, "batch_size": batch}
    profile = Profile.parse(
        {"name": "benchmark", "shows_results": False, "teachers": ["resnet20", "resnet56", "resnet110"],
         "student": "resnet20", "image_size": 32, "teacher_schedule": schedule, "student_schedule": schedule,
         "fine_tuning_schedule": schedule},
        "benchmark",
    )  # fmt: skip
    return Suite.open(profile, "digits", results=folder, device=device)


def with_compiling(suite: Suite) -> Suite:
    """The same suite with passes by ``torch.compile``."""
    profile = suite.profile.model_copy(update={"compile": True})
    return replace(suite, state=suite.state.model_copy(update={"profile": profile}))


def endless(batches: Batches) -> Iterator[Batch]:
    return itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())


def cohort_step(
    suite: Suite,
    configs: Sequence[RunConfig],
    teacher: str | None,
    like: RunConfig | None = None,
    cuda_graphs: bool = True,
) -> Callable[[], None]:
    """One step of the suite's own training loop for these students: data, the teacher's pass, every student's step.

    Without students the step is data and the teacher's pass, for a student such as ``like``.
    """
    training, like = suite.splits[0], like or configs[0]
    # An epoch longer than any benchmark: a learner has room for the terms of one.
    training = Images(training.pixels.repeat(16, 1, 1, 1), training.labels.repeat(16))
    images = training.unlabelled() if like.label_free else training
    batches = Batches(images, like.optimization.batch_size, 1, suite.normalizer)
    learners = [suite.learner(config, batches) for config in configs]
    model = None
    if teacher is not None:
        model = build_model(teacher, 10, image_size=32, seed=0)
        model = model.to(suite.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    cohort = Cohort(learners, model, STAGES, suite.device, optimization=like.optimization, cuda_graphs=cuda_graphs)
    source = endless(batches)

    def step() -> None:
        cohort.step(0, next(source), learners)

    return step


def peaks(calls: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Peak memory of each call in MiB, measured before CUDA graphs are recorded, which keep their memory."""
    found = {}
    for name, call in calls.items():
        call()
        found[name] = peak_bytes(call, device) / 2**20
        call()
    return found


def row(times: list[float], images: int, **labels) -> dict:
    return {**labels, **spread(times), "images_per_second": images / statistics.median(times)}


def steps(suite: Suite, batch: int, rounds: int, teacher: str, compiling: bool) -> pd.DataFrame:
    """A student's step as parts are added, and data alone."""
    faqd = {"weight_bits": 1, "activation_bits": 4}
    variants = {"": (suite, True)}
    if suite.device.type == "cuda":
        variants["not recorded"] = (suite, False)
    if compiling:
        variants["compiled"] = (with_compiling(suite), True)
    rows_of, calls = {}, {}
    for variant, (chosen, cuda_graphs) in variants.items():
        kinds = {
            "float, labels": (chosen.float_student(), None),
            "+ quantization (1W4A)": (chosen.student("labels", **faqd), None),
            "+ KD": (chosen.student("KD", teacher=teacher, **faqd), teacher),
            "+ FA": (chosen.student("FAQD", teacher=teacher, **faqd), teacher),
            "+ FFA, k = 6, in place of FA": (chosen.student("FFAQD", k=6, teacher=teacher, **faqd), teacher),
        }
        for kind, (config, model) in kinds.items():
            name = f"{kind}, {variant}" if variant else kind
            rows_of[name] = {"step": kind, "how": variant, "teacher": model or "", "batch": batch}
            calls[name] = cohort_step(chosen, [config], model, cuda_graphs=cuda_graphs)
    memory = peaks(calls, suite.device)
    times = take_turns(calls, rounds, suite.device)
    rows = [row(times[name], batch, **rows_of[name], peak_MiB=memory[name]) for name in calls]
    for each in rows:
        each["time / float"] = each["median_ms"] / rows[0]["median_ms"]
    source, watch = endless(Batches(suite.splits[0].unlabelled(), batch, 1, suite.normalizer)), Stopwatch(suite.device)
    for _ in range(rounds + 1):
        watch.start()
        next(source)
        watch.stop()
    data = row(watch.read()[1:], batch, step="data alone", how="", teacher="", batch=batch)
    data["time / float"] = data["median_ms"] / rows[0]["median_ms"]
    data |= {"wanted": f"≤ {MOST_FOR_DATA}", "met": data["time / float"] <= MOST_FOR_DATA}
    return pd.DataFrame([*rows, data])


def cohorts(suite: Suite, batch: int, rounds: int, teachers: Sequence[str]) -> pd.DataFrame:
    """FAQD students side by side: student-images a second, and the time against that of separate runs."""
    rows = []
    for teacher in teachers:
        configs = [
            suite.student(method, weight_bits=bits, teacher=teacher, affinity_weight=weight)
            for method, weight in (("FAQD", 30.0), ("FAQD", 10.0))
            for bits in (1, 2, 4, 32)
        ]
        calls = {f"{count}": cohort_step(suite, configs[:count], teacher) for count in COHORTS}
        peaks(calls, suite.device)
        times = take_turns(calls, rounds, suite.device)
        alone = statistics.median(times["1"])
        for count in COHORTS:
            found = row(times[f"{count}"], batch * count, teacher=teacher, students=count, batch=batch)
            found["time / separate runs"] = found["median_ms"] / (1e3 * alone * count)
            if count == COHORTS[-1] and teacher in MOST_OF_SEPARATE:
                most = MOST_OF_SEPARATE[teacher]
                found |= {"wanted": f"≤ {most}", "met": found["time / separate runs"] <= most}
            rows.append(found)
    return pd.DataFrame(rows)


# ---- the plain implementation


class PlainImages(Dataset):
    """Images one at a time, as PIL pictures through torchvision's transforms."""

    def __init__(self, pixels: torch.Tensor) -> None:
        transforms = torchvision.transforms
        self.pictures = [transforms.functional.to_pil_image(image) for image in pixels]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.pictures[index])


def plain_affinity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Whole N×N matrices and the L1 norm."""

    def matrix(features: torch.Tensor) -> torch.Tensor:
        pixels = F.normalize(features.flatten(2), dim=1)
        return pixels.transpose(1, 2) @ pixels

    return (matrix(student) - matrix(teacher)).abs().mean()


def plain_step(suite: Suite, teacher_name: str, workers: int) -> Callable[[], None]:
    """One step of a 1-bit student, written the plain way."""
    device = suite.device
    student = build_model("resnet20", 10, image_size=32, seed=1).to(device).train()
    teacher = build_model(teacher_name, 10, image_size=32, seed=0).to(device).eval()
    adapters = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU()) for c in (16, 32, 64)).to(device)
    parameters = [*student.parameters(), *adapters.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    quantized = [module.weight for module in student.modules() if isinstance(module, nn.Conv2d)]
    loader = DataLoader(
        PlainImages(suite.splits[0].pixels), PLAIN_BATCH, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    source = itertools.chain.from_iterable(loader for _ in itertools.count())

    def step() -> None:
        images = next(source).to(device)
        latent = [weight.detach().clone() for weight in quantized]
        for weight in quantized:
            weight.data = weight.data.sign() * weight.data.abs().mean()
        with FeatureTap(teacher, STAGES) as t, FeatureTap(student, STAGES) as s:
            with torch.no_grad():
                target = teacher(images)
            loss = F.mse_loss(student(images), target)
            for adapter, own, other in zip(adapters, s.features, t.features, strict=True):
                loss = loss + 0.1 * plain_affinity(adapter(own), other)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 20)
        for weight, kept in zip(quantized, latent, strict=True):
            weight.data = kept
        optimizer.step()

    return step


def against_plain(suite: Suite, batch: int, rounds: int, workers: int, compiling: bool) -> pd.DataFrame:
    """One FAQD student and eight, taught by a ResNet-110, against the plain implementation."""
    teacher = "resnet110"
    calls, students = {"plain": plain_step(suite, teacher, workers)}, {"plain": 0}
    for how, chosen in ({"suite": suite} | ({"suite, compiled": with_compiling(suite)} if compiling else {})).items():
        configs = [
            chosen.student("FAQD", weight_bits=bits, teacher=teacher, affinity_weight=weight)
            for weight in (30.0, 10.0)
            for bits in (1, 2, 4, 32)
        ]
        for count in LEAST_AGAINST_PLAIN:
            name = f"{how}, {count} student{'s' * (count > 1)}"
            calls[name], students[name] = cohort_step(chosen, configs[:count], teacher), count
    memory = peaks(calls, suite.device)
    times = take_turns(calls, rounds, suite.device)
    rows = [
        row(times[name], count * batch or PLAIN_BATCH, implementation=name, teacher=teacher, peak_MiB=memory[name])
        for name, count in students.items()
    ]
    for count, found in zip(students.values(), rows, strict=True):
        found["times the plain images/s"] = found["images_per_second"] / rows[0]["images_per_second"]
        if count:
            least = LEAST_AGAINST_PLAIN[count]
            found |= {"wanted": f"≥ {least}", "met": found["times the plain images/s"] >= least}
    return pd.DataFrame(rows)


def figure_of(frame: pd.DataFrame):
    """Student-images a second against the size of the cohort."""
    shown = frame.assign(x=frame["students"], y=frame["images_per_second"], series=frame["teacher"], kind="measured")
    return charts.scaling(shown.assign(panel="cohorts"), "students side by side", "student-images a second")


PARTS = ("steps", "cohorts", "plain")


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which parts (all)")
    parser.add_argument(
        "--teachers",
        nargs="+",
        default=["resnet20", "resnet56", "resnet110"],
        help="of the cohorts; the first, of the steps, too",
    )
    parser.add_argument("--batch", type=int, default=128, help="images a step of the suite's own loop (128)")
    parser.add_argument("--workers", type=int, default=0, help="of the plain implementation's DataLoader (0)")
    parser.add_argument(
        "--compile", action="store_true", help="compiled students and teachers, too (about 5 minutes more)"
    )
    arguments = parse(parser)
    machine = environment(arguments.device)
    announce(machine)
    batch, rounds = arguments.batch, arguments.rounds
    with tempfile.TemporaryDirectory() as scratch:
        suite = suite_in(Path(scratch), batch, arguments.device)
        parts = {
            "steps": lambda: steps(suite, batch, rounds, arguments.teachers[0], arguments.compile),
            "cohorts": lambda: cohorts(suite, batch, rounds, arguments.teachers),
            "plain": lambda: against_plain(suite, batch, rounds, arguments.workers, arguments.compile),
        }
        result = {"environment": machine, "precision": suite.precision}
        for name in arguments.parts:
            with own_stream(suite.device), exact_kernels():
                frame = parts[name]()
            result[name] = show(f"{name}, {suite.precision}", frame)
            if name == "cohorts":
                print(*charts.save(figure_of(frame), arguments.out, "training"))
            write(arguments.out, "training", result)


if __name__ == "__main__":
    main()
