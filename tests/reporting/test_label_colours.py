"""Colours of label maps."""

import torch

from faqd_lib.data.images import IGNORED
from faqd_lib.reporting.pictures import LABEL_COLOURS, label_colours


def test_every_class_has_its_colour_and_ignored_pixels_are_dark():
    painted = label_colours(torch.tensor([[[0, 10, IGNORED, 12]]], dtype=torch.uint8))
    assert painted.shape == (1, 3, 1, 4)
    assert painted.dtype == torch.uint8
    colours = painted[0, :, 0].T.tolist()
    assert colours == [list(LABEL_COLOURS[0]), list(LABEL_COLOURS[10]), [30, 30, 30], list(LABEL_COLOURS[0])]
    assert len(set(LABEL_COLOURS)) == len(LABEL_COLOURS)
