"""Networks of timm and torchvision by name, with the ``forward_stages`` and ``feature_info`` of those here."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from anorm.archs.base import FeatureInfo
from anorm.archs.trace import Call, trace
from anorm.words import nearest

__all__ = ["LIBRARIES", "Foreign", "find", "load", "timm_norm"]

LIBRARIES = ("timm", "torchvision")


class Foreign(nn.Module):
    """Another library's network, unchanged, in ``network``: images (N, C, H, W) -> logits (N, num_classes).

    ``feature_info`` maps the name of a module to the channels and stride of its output, one for each resolution.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.feature_info = _features(network)

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        # in training GoogLeNet and Inception return their auxiliary logits beside the logits
        return y.logits if isinstance(y, tuple) else y

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {name: (N, C, H/stride, W/stride)}, in order; the classifier runs too."""
        maps: dict[str, Tensor] = {}

        def keep(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                maps.setdefault(name, output.clone())  # a copy: the next layer may write into the map

            return hook

        hooks = [
            self.network.get_submodule(name).register_forward_hook(keep(name)) for name in self.feature_info
        ]
        try:
            self(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: maps[name] for name in self.feature_info}


def find(arch: str) -> tuple[ModuleType, str]:
    """``timm:NAME`` or ``torchvision:NAME`` -> (the library, NAME).

    Raises ValueError for a name that the library does not have, with the nearest; ImportError, with what to
    install, where the library is missing.
    """
    library, _, name = arch.partition(":")
    if library not in LIBRARIES:
        raise ValueError(
            f"arch={arch!r}: {library!r} is none of {', '.join(LIBRARIES)}, as in timm:resnet50d"
        )
    package = _import(library)
    names = package.list_models() if library == "timm" else package.models.list_models()
    if name.split(".")[0] not in names:
        raise ValueError(f"{library} has no model {name!r}{nearest(name, names)}")
    return package, name


def load(arch: str, num_classes: int = 1000, in_channels: int = 3, **options) -> Foreign:
    """``timm:NAME`` or ``torchvision:NAME``; options go to the library's own function.

    Raises, besides ``find``'s errors, ValueError for an option that the network does not take and for images
    of other than 3 channels where torchvision is asked.
    """
    package, name = find(arch)
    try:
        return Foreign(_create(package, name, num_classes, in_channels, options))
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"{arch}: {error}") from error


def _create(package: ModuleType, name: str, num_classes: int, in_channels: int, options: dict) -> nn.Module:
    if package.__name__ == "timm":
        return package.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
    if in_channels != 3:
        raise ValueError(
            f"torchvision's networks take images of 3 channels, not {in_channels}; timm's take any"
        )
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False} | ({} if options.get("weights") else {"init_weights": True}) | options
    return package.models.get_model(name, num_classes=num_classes, **options)


def timm_norm(name: str, channels: int, act: nn.Module, drop: nn.Module, options: dict) -> nn.Module:
    """timm's norm layer of that name, as it is; its norm + activation layer where the BN had an activation or a drop.

    Raises ValueError for a name that timm does not have, for an option that the layer does not take, and for
    EvoNorm, which cannot do without its activation, where the BN had none.
    """
    try:
        return _timm_norm(name, channels, act, drop, options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"norm=timm:{name}: {error}") from error


def _timm_norm(name: str, channels: int, act: nn.Module, drop: nn.Module, options: dict) -> nn.Module:
    _import("timm")
    layers = importlib.import_module("timm.layers")
    plain, joint = _found(layers.get_norm_layer, name), _found(layers.get_norm_act_layer, name)
    if plain is None and joint is None:
        raise ValueError(
            f"timm has no norm layer {name!r}; it has batchnorm2d, groupnorm, layernorm2d, frn, ..."
        )
    bare = isinstance(act, nn.Identity) and isinstance(drop, nn.Identity)
    if bare and plain is not None:
        return plain(channels, **options)
    if joint is None:
        return nn.Sequential(OrderedDict(norm=plain(channels, **options), drop=drop, act=act))
    if bare and name.startswith("evonorm"):
        raise ValueError(
            f"timm:{name} is a norm and an activation in one: it cannot replace a norm without activation"
        )
    layer = joint(channels, apply_act=not isinstance(act, nn.Identity), **options)
    if isinstance(getattr(layer, "act", None), nn.Module):
        layer.act = act
    if not isinstance(drop, nn.Identity):
        layer.drop = drop
    return layer


def _found(lookup: Callable, name: str) -> Callable | None:
    try:
        return lookup(name)
    except KeyError:
        return None


def _import(library: str) -> ModuleType:
    try:
        importlib.import_module("torchvision")  # timm needs it too
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{library} is not installed: pip install {library}") from error
    except (
        RuntimeError
    ) as error:  # a torchvision built against another torch: "operator torchvision::nms does not exist"
        raise ImportError(
            f"the installed torchvision does not fit torch {torch.__version__} ({error}); install both from "
            "one place: pip install --force-reinstall torch torchvision"
        ) from error


def _features(network: nn.Module) -> dict[str, FeatureInfo]:
    """The modules whose outputs are the stages: timm's own list, else the last of each resolution."""
    calls = trace(network)
    shapes = {call.name: call.shape for call in calls if call.shape is not None and len(call.shape) == 4}
    declared = getattr(network, "feature_info", None)
    names = (
        [entry.get("module") for entry in declared]
        if declared
        else _last_of_each_resolution(network, calls, shapes)
    )
    side = calls[-1].given[2]
    return {
        name: FeatureInfo(shapes[name][1], round(side / shapes[name][2])) for name in names if name in shapes
    }


def _last_of_each_resolution(network: nn.Module, calls: list[Call], shapes: dict[str, tuple]) -> list[str]:
    order = {call.name: i for i, call in enumerate(calls)}
    convolved = {shapes[call.name][2:] for call in calls if isinstance(call.module, nn.Conv2d)}
    last: dict[tuple[int, ...], str] = {}
    for name in sorted(_pieces(network, "", shapes), key=order.__getitem__):
        last[shapes[name][2:]] = name
    return [name for size, name in last.items() if size in convolved and max(size) > 1]


def _pieces(module: nn.Module, prefix: str, shapes: dict[str, tuple]) -> list[str]:
    """The modules of the main path: the children of the network, and of each Sequential that works at several
    resolutions and holds blocks or more than one convolution (so not of a transition)."""
    pieces = []
    for child, inner in module.named_children():
        name = f"{prefix}{child}"
        sizes = {shapes[n][2:] for n in (f"{name}.{c}" for c, _ in inner.named_children()) if n in shapes}
        convs = sum(isinstance(m, nn.Conv2d) for m in inner.modules())
        if isinstance(inner, nn.Sequential) and len(sizes) > 1 and convs > 1:
            pieces += _pieces(inner, f"{name}.", shapes)
        elif name in shapes:
            pieces.append(name)
    return pieces
