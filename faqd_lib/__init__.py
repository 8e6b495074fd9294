"""FAQD: feature-affinity assisted distillation and quantization of networks on label-free data (arXiv 2302.10899)."""

from .affinity import (
    FastFeatureAffinityLoss,
    FeatureAffinityLoss,
    affinity_matrix,
    feature_affinity_loss,
)
from .affinity_statistics import affinity_statistics
from .description import describe
from .distill import DistillationObjective
from .models import FeatureTap, build_model
from .packed import load_packed, save_packed
from .quantize import (
    calibrate,
    compile_activations,
    dequantize,
    quantize,
    reestimate_batch_norm,
    split_parameters,
)


def __getattr__(name: str) -> object:
    """``from faqd_lib import torchvision``: beside any build of torch, and only when it is asked for."""
    if name == "torchvision":
        from ._torchvision import torchvision

        return torchvision
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "DistillationObjective",
    "FastFeatureAffinityLoss",
    "FeatureAffinityLoss",
    "FeatureTap",
    "affinity_matrix",
    "affinity_statistics",
    "build_model",
    "calibrate",
    "compile_activations",
    "dequantize",
    "describe",
    "feature_affinity_loss",
    "load_packed",
    "quantize",
    "reestimate_batch_norm",
    "save_packed",
    "split_parameters",
]
