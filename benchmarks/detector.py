"""Mask R-CNN R50-FPN here and in torchvision, side by side: a training step and an inference.

    python -m benchmarks.detector                  both at equal heads (2fc), proposals and image size; BN; one process
    python -m benchmarks.detector --size 480 --repeats 9

Times are of the processor, on one thread, so that other work on the machine counts little; both networks take turns.
Weights are equal (torchvision's, loaded here), the geometry is torchvision's. Printed: medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import anorm


def networks(folder: Path, size: int) -> tuple[nn.Module, nn.Module]:
    """Return torchvision's network and ours with its weights."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=81, min_size=size, max_size=10**6
    )
    torch.save(theirs.state_dict(), folder / "torchvision.pth")
    ours = anorm.create_detector("mask_rcnn", "resnet50", norm="bn", geometry="torchvision", box_head="2fc")
    anorm.load_weights(ours, folder / "torchvision.pth")
    return theirs, ours


def scene(size: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of noise with eight objects each."""
    images, targets = [], []
    for number in range(2):
        draws = torch.Generator().manual_seed(number)
        corner = torch.rand(8, 2, generator=draws) * size / 2
        boxes = torch.cat((corner, corner + 20 + torch.rand(8, 2, generator=draws) * size / 3), 1)
        masks = torch.zeros(8, size, size + 64, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        images.append(torch.rand(3, size, size + 64, generator=draws))
        targets.append({"boxes": boxes, "labels": torch.arange(1, 9), "masks": masks})
    return images, targets


def step(network: nn.Module, images, targets) -> float:
    """Seconds of the processor for forward, losses and backward."""
    network.train()
    torch.manual_seed(0)
    started = time.process_time()
    losses = network(images, targets)
    sum(losses.values()).backward()
    network.zero_grad()
    return time.process_time() - started


def infer(network: nn.Module, images, targets) -> float:
    """Seconds of the processor for the detections of one image."""
    network.eval()
    started = time.process_time()
    with torch.no_grad():
        network(images[:1])
    return time.process_time() - started


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--size", type=int, default=320)
    asked.add_argument("--repeats", type=int, default=5)
    options = asked.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pair = networks(Path(folder), options.size)
    images, targets = scene(options.size)
    for name, measure in (("inference", infer), ("training step", step)):
        times: list[list[float]] = [[], []]
        for repeat in range(options.repeats + 1):
            for of, network in zip(times, pair, strict=True):
                seconds = measure(network, images, targets)
                if repeat:  # the first one warms up
                    of.append(seconds)
        theirs, ours = (statistics.median(of) for of in times)
        print(f"{name}: torchvision {theirs:.3f} s, anorm {ours:.3f} s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
