"""Rivals of feature affinity: values worked out by hand, their invariances, their place in the objective."""

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from fresh_process import run_fresh

from faqd_lib import DistillationObjective
from faqd_lib.affinity.rivals import RIVALS, ChannelDistillationLoss, rival
from faqd_lib.config import METHOD_OF_AFFINITY, Affinity, ConfigurationError, Method, ObjectiveConfig
from faqd_lib.quantization.relu import QuantizedReLU
from faqd_lib.training.objective import AFFINITY_LOSSES
from faqd_lib.training.objective import RIVALS as NAMES


def maps(*shapes, seed=0, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


# Two images of two channels and two pixels: values are channel 1 at both pixels, then channel 2.
STUDENT = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]], [[[0.0, 2.0]], [[0.0, 0.0]]]])
TEACHER = torch.tensor([[[[3.0, 0.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[4.0, 0.0]]]])
ROOT = math.sqrt(0.5)


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(values: list[float]) -> list[float]:
    total = sum(map(math.exp, values))
    return [math.exp(value) / total for value in values]


STEP = 1.5


def value(name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The loss of a name; ``squat`` on the lattice 0, 1.5, 3, 4.5."""
    lattice = [SimpleNamespace(step=torch.tensor(STEP), highest=3)] if name == "squat" else []
    return rival(name)(student, teacher, *lattice)


GOLDEN = {
    # The student's images have the products [[2, 0], [0, 4]], the teacher's [[9, 0], [0, 16]]: the same directions.
    "sp": 0.0,
    # Attention (½, ½) and (0, 2) of the student, (4.5, 0) and (8, 0) of the teacher, each divided by its length.
    "at": ((ROOT - 1) ** 2 + ROOT**2 + 1 + 1) / 4,
    # Differences (−2, 0; 0, 1) and (0, 2; −4, 0).
    "hint": (4 + 1 + 4 + 16) / 8,
    # Two centred images are opposite to each other, for student and teacher: the same alignment.
    "cka": 0.0,
    # The teacher's 3 is on the lattice, its 4 becomes 4.5: differences (−2, 0; 0, 1) and (0, 2; −4.5, 0).
    "squat": (4 + 1 + 4 + 4.5**2) / 8,
    "channel": 16 / 4 * sum(
        divergence(softmax([g / 4 for g in teacher]), softmax([f / 4 for f in student]))
        for student, teacher in [([1, 0], [3, 0]), ([0, 1], [0, 0]), ([0, 2], [0, 0]), ([0, 0], [4, 0])]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIVALS)
def test_golden_values(name):
    assert value(name, STUDENT, TEACHER).item() == pytest.approx(GOLDEN[name], abs=1e-6)


def test_golden_values_of_three_images():
    """One pixel, one channel: everything is a product of numbers."""
    student, teacher = (torch.tensor(values).reshape(3, 1, 1, 1) for values in ([1.0, 2.0, 3.0], [1.0, 0.0, 2.0]))
    # Rows of the student's Gram matrix all point along (1, 2, 3)/√14, the teacher's along (1, 0, 2)/√5 or nowhere.
    a, b = (torch.tensor(values) for values in ([1.0, 2.0, 3.0], [1.0, 0.0, 2.0]))
    a, b = a / a.norm(), b / b.norm()
    expected = (2 * (a - b).square().sum() + a.square().sum()) / 9
    assert rival("sp")(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)
    # Centred: (−1, 0, 1) and (0, −1, 1); their squared cosine is (1 / (√2·√2))² = ¼.
    assert rival("cka")(student, teacher).item() == pytest.approx(0.75, rel=1e-6)


@pytest.mark.parametrize("name", RIVALS)
def test_equal_maps_have_no_loss_and_gradients_are_derivatives(name):
    student, teacher = maps((3, 2, 2, 3), (3, 2, 2, 3))
    if name == "squat":  # a lattice has no negative values
        teacher = STEP * teacher.round().clamp(0, 3)
    assert value(name, teacher, teacher.clone()).item() == pytest.approx(0, abs=1e-12)
    assert value(name, student, teacher).item() > 1e-4
    assert torch.autograd.gradcheck(lambda x: value(name, x, teacher), (student.requires_grad_(),))
    teacher.requires_grad_()
    value(name, student, teacher).backward()
    assert teacher.grad is None


def rotated(features: torch.Tensor) -> torch.Tensor:
    rotation, _ = torch.linalg.qr(maps((features.shape[1],) * 2, seed=9)[0])
    return torch.einsum("dc,bchw->bdhw", rotation, features)


CHANGES = {
    "another scale": lambda features: 3 * features,
    "rotated channels": rotated,
    "other order of pixels": lambda features: features.flip(3),
    "shifted by a map": lambda features: features + maps(features.shape[1:], seed=8)[0],
}
# What a change of the student's map leaves as it is.
INVARIANT = {
    "sp": {"another scale", "rotated channels", "other order of pixels"},
    "at": {"another scale", "rotated channels"},
    "hint": set(),
    "cka": {"another scale", "rotated channels", "other order of pixels", "shifted by a map"},
    "channel": set(),
    "squat": set(),
}


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("change", CHANGES)
def test_invariances(name, change):
    student, teacher = maps((4, 3, 2, 3), (4, 3, 2, 3), seed=3)
    before, after = (value(name, features, teacher).item() for features in (student, CHANGES[change](student)))
    if change in INVARIANT[name]:
        assert after == pytest.approx(before, rel=1e-9)
    else:
        assert after != pytest.approx(before, rel=1e-3)


def test_channel_distillation_ignores_a_constant_for_each_channel():
    student, teacher = maps((2, 3, 2, 2), (2, 3, 2, 2), seed=4)
    loss = ChannelDistillationLoss(2.0)
    shifted = student + torch.tensor([1.0, -2.0, 5.0]).view(1, 3, 1, 1)
    assert loss(shifted, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        ChannelDistillationLoss(0)


@pytest.mark.parametrize("name", RIVALS)
def test_other_sizes_and_channels(name):
    student, wider = maps((2, 2, 4, 4), (2, 5, 2, 2), dtype=torch.float32)
    if RIVALS[name].same_channels:
        with pytest.raises(ValueError, match="2 channels and the teacher's 5"):
            value(name, student, wider)
        wider = wider[:, :2]
    with torch.autocast("cpu", torch.bfloat16):
        loss = value(name, student.bfloat16(), wider.bfloat16())
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())


def test_images_that_are_all_the_same_have_no_alignment():
    student, teacher = maps((1, 2, 2, 2), (3, 2, 2, 2))
    same = student.expand(3, -1, -1, -1).clone().requires_grad_()
    value = rival("cka")(same, teacher)
    value.backward()
    assert value.item() == pytest.approx(1, abs=1e-9)
    assert same.grad.abs().max() < 1e-12


def test_an_unknown_rival_is_named():
    with pytest.raises(ValueError, match="name must be one of sp, at, hint, cka, channel, squat, got 'att'"):
        rival("att")


# ---- in the objective and in configurations


@pytest.mark.parametrize("name", RIVALS)
def test_the_objective_weighs_a_rival_like_the_affinity(name):
    logits, other = maps((3, 4), (3, 4), dtype=torch.float32)
    student, teacher = maps((3, 2, 4, 4), (3, 2, 4, 4), dtype=torch.float32)
    lattices = [SimpleNamespace(step=torch.tensor(STEP), highest=3)] * 2 if name == "squat" else ()
    objective = DistillationObjective("mse", name, affinity_weight=5.0, lattices=lattices)
    terms = objective(logits, [student, 2 * student], other, [teacher] * 2)
    expected = value(name, student, teacher) + value(name, 2 * student, teacher)
    assert terms["affinity"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["total"].item() == pytest.approx(terms["logit"].item() + 5 * expected.item(), rel=1e-6)


def test_names_agree():
    assert tuple(RIVALS) == NAMES
    assert get_args(Affinity) == AFFINITY_LOSSES
    assert tuple(METHOD_OF_AFFINITY) == get_args(Affinity)
    assert {*METHOD_OF_AFFINITY.values(), "labels", "FA"} == set(get_args(Method))


def test_the_papers_losses_do_not_import_rivals():
    code = """
import sys
from faqd_lib import DistillationObjective
for affinity in ("none", "fa", "ffa"):
    DistillationObjective("mse", affinity)
assert "faqd_lib.affinity.rivals" not in sys.modules
DistillationObjective("mse", "sp")
assert "faqd_lib.affinity.rivals" in sys.modules
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr


def test_a_rivals_run_has_a_name_of_its_own(tiny_suite):
    suite = tiny_suite()
    runs = [suite.student(method, weight_bits=1) for method in ("KD", "FAQD", "KD+SP", "KD+FitNet")]
    assert [run.method for run in runs] == ["KD", "FAQD", "KD+SP", "KD+FitNet"]
    assert "-1w32a-kd+sp-mse-labelfree-" in runs[2].run_id
    assert len({run.digest for run in runs}) == 4
    alone = ObjectiveConfig(affinity="cka", affinity_weight=1.0)
    assert runs[2].model_copy(update={"objective": alone}).method == "CKA"


def test_a_rivals_student_is_trained(tiny_suite):
    suite = tiny_suite()
    (record,) = suite.run([suite.student("KD+CWD", weight_bits=1)])
    assert {"logit", "affinity"} <= set(record.history[-1])
    assert record.test_affinity > 0


def test_the_teachers_map_is_rounded_to_what_the_student_can_say():
    """Half a step and more than the highest level are lost; a lattice is needed, and belongs to this loss alone."""
    quantizer = QuantizedReLU(2)
    quantizer.step.data.fill_(0.5)  # levels 0, 0.5, 1, 1.5
    teacher = torch.tensor([-3.0, 0.2, 0.3, 1.1, 9.0]).view(1, 1, 1, 5)
    said = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 1, 5)
    assert rival("squat")(said, teacher, quantizer) == 0
    assert torch.equal(quantizer(teacher), said)
    for affinity, lattices in (("squat", ()), ("fa", [quantizer])):
        with pytest.raises(ValueError, match="needs the student's quantized ReLU"):
            DistillationObjective("mse", affinity, lattices=lattices)


def test_a_squat_student_compares_on_its_own_lattice(tiny_suite):
    suite = tiny_suite()
    with pytest.raises(ConfigurationError, match="set activation_bits below 32"):
        suite.student("KD+SQuaT", weight_bits=1)
    config = suite.student("KD+SQuaT", weight_bits=1, activation_bits=4, stages=(3,))
    learner = suite.learner(config, suite.batches([config]))
    (lattice,) = learner.objective._lattices
    assert lattice is learner.model.layer3[-1].relu2
    assert not list(learner.objective.parameters())
    (record,) = suite.run([config])
    assert record.configuration.method == "KD+SQuaT"
    assert record.history[-1]["affinity"] > 0
