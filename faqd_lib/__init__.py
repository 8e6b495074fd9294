"""FAQD: feature-affinity assisted distillation and quantization of networks on label-free data (arXiv 2302.10899)."""

from .affinity.loss import (
    FastFeatureAffinityLoss,
    FeatureAffinityLoss,
    affinity_matrix,
    feature_affinity_loss,
)
from .affinity.statistics import affinity_statistics
from .export.packed import load_packed, save_packed
from .models import FeatureTap, build_model, stage_taps
from .quantization.description import describe
from .quantization.network import (
    calibrate,
    compile_activations,
    dequantize,
    quantize,
    reestimate_batch_norm,
    split_parameters,
)
from .training.objective import DistillationObjective


def __getattr__(name: str) -> object:
    """Import names that take seconds when they are first asked for; ``torchvision`` works beside any build of torch."""
    if name == "torchvision":
        from .utils.torchvision_import import torchvision

        return torchvision
    if name == "compress":
        from .compression.compress import compress

        return compress
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
    "compress",
    "dequantize",
    "describe",
    "feature_affinity_loss",
    "load_packed",
    "quantize",
    "reestimate_batch_norm",
    "save_packed",
    "split_parameters",
    "stage_taps",
]
