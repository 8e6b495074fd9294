"""Small networks without labels, from the same teacher, pictures and updates: `compress`, and others' tools.

    python benchmarks/rivals_of_compress.py results/reference/cpu-cifar10-jpeg
    pip install brevitas onnxoptimizer torchao     # what is not installed is left out, with the reason

Each student begins with the weights of the folder's ResNet-20 teacher and learns from its answers alone:

- *rounded*: quantized after training, steps calibrated, batch normalisation estimated again;
- *compress*: logits and feature affinity, by :func:`faqd_lib.compress`, without search;
- *Brevitas*: logits alone; all scales are learned. Weights have one scale per output channel, which begins at the least
  squared error (4 bits) or at the mean absolute weight (1 bit). Scales of activations begin at the least squared error
  on the first batches;
- *torchao*: PT2E quantization-aware training at 8 bits, with its x86 quantizer; logits alone. It has no 4-bit or 1-bit
  convolutions that train.

All train with the same batches, learning rate, schedule and clipping. Scales of quantizers have no weight decay.
Agreement is measured on pictures held out from training. The file is what each tool deploys: packed (ours), ONNX with
integers (Brevitas), exported program (torchao). Minutes are not compared. Prints a table; writes
``rivals_of_compress.json`` to ``--out``. With ``--only``, rows of other students stay as the file holds them. Each row
names the commit that made it.
"""

import copy
import importlib.util
import json
import math
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from reporting import announce, options, parse, show, write
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

RATE, CLIP, SEED = 0.02, 20.0, 0
DECAY = 5e-4  # weight decay, not of quantizers' scales
COLLECTED = 10  # batches that Brevitas takes scales of activations from, before the first update; its default is 300


class Made(NamedTuple):
    """A student in evaluation mode, and the bytes of its file or why it has none."""

    model: Callable[[torch.Tensor], torch.Tensor]
    size: int | None
    note: str = ""


class Given(NamedTuple):
    """What all students share."""

    teacher: nn.Module
    pictures: Pictures
    expects: Preprocessing
    batches: PictureBatches
    updates: int
    scratch: Path


