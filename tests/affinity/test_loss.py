"""Feature affinity against its N×N definition, its symmetries, its estimates and its refusals."""

import copy
import math
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh_process import run_fresh
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from faqd_lib.affinity import kernels as affinity_kernels
from faqd_lib.affinity import loss as affinity
from faqd_lib.affinity.loss import (
    FastFeatureAffinityLoss,
    FeatureAffinityLoss,
    affinity_matrix,
    cheaper_exact,
    draw_projections,
    feature_affinity_loss,
    projections_needed,
)
from faqd_lib.utils.measure import peak_bytes

EXACT = ("gram", "pairwise", "auto")


def naive_differences(student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    """D = S_student − S_teacher of every image, from the definition, in float64."""
    differences = []
    for pair in zip(student.detach().double(), teacher.detach().double(), strict=True):
        matrices = []
        for feature_map in pair:
            vectors = [pixel / max(float(pixel.norm()), 1e-6) for pixel in feature_map.flatten(1).T]
            x = torch.stack(vectors)
            matrices.append(x @ x.T)
        differences.append(matrices[0] - matrices[1])
    return differences


def naive(student: torch.Tensor, teacher: torch.Tensor) -> float:
    return float(np.mean([float(d.square().sum()) / d.numel() for d in naive_differences(student, teacher)]))


def maps(seed: int = 0, student=(2, 3, 4, 4), teacher=None, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in (student, teacher or student))


# ---- values

SHAPES = {
    "equal": ((2, 3, 4, 4), (2, 3, 4, 4)),
    "fewer pixels than channels": ((2, 12, 2, 2), (2, 12, 2, 2)),
    "more pixels than channels": ((3, 2, 6, 5), (3, 2, 6, 5)),
    "one pixel": ((2, 5, 1, 1), (2, 5, 1, 1)),
    "one channel": ((2, 1, 3, 4), (2, 1, 3, 4)),
    "not square": ((1, 4, 2, 7), (1, 4, 2, 7)),
    "wider teacher": ((2, 3, 4, 3), (2, 8, 4, 3)),
    "narrower teacher": ((2, 8, 4, 3), (2, 3, 4, 3)),
}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_exact_forms_equal_the_definition(method, shapes):
    student, teacher = maps(1, *shapes)
    value = feature_affinity_loss(student, teacher, method)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(naive(student, teacher), rel=1e-12, abs=1e-15)
    assert feature_affinity_loss(student.float(), teacher.float(), method).dtype == torch.float32


# Two by two pixels whose cosines are rational, so that the expected values can be worked out on paper.
STUDENT_PIXELS = [(3, 4), (1, 0), (0, 2), (5, 12)]
TEACHER_PIXELS = [(1, 2, 2), (0, 0, 3), (2, 1, 2), (0, 3, 4)]
# D above the diagonal: student's cosine − teacher's.
ABOVE = {
    (0, 1): Fraction(3, 5) - Fraction(2, 3),
    (0, 2): Fraction(4, 5) - Fraction(8, 9),
    (0, 3): Fraction(63, 65) - Fraction(14, 15),
    (1, 2): Fraction(0) - Fraction(2, 3),
    (1, 3): Fraction(5, 13) - Fraction(4, 5),
    (2, 3): Fraction(12, 13) - Fraction(11, 15),
}
GOLDEN_EXACT = 0.083328219738
GOLDEN_PROJECTED = 0.155619110234  # z = (1, −1, 2, 0) and (0, 1, 1, −3)
PROJECTIONS = [(1, 0), (-1, 1), (2, 1), (0, -3)]


def golden_maps() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        torch.tensor(pixels, dtype=torch.float32).T.reshape(1, -1, 2, 2) for pixels in (STUDENT_PIXELS, TEACHER_PIXELS)
    )


def test_golden_values_follow_from_the_fractions():
    d = [[ABOVE.get((min(i, j), max(i, j)), Fraction(0)) for j in range(4)] for i in range(4)]
    exact = sum(entry**2 for row in d for entry in row) / 16
    assert float(exact) == pytest.approx(GOLDEN_EXACT, rel=1e-8)
    projected = [[sum(d[i][j] * PROJECTIONS[j][p] for j in range(4)) for i in range(4)] for p in range(2)]
    assert float(sum(entry**2 for column in projected for entry in column) / 2 / 16) == pytest.approx(
        GOLDEN_PROJECTED, rel=1e-8
    )


@pytest.mark.parametrize("method", EXACT)
def test_golden_exact(method):
    assert feature_affinity_loss(*golden_maps(), method).item() == pytest.approx(GOLDEN_EXACT, rel=1e-5)


def test_golden_projection(monkeypatch):
    monkeypatch.setattr(affinity, "draw_projections", lambda *_: torch.tensor(PROJECTIONS, dtype=torch.float32))
    assert feature_affinity_loss(*golden_maps(), "projection", k=2).item() == pytest.approx(GOLDEN_PROJECTED, rel=1e-5)


