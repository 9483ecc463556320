"""Measurements on a network in evaluation mode: what its laws decide, what its units answer, what their
decisions are worth.

Nothing here asks for the type of a layer: a law tells its parts (``Norm.parts``) and a placement its site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from anorm.algebra import Moments
from anorm.engine.device import Autocast
from anorm.norms.base import Choice, Norm, Site, outermost_norms
from anorm.ops import reference

__all__ = [
    "LayerProbe",
    "Responses",
    "Spread",
    "layers",
    "look",
    "rank_divergence",
    "responses",
]


def layers(model: nn.Module) -> dict[str, Norm]:
    """The norms of a network that are no part of another law, by name."""
    return dict(outermost_norms(model))


class Spread:
    """Mean and standard deviation (population) over instances, for each channel; exactly 0 where nothing varies."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """values (N, C). Batches are merged by Chan's formula, in float64."""
        values = values.detach().double().cpu()
        mean = values.sum(0) / len(values)  # of equal float32 values exactly that value
        delta, total = mean - self.mean, self.count + len(values)
        self._squares = (
            self._squares
            + (values - mean).square().sum(0)
            + delta.square() * (self.count * len(values) / total)
        )
        self.mean = self.mean + delta * (len(values) / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self._squares / max(self.count, 1)).sqrt()


@dataclass
class LayerProbe:
    """What was seen of a layer. known: whether its law tells its parts; by_instance: whether gamma or beta
    are functions of the instance. choices: by name, with the values of all instances (N, K), or (K,) where
    they are the same for all.
    """

    name: str
    law: str
    site: Site | None
    channels: int
    known: bool = False
    by_instance: bool = False
    gamma: Spread = field(default_factory=Spread)
    beta: Spread = field(default_factory=Spread)
    choices: dict[str, Choice] = field(default_factory=dict)
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def stage(self) -> int:
        """Counted from 1; 0 where the layer knows of none."""
        return self.site.stage + 1 if self.site else 0

    @property
    def gamma_spread(self) -> float:
        """Mean over channels of the standard deviation of gamma over instances, in units of gamma's mean size."""
        return _relative(self.gamma.std.mean(), self.gamma.mean)

    @property
    def gamma_between_channels(self) -> float:
        """Standard deviation over channels of the mean gamma, in the same units."""
        return _relative(self.gamma.mean.std(correction=0), self.gamma.mean)


def _relative(value: Tensor, mean: Tensor) -> float:
    size = float(mean.abs().mean())
    return float(value) / size if size else 0.0


@torch.no_grad()
def look(model: nn.Module, batches: Iterable, autocast: Autocast) -> dict[str, LayerProbe]:
    """Every layer that runs, in the order of its first call, over ``batches`` of (images, labels, ...)."""
    found: dict[str, LayerProbe] = {}
    kept: dict[str, dict[str, list[Tensor]]] = {}

    def note(name: str, norm: Norm, x: Tensor) -> None:
        seen = found.setdefault(name, LayerProbe(name, type(norm).__name__, norm.site, norm.channels))
        with torch.autocast(x.device.type, enabled=False):
            parts = norm.parts(Moments(*reference.moments(x), x.shape[2] * x.shape[3]))
        if parts is None:
            return
        seen.known = True
        for spread, value, default in ((seen.gamma, parts.gamma, 1.0), (seen.beta, parts.beta, 0.0)):
            value = x.new_full((norm.channels,), default) if value is None else value
            seen.by_instance |= value.dim() == 2
            spread.add(value.expand(len(x), -1))
        for key, choice in parts.choices.items():
            seen.choices[key] = choice
            kept.setdefault(name, {}).setdefault(key, []).append(choice.values.detach().float().cpu())

    hooks = [
        norm.register_forward_pre_hook(lambda norm, given, name=name: note(name, norm, given[0]))
        for name, norm in layers(model).items()
    ]
    labels = _run(model, batches, autocast, hooks)
    for name, seen in found.items():
        seen.labels = labels
        for key, values in kept.get(name, {}).items():
            whole = torch.cat(values) if values[0].dim() == 2 else values[0]
            seen.choices[key] = seen.choices[key]._replace(values=whole)
    return found


