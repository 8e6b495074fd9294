"""Learning: a label-free 1-bit student on real images, through the public interface."""

import torch

from faqd_lib.quantization.network import low_bit_weights
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.suite import Suite


def test_a_one_bit_student_learns_digits_without_labels(tmp_path):
    schedule = {"batch_size": 32, "warmup_epochs": 0.5}
    profile = Profile.parse(
        {
            "name": "learning", "shows_results": False, "teachers": ["resnet8"], "student": "resnet8", "image_size": 16,
            "teacher_schedule": {**schedule, "epochs": 3}, "student_schedule": {**schedule, "epochs": 4},
            "fine_tuning_schedule": {**schedule, "epochs": 1},
        },
        "learning",
    )  # fmt: skip
    suite = Suite.open(profile, "digits", results=tmp_path, device="cpu")
    config = suite.student("FAQD", weight_bits=1)
    assert config.label_free
    teacher, student = suite.run([suite.teacher(), config])
    assert teacher.last_accuracy > 80
    assert student.last_accuracy > 60  # percent; chance is 10
    layers = low_bit_weights(suite.model(config))
    assert len(layers) == 7
    for low in layers.values():
        assert torch.equal(low.levels.abs(), torch.ones_like(low.levels))  # one bit a weight