def test_golden_batch_is_the_mean_over_images():
    student, teacher = golden_maps()
    assert feature_affinity_loss(student.repeat(3, 1, 1, 1), teacher.repeat(3, 1, 1, 1)).item() == pytest.approx(
        GOLDEN_EXACT, rel=1e-5
    )
    # Beside an image whose maps agree, the mean halves.
    both = feature_affinity_loss(torch.cat((student, student)), torch.cat((student * 0 + 1, student)))
    alone = feature_affinity_loss(student, student * 0 + 1)
    assert alone.item() > 0
    assert both.item() == pytest.approx(alone.item() / 2, rel=1e-5)


def test_affinity_matrix_holds_cosines():
    matrix = affinity_matrix(golden_maps()[0])
    assert matrix.shape == (1, 4, 4)
    assert torch.allclose(matrix[0].diagonal(), torch.ones(4))
    assert matrix[0, 0, 3].item() == pytest.approx(63 / 65, rel=1e-6)
    assert torch.equal(matrix, matrix.transpose(1, 2))
    student, _ = maps(2)
    assert torch.autograd.gradcheck(affinity_matrix, (student.requires_grad_(),))


@pytest.mark.parametrize("shapes", [((2, 3, 4, 4), (2, 3, 4, 4)), ((2, 4, 2, 3), (2, 7, 2, 3))])
def test_projection_is_the_mean_squared_length_of_Dz(shapes):
    student, teacher = maps(3, *shapes)
    pixels = shapes[0][2] * shapes[0][3]
    z = draw_projections(pixels, 5, generator=torch.Generator().manual_seed(7)).double()
    expected = np.mean([float((d @ z).square().sum()) / 5 / pixels**2 for d in naive_differences(student, teacher)])
    value = feature_affinity_loss(student, teacher, "projection", k=5, generator=torch.Generator().manual_seed(7))
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [(8, 6), (2, 3), (5, 9)])
def test_teacher_of_another_size_is_resized(size):
    student, teacher = maps(4, (2, 3, 4, 4), (2, 5, *size))
    resized = F.interpolate(teacher, (4, 4), mode="bilinear", align_corners=False, antialias=True)
    assert feature_affinity_loss(student, teacher).item() == pytest.approx(naive(student, resized), rel=1e-10)


def test_resizing_leaves_a_constant_map_constant():
    student, _ = maps(4)
    teacher = torch.ones(2, 3, 9, 2, dtype=torch.float64)
    assert feature_affinity_loss(student, teacher).item() == pytest.approx(
        naive(student, torch.ones_like(student)), rel=1e-10
    )


@pytest.mark.parametrize("method", ["gram", "pairwise"])
@pytest.mark.parametrize("delta", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("channels", [(16, 16), (16, 24)])
def test_float32_does_not_cancel_when_student_is_near_teacher(method, delta, channels):
    student_channels, teacher_channels = channels
    teacher, noise = maps(5, (2, student_channels, 12, 12), dtype=torch.float32)
    student = teacher + delta * noise
    if teacher_channels > student_channels:  # zero channels change no cosine
        teacher = F.pad(teacher, (0, 0, 0, 0, 0, teacher_channels - student_channels))
    value = feature_affinity_loss(student, teacher, method).item()
    assert value == pytest.approx(feature_affinity_loss(student.double(), teacher.double(), method).item(), rel=1e-5)
    assert value > 0


@pytest.mark.parametrize("seed", range(8))
def test_never_negative_however_near(seed):
    teacher, noise = maps(seed, (2, 8, 6, 6), dtype=torch.float32)
    for delta in (1e-5, 1e-6, 1e-7, 1e-8, 0):
        assert feature_affinity_loss(teacher + delta * noise, teacher, "gram").item() >= 0


@pytest.mark.parametrize("method", [*EXACT, "projection"])
def test_zero_for_equal_maps(method):
    student, _ = maps(6, dtype=torch.float32)
    student.requires_grad_()
    value = feature_affinity_loss(student, student.detach().clone(), method)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert student.grad.abs().max() < 1e-7


# ---- properties

shape = st.tuples(*(st.integers(1, most) for most in (3, 5, 4, 4)))
exact_method = st.sampled_from(["gram", "pairwise"])
seed = st.integers(0, 2**31)


@given(shape, seed, exact_method)
def test_rescaling_any_pixel_vector_changes_nothing(shape, seed, method):
    student, teacher = maps(seed, shape)
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = [torch.rand(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64) * 9 + 0.1 for _ in "st"]
    assert feature_affinity_loss(student * lengths[0], teacher * lengths[1], method).item() == pytest.approx(
        feature_affinity_loss(student, teacher, method).item(), rel=1e-10, abs=1e-14
    )


@given(shape, seed, exact_method)
def test_an_orthogonal_change_of_the_channel_basis_changes_nothing(shape, seed, method):
    student, teacher = maps(seed, shape)
    generator = torch.Generator().manual_seed(seed + 1)
    basis, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64))
    turned = torch.einsum("dc,bchw->bdhw", basis, student)
    expected = feature_affinity_loss(student, teacher, method).item()
    assert feature_affinity_loss(turned, teacher, method).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@given(shape, seed, exact_method)
