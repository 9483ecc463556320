"""anorm: Attentive Normalization and its relatives, as layers, networks and a trainer.

    model = anorm.create_model("resnet50", norm="an")
    layer = anorm.create_norm("an", 64, act="relu")
    print(anorm.convert(torchvision.models.resnet50(), norm="an"))
"""

from anorm.openmp import let_threads_sleep

let_threads_sleep()  # before torch is imported, which is what reads it

from anorm.convert import convert
from anorm.norms.statistics import freeze_stats, set_sync, update_stats
from anorm.registry import create_model, create_norm, list_archs, list_norms
from anorm.weights import load_weights

__version__ = "0.1.0"
__all__ = [
    "convert",
    "create_detector",
    "create_model",
    "create_norm",
    "freeze_stats",
    "list_archs",
    "list_norms",
    "load_weights",
    "set_sync",
    "update_stats",
]


def __getattr__(name: str):
    """``create_detector``, imported when it is asked for: classification does not need it."""
    if name != "create_detector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from anorm.detection.detectors import create_detector

    return create_detector
