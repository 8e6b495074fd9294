"""Import torchvision with any build of torch.

A torchvision wheel built for CUDA registers kernels for ``torchvision::nms`` on import. A CPU-only torch cannot load
the compiled extension that defines the schemas, and ``import torchvision`` raises ``RuntimeError: operator
torchvision::nms does not exist``. Defining two schemas first is enough for the datasets and models, which are pure
Python.
"""

import torch


def _import_torchvision():
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        # A failed import leaves half-initialised submodules behind: remove them before importing again.
        import sys

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        return torchvision, library  # the library object keeps the schemas alive
    return torchvision, None


torchvision, _library = _import_torchvision()