def test_permuting_the_pixels_of_both_maps_changes_nothing(shape, seed, method):
    student, teacher = maps(seed, shape)
    order = torch.randperm(shape[2] * shape[3], generator=torch.Generator().manual_seed(seed + 1))
    permuted = [m.flatten(2)[:, :, order].unflatten(2, shape[2:]) for m in (student, teacher)]
    expected = feature_affinity_loss(student, teacher, method).item()
    assert feature_affinity_loss(*permuted, method).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@given(shape, st.integers(1, 6), seed, exact_method)
def test_symmetric_in_student_and_teacher(shape, teacher_channels, seed, method):
    student, teacher = maps(seed, shape, (shape[0], teacher_channels, *shape[2:]))
    there = feature_affinity_loss(student, teacher, method).item()
    assert feature_affinity_loss(teacher, student, method).item() == pytest.approx(there, rel=1e-10, abs=1e-14)


@given(shape, seed)
def test_gram_and_pairwise_agree_in_value_and_gradient(shape, seed):
    student, teacher = maps(seed, shape)
    values, gradients = [], []
    for method in ("gram", "pairwise"):
        leaf = student.clone().requires_grad_()
        value = feature_affinity_loss(leaf, teacher, method)
        value.backward()
        values.append(value.item())
        gradients.append(leaf.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-10, abs=1e-14)
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12)


def test_zero_iff_the_affinities_agree():
    student, _ = maps(22, (2, 5, 4, 4))
    generator = torch.Generator().manual_seed(23)
    # Any lengths, any basis, more channels: other maps, the same affinities.
    basis, _ = torch.linalg.qr(torch.randn(9, 5, generator=generator, dtype=torch.float64))
    lengths = torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64) + 0.5
    same = torch.einsum("dc,bchw->bdhw", basis, student) * lengths
    changed = same.clone()
    changed[1, 0, 2, 2] += 0.3  # one number of one pixel
    for method in EXACT:
        assert feature_affinity_loss(student, same, method).item() == pytest.approx(0, abs=1e-15)
        assert feature_affinity_loss(student, changed, method).item() > 1e-6


@pytest.mark.parametrize("method", [*EXACT, "projection"])
def test_exactly_zero_for_equal_maps_of_any_layout(method):
    student, _ = maps(24, (2, 5, 4, 4), dtype=torch.float32)
    for teacher in (student.clone(), student.to(memory_format=torch.channels_last)):
        assert feature_affinity_loss(student, teacher, method).item() == 0


# ---- other norms and scalings


def l1_of_definition(student, teacher) -> list[float]:
    return [float(d.abs().sum()) for d in naive_differences(student, teacher)]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_l1_is_the_sum_of_absolute_differences(shapes):
    student, teacher = maps(25, *shapes)
    pixels = shapes[0][2] * shapes[0][3]
    expected = np.mean(l1_of_definition(student, teacher)) / pixels**2
    for method in ("auto", "pairwise"):
        value = feature_affinity_loss(student, teacher, method, norm="l1").item()
        assert value == pytest.approx(expected, rel=1e-11, abs=1e-14)


def test_released_scaling():
    student, teacher = maps(26, (3, 4, 3, 2))
    released = {"l1": sum(l1_of_definition(student, teacher)) / 36}
    released["l2"] = math.sqrt(sum(float(d.square().sum()) for d in naive_differences(student, teacher))) / 6
    for norm, expected in released.items():
        value = feature_affinity_loss(student, teacher, norm=norm, reduction="released").item()
        assert value == pytest.approx(expected, rel=1e-11)
        module = FeatureAffinityLoss(norm=norm, reduction="released")
        assert module(student, teacher).item() == value
    fast = FastFeatureAffinityLoss(k=4000, reduction="released")(student, teacher).item()
    assert fast == pytest.approx(released["l2"], rel=0.1)


def test_released_scaling_of_equal_maps_has_a_gradient_of_zero():
    student, _ = maps(27)
    leaf = student.clone().requires_grad_()
    feature_affinity_loss(leaf, student, reduction="released").backward()
    assert leaf.grad.abs().max() == 0


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_rows_and_images_in_blocks_change_nothing(monkeypatch, chunk, norm):
    student, teacher = maps(28, (5, 3, 6, 5))
    leaf = student.clone().requires_grad_()
    expected = naive(student, teacher) if norm == "l2" else np.mean(l1_of_definition(student, teacher)) / 900
    monkeypatch.setattr(affinity_kernels, "_CPU_CHUNK", chunk)
    monkeypatch.setattr(affinity_kernels, "_ROWS", 7)  # does not divide 30
    gradients = []
    for method in ("pairwise", "gram") if norm == "l2" else ("pairwise",):
        value = feature_affinity_loss(leaf, teacher, method, norm=norm)
        assert value.item() == pytest.approx(expected, rel=1e-11)
        gradients.append(torch.autograd.grad(value, leaf)[0])
    if norm == "l2":
        assert torch.allclose(*gradients, rtol=1e-9, atol=1e-13)


