"""Random small networks through every station: quantize, calibrate, train, describe, copy, load, pack, export.

At each station the outputs keep their bits, or a documented error names what cannot be done. ONNX Runtime adds in
another order, so its outputs may differ where a value lies on the edge between two levels of an activation.

    python tests/export/test_fuzzed_networks.py 5000    # prints the number of each outcome
"""

import copy
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import onnxruntime
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from faqd_lib.export.onnx import OnnxExportError, export_onnx
from faqd_lib.export.packed import load_packed, save_packed
from faqd_lib.quantization.description import describe
from faqd_lib.quantization.network import calibrate, dequantize, quantize
from faqd_lib.quantization.weights import FLOAT_BITS

ACTIVATIONS = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "relu in place": lambda: nn.ReLU(inplace=True), "silu": nn.SiLU,
    "gelu": nn.GELU, "leaky": nn.LeakyReLU, "hardswish": nn.Hardswish, "none": nn.Identity,
}  # fmt: skip
IMAGES, CHANNELS, SIZE, CLASSES = 8, 3, 12, 5


class Unit(nn.Module):
    """A convolution, perhaps with normalisation and activation."""

    def __init__(self, inputs: int, outputs: int, spec: dict) -> None:
        super().__init__()
        groups = max(g for g in (1, spec["groups"]) if inputs % g == 0 and outputs % g == 0)
        kernel = spec["kernel"]
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, spec["stride"], padding=kernel // 2, groups=groups, bias=spec["bias"]
        )
        self.norm = nn.BatchNorm2d(outputs) if spec["norm"] else nn.Identity()
        self.act = ACTIVATIONS[spec["act"]]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class Stage(nn.Module):
    """Units in a row, as a residual block, side by side, or one unit twice."""

    def __init__(self, inputs: int, size: int, spec: dict) -> None:
        super().__init__()
        self.graph, width, unit = spec["graph"], spec["width"], spec["unit"]
        plain = unit | {"stride": 1}
        self.outputs = 2 * width if self.graph == "cat" else width
        self.first = Unit(inputs, width, unit)
        if self.graph == "cat":
            self.second = Unit(inputs, width, unit)
        elif self.graph != "row":
            self.second = Unit(width, width, plain)
        self.size = -(-size // unit["stride"])
        pool = spec["pool"] if self.size > 1 else "none"
        self.pool = {"max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2), "none": nn.Identity()}[pool]
        self.size //= 1 if pool == "none" else 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.graph == "residual":
            y = y + self.second(y)
        elif self.graph == "cat":
            y = torch.cat([y, self.second(x)], 1)
        elif self.graph == "twice":
            y = self.second(self.second(y))
        return self.pool(y)


class Network(nn.Module):
    """Stages, global pooling and a classifier of one or two layers."""

    def __init__(self, spec: dict) -> None:
        super().__init__()
        stages, width, size = [], CHANNELS, SIZE
        for stage in spec["stages"]:
            stages.append(Stage(width, size, stage))
            width, size = stages[-1].outputs, stages[-1].size
        self.stages = nn.Sequential(*stages)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        hidden = [nn.Linear(width, 6), nn.ReLU()] if spec["hidden"] else []
        self.head = nn.Sequential(*hidden, nn.Linear(6 if hidden else width, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.flat(self.pool(self.stages(x))))


UNIT = st.fixed_dictionaries(
    {
        "kernel": st.sampled_from([1, 3]), "stride": st.sampled_from([1, 2]), "groups": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(), "norm": st.booleans(), "act": st.sampled_from(list(ACTIVATIONS)),
    }
)  # fmt: skip
STAGE = st.fixed_dictionaries(
    {
        "width": st.sampled_from([2, 4, 6]), "unit": UNIT,
        "graph": st.sampled_from(["row", "residual", "cat", "twice"]),
        "pool": st.sampled_from(["none", "max", "average"]),
    }
)  # fmt: skip
NETWORKS = st.fixed_dictionaries(
    {"stages": st.lists(STAGE, min_size=1, max_size=3), "hidden": st.booleans(), "seed": st.integers(0, 2**16)}
)
SOME_BITS = st.tuples(st.sampled_from([1, 2, 3, 4, 5, 8, 32]), st.sampled_from([1, 2, 4, 8, 32])).filter(
    lambda bits: bits != (FLOAT_BITS, FLOAT_BITS)
)
POLICIES = st.fixed_dictionaries(
    {
        "bits": SOME_BITS,
        "first_layer": st.sampled_from(["quantize", "float"]), "last_layer": st.sampled_from(["quantize", "float"]),
        "per_channel": st.booleans(), "step_gradient": st.sampled_from(["lsq", "coarse", "frozen"]),
    }
)  # fmt: skip


def build(spec: dict) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["seed"])
        return Network(spec)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(IMAGES, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


def through_all_stations(spec: dict, policy: dict, folder: Path) -> str:
    """Take one network through every station; returns the outcome in words."""
    model, images = build(spec), draw(spec["seed"])
    state = copy.deepcopy(model.state_dict())
    before = outputs(copy.deepcopy(model), images)
    try:
        quantize(model, **policy)
    except ValueError as error:
        refusal = str(error).split(":")[0]
    else:
        refusal = ""
    if refusal:
        assert "no nn.ReLU" in refusal or "kept float by policy" in refusal
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        return f"quantize refuses: {refusal}"
    undone = dequantize(copy.deepcopy(model))
    assert torch.equal(outputs(undone, images), before)
    calibrate(model, images)
    step(model, images)
    expected = outputs(model, images)
    assert expected.isfinite().all()
    check_description(model, images, policy)
    assert torch.equal(outputs(copy.deepcopy(model), images), expected)
    loaded = quantize(build(spec), **policy)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(outputs(loaded, images), expected)
    packed = load_packed(save_packed(model, folder / "packed.safetensors"), build(spec))
    assert torch.equal(outputs(packed, images), expected)
    try:
        file = export_onnx(model, folder / "network.onnx", images.shape[1:])
    except OnnxExportError as error:
        return f"export refuses: {str(error)[:60]}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more threads would spin while they wait
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"images": images.numpy()})
    off = (torch.from_numpy(theirs) - expected).abs().amax(1) > 1e-4 * (1 + expected.abs().amax())
    if policy["activation_bits"] == FLOAT_BITS:
        assert not off.any()
    assert off.sum() <= 2, f"{int(off.sum())} of {IMAGES} images differ"
    return "the same bits, and ONNX within the edges of levels" if off.any() else "the same bits, and ONNX the same"


def step(model: nn.Module, images: torch.Tensor) -> None:
    """One training step; every parameter that takes part has a finite gradient."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    model.train()(images).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
    assert any(p.grad is not None for p in parameters)
    optimizer.step()


def check_description(model: nn.Module, images: torch.Tensor, policy: dict) -> None:
    """Every layer and activation is listed, with bits that some policy allows."""
    rows = {row.layer: row for row in describe(model, images)}
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("Parametrized")
        if kind in ("Conv2d", "Linear"):
            assert rows[name].bits in (policy["weight_bits"], FLOAT_BITS)
        elif kind == "QuantizedReLU":
            assert rows[name].bits == policy["activation_bits"]


def counted(examples: int) -> Counter[str]:
    """The number of each outcome over so many networks.

    Raises:
        AssertionError: a station changed bits; hypothesis prints the smallest such network.
    """
    found: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(NETWORKS, POLICIES)
    def check(spec: dict, policy: dict) -> None:
        policy = dict(zip(("weight_bits", "activation_bits"), policy.pop("bits"), strict=True)) | policy
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found[through_all_stations(spec, policy, Path(folder))] += 1

    check()
    return found


def test_random_networks_keep_their_bits_at_every_station():
    found = counted(100)
    assert sum(found.values()) >= 100
    assert sum(count for outcome, count in found.items() if outcome.startswith("the same bits")) > 70


if __name__ == "__main__":
    for outcome, count in counted(int(sys.argv[1])).most_common():
        print(f"{count:6}  {outcome}")
