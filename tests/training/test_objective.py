"""The objective: its terms, their weights, who may see labels, adapters that learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from faqd_lib.affinity.loss import feature_affinity_loss
from faqd_lib.training.objective import Adapter, DistillationObjective, logit_kl, logit_mse


@pytest.fixture
def batch() -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "student_logits": draw(4, 5).requires_grad_(),
        "teacher_logits": draw(4, 5),
        "student_maps": [draw(4, 3, 4, 4).relu().requires_grad_(), draw(4, 6, 2, 2).relu().requires_grad_()],
        "teacher_maps": [draw(4, 8, 4, 4), draw(4, 6, 3, 3)],
    }


LABELS = torch.tensor([0, 4, 2, 2])


def kl_by_hand(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(v / temperature) for v in t]
        q = [math.exp(v / temperature) for v in s]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_by_hand(batch, temperature):
    value = logit_kl(batch["student_logits"], batch["teacher_logits"], temperature).item()
    assert value == pytest.approx(kl_by_hand(batch["student_logits"], batch["teacher_logits"], temperature), rel=1e-5)


def test_kl_of_two_classes_worked_out():
    # softmax(0, ln 3) = (1/4, 3/4) against (1/2, 1/2): ½ ln 2 + ½ ln(2/3).
    value = logit_kl(torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2), 1.0).item()
    assert value == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_mse_is_the_mean_over_images_and_classes():
    assert logit_mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [0.0, 1.0]])).item() == 5 / 4


def test_terms_and_weights(batch):
    objective = DistillationObjective("mse", "fa", logit_weight=2.0, affinity_weight=30.0, label_weight=0.3)
    terms = objective(**batch, labels=LABELS)
    assert set(terms) == {"total", "logit", "affinity", "label"}
    affinity = sum(
        feature_affinity_loss(s, t).item() for s, t in zip(batch["student_maps"], batch["teacher_maps"], strict=True)
    )
    logit = logit_mse(batch["student_logits"], batch["teacher_logits"]).item()
    label = F.cross_entropy(batch["student_logits"], LABELS).item()
    assert terms["logit"].item() == pytest.approx(logit, rel=1e-6)
    assert terms["affinity"].item() == pytest.approx(affinity, rel=1e-5)
    assert terms["label"].item() == pytest.approx(label, rel=1e-6)
    assert terms["total"].item() == pytest.approx(2 * logit + 30 * affinity + 0.3 * label, rel=1e-5)


def test_kl_objective_uses_its_temperature(batch):
    terms = DistillationObjective("kl", "none", temperature=3.0)(
        batch["student_logits"], teacher_logits=batch["teacher_logits"]
    )
    expected = kl_by_hand(batch["student_logits"], batch["teacher_logits"], 3.0)
    assert set(terms) == {"total", "logit"}
    assert terms["total"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "terms"),
    [
        ({"logit_loss": "none", "affinity": "none", "label_weight": 1.0}, {"label"}),
        ({"logit_loss": "none", "affinity": "fa"}, {"affinity"}),
        ({"logit_loss": "mse", "affinity": "none"}, {"logit"}),
        ({"logit_loss": "kl", "affinity": "ffa", "label_weight": 0.5}, {"logit", "affinity", "label"}),
    ],
)
def test_only_its_own_terms(batch, arguments, terms):
    objective = DistillationObjective(**arguments)
    got = objective(**batch, labels=LABELS if objective.label_weight else None)
    assert set(got) == {"total", *terms}


def test_gradients_reach_the_student_and_not_the_teacher(batch):
    batch["teacher_logits"].requires_grad_()
    for teacher_map in batch["teacher_maps"]:
        teacher_map.requires_grad_()
    DistillationObjective()(**batch)["total"].backward()
    assert batch["student_logits"].grad.abs().max() > 0
    assert all(m.grad.abs().max() > 0 for m in batch["student_maps"])
    assert batch["teacher_logits"].grad is None
    assert all(m.grad is None for m in batch["teacher_maps"])


def test_labels_are_refused_by_a_label_free_objective(batch):
    with pytest.raises(ValueError, match="label-free"):
        DistillationObjective()(**batch, labels=LABELS)


def test_labels_are_demanded_by_a_labelled_objective(batch):
    with pytest.raises(ValueError, match="labels are needed"):
        DistillationObjective(label_weight=0.3)(**batch)


def test_missing_teacher_and_maps_are_named(batch):
    with pytest.raises(ValueError, match="teacher_logits"):
        DistillationObjective("mse", "none")(batch["student_logits"])
    with pytest.raises(ValueError, match="2 and 1"):
        DistillationObjective()(**{**batch, "teacher_maps": batch["teacher_maps"][:1]})
    with pytest.raises(ValueError, match="0 and 0"):
        DistillationObjective()(**{**batch, "student_maps": [], "teacher_maps": []})


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"logit_loss": "l1"}, "'l1'"),
        ({"affinity": "ckd"}, "'ckd'"),
        ({"temperature": 0}, "temperature.*0"),
        ({"temperature": math.nan}, "temperature.*nan"),
        ({"affinity_weight": -1.0}, r"affinity_weight.*-1\.0"),
        ({"label_weight": math.nan}, "label_weight.*nan"),
        ({"logit_weight": math.inf}, "logit_weight.*inf"),
        ({"logit_loss": "none", "affinity": "none"}, "no term"),
        ({"affinity": "ffa", "k": 0}, "0"),
    ],
)
def test_bad_settings_are_named(arguments, names):
    with pytest.raises(ValueError, match=names):
        DistillationObjective(**arguments)


def test_ffa_draws_anew_and_is_seeded(batch):
    def values(seed):
        objective = DistillationObjective("none", "ffa", k=2, seed=seed)
        return [objective(**batch)["affinity"].item() for _ in range(3)]

    first = values(1)
    assert len(set(first)) == 3
    assert values(1) == first
    assert values(2) != first


def test_bf16_logits_are_compared_in_float32(batch):
    objective = DistillationObjective("mse", "none")
    half = batch["student_logits"].detach().bfloat16()
    total = objective(half, teacher_logits=batch["teacher_logits"])["total"]
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(F.mse_loss(half.float(), batch["teacher_logits"]).item(), rel=1e-6)


# ---- adapters


@pytest.mark.parametrize("channels", [1, 5, 16])
def test_adapter_starts_as_the_identity_after_a_relu(channels):
    feature_map = torch.randn(2, channels, 3, 3, generator=torch.Generator().manual_seed(1)).relu()
    assert torch.equal(Adapter(channels)(feature_map), feature_map)


def test_adapters_change_nothing_at_first_and_get_gradients(batch):
    plain = DistillationObjective("none", "fa")
    adapted = DistillationObjective("none", "fa", adapter_channels=(3, 6))
    assert not list(plain.parameters())
    assert len(list(adapted.parameters())) == 4
    total = adapted(**batch)["total"]
    assert total.item() == pytest.approx(plain(**batch)["total"].item(), rel=1e-6)
    total.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_a_map_of_one_pixel_is_warned_of(batch):
    batch["student_maps"][1], batch["teacher_maps"][1] = torch.rand(4, 6, 1, 1), torch.rand(4, 6, 1, 1)
    with pytest.warns(UserWarning, match="one pixel"):
        both = DistillationObjective("none", "fa")(**batch)["affinity"].detach()
    batch["student_maps"].pop()
    batch["teacher_maps"].pop()
    assert torch.equal(both, DistillationObjective("none", "fa")(**batch)["affinity"].detach())


def test_adapters_must_be_as_many_as_maps(batch):
    with pytest.raises(ValueError, match="zip"):
        DistillationObjective("none", "fa", adapter_channels=(3,))(**batch)


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("teacher", [(4, 1), (4, 5), (1, 10)])
def test_logits_of_other_shapes_are_refused(loss, teacher):
    with pytest.raises(ValueError, match=r"same images and classes.*\(4, 10\) and"):
        DistillationObjective(loss, "none")(torch.randn(4, 10), teacher_logits=torch.randn(teacher))


# ---- one prediction a pixel


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_dense_logits_are_averaged_over_images_and_pixels(loss):
    """As if every pixel were an image."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 3, 4, generator=generator) for _ in range(2))
    flat = [logits.permute(0, 2, 3, 1).reshape(-1, 5) for logits in (student, teacher)]
    objective = DistillationObjective(loss, "none", affinity_weight=0.0)
    assert float(objective(student, (), teacher)["total"]) == pytest.approx(
        float(objective(flat[0], (), flat[1])["total"])
    )


