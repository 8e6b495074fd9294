"""Small networks without labels, from the same teacher, pictures and CPU minutes: `compress`, and others' tools.

    python benchmarks/rivals_of_compress.py results/reference/cpu-cifar10-jpeg --cpu-minutes 3 --seeds 1 2 3
    pip install brevitas onnxoptimizer torchao     # what is not installed is left out, with the reason

Each student begins with the weights of the folder's ResNet-20 teacher and learns from its answers alone:

- *rounded*: quantized after training, steps calibrated, batch normalisation estimated again;
- *compress*: logits and feature affinity, by :func:`faqd_lib.compress`;
- *Brevitas*: logits alone; all scales are learned. Weights have one scale per output channel, which begins at the least
  squared error (4 bits) or at the mean absolute weight (1 bit). Scales of activations begin at the least squared error
  on the first batches;
- *torchao*: PT2E quantization-aware training at 8 bits, with its x86 quantizer; logits alone. It has no 4-bit or 1-bit
  convolutions that train.

All have the same order of batches, schedule, clipping and CPU time of this process (``time.process_time``). The time
counts building, tracing, compiling, calibration, timing, search and training. It does not count writing files or
measuring. A schedule must know its length: each student times three updates after two that warm up. Each tool finds its
learning rate as ``compress`` does. If there is time, four candidates are trained, and training pictures that no
candidate saw decide. Otherwise the rate is the usual one; ``--rate`` sets it for the other tools. *compress* also
searches the affinity weight. The other tools plan again after their search, for the time that is left. The last state
counts.
Scales of quantizers have no weight decay.

Agreement is measured on pictures held out from training, the same for all seeds; a seed changes order and augmentation.
The file is what each tool deploys: packed (ours), ONNX with integers (Brevitas), exported program (torchao). Prints
tables; writes ``rivals_of_compress.json`` to ``--out`` after each student. Results in
the file stay if they were made with the same split, batch and test images. ``--again`` names students to train
anew. Each cell names the commit that made it.
"""

import argparse
import copy
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F
from reporting import announce, options, parse, show, write
from scipy.stats import t
from torch import nn

from faqd_lib import calibrate, compress, load_packed, quantize, reestimate_batch_norm, save_packed
from faqd_lib.compression import planning
from faqd_lib.compression.measures import agreement
from faqd_lib.data import datasets
from faqd_lib.data.batches import Normalizer
from faqd_lib.data.images import Images
from faqd_lib.data.pictures import PictureBatches, Pictures, split_pictures
from faqd_lib.data.preprocessing import Preprocessing
from faqd_lib.quantization.network import replace_modules
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.measure import commit, environment

NAME = "rivals_of_compress"
CLIP = 20.0
DECAY = 5e-4  # weight decay, not of quantizers' scales
COLLECTED = 4  # batches that Brevitas takes scales of activations from, 3 s each; its default is 300
JUDGED = 1000  # training pictures that judge a candidate of a search, as in compress
WARM_UP, TIMED = 2, 3  # updates, as in compress


class Trained(NamedTuple):
    """A training: updates, the learning rate that the search found, CPU seconds."""

    updates: int = 0
    rate: float | None = None
    seconds: float = 0.0


class Made(NamedTuple):
    """A student in evaluation mode, its training, and the bytes of its file or why it has none."""

    model: Callable[[torch.Tensor], torch.Tensor]
    trained: Trained
    size: int | None
    note: str = ""


class Given(NamedTuple):
    """What all students share."""

    teacher: nn.Module
    pictures: Pictures
    expects: Preprocessing
    batches: PictureBatches
    seed: int
    seconds: float  # CPU seconds of a training
    rate: float | None  # learning rate of the tools that train, compress apart; None for that of compress
    scratch: Path

    def asked(self, student: str) -> float | None:
        """The learning rate that a student is told to take; None if it finds its own, or does not train."""
        return self.rate if student in ("Brevitas", "torchao") else None


