"""Networks for deployment: ONNX, torch.export and safetensors, checked against the network itself."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anorm import ops
from anorm.deploy.folding import Folded, FoldReport, PerInstance, fold
from anorm.norms.base import Norm, RunningNorm

__all__ = ["check", "export", "latency", "open_session", "program", "smallest_size", "to_onnx"]

FORMATS = {"onnx": "model.onnx", "pt2": "model.pt2", "safetensors": "model.safetensors"}
TOLERANCE = 1e-3
"""Largest difference of a logit, as a share of the largest logit: folding moves float32 roundings (about 1e-5 in
a ResNet-50), and a wrong graph is wrong by far more."""


# ---- the graph ---------------------------------------------------------------------------------------------


def program(
    model: nn.Module, size: int, in_channels: int = 3
) -> tuple[torch.export.ExportedProgram, int | None]:
    """The graph of images (batch, in_channels, height, width) -> logits, and the smallest size it takes.

    Batch, height and width are free; for a network that takes one size alone the last two are fixed and the
    smallest size is None. ``model`` is in evaluation mode.

    Raises ValueError for a size at which a map is left with one position (torch.export treats 1 as special).
    """
    smallest = smallest_size(model, size, in_channels)
    batch, free = torch.export.Dim("batch"), {}
    if smallest is not None:
        free = {i + 2: torch.export.Dim(name, min=smallest) for i, name in enumerate(("height", "width"))}
    images = torch.randn(2, in_channels, size, size)
    with torch.no_grad():
        # equalities between sizes that hold but that it cannot prove become checks at run time
        graph = torch.export.export(
            model,
            (images,),
            dynamic_shapes=({0: batch, **free},),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    return graph, smallest


def smallest_size(model: nn.Module, size: int, in_channels: int = 3) -> int | None:
    """The smallest square image whose maps all keep more than one position; None: it takes ``size`` alone."""
    if not _maps_remain(model, size, in_channels):
        raise ValueError(
            f"images of {size} x {size} leave feature maps of one position: give a larger --size"
        )
    if not _maps_remain(model, 2 * size, in_channels):
        return None
    low, high = 1, size  # low does not work, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _maps_remain(model, middle, in_channels) else (middle, high)
    return high


def _maps_remain(model: nn.Module, size: int, in_channels: int) -> bool:
    """Whether the network runs at this size with height and width > 1 at every convolution and norm."""
    areas: list[int] = []

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        areas.append(min(output.shape[2:]))

    kinds = (nn.Conv2d, Norm, Folded, PerInstance)
    inner = {
        id(m) for norm in model.modules() if isinstance(norm, Norm) for m in norm.modules() if m is not norm
    }
    hooks = [
        m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds) and id(m) not in inner
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(1, in_channels, size, size))
    except (ValueError, RuntimeError):  # a network's own words for a size it does not take, or torch's
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return min(areas) > 1


def to_onnx(graph: torch.export.ExportedProgram, path: Path, any_size: bool = True) -> None:
    """Write the graph as ONNX with axes named batch, height and width."""
    axes = {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own internals
        done = torch.onnx.export(
            graph,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(axes,),
            input_names=["images"],
            output_names=["logits"],
        )
    done.save(str(path), external_data=False)


# ---- checking and measuring --------------------------------------------------------------------------------


def open_session(path: Path, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """images -> logits by onnxruntime on the CPU; ``threads`` 0 lets it choose."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def check(run: Callable[[Tensor], Tensor], model: nn.Module, shapes: list[tuple[int, ...]]) -> float:
    """The largest difference of a logit over these image shapes, as a share of the largest logit.

    Raises ValueError when it exceeds ``TOLERANCE``.
    """
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        with torch.no_grad(), ops.use_backend("reference"):
            expected = model(images)
        difference = ((run(images) - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"on images {shape} the exported graph differs by {difference:.1e} of the largest logit "
                f"(accepted: {TOLERANCE:.0e}): its weights may not be finite, or the exporter has a fault"
            )
        worst = max(worst, difference)
    return worst


def latency(
    runs: dict[str, Callable[[Tensor], Any]], images: Tensor, rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of each way to run ``images``; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            if turn >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: dict(zip(("q25", "median", "q75"), statistics.quantiles(values, n=4), strict=True))
        for name, values in times.items()
    }


# ---- one export --------------------------------------------------------------------------------------------


def export(model: nn.Module, folder: Path, size: int, in_channels: int = 3, formats=tuple(FORMATS)) -> dict:
    """Write ``formats`` of a network into ``folder``; returns the report that export.json holds.

    Raises ValueError, and writes nothing, when an exported graph disagrees with the network.
    """
    model = model.eval().cpu().float()
    folded, done = fold(model)
    graph, smallest = program(folded, size, in_channels)
    other = size if smallest is None else max(smallest, size * 3 // 4)
    shapes = [(1, in_channels, size, size), (3, in_channels, other, size)]
    report: dict[str, Any] = {
        "norms": _described(done),
        "size": size,
        "smallest_size": smallest,
        "difference": {},
    }
    report["versions"] = {"torch": torch.__version__}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = {}
        runs: dict[str, Callable] = {"torch": torch.inference_mode()(model)}
        if "onnx" in formats:
            written["onnx"] = Path(scratch) / FORMATS["onnx"]
            to_onnx(graph, written["onnx"], smallest is not None)
            runs["onnxruntime"] = open_session(written["onnx"], torch.get_num_threads())
            report["difference"]["onnx"] = check(runs["onnxruntime"], model, shapes)
            report["versions"] |= _versions("onnx", "onnxscript", "onnxruntime")
        if "pt2" in formats:
            written["pt2"] = Path(scratch) / FORMATS["pt2"]
            torch.export.save(graph, written["pt2"])
            report["difference"]["pt2"] = check(torch.export.load(written["pt2"]).module(), model, shapes)
        if "safetensors" in formats:
            from safetensors.torch import save_file

            written["safetensors"] = Path(scratch) / FORMATS["safetensors"]
            save_file(
                {name: value.contiguous() for name, value in model.state_dict().items()},
                written["safetensors"],
            )
        images = torch.randn(1, in_channels, size, size)
        # one after another: onnxruntime's idle threads would slow torch's
        report["latency_ms"] = {name: latency({name: run}, images)[name] for name, run in runs.items()}
        report["threads"] = torch.get_num_threads()
        for name, path in written.items():
            os.replace(path, folder / FORMATS[name])
    report["files"] = [FORMATS[name] for name in written]
    (folder / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _described(done: FoldReport) -> dict[str, Any]:
    return {"folded": len(done.folded), "centred": len(done.centred), "kept": done.kept}


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in packages}


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Give an untrained network the statistics of a batch of noise; without any its values overflow."""
    layers = [module for module in model.modules() if isinstance(module, RunningNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    size = getattr(model, "image_size", 64)
    model.train()(torch.randn(8, 3, size, size))
    model.eval()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