# ---- gradients


@pytest.mark.parametrize("method", ["gram", "pairwise", "projection"])
@pytest.mark.parametrize(
    "shapes", [((2, 3, 2, 3), (2, 3, 2, 3)), ((1, 5, 2, 2), (1, 3, 2, 2)), ((2, 2, 3, 3), (2, 4, 2, 5))]
)
def test_gradcheck(method, shapes):
    student, teacher = maps(8, *shapes)

    def loss(x):
        # The same projections at every call, or there would be no derivative to compare with.
        k = 3 if method == "projection" else None
        return feature_affinity_loss(x, teacher, method, k=k, generator=torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize("reduction", ["mean", "released"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_gradcheck_of_norms_and_scalings(norm, reduction):
    student, teacher = maps(29, (2, 3, 2, 3))

    def loss(x):
        return feature_affinity_loss(x, teacher, norm=norm, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize("method", ["gram", "pairwise"])
@pytest.mark.parametrize("delta", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (64, 16)])
@pytest.mark.parametrize("level", [0, 2, 10])
def test_float32_near_the_teacher(method, delta, channels, size, level):
    """Relative error of the value at most 1e-5, of the gradient 1e-6/δ, against N×N in float64.

    The higher the level under the noise, the closer the cosines are to 1 (mean 0.5, 0.8, 0.99), as after a ReLU.
    """
    teacher, noise = maps(30, (2, channels, size, size), dtype=torch.float32)
    teacher = (teacher + level).relu()
    student = teacher + delta * noise * teacher.square().mean().sqrt()
    student.requires_grad_()
    value = feature_affinity_loss(student, teacher, method)
    (gradient,) = torch.autograd.grad(value, student)
    reference = student.detach().double().requires_grad_()
    d = affinity_matrix(reference) - affinity_matrix(teacher.double())
    truth = (d.square().sum((1, 2)) / d.shape[1] ** 2).mean()
    (exact,) = torch.autograd.grad(truth, reference)
    assert value.item() == pytest.approx(truth.item(), rel=1e-5)
    assert value.item() >= 0
    assert float((gradient - exact).norm() / exact.norm()) < 1e-6 / delta


@pytest.mark.parametrize(("method", "floor"), [("gram", 5e-8), ("pairwise", 1e-11)])
@pytest.mark.parametrize("delta", [0, 1e-3, 1e-2])
def test_float32_of_a_rotated_teacher_has_a_stated_floor(method, floor, delta):
    teacher, noise = maps(35, (2, 16, 16, 16), dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(36), dtype=torch.float64))
    student = torch.einsum("dc,bchw->bdhw", rotation, teacher) + delta * noise
    truth = feature_affinity_loss(student, teacher, "pairwise").item()
    value = feature_affinity_loss(student.float(), teacher.float(), method).item()
    assert value == pytest.approx(truth, rel=1e-4, abs=floor)


def test_numbers_whose_squares_overflow_do_not_look_like_a_loss():
    student, teacher = maps(37, dtype=torch.float32)
    student[0, :, 1, 1] *= 1e25
    for method in (*EXACT, "projection"):
        assert math.isnan(feature_affinity_loss(student, teacher, method).item())


def test_forward_mode_is_refused():
    student, teacher = maps(38)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: feature_affinity_loss(x, teacher), (student,), (student,))


@pytest.mark.parametrize("method", [*EXACT, "projection"])
def test_calls_do_not_share_their_buffers(method):
    pairs = [tuple(m.float() for m in maps(seed, (5, 3, 6, 6))) for seed in (39, 40)]
    results = []
    for interleaved in (False, True):
        leaves = [student.clone().requires_grad_() for student, _ in pairs]
        losses = []
        for leaf, (_, teacher) in zip(leaves, pairs, strict=True):
            losses.append(feature_affinity_loss(leaf, teacher, method, generator=torch.Generator().manual_seed(1)))
            if not interleaved:
                losses[-1].backward(retain_graph=True)
        for loss in losses if interleaved else ():
            loss.backward(retain_graph=True)
        results.append([leaf.grad.clone() for leaf in leaves])
        losses[0].backward()  # a graph that was kept gives the same again
        assert torch.allclose(leaves[0].grad, 2 * results[-1][0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inference_mode_before_and_between():
    student, teacher = maps(41)
    with torch.inference_mode():
        module = FastFeatureAffinityLoss(k=2, seed=5)
        module.load_state_dict(FastFeatureAffinityLoss(k=2, seed=5).state_dict())
        first = module(student, teacher.clone()).item()
        inferred = teacher.clone()
    leaf = student.clone().requires_grad_()
    module(leaf, inferred).backward()
    assert leaf.grad.abs().max() > 0
    assert first == FastFeatureAffinityLoss(k=2, seed=5)(student, teacher).item()
    with pytest.raises(RuntimeError):
        module.set_extra_state(torch.zeros(3, dtype=torch.uint8))


def test_mixed_precisions_and_strided_maps():
    student, teacher = maps(42, (2, 6, 4, 4))
    expected = feature_affinity_loss(student, teacher).item()
    assert feature_affinity_loss(student, teacher.float()).item() == pytest.approx(expected, rel=1e-5)
    assert feature_affinity_loss(student.float(), teacher).item() == pytest.approx(expected, rel=1e-5)
    wide = torch.cat((student, student), dim=3)[..., :4].transpose(2, 3)
    assert feature_affinity_loss(wide, teacher.transpose(2, 3)).item() == pytest.approx(expected, rel=1e-12)
    half = student.half().requires_grad_()
    (feature_affinity_loss(half, teacher) * 65536).backward()
    assert half.grad.dtype == torch.float16
    assert half.grad.isfinite().all()
    with torch.no_grad():
        assert not feature_affinity_loss(half, teacher).requires_grad


def test_gradient_is_scaled_by_the_weight_of_the_loss():
    student, teacher = maps(9)
    gradients = []
    for weight in (1.0, 30.0):
        leaf = student.clone().requires_grad_()
        (weight * feature_affinity_loss(leaf, teacher)).backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(30 * gradients[0], gradients[1], rtol=1e-12)


def test_teacher_gets_no_gradient():
    student, teacher = (m.requires_grad_() for m in maps(10))
    feature_affinity_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_no_graph_where_the_student_needs_no_gradient():
    student, teacher = maps(10)
    assert not feature_affinity_loss(student, teacher.requires_grad_()).requires_grad


@pytest.mark.parametrize("of_loss", [lambda loss: 30 * loss, lambda loss: loss.square()], ids=["weighted", "squared"])
def test_double_backward_is_refused(of_loss):
    student, teacher = maps(11)
    student.requires_grad_()
    loss = of_loss(feature_affinity_loss(student, teacher))

    def gradient_penalty():
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        # Beside a term that can be differentiated twice, a constant gradient would pass unnoticed.
        (gradient.square().sum() + student.square().sum()).backward()

    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient_penalty()


@pytest.mark.parametrize("method", [*EXACT, "projection"])
def test_all_zero_pixel_gives_finite_loss_and_gradient(method):
    student, teacher = maps(12, dtype=torch.float32)
    student[0, :, 1, 2] = 0
    teacher[1, :, 0, 0] = 0
    student.requires_grad_()
    value = feature_affinity_loss(student, teacher, method, generator=torch.Generator().manual_seed(0))
    value.backward()
    assert math.isfinite(value.item())
    if method != "projection":
        assert value.item() == pytest.approx(naive(student, teacher), rel=1e-5)
    assert student.grad.isfinite().all()
    assert student.grad[0, :, 1, 2].abs().max() == 0
    assert student.grad[0, :, 0, 0].abs().max() > 0


@pytest.mark.parametrize("method", [*EXACT, "projection"])
def test_wholly_dead_map_is_finite(method):
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = feature_affinity_loss(student, maps(13, dtype=torch.float32)[1], method)
    value.backward()
    assert value.item() > 0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("method", [*EXACT, "projection"])
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_do_not_look_like_a_number(method, which, bad):
    pair = dict(zip(("student", "teacher"), maps(14, dtype=torch.float32), strict=True))
    pair[which][1, 2, 3, 3] = bad
    assert math.isnan(feature_affinity_loss(**pair, method=method).item())


# ---- memory formats and precisions


@pytest.mark.parametrize("method", [*EXACT, "projection"])
def test_channels_last_and_contiguous_agree(method):
    student, teacher = maps(15, (2, 6, 4, 5), dtype=torch.float32)
    values, gradients = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = student.clone(memory_format=memory_format).requires_grad_()
        value = feature_affinity_loss(
            leaf, teacher.to(memory_format=memory_format), method, generator=torch.Generator().manual_seed(2)
        )
        value.backward()
        values.append(value.item())
        gradients.append(leaf.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["gram", "pairwise", "projection"])
def test_bf16_autocast_computes_in_float32(method):
    student, teacher = maps(16, (2, 6, 4, 4), dtype=torch.float32)

    def loss():
        return feature_affinity_loss(student, teacher, method, generator=torch.Generator().manual_seed(3))

    with torch.autocast("cpu", torch.bfloat16):
        inside = loss()
    assert inside.dtype == torch.float32
    assert inside.item() == loss().item()


def test_bf16_maps():
    student, teacher = (m.bfloat16() for m in maps(17, (2, 6, 4, 4)))
    student.requires_grad_()
    value = feature_affinity_loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(naive(student, teacher), rel=1e-5)
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_memory_stays_far_below_the_matrix(norm):
    # N×N in float32 would take 4096² · 4 bytes = 64 MiB for each of the matrices of an image.
    student, teacher = maps(31, (2, 4, 64, 64), dtype=torch.float32)
    student.requires_grad_()
    method = "gram" if norm == "l2" else "pairwise"
    peak = peak_bytes(lambda: feature_affinity_loss(student, teacher, method, norm=norm).backward())
    assert peak < (3 * 2 * student.numel() * 4 if norm == "l2" else 16 * 2**20)


def test_extra_memory_at_224_is_within_three_times_the_inputs():
    student, teacher = (torch.ones(4, 64, 224, 224).to(memory_format=torch.channels_last) for _ in range(2))
    student.requires_grad_()
    peak = peak_bytes(lambda: torch.autograd.grad(feature_affinity_loss(student, teacher), student))
    assert peak <= 3 * 2 * student.numel() * 4  # one N×N matrix of one image would take 10 GB


# ---- the compiler

COMPILED = {
    "exact": FeatureAffinityLoss,
    "pairwise": lambda: FeatureAffinityLoss("pairwise"),
    "l1": lambda: FeatureAffinityLoss(norm="l1"),
    "fast": lambda: FastFeatureAffinityLoss(k=3, seed=4),
    "frozen": lambda: FastFeatureAffinityLoss(k=3, seed=4, frozen=True),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph_with_the_same_numbers(name):
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1).double()
    images, teacher = maps(32, (2, 3, 6, 6), (2, 5, 6, 6))
    results = []
    for compiled in (False, True):
        loss = COMPILED[name]()

        def step(x, y, loss=loss):
            return loss(convolution(x).relu(), y)

        if compiled:
            torch.compiler.reset()
            # The graph is traced and differentiated as for any backend, and then run as it is.
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        values = []
        for _ in range(3):
            convolution.zero_grad()
            value = step(images, teacher)
            value.backward()
            values += [value.item(), convolution.weight.grad.norm().item()]
        results.append(values)
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    assert (len(set(results[1])) == 2) == (name != "fast")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler backend needs a C++ compiler")
def test_compiles_with_torchs_own_backend():
    student, teacher = maps(43, dtype=torch.float32)
    exact, fast = FeatureAffinityLoss(), FastFeatureAffinityLoss(k=3, seed=4)
    expected = [exact(student * 2, teacher).item() + fast(student * 3, teacher).item() for _ in range(2)]
    fast = FastFeatureAffinityLoss(k=3, seed=4)
    torch.compiler.reset()
    step = torch.compile(lambda x, y: exact(x * 2, y) + fast(x * 3, y), fullgraph=True)
    leaf = student.clone().requires_grad_()
    values = []
    for _ in range(2):
        value = step(leaf, teacher)
        value.backward()
        values.append(value.item())
    assert values == pytest.approx(expected, rel=1e-6)
    assert leaf.grad.abs().max() > 0


def test_operators_meet_torchs_own_checks():
    student, teacher = maps(33)
    for method, z in (("gram", None), ("pairwise", None), ("projection", torch.randn(16, 3, dtype=torch.float64))):
        arguments = (student.clone().requires_grad_(), teacher, method, "l2", z, True)
        torch.library.opcheck(affinity_kernels.affinity_operator, arguments)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("method", ["gram", "pairwise", "projection"])
def test_counted_operations_are_those_of_the_products_inside(method, with_gradient):
    student, teacher = maps(34, (3, 4, 5, 5), (3, 7, 5, 5))
    z = torch.randn(25, 6, dtype=torch.float64) if method == "projection" else None
    arguments = (student, teacher, method, "l2", z, with_gradient)
    with FlopCounterMode(display=False) as declared:
        affinity_kernels.affinity_operator(*arguments)
    with FlopCounterMode(display=False) as inside:
        affinity_kernels.affinity_operator._init_fn(*arguments)
    # torch's counter does not know the in-place baddbmm_ of the fast loss's gradient.
    unseen = 2 * 3 * 25 * 6 * 4 if method == "projection" and with_gradient else 0
    assert declared.get_total_flops() == inside.get_total_flops() + unseen > unseen


# ---- estimates


def draws(student, teacher, k, count, distribution="gaussian") -> np.ndarray:
    generator = torch.Generator().manual_seed(k)
    return np.array(
        [
            feature_affinity_loss(
                student, teacher, "projection", k=k, distribution=distribution, generator=generator
            ).item()
            for _ in range(count)
        ]
    )


@pytest.fixture(scope="module")
def pair():
    student, teacher = maps(18, (1, 3, 3, 3))
    (d,) = naive_differences(student, teacher)
    return student, teacher, d


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_estimate_is_unbiased_with_the_known_variance(pair, distribution):
    student, teacher, d = pair
    squared = d @ d
    variance = 2 * squared.square().sum()
    if distribution == "rademacher":
        variance = variance - 2 * squared.diagonal().square().sum()
    variance = float(variance) / d.numel() ** 2
    count = 1500
    values = draws(student, teacher, 1, count, distribution)
    assert abs(values.mean() - naive(student, teacher)) < 4 * math.sqrt(variance / count)
    assert values.var() == pytest.approx(variance, rel=0.25)


def test_variance_falls_like_one_over_k(pair):
    student, teacher, d = pair
    one = 2 * float((d @ d).square().sum()) / d.numel() ** 2
    for k in (4, 16):
        assert draws(student, teacher, k, 1000).var() == pytest.approx(one / k, rel=0.25)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_projections_have_mean_zero_and_identity_covariance(distribution):
    z = draw_projections(5, 20_000, distribution, torch.Generator().manual_seed(0))
    assert z.shape == (5, 20_000)
    assert z.mean(1).abs().max() < 4 / math.sqrt(20_000)
    assert torch.allclose(z @ z.T / 20_000, torch.eye(5), atol=0.06)
    assert (z.unique().tolist() == [-1, 1]) == (distribution == "rademacher")


def test_projections_needed_keeps_chebyshevs_promise(pair):
    student, teacher, _ = pair
    k = projections_needed(0.5, 0.5)
    assert k == 16
    exact = naive(student, teacher)
    assert (np.abs(draws(student, teacher, k, 400) - exact) > 0.5 * exact).mean() <= 0.5
    with pytest.raises(ValueError, match=r"1\.5"):
        projections_needed(0.1, 1.5)


def test_module_draws_anew_at_every_call():
    student, teacher = maps(19)
    first, second = FastFeatureAffinityLoss(k=2, seed=5), FastFeatureAffinityLoss(k=2, seed=5)
    values = [first(student, teacher).item() for _ in range(4)]
    assert len(set(values)) == 4
    assert values == [second(student, teacher).item() for _ in range(4)]
    assert values[0] != FastFeatureAffinityLoss(k=2, seed=6)(student, teacher).item()


def test_frozen_module_draws_the_same_at_every_call():
    student, teacher = maps(19)
    frozen = FastFeatureAffinityLoss(k=2, seed=5, frozen=True)
    values = {frozen(student, teacher).item() for _ in range(4)}
    assert values == {FastFeatureAffinityLoss(k=2, seed=5)(student, teacher).item()}
    assert "frozen" in repr(frozen)


def test_module_state_goes_on_where_it_was():
    student, teacher = maps(19)
    first, second = FastFeatureAffinityLoss(k=2, seed=5), FastFeatureAffinityLoss(k=2, seed=6)
    first(student, teacher)
    second.load_state_dict(first.state_dict())
    third = copy.deepcopy(first)
    expected = [first(student, teacher).item() for _ in range(2)]
    for other in (second, third):
        assert [other(student, teacher).item() for _ in range(2)] == expected


def test_module_draws_what_a_generator_with_its_seed_draws():
    student, teacher = maps(19)
    generator = torch.Generator().manual_seed(5)
    module = FastFeatureAffinityLoss(k=2, seed=5)
    for _ in range(2):
        by_function = feature_affinity_loss(student, teacher, "projection", k=2, generator=generator)
        assert module(student, teacher).item() == by_function.item()


def test_generator_decides_and_the_global_one_is_left_alone():
    student, teacher = maps(20)
    before = torch.get_rng_state()
    values = [draws(student, teacher, 3, 2).tolist() for _ in range(2)]
    FastFeatureAffinityLoss()(student, teacher)
    assert values[0] == values[1]
    assert torch.equal(before, torch.get_rng_state())


def test_without_a_generator_the_global_one_is_used_and_moves_on():
    student, teacher = maps(20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        one, two = (feature_affinity_loss(student, teacher, "projection").item() for _ in range(2))
        torch.manual_seed(3)
        assert feature_affinity_loss(student, teacher, "projection").item() == one
    assert one != two


def test_exact_module_and_choice_of_form():
    student, teacher = maps(21)
    for method in EXACT:
        assert FeatureAffinityLoss(method)(student, teacher).item() == pytest.approx(naive(student, teacher), rel=1e-10)
    assert cheaper_exact(1024, 16, 16) == "gram"
    assert cheaper_exact(16, 64, 64) == "pairwise"
    assert "gram" in repr(FeatureAffinityLoss("gram"))
    assert "k=3" in repr(FastFeatureAffinityLoss(3))


# ---- refusals

GOOD = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"teacher": torch.ones(3, 3, 4, 4)}, ValueError, ["2 images", "3"]),
        ({"student": torch.ones(0, 3, 4, 4), "teacher": torch.ones(0, 3, 4, 4)}, ValueError, ["(0, 3, 4, 4)"]),
        (
            {"student": torch.ones(2, 3, 4)},
            ValueError,
            ["student and teacher", "tokens, got 3 and 16", "student (2, 3, 4) and teacher (2, 3, 4, 4)"],
        ),
        ({"teacher": torch.ones(2, 3, 0, 4)}, ValueError, ["teacher", "(2, 3, 0, 4)"]),
        ({"student": torch.ones(2, 3, 4, 4, dtype=torch.int64)}, TypeError, ["student", "int64"]),
        ({"teacher": [1.0]}, TypeError, ["teacher", "list"]),
        ({"method": "l1"}, ValueError, ["'l1'", "gram", "projection"]),
        ({"k": 3}, ValueError, ["k = 3", "'auto'", "'projection'"]),
        ({"method": "ffa"}, ValueError, ["'ffa'", "is 'projection'"]),
        ({"generator": 5}, TypeError, ["torch.Generator", "int"]),
        ({"norm": "l3"}, ValueError, ["'l3'", "l1", "l2"]),
        ({"reduction": "sum"}, ValueError, ["'sum'", "mean", "released"]),
        ({"norm": "l1", "method": "gram"}, ValueError, ["gram", "pairwise"]),
        ({"norm": "l1", "method": "projection"}, ValueError, ["projection", "pairwise"]),
        ({"method": "projection", "k": 0}, ValueError, ["k", "0"]),
        ({"method": "projection", "k": -2}, ValueError, ["k", "-2"]),
        ({"method": "projection", "k": 1.5}, TypeError, ["k", "1.5"]),
        ({"method": "projection", "k": True}, TypeError, ["k", "True"]),
        ({"method": "projection", "distribution": "cauchy"}, ValueError, ["'cauchy'", "rademacher"]),
    ],
)
def test_bad_arguments_are_named(change, error, names):
    with pytest.raises(error) as raised:
        feature_affinity_loss(**{"student": GOOD, "teacher": GOOD, **change})
    for name in names:
        assert name in str(raised.value)