def distilled(model: nn.Module, given: Given, batches: PictureBatches, updates: int, rate: float) -> list[float]:
    """Train on the teacher's logits: the schedule of :mod:`faqd_lib.compression.planning`, and its optimizer.

    Returns the CPU time after each update.
    """
    scales = [value for name, value in model.named_parameters() if "scaling_impl" in name]  # Brevitas' name for them
    weights = [value for name, value in model.named_parameters() if "scaling_impl" not in name]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    warm_up, times, epoch = max(1.0, planning.WARMUP_SHARE * updates), [], 0
    while len(times) < updates:
        for batch in islice(batches.epoch(epoch), updates - len(times)):
            done = len(times)
            part = max(0.0, (done - warm_up) / max(1.0, updates - warm_up))
            now = (done + 1) / warm_up if done < warm_up else 0.5 * (1 + math.cos(math.pi * part))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, now)
            with torch.no_grad():
                wanted = given.teacher(batch.images)
            loss = F.mse_loss(model(batch.images), wanted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            times.append(time.process_time())
        epoch += 1
    return times


class Modes(NamedTuple):
    """How a tool's network is put into training and evaluation."""

    train: Callable[[nn.Module], object] = nn.Module.train
    evaluate: Callable[[nn.Module], object] = nn.Module.eval


USUAL = Modes()


def learned(initial: nn.Module, given: Given, began: float, modes: Modes = USUAL) -> tuple[nn.Module, Trained]:
    """A copy of ``initial``, trained until the CPU time is used; other copies search the learning rate before it.

    There is no search where *compress* would have none. ``began`` is the CPU time at which the tool's work began.
    """

    def fresh() -> nn.Module:
        model = copy.deepcopy(initial).requires_grad_(True)
        modes.train(model)
        return model

    def updates_beside(trials: int) -> int:
        left = given.seconds - (time.process_time() - began)
        return planning.updates_within(None, left, len(given.batches), seconds, trials)

    times = distilled(fresh(), given, given.batches, WARM_UP + TIMED, planning.LEARNING_RATES[0])
    seconds = statistics.mean(after - before for before, after in pairwise(times[WARM_UP - 1 :]))
    trials, rate = len(planning.LEARNING_RATES) if given.rate is None else 0, given.rate or planning.LEARNING_RATE
    if updates := planning.trial_updates(updates_beside(trials), trials):
        rate = best_rate(fresh, given, updates, modes)
    updates = updates_beside(0)
    model = fresh()
    distilled(model, given, given.batches, updates, rate)
    modes.evaluate(model)
    return model, Trained(updates, rate, time.process_time() - began)


def best_rate(fresh: Callable[[], nn.Module], given: Given, updates: int, modes: Modes) -> float:
    """The learning rate that agrees most often with the teacher on training pictures not trained on."""
    train_set, normalizer = given.pictures.train, given.batches.normalizer
    judging = torch.zeros(len(train_set), dtype=torch.bool)
    judging[:: max(5, -(-len(train_set) // JUDGED))] = True
    judged, searched = (replace(train_set, indices=train_set.indices[some]) for some in (judging, ~judging))
    batches = PictureBatches(searched, given.batches.batch_size, given.seed, normalizer, flip=given.batches.flip)
    taught, found = logits(given.teacher, judged[:], normalizer), {}
    for rate in planning.LEARNING_RATES:
        model = fresh()
        distilled(model, given, batches, updates, rate)
        modes.evaluate(model)
        said = logits(model, judged[:], normalizer)
        if bool(said.isfinite().all()):
            found[rate] = agreement(said, taught).count, -float(F.cross_entropy(said, taught.argmax(1)))
    return max(found, key=found.__getitem__)


def rounded(given: Given, weight_bits: int, activation_bits: int) -> Made:
    began = time.process_time()
    model = quantize(copy.deepcopy(given.teacher), weight_bits, activation_bits, per_channel=True)
    model.to(memory_format=torch.channels_last)
    calibrate(model, next(given.batches.epoch(0)).images)
    reestimate_batch_norm(model, (batch.images for batch in islice(given.batches.epoch(0), 8)))
    trained = Trained(seconds=time.process_time() - began)
    path = save_packed(model.eval(), given.scratch / "rounded.safetensors")
    return Made(load_packed(path, copy.deepcopy(given.teacher)).eval(), trained, path.stat().st_size)


def compressed(given: Given, weight_bits: int, activation_bits: int) -> Made:
    """The call itself plans ``hours``; its clock is the CPU time here."""
    out = given.scratch / f"compress-{weight_bits}-{activation_bits}-{given.seed}"
    began, ended = time.process_time(), []

    def say(line: str) -> None:
        print(f"  {line}", flush=True)
        if line.startswith("measuring"):  # said when the training is done
            ended.append(time.process_time())

    with mock.patch.object(time, "perf_counter", time.process_time):
        made = compress(
            given.teacher, given.pictures, out=out, weight_bits=weight_bits, activation_bits=activation_bits,
            preprocessing=given.expects, hours=given.seconds / 3600, batch_size=given.batches.batch_size,
            flip=given.batches.flip, seed=given.seed, device="cpu", precision="float32", say=say,
        )  # fmt: skip
    (student,) = made.card.students
    path = out / student.packed.name
    trained = Trained(made.card.plan.updates, student.learning_rate, ended[0] - began)
    note = f"affinity weight {student.affinity_weight:g}"
    return Made(load_packed(path, copy.deepcopy(given.teacher)).eval(), trained, path.stat().st_size, note)


def brevitas_network(teacher: nn.Module, weight_bits: int, activation_bits: int) -> nn.Module:
    """Brevitas' layers where :func:`quantize` puts quantizers: every convolution and ReLU; the classifier is float.

    All scales are parameters. Brevitas' own binary quantizer has the constant scale 0.1 and clips the weights to it;
    this one keeps the teacher's weights, and its scales begin at the mean absolute weight of an output channel.
    """
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerChannelFloatMSE, Uint8ActPerTensorFloatMSE

    quantizer = {"weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": weight_bits}
    if weight_bits == 1:
        quantizer = {
            "weight_quant": Int8WeightPerChannelFloat, "weight_quant_type": "binary", "weight_bit_width": 1,
            "weight_scaling_impl_type": "parameter_from_stats", "weight_scaling_stats_op": "ave",
        }  # fmt: skip
    model, made = copy.deepcopy(teacher).requires_grad_(True), {}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            made[layer] = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
                bias=layer.bias is not None, **quantizer,
            )  # fmt: skip
            made[layer].load_state_dict(layer.state_dict(), strict=False)
        elif isinstance(layer, nn.ReLU) and activation_bits < 32:
            made[layer] = qnn.QuantReLU(
                act_quant=Uint8ActPerTensorFloatMSE, bit_width=activation_bits, collect_stats_steps=COLLECTED
            )
    replace_modules(model, made)
    return model


def by_brevitas(given: Given, weight_bits: int, activation_bits: int) -> Made:
    importlib.import_module("brevitas.nn")  # before the clock starts
    began = time.process_time()
    model = brevitas_network(given.teacher, weight_bits, activation_bits).train()
    with torch.no_grad():  # begins the scales; those of weights in the first pass
        for batch in islice(given.batches.epoch(0), COLLECTED):
            model(batch.images)
    model, trained = learned(model, given, began)
    if weight_bits == 1:
        return Made(model, trained, None, "no export of binary weights to ONNX integers")
    from brevitas.export import export_onnx_qcdq

    path = given.scratch / "brevitas.onnx"
    example = torch.zeros(1, 3, given.expects.image_size, given.expects.image_size)
    export_onnx_qcdq(copy.deepcopy(model), args=example, export_path=str(path), dynamo=False)
    return Made(model, trained, path.stat().st_size, "4-bit weights in bytes")


def by_torchao(given: Given, weight_bits: int, activation_bits: int) -> Made:
    from torch.export import Dim, export, save
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    began = time.process_time()
    example = (next(given.batches.epoch(0)).images[:2].contiguous(),)
    shapes = ({0: Dim("batch", min=2, max=1024)},)
    model = export(copy.deepcopy(given.teacher).train(), example, dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    model = prepare_qat_pt2e(model, quantizer)
    modes = Modes(move_exported_model_to_train, move_exported_model_to_eval)
    model, trained = learned(model, given, began, modes)
    model = convert_pt2e(model)
    program, path = export(model, example, dynamic_shapes=shapes), given.scratch / "torchao.pt2"
    save(program, path)
    held = [*program.state_dict.values(), *program.constants.values()]
    integers = sum(value.numel() for value in held if isinstance(value, torch.Tensor) and value.dtype == torch.int8)
    return Made(model, trained, path.stat().st_size, f"{integers:,} bytes of it are int8 weights")


STUDENTS = {
    "rounded": (rounded, "", ((1, 32), (4, 4))),
    "compress": (compressed, "", ((1, 32), (4, 4))),
    "Brevitas": (by_brevitas, "brevitas", ((1, 32), (4, 4))),
    "torchao": (by_torchao, "torchao", ((8, 8),)),
}


BITS = ("1W32A", "4W4A", "8W8A")


@torch.no_grad()
def logits(model: Callable, pixels: torch.Tensor, normalizer: Normalizer) -> torch.Tensor:
    return torch.cat([model(normalizer(part).contiguous()).detach() for part in pixels.split(250)])


def cell(name: str, bits: str, made: Made, given: Given, taught: torch.Tensor, test: Images) -> dict:
    """What is known of one student of one seed."""
    normalizer = given.expects.normalizer("cpu")
    share = agreement(logits(made.model, given.pictures.held_out[:], normalizer), taught)
    right = logits(made.model, test.pixels, normalizer).argmax(1) == test.labels
    return {
        "student": name, "bits": bits, "seed": given.seed, "rate asked": given.asked(name),
        "minutes asked": given.seconds / 60, "CPU minutes": made.trained.seconds / 60,
        "updates": made.trained.updates, "learning rate": made.trained.rate, "bytes of the file": made.size,
        "agreement (%)": share.percent, "test accuracy (%)": 100 * float(right.double().mean()), "note": made.note,
        "commit": f"{commit():.8}",
    }  # fmt: skip


def with_interval(values: list[float]) -> str:
    """Mean and its 95 % interval over seeds, by Student's t; the mean alone for one seed."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} ± {half:.2f}"


def by_student(cells: list[dict]) -> dict[tuple[str, str, float | None], list[dict]]:
    """The cells of each student, its bits and the learning rate that it was told: one for each seed."""
    groups = {}
    for one in cells:
        groups.setdefault((one["student"], one["bits"], one["rate asked"]), []).append(one)
    return groups


def rows_of(cells: list[dict]) -> list[dict]:
    """One row for the seeds of a student, its bits and the learning rate that it was told."""
    rows = []
    for (name, bits, _), group in by_student(cells).items():
        part = pd.DataFrame(group)
        notes, commits, rates = (
            ", ".join(dict.fromkeys(str(one) for one in part[column].dropna() if one))
            for column in ("note", "commit", "learning rate")
        )
        rows.append({
            "student": name, "bits": bits, "seeds": len(part), "CPU minutes": part["CPU minutes"].mean(),
            "updates": round(part["updates"].mean()), "learning rates": rates,
            "bytes of the file": part["bytes of the file"].iloc[0],
            "agreement (%)": with_interval(part["agreement (%)"].tolist()),
            "test accuracy (%)": with_interval(part["test accuracy (%)"].tolist()), "note": notes, "commit": commits,
        })  # fmt: skip
    return json.loads(pd.DataFrame(rows).to_json(orient="records"))


def differences(cells: list[dict]) -> list[dict]:
    """Pairs of students at the same bits, seed by seed: mean difference and 95 % interval, in points.

    Of a tool that was told several rates, the one counts with which it agrees most often.
    """
    groups, rows = by_student(cells), []

    def best(student: str, bits: str) -> dict[int, dict]:
        told = [group for (name, at, _), group in groups.items() if (name, at) == (student, bits)]
        found = max(told, key=lambda group: statistics.mean(one["agreement (%)"] for one in group), default=[])
        return {one["seed"]: one for one in found}

    for one, other in (("compress", "rounded"), ("compress", "Brevitas"), ("Brevitas", "rounded")):
        for bits in (bits for name, bits, _ in groups if name == "compress"):
            first, second = best(one, bits), best(other, bits)
            if seeds := sorted(first.keys() & second.keys()):
                gaps = {
                    name: with_interval([first[seed][name] - second[seed][name] for seed in seeds])
                    for name in ("agreement (%)", "test accuracy (%)")
                }
                rows.append({"compared": f"{one} − {other}", "bits": bits, "seeds": len(seeds), **gaps})
    return rows


@dataclass
class Results:
    """All cells, in the file that each new one is written to."""

    out: Path
    settings: dict[str, float]
    machine: dict[str, str | int]
    left_out: dict[str, str]
    cells: list[dict]

    def has(self, name: str, bits: str, seed: int, rate: float | None = None) -> bool:
        return any(
            (one["student"], one["bits"], one["seed"], one["rate asked"]) == (name, bits, seed, rate)
            for one in self.cells
        )

    def add(self, one: dict) -> None:
        order = ["teacher", *STUDENTS]
        self.cells = sorted([*self.cells, one], key=lambda one: order.index(one["student"]))
        tables = {"rows": rows_of(self.cells), "differences": differences(self.cells), "cells": self.cells}
        result = {"environment": self.machine, "settings": self.settings, **tables, "left_out": self.left_out}
        write(self.out, NAME, result)
        print(one, flush=True)


def kept(file: Path, settings: dict[str, float], again: list[str]) -> list[dict]:
    """The cells that a file holds with the same settings, without those of ``again``."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [one for one in before.get("cells", ()) if before["settings"] == settings and one["student"] not in again]


def arguments_of_the_command() -> argparse.Namespace:
    parser = options(__doc__, rounds=2)
    parser.add_argument("folder", type=Path, help="a results folder with a trained ResNet-20 teacher")
    parser.add_argument("--cpu-minutes", type=float, default=3.0, help="of each student's training (3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of order and augmentation (1 2 3)")
    parser.add_argument("--split-seed", type=int, default=0, help="of the held-out pictures and the test images (0)")
    parser.add_argument("--batch", type=int, default=64, help="pictures an update (64)")
    parser.add_argument("--held-out", type=int, default=2000, help="pictures that agreement is measured on (2,000)")
    parser.add_argument("--test-images", type=int, default=2000, help="a class-balanced part (2,000; 0: all)")
    parser.add_argument("--only", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="some students")
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=BITS, help="some bits")
    parser.add_argument("--rate", type=float, help="learning rate of other tools than compress (as compress)")
    parser.add_argument("--again", nargs="+", choices=STUDENTS, default=[], help="train these again")
    return parse(parser)


def main() -> None:
    arguments = arguments_of_the_command()
    suite = Suite.read(arguments.folder)
    teacher = suite.model(suite.teacher()).cpu().eval().requires_grad_(False)
    expects = Preprocessing(suite.data.image_size, tuple(suite.data.mean), tuple(suite.data.std))
    opened = split_pictures(suite.splits.training.pixels, held_out=arguments.held_out, seed=arguments.split_seed)
    normalizer, test = expects.normalizer("cpu"), suite.splits.test
    if arguments.test_images:
        test = datasets.subset(test, arguments.test_images, arguments.split_seed)
    machine = environment("cpu")
    for name in ("brevitas", "torchao"):
        machine[name] = version(name) if importlib.util.find_spec(name) else "not installed"
    announce(machine)
    left_out = {
        name: f"{package} is not installed: pip install {package}"
        for name, (_, package, _) in STUDENTS.items()
        if package and machine[package] == "not installed"
    }
    for name, reason in left_out.items():
        print(f"left out: {name}, {reason}", flush=True)
    names = ("split_seed", "batch", "held_out", "test_images")
    settings = {name: getattr(arguments, name) for name in names}
    before = kept(arguments.out / f"{NAME}.json", settings, arguments.again)
    results = Results(arguments.out, settings, machine, left_out, before)
    taught = logits(teacher, opened.held_out[:], normalizer)
    size = sum(value.numel() * value.element_size() for value in teacher.state_dict().values())
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            batches = PictureBatches(opened.train, arguments.batch, seed, normalizer, flip=suite.data.flip)
            given = Given(
                teacher, opened, expects, batches, seed, 60 * arguments.cpu_minutes, arguments.rate, Path(scratch)
            )
            if not results.has("teacher", "float", arguments.seeds[0]):
                results.add(cell("teacher", "float", Made(teacher, Trained(), size), given, taught, test))
            for name in arguments.only:
                make, _, widths = STUDENTS[name]
                for weight_bits, activation_bits in widths if name not in left_out else ():
                    bits = f"{weight_bits}W{activation_bits}A"
                    if bits in arguments.bits and not results.has(name, bits, seed, given.asked(name)):
                        torch.manual_seed(seed)
                        made = make(given, weight_bits, activation_bits)
                        results.add(cell(name, bits, made, given, taught, test))
    show("rivals of compress", pd.DataFrame(rows_of(results.cells)))
    show("differences", pd.DataFrame(differences(results.cells)))


if __name__ == "__main__":
    main()