def _run(model: nn.Module, batches: Iterable, autocast: Autocast, hooks: list) -> Tensor:
    """The network over all batches, the hooks removed at the end; the labels."""
    labels = []
    try:
        for images, wanted, *_ in batches:
            with autocast():
                model(images)
            labels.append(wanted.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(labels)


BINS = 60


@dataclass
class Responses:
    """Histograms of a unit's output, one an image: ``density`` (images, BINS) sums to one over the bins
    between ``low`` and ``high``; what lies outside is counted in the bins at the ends. unit: counted from 1
    in its stage.
    """

    name: str
    stage: int
    unit: int
    low: float
    high: float
    density: Tensor
    labels: Tensor

    def similarity(self) -> tuple[float, float]:
        """Mean total variation distance (0 to 1) of two images' histograms: of one class, and of two."""
        distance = torch.cdist(self.density, self.density, p=1) / 2
        same = self.labels[:, None] == self.labels
        pairs = ~torch.eye(len(self.labels), dtype=torch.bool)
        means = (
            distance[mask].mean() if mask.any() else torch.tensor(float("nan"))
            for mask in (same & pairs, ~same)
        )
        within, between = (float(mean) for mean in means)
        return within, between


@torch.no_grad()
def responses(model: nn.Module, batches: Iterable, autocast: Autocast, most: int = 3) -> list[Responses]:
    """Histograms of the output (behind activation and shortcut) of the last norm of each block: at most
    ``most`` units a stage, at even distances. Bins span the central 99.96 % of the first batch.
    """
    found: dict[str, dict] = {}

    def note(name: str, y: Tensor) -> None:
        flat = y.detach().float().flatten(1).cpu()  # a GPU's histogram is not deterministic
        if name not in found:
            few = flat.flatten()[:: max(1, flat.numel() // 500_000)]
            low, high = torch.quantile(few, torch.tensor([2e-4, 1 - 2e-4])).tolist()
            found[name] = {"low": low, "high": high if high > low else low + 1.0, "rows": []}
        one = found[name]
        one["rows"] += [
            torch.histc(row.clamp(one["low"], one["high"]), BINS, one["low"], one["high"]) for row in flat
        ]

    norms = layers(model)
    last = [name for name, norm in norms.items() if norm.site is not None and norm.site.last] or list(norms)
    hooks = [
        norms[name].register_forward_hook(lambda norm, given, y, name=name: note(name, y)) for name in last
    ]
    labels = _run(model, batches, autocast, hooks)
    stages: dict[int, list[str]] = {}
    for name in found:  # in the order of calls
        site = norms[name].site
        stages.setdefault(site.stage + 1 if site else 1, []).append(name)
    kept = []
    for stage, names in sorted(stages.items()):
        for unit in sorted(
            {round(i * (len(names) - 1) / max(1, most - 1)) for i in range(min(most, len(names)))}
        ):
            one = found[names[unit]]
            counts = torch.stack(one["rows"])
            density = counts / counts.sum(1, keepdim=True)
            kept.append(Responses(names[unit], stage, unit + 1, one["low"], one["high"], density, labels))
    return kept


def rank_divergence(state: dict, model: nn.Module) -> dict[str, dict[str, float]]:
    """Layer -> statistic -> root mean square distance of the ranks' values from their mean, in units of that
    mean's root mean square, from the buffers that a checkpoint holds of every process. Empty for one process.
    """
    kept = state["processes"]["buffers"]
    if len(kept) < 2:
        return {}
    place = {name: i for i, (name, _) in enumerate(model.named_buffers())}
    found: dict[str, dict[str, float]] = {}
    for layer, norm in layers(model).items():
        for name, buffer in norm.stat_buffers():
            if buffer.is_floating_point():
                values = torch.stack([rank[place[f"{layer}.{name}"]].double() for rank in kept])
                mean = values.mean(0)
                size = float(mean.square().mean().sqrt())
                distance = float((values - mean).square().mean().sqrt())
                found.setdefault(layer, {})[name] = distance / size if size else distance
    return found