def test_dense_kl_by_hand():
    """One image of two pixels: KL(½, ½ ‖ ¾, ¼) = ½ ln(4/3), and 0; T = 1."""
    student = torch.tensor([[0.75, 0.5], [0.25, 0.5]]).log().view(1, 2, 1, 2)
    teacher = torch.zeros(1, 2, 1, 2)
    assert float(logit_kl(student, teacher, 1.0)) == pytest.approx(math.log(4 / 3) / 4)


def test_dense_labels_are_averaged_over_pixels():
    logits = torch.zeros(2, 4, 3, 3)
    objective = DistillationObjective("none", "none", affinity_weight=0.0, label_weight=1.0)
    labels = torch.zeros(2, 3, 3, dtype=torch.int64)
    assert float(objective(logits, labels=labels)["total"]) == pytest.approx(math.log(4))


@pytest.mark.parametrize("output", [{"out": torch.zeros(2, 3)}, (torch.zeros(2, 3),)])
def test_logits_that_are_no_tensor_are_named(output):
    objective = DistillationObjective("mse", "none", affinity_weight=0.0)
    with pytest.raises(TypeError, match=r"student_logits must be a tensor .*take the logits out"):
        objective(output, (), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="teacher_logits must be a tensor"):
        objective(torch.zeros(2, 3), (), output)
