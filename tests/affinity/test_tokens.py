"""Affinity between tokens: the numbers of maps, beside maps, and refusals."""

import pytest
import torch

from faqd_lib import affinity_statistics
from faqd_lib.affinity.estimators import average_pooling, hutch_plus_plus, orthogonal_probes, pixel_subset
from faqd_lib.affinity.loss import FastFeatureAffinityLoss, affinity_matrix, feature_affinity_loss, pixel_count
from faqd_lib.affinity.rivals import rival
from faqd_lib.models import FeatureTap
from faqd_lib.training.objective import DistillationObjective


def maps(batch: int = 2, channels: int = 5, height: int = 3, width: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator)


def tokens(features: torch.Tensor) -> torch.Tensor:
    """(batch, N, channels) of a map, row by row."""
    return features.flatten(2).mT.contiguous()


def with_gradient(student: torch.Tensor, teacher: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.clone().requires_grad_()
    if options.get("method") == "projection":
        options["generator"] = torch.Generator().manual_seed(3)
    loss = feature_affinity_loss(student, teacher, **options)
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize(
    "options", [{}, {"method": "gram"}, {"method": "pairwise"}, {"norm": "l1"}, {"method": "projection"}], ids=str
)
def test_tokens_have_the_loss_and_gradient_of_their_map(options):
    student, teacher = maps(), maps(channels=7, seed=1)
    expected, gradient = with_gradient(student, teacher, **options)
    assert expected > 0
    for of_student in (student, tokens(student)):
        for of_teacher in (teacher, tokens(teacher)):
            loss, found = with_gradient(of_student, of_teacher, **options)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
            shaped = gradient if found.ndim == 4 else tokens(gradient)
            torch.testing.assert_close(found, shaped, rtol=1e-4, atol=1e-7)


def test_the_definition_holds_for_tokens():
    student, teacher = tokens(maps()).double(), tokens(maps(seed=1)).double()
    unit = [part / part.norm(dim=2, keepdim=True) for part in (student, teacher)]
    x, y = (part @ part.mT for part in unit)
    assert torch.allclose(feature_affinity_loss(student, teacher), (x - y).square().sum((1, 2)).mean() / 12**2)
    assert torch.allclose(affinity_matrix(student), x)


@pytest.mark.parametrize(
    ("student", "teacher", "counts"),
    [((2, 12, 5), (2, 13, 5), "12 and 13"), ((2, 13, 5), (2, 5, 3, 4), "13 and 12"),
     ((2, 5, 3, 4), (2, 17, 8), "12 and 17"), ((2, 65, 5), (2, 5, 8, 8), "65 and 64"),
     ((2, 9, 5), (2, 5, 2, 4), "9 and 8"), ((2, 5, 9, 15), (2, 36, 8), "135 and 36")],
)  # fmt: skip
def test_other_numbers_of_tokens_are_refused(student, teacher, counts):
    with pytest.raises(ValueError, match=f"same number of tokens, got {counts}.*class tokens"):
        feature_affinity_loss(torch.ones(student), torch.ones(teacher))


@pytest.mark.parametrize(("height", "width"), [(3, 3), (9, 16)])  # 144 tokens are a square as well
def test_a_grid_of_tokens_beside_a_map_of_its_proportions_is_that_map(height, width):
    """Its loss is that of the grid: the teacher is resized to the student's, whichever of them has tokens."""
    large = maps(height=2 * height, width=2 * width)
    small = maps(channels=7, height=height, width=width, seed=1)
    for student, teacher in ((small, large), (large, small)):
        expected, gradient = with_gradient(student, teacher)
        of_teacher, _ = with_gradient(student, tokens(teacher))
        of_student, found = with_gradient(tokens(student), teacher)
        torch.testing.assert_close(torch.stack([of_teacher, of_student]), expected.expand(2), rtol=1e-5, atol=0)
        torch.testing.assert_close(found, tokens(gradient), rtol=1e-4, atol=1e-7)


def test_statistics_estimators_and_rivals_take_tokens():
    student, teacher = maps().double(), maps(seed=1).double()
    of_maps, of_tokens = affinity_statistics(student, teacher), affinity_statistics(tokens(student), tokens(teacher))
    assert of_tokens.loss == pytest.approx(of_maps.loss, rel=1e-12)
    assert of_tokens.variance(3) == pytest.approx(of_maps.variance(3), rel=1e-12)
    for estimate, budget in ((hutch_plus_plus, 8), (pixel_subset, 5), (orthogonal_probes, 4)):
        values = [
            estimate(*pair, budget, torch.Generator().manual_seed(2))
            for pair in ((student, teacher), (tokens(student), tokens(teacher)))
        ]
        torch.testing.assert_close(*values)
    torch.testing.assert_close(
        average_pooling(tokens(student), tokens(teacher), 12), feature_affinity_loss(student, teacher)
    )
    torch.testing.assert_close(rival("sp")(tokens(student), tokens(teacher)), rival("sp")(student, teacher))


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 12), (2, 1, 1, 12, 5)])
def test_what_is_neither_tokens_nor_a_map_is_refused(shape):
    with pytest.raises(ValueError, match=r"nothing empty|same number of tokens"):
        feature_affinity_loss(torch.ones(shape), torch.ones(2, 12, 5))


def test_projections_can_be_drawn_ahead_for_tokens():
    student, teacher = tokens(maps()), tokens(maps(seed=1))
    expected = FastFeatureAffinityLoss(seed=5)(student, teacher)
    ahead = FastFeatureAffinityLoss(seed=5)
    ahead.predraw([pixel_count(student)], torch.device("cpu"))
    assert torch.equal(ahead(student, teacher), expected)
    assert pixel_count(maps()) == pixel_count(student) == 12


@pytest.mark.parametrize("affinity", ["fa", "ffa"])
def test_the_objective_takes_tokens_beside_maps(affinity):
    objective = DistillationObjective("none", affinity, adapter_channels=[5, 5])
    students = [tokens(maps()).requires_grad_(), maps(seed=2).requires_grad_()]
    terms = objective(torch.zeros(2, 3), students, teacher_maps=[tokens(maps(seed=1)), maps(seed=3)])
    terms["total"].backward()
    assert terms["affinity"] > 0
    assert all(student.grad.abs().max() > 0 for student in students)
    assert all(adapter[0].weight.grad.abs().max() > 0 for adapter in objective.adapters)


def test_one_token_has_no_affinity():
    objective = DistillationObjective("none", "fa")
    with pytest.warns(UserWarning, match="one pixel"):
        terms = objective(torch.zeros(2, 3), [torch.ones(2, 1, 8)], teacher_maps=[torch.ones(2, 1, 8)])
    assert terms["affinity"] == 0


def test_maps_whose_channels_come_last_are_tapped_as_maps():
    class Turned(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.permute(0, 2, 3, 1)

    model, features = torch.nn.Sequential(Turned(), torch.nn.Flatten()), maps()
    with FeatureTap(model, ["0@bhwc", "0"]) as tap:
        model(features)
    assert torch.equal(tap.features[0], features)
    assert tap.features[1].shape == (2, 3, 4, 5)
    with FeatureTap(model, ["1@bhwc"]), pytest.raises(TypeError, match=r"'1@bhwc' must be a map .*got .*\(2, 60\)"):
        model(features)