def test_modules_check_at_construction():
    with pytest.raises(ValueError, match="0"):
        FastFeatureAffinityLoss(k=0)
    with pytest.raises(ValueError, match="projection"):
        FeatureAffinityLoss("projection")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        affinity_matrix(torch.ones(2, 3))


def test_projections_drawn_ahead_are_those_of_the_calls_and_are_forgotten_when_asked():
    maps = [torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(size)) for size in (4, 3)]
    expected, ahead = FastFeatureAffinityLoss(3, seed=5), FastFeatureAffinityLoss(3, seed=5)
    wanted = [expected(m, m + 1).item() for _ in range(3) for m in maps]
    found, places = [], set()
    for _ in range(2):
        ahead.predraw([16, 9], torch.device("cpu"))
        places.add(tuple(z.data_ptr() for z in ahead._ahead))
        found += [ahead(m, m + 1).item() for m in maps]
    assert len(places) == 1
    ahead.predraw([], torch.device("cpu"))
    assert found + [ahead(m, m + 1).item() for m in maps] == wanted
    ahead.predraw([9], torch.device("cpu"))
    with pytest.raises(ValueError, match="for 9 pixels, and the maps have 16"):
        ahead(maps[0], maps[0] + 1)
    ahead.load_state_dict(FastFeatureAffinityLoss(3, seed=5).state_dict())
    assert ahead(maps[0], maps[0] + 1).item() == wanted[0]


@pytest.mark.parametrize("method", ["gram", "pairwise", "projection"])
def test_torch_func_is_refused_in_the_losss_own_words(method):
    maps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"torch\.func cannot differentiate the affinity loss"):
        torch.func.grad(lambda student: feature_affinity_loss(student, maps[1], method))(maps[0])


def test_an_eager_step_does_not_import_a_compiler():
    """Losses, quantizers and objective of a 1W4A student; the compiler takes seconds to import."""
    code = """
import sys
import torch
from faqd_lib import DistillationObjective, FeatureTap, build_model, quantize
student, teacher = quantize(build_model("resnet8", 10), 1, 4), build_model("resnet8", 10).eval()
images = torch.randn(4, 3, 8, 8)
for affinity in ("fa", "ffa"):
    with FeatureTap(student, ["layer1"]) as s, FeatureTap(teacher, ["layer1"]) as t, torch.no_grad():
        target = teacher(images)
        with torch.enable_grad():
            loss = DistillationObjective("mse", affinity)(student(images), s.features, target, t.features)["total"]
    loss.backward()
assert all(parameter.grad is not None for parameter in student.parameters())
print(*{"torch._dynamo", "torch._inductor", "sympy"}.intersection(sys.modules))
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