def distilled(model: nn.Module, given: Given) -> None:
    """Train on the teacher's logits: the schedule of :mod:`faqd_lib.compression.planning`, and its optimizer."""
    scales = [value for name, value in model.named_parameters() if "scaling_impl" in name]  # Brevitas' name for them
    weights = [value for name, value in model.named_parameters() if "scaling_impl" not in name]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)
    warm_up, done, epoch = max(1.0, planning.WARMUP_SHARE * given.updates), 0, 0
    while done < given.updates:
        for batch in islice(given.batches.epoch(epoch), given.updates - done):
            part = max(0.0, (done - warm_up) / max(1.0, given.updates - warm_up))
            rate = RATE * (done + 1) / warm_up if done < warm_up else RATE * 0.5 * (1 + math.cos(math.pi * part))
            for group in optimizer.param_groups:
                group["lr"] = min(RATE, rate)
            with torch.no_grad():
                wanted = given.teacher(batch.images)
            loss = F.mse_loss(model(batch.images), wanted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            done += 1
        epoch += 1


def rounded(given: Given, weight_bits: int, activation_bits: int) -> Made:
    model = quantize(copy.deepcopy(given.teacher), weight_bits, activation_bits, per_channel=True)
    model.to(memory_format=torch.channels_last)
    calibrate(model, next(given.batches.epoch(0)).images)
    reestimate_batch_norm(model, (batch.images for batch in islice(given.batches.epoch(0), 8)))
    path = save_packed(model.eval(), given.scratch / "rounded.safetensors")
    return Made(load_packed(path, copy.deepcopy(given.teacher)).eval(), path.stat().st_size)


def compressed(given: Given, weight_bits: int, activation_bits: int) -> Made:
    out = given.scratch / f"compress-{weight_bits}-{activation_bits}"
    made = compress(
        given.teacher, given.pictures, out=out, weight_bits=weight_bits, activation_bits=activation_bits,
        preprocessing=given.expects, epochs=given.updates / len(given.batches), learning_rate=RATE,
        affinity_weight=planning.AFFINITY_WEIGHT, batch_size=given.batches.batch_size, flip=given.batches.flip,
        seed=SEED, device="cpu", precision="float32",
    )  # fmt: skip
    path = out / made.card.students[0].packed.name
    return Made(load_packed(path, copy.deepcopy(given.teacher)).eval(), path.stat().st_size)


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
    model = brevitas_network(given.teacher, weight_bits, activation_bits).train()
    with torch.no_grad():  # begins the scales; those of weights in the first pass
        for batch in islice(given.batches.epoch(0), COLLECTED):
            model(batch.images)
    distilled(model, given)
    model.eval()
    if weight_bits == 1:
        return Made(model, None, "no export of binary weights to ONNX integers")
    from brevitas.export import export_onnx_qcdq

    path = given.scratch / "brevitas.onnx"
    example = torch.zeros(1, 3, given.expects.image_size, given.expects.image_size)
    export_onnx_qcdq(copy.deepcopy(model), args=example, export_path=str(path), dynamo=False)
    return Made(model, path.stat().st_size, "4-bit weights in bytes")


def by_torchao(given: Given, weight_bits: int, activation_bits: int) -> Made:
    from torch.export import Dim, export, save
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = (next(given.batches.epoch(0)).images[:2].contiguous(),)
    shapes = ({0: Dim("batch", min=2, max=1024)},)
    model = export(copy.deepcopy(given.teacher).train(), example, dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    model = prepare_qat_pt2e(model, quantizer)
    move_exported_model_to_train(model)
    distilled(model.requires_grad_(True), given)
    move_exported_model_to_eval(model)
    model = convert_pt2e(model)
    program, path = export(model, example, dynamic_shapes=shapes), given.scratch / "torchao.pt2"
    save(program, path)
    held = [*program.state_dict.values(), *program.constants.values()]
    integers = sum(value.numel() for value in held if isinstance(value, torch.Tensor) and value.dtype == torch.int8)
    return Made(model, path.stat().st_size, f"{integers:,} bytes of it are int8 weights")


STUDENTS = {
    "rounded": (rounded, "", ((4, 4), (1, 32))),
    "compress": (compressed, "", ((4, 4), (1, 32))),
    "Brevitas": (by_brevitas, "brevitas", ((4, 4), (1, 32))),
    "torchao": (by_torchao, "torchao", ((8, 8),)),
}


@torch.no_grad()
def logits(model: Callable, pixels: torch.Tensor, normalizer: Normalizer) -> torch.Tensor:
    return torch.cat([model(normalizer(part).contiguous()).detach() for part in pixels.split(250)])


def row(name: str, bits: str, made: Made, given: Given, taught: torch.Tensor, test: Images, trained: bool) -> dict:
    normalizer = given.expects.normalizer("cpu")
    share = agreement(logits(made.model, given.pictures.held_out[:], normalizer), taught)
    low, high = share.interval
    right = logits(made.model, test.pixels, normalizer).argmax(1) == test.labels
    updates = given.updates if trained else 0
    return {
        "student": name, "bits": bits, "updates": updates, "pictures seen": updates * given.batches.batch_size,
        "bytes of the file": made.size, "agreement (%)": share.percent,
        "95 % interval": f"{low:.1f} to {high:.1f}", "held out": share.total,
        "test images": len(test), "test accuracy (%)": 100 * float(right.double().mean()), "note": made.note,
        "commit": f"{commit():.8}",
    }  # fmt: skip


def joined(rows: list[dict], file: Path) -> list[dict]:
    """The rows, and those of other students that the file holds, in the order of ``STUDENTS``."""
    new, order = {row["student"] for row in rows}, ["teacher", *STUDENTS]
    old = json.loads(file.read_text())["rows"] if file.is_file() else []
    return sorted([row for row in old if row["student"] not in new] + rows, key=lambda row: order.index(row["student"]))


def main() -> None:
    parser = options(__doc__, rounds=2)
    parser.add_argument("folder", type=Path, help="a results folder with a trained ResNet-20 teacher")
    parser.add_argument("--updates", type=int, default=400, help="of each student (400)")
    parser.add_argument("--batch", type=int, default=128, help="pictures an update (128)")
    parser.add_argument("--held-out", type=int, default=5000, help="pictures that agreement is measured on (5,000)")
    parser.add_argument("--test-images", type=int, default=0, help="a class-balanced part of the test images (0: all)")
    parser.add_argument(
        "--only", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="some students; other rows of the file stay"
    )
    arguments = parse(parser)
    suite = Suite.read(arguments.folder)
    teacher = suite.model(suite.teacher()).cpu().eval().requires_grad_(False)
    expects = Preprocessing(suite.data.image_size, tuple(suite.data.mean), tuple(suite.data.std))
    opened = split_pictures(suite.splits.training.pixels, held_out=arguments.held_out, seed=SEED)
    batches = PictureBatches(opened.train, arguments.batch, SEED, expects.normalizer("cpu"), flip=suite.data.flip)
    machine = environment("cpu")
    for name in ("brevitas", "torchao"):
        machine[name] = version(name) if importlib.util.find_spec(name) else "not installed"
    announce(machine)
    test = suite.splits.test
    if arguments.test_images:
        test = datasets.subset(test, arguments.test_images, SEED)
    rows, left_out = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        given = Given(teacher, opened, expects, batches, arguments.updates, Path(scratch))
        taught = logits(teacher, opened.held_out[:], expects.normalizer("cpu"))
        size = sum(value.numel() * value.element_size() for value in teacher.state_dict().values())
        rows.append(row("teacher", "float", Made(teacher, size), given, taught, test, trained=False))
        for name in arguments.only:
            make, package, widths = STUDENTS[name]
            if package and machine[package] == "not installed":
                left_out[name] = f"{package} is not installed: pip install {package}"
                print(f"left out: {name}, {left_out[name]}", flush=True)
                continue
            for weight_bits, activation_bits in widths:
                torch.manual_seed(SEED)
                made = make(given, weight_bits, activation_bits)
                bits = f"{weight_bits}W{activation_bits}A"
                rows.append(row(name, bits, made, given, taught, test, trained=make is not rounded))
                print(rows[-1], flush=True)
    if arguments.only != list(STUDENTS):
        rows = joined(rows, arguments.out / "rivals_of_compress.json")
    result = {"environment": machine, "rows": show("rivals of compress", pd.DataFrame(rows)), "left_out": left_out}
    write(arguments.out, "rivals_of_compress", result)


if __name__ == "__main__":
    main()
