"""Networks for deployment: ONNX, torch.export and safetensors, checked against the network itself.

    python tools/export.py RUN                                      a run's last weights, to RUN/export/
    python tools/export.py ARCH --norm an --weights FILE            any weights that anorm.load_weights reads
    python tools/export.py resnet50 --norm an                       random weights: for latency alone

Writes model.onnx (dynamic batch and size; BN in the convolutions, see anorm/deploy/folding.py), model.pt2 (the same graph,
for torch.export.load), model.safetensors (the weights as they were trained) and export.json (what was done, the
measured differences and latencies). Nothing is written unless onnxruntime and torch agree with the network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

FORMATS = ("onnx", "pt2", "safetensors")


def network(what: str, norm: str, weights: str | None, classes: int) -> tuple[nn.Module, int, Path]:
    """Return (network, side of its images, folder for the files) of a run folder or an architecture's name."""
    from anorm import create_model, load_weights
    from anorm.deploy.export import settle

    folder = Path(what)
    if folder.is_dir():
        from anorm.deploy.predict import predictor

        found = predictor(folder)
        return found.model, found.image_size, folder / "export"
    model = create_model(what, norm, classes)
    if weights:
        print(load_weights(model, weights))
    else:
        settle(model)
    return model, getattr(model, "image_size", 224), Path("exports") / f"{what}-{norm}"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("what", metavar="RUN|ARCH", help="a run folder, or an architecture's name")
    add("--norm", default="bn", help="with ARCH: the law at its published places")
    add("--weights", help="with ARCH: a file of weights")
    add("--classes", type=int, default=1000, help="with ARCH: number of classes")
    add("--size", type=int, help="side of the images it is checked and timed on (default: the network's)")
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="which files (default: all)")
    add("--threads", type=int, help="threads of torch and of onnxruntime")
    add("--out", type=Path, help="where the files go (default: RUN/export, or exports/ARCH-NORM)")
    return found


def main(argv: list[str]) -> int:
    """Export and report; the exit status."""
    asked = parser().parse_args(argv)

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        import torch

        from anorm.deploy.export import export

        if asked.threads:
            torch.set_num_threads(asked.threads)
        model, size, folder = network(asked.what, asked.norm, asked.weights, asked.classes)
        folder = asked.out or folder
        report = export(model, folder, asked.size or size, formats=tuple(asked.formats))
        norms, differences = report["norms"], report["difference"]
        print(f"{folder}: {', '.join(report['files'])}")
        print(
            f"norms: {norms['folded']} in the convolutions, {norms['centred']} centred, {len(norms['kept'])} kept"
        )
        sizes = (
            "this size alone"
            if report["smallest_size"] is None
            else f"any size from {report['smallest_size']}"
        )
        print(
            f"images: any batch, {sizes}; differences: "
            + ", ".join(f"{k} {v:.1e}" for k, v in differences.items())
        )
        for name, times in report["latency_ms"].items():
            print(f"latency at batch 1, {report['threads']} threads, {name}: {times['median']:.1f} ms")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
