"""What figures show, read back from their axes."""

import pandas as pd
import pytest
import torch

from faqd_lib.reporting import charts, pictures


def test_confusion_counts_answers_and_changes():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    teacher = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    student = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0])
    left, right, *_ = pictures.confusion(teacher, student, labels, ["cat", "dog"]).axes
    torch.testing.assert_close(
        torch.tensor(left.images[0].get_array().filled()), torch.tensor([[200 / 3, 100 / 3], [20.0, 80.0]]).double()
    )
    assert right.images[0].get_array().tolist() == [[-25.0, 25.0], [25.0, -25.0]]
    assert left.get_title() == "same answer on 75.0 % of 8 images"
    assert [text.get_text() for text in right.texts] == ["-25", "+25", "+25", "-25"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["cat", "dog"]


def test_confusion_of_many_classes_is_drawn_without_their_names():
    labels = torch.arange(200)
    left, *_ = pictures.confusion(labels, labels, labels, [f"class {i}" for i in range(200)]).axes
    assert "class 1" not in [label.get_text() for label in left.get_xticklabels()]


def test_the_area_of_a_mark_is_the_size_of_the_weights():
    frame = pd.DataFrame(
        {
            "bits": ["32W32A", "1W32A", "1W32A", "1W32A"],
            "method": ["FAQD", "FAQD", "FAQD", "labels"],
            "accuracy": [90.0, 80.0, 82.0, 75.0],
            "size_kB": [1000.0, 50.0, 50.0, 50.0],
        }
    )
    (axis,) = charts.accuracy_and_size(frame).axes
    areas, points = axis.collections[0:6:2], axis.collections[1:6:2]
    sizes = [float(area.get_sizes()[0]) for area in areas]
    assert sizes == pytest.approx([20 * sizes[1], sizes[1], sizes[1]])
    assert [area.get_offsets()[:, 1].tolist() for area in areas] == [[90.0], [81.0], [75.0]]  # means
    assert [point.get_offsets()[:, 1].tolist() for point in points] == [[90.0], [80.0, 82.0], [75.0]]  # seeds
    assert [label.get_text() for label in axis.get_xticklabels()] == ["32W32A\n1000 kB", "1W32A\n50 kB"]


def test_rows_of_affinities_have_names():
    images, maps = torch.rand(2, 3, 8, 8), {"before": torch.rand(2, 4, 4), "teacher": torch.rand(2, 4, 4)}
    figure = pictures.pixel_affinity(images, [(1, 2)] * 2, maps, row_names=["KD", "FAQD"])
    assert [axis.get_ylabel() for axis in figure.axes[:6:3]] == ["KD", "FAQD"]
    assert [axis.get_title() for axis in figure.axes[:3]] == ["image", "before", "teacher"]
    # The circle stands on the chosen pixel's centre, in pixels of the image.
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[5.0, 3.0]]
