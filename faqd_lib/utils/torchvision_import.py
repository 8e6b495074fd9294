"""Import torchvision with any build of torch.

A torchvision wheel built for CUDA registers kernels for ``torchvision::nms`` on import. With a CPU-only torch its
compiled extension cannot be loaded, the schemas are missing, and ``import torchvision`` raises ``RuntimeError: operator
torchvision::nms does not exist``. Defining the two schemas first is enough: this project uses torchvision's datasets
and models, which are pure Python, and none of its compiled operators.
"""

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


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
        for schema in _SCHEMAS.values():
            library.define(schema)
        import torchvision

        return torchvision, library  # the library object keeps the schemas alive
    return torchvision, None


torchvision, _library = _import_torchvision()
