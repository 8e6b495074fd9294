"""Import torchvision with any build of torch.

A torchvision wheel built for CUDA registers kernels for ``torchvision::nms`` on import. A CPU-only torch cannot load
the compiled extension that defines the schemas, and the import raises ``RuntimeError``. Defining two schemas first is
enough for the datasets and models, which are pure Python.
"""

import sys

import torch

__all__ = ["torchvision"]

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    # A failed import leaves half-initialised submodules behind: remove them before importing again.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")  # keeps the schemas alive
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
