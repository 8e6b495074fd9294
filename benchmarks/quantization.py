"""Measure what quantization adds to a training step: ratios to the float network's step within one run.

    python benchmarks/quantization.py                  # a few minutes on 2 cores
    pip install brevitas && python benchmarks/quantization.py

A step of a ResNet-20 on random images, channels-last, is forward, cross-entropy, backward and SGD. The networks are
float, 1-bit weights (1W32A), and 1-bit weights with 4-bit activations (1W4A). The last is measured as the suite trains
it, without compiled kernels, and by Brevitas, if installed: 1-bit weights of fixed scale, 4-bit activations of learned
scale. Prints a table; writes ``quantization.json`` to ``--out``, by default ``results/benchmarks``.
"""

import importlib.util
import statistics
from collections.abc import Callable
from importlib.metadata import version

import pandas as pd
import torch
import torch.nn.functional as F
from reporting import announce, options, parse, show, spread, write
from torch import nn

from faqd_lib import build_model, calibrate, compile_activations, quantize
from faqd_lib.quantization.network import replace_modules
from faqd_lib.training.learner import precision_that_pays
from faqd_lib.utils.measure import environment, peak_bytes, take_turns

WANTED = {"1W32A": ("≤ 1.08", 1.08), "1W4A": ("≤ 1.25", 1.25)}


def brevitas_network(model: nn.Module) -> nn.Module:
    """The same network with Brevitas' layers in the places that ``quantize(model, 1, 4)`` would quantize."""
    import brevitas.nn as qnn
    from brevitas.quant import SignedBinaryWeightPerTensorConst, Uint8ActPerTensorFloat

    made: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            made[layer] = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
                bias=layer.bias is not None, weight_quant=SignedBinaryWeightPerTensorConst,
            )  # fmt: skip
            made[layer].load_state_dict(layer.state_dict(), strict=False)
        elif isinstance(layer, nn.ReLU):
            made[layer] = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=4)
    replace_modules(model, made)
    return model


def networks(device: str, images: torch.Tensor, precision: str) -> dict[str, nn.Module]:
    def fresh() -> nn.Module:
        return build_model("resnet20", 10, image_size=32, seed=1)

    made = {
        "float": fresh(),
        "1W32A": quantize(fresh(), weight_bits=1),
        "1W4A": quantize(fresh(), weight_bits=1, activation_bits=4),
        "1W4A, not compiled": quantize(fresh(), weight_bits=1, activation_bits=4),
        "1W4A, coarse": quantize(fresh(), weight_bits=1, activation_bits=4, step_gradient="coarse"),
    }
    if importlib.util.find_spec("brevitas"):
        made["1W4A, Brevitas"] = brevitas_network(fresh())
    for name, model in made.items():
        model.to(device, memory_format=torch.channels_last)
        if "Brevitas" not in name:  # Brevitas calibrates in the first steps
            calibrate(model, images)
        if name in ("1W4A", "1W4A, coarse") and torch.device(device).type == "cpu":
            compile_activations(model, torch.bfloat16 if precision == "bf16" else torch.float32)
        model.train()
    return made


Calls = dict[str, Callable[[], object]]


def training_steps(device: str, batch: int, precision: str) -> Calls:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), generator=generator).to(device)
    calls = {}
    for name, model in networks(device, images, precision).items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step(model=model, optimizer=optimizer):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        calls[name] = step
    return calls


def table(device: str, batch: int, precision: str, calls: Calls, times: dict[str, list[float]]) -> pd.DataFrame:
    rows = []
    for name, call in calls.items():
        # Ratios are taken within a round, because a machine that slows down for a while slows both of a pair.
        ratio = statistics.median(own / base for own, base in zip(times[name], times["float"], strict=True))
        wanted, limit = WANTED.get(name, ("", None))
        rows.append(
            {"precision": precision, "batch": batch, "network": name, **spread(times[name]),
             "peak_MiB": peak_bytes(call, device) / 2**20, "time / float": ratio, "wanted": wanted,
             "met": None if limit is None else ratio <= limit}
        )  # fmt: skip
    by_name = {row["network"]: row for row in rows}
    if "1W4A, Brevitas" in by_name:
        ours, theirs = by_name["1W4A"], by_name["1W4A, Brevitas"]
        theirs["times ours"] = theirs["median_ms"] / ours["median_ms"]
        theirs |= {"wanted": "≥ 3 times ours", "met": theirs["times ours"] >= 3}
    return pd.DataFrame(rows)


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=128, help="images a step (128)")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bf16"), help="float32, and bf16 where it pays")
    arguments = parse(parser)
    machine = environment(arguments.device)
    machine["brevitas"] = version("brevitas") if importlib.util.find_spec("brevitas") else "not installed"
    announce(machine)
    device, batch = arguments.device, arguments.batch
    # Emulated bf16 is so slow that nothing else would show beside it.
    precisions = arguments.precisions or dict.fromkeys(("float32", precision_that_pays(device)))
    calls = {precision: training_steps(device, batch, precision) for precision in precisions}
    times = {precision: take_turns(calls[precision], arguments.rounds, device) for precision in precisions}
    rows = []
    for precision in precisions:  # memory last: a process in which the profiler has run is slower ever after
        rows += show(precision, table(device, batch, precision, calls[precision], times[precision]))
    write(arguments.out, "quantization", {"environment": machine, "steps": rows})


if __name__ == "__main__":
    main()
