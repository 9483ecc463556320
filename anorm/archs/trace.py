"""Reading a network that this project did not write: what runs in which order, and where its norms stand.

No torch.fx: one forward pass with hooks, on fake tensors (shapes only, no arithmetic), so that any module
that runs can be read, control flow and all.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from anorm.norms.base import Site
from anorm.ops import use_backend

__all__ = ["Call", "find_sites", "trace"]

SIZES = (224, 299, 128, 64, 32, 28)
STEM = re.compile(r"(^|\.)stem(\.|$)")
SHORTCUT = re.compile(r"(^|\.)(downsample|shortcut|proj|project|skip|conv_skip|identity)(\.|$)")


@dataclass(frozen=True)
class Call:
    """One module's first call, in the order of completion (the network itself comes last, under the name "").

    ``given``, ``shape``: the shapes of its first argument and of its output, where they are tensors;
    ``source``: the convolution whose output it was given directly, if any.
    """

    name: str
    module: nn.Module
    given: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    source: str | None


def trace(model: nn.Module, example: object = None) -> list[Call]:
    """The calls of one forward pass in evaluation mode; weights, buffers and modes stay as they are.

    Args:
        model: any module from images (N, C, H, W).
        example: what to call the model with (a tensor, or a tuple of arguments), run for real. None: fake
            images of the size that the model declares (timm) or of the first of 224, 299, 128, 64, 32, 28
            pixels that passes.

    Raises ValueError with the first failure when no size passes.
    """
    if example is not None:
        arguments = example if isinstance(example, tuple) else (example,)
        return _run(model, lambda: model(*arguments))
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} holds no Conv2d: there is nothing to follow a norm through")
    declared = (getattr(model, "default_cfg", None) or {}).get("input_size")
    shapes = ([tuple(declared)] if declared else []) + [(first.in_channels, size, size) for size in SIZES]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    failures = []
    for shape in shapes:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake, use_backend("reference"):
                state = {name: _fake(fake, tensor.detach()) for name, tensor in tensors.items()}
                device = "cpu" if first.weight.is_meta else first.weight.device
                images = torch.empty(2, *shape, dtype=first.weight.dtype, device=device)
                # untied: torch puts the weights of a module that stands at two places back only once
                call = partial(functional_call, model, state, (images,), tie_weights=False)
                return _run(model, call)
        except Exception as error:  # whatever a forward raises; the first is told
            failures.append(error)
    raise ValueError(
        f"{type(model).__name__} does not run on images of any size that was tried ({failures[0]}); give "
        "convert(..., example=images), or convert the part of the model that takes images"
    ) from failures[0]


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A stand-in; on the CPU for a tensor of the meta device, beside which others may be on a real one."""
    return torch.empty_like(tensor, device="cpu") if tensor.is_meta else mode.from_tensor(tensor)


def _run(model: nn.Module, forward) -> list[Call]:
    calls: dict[str, Call] = {}
    written: dict[int, tuple[weakref.ref, str]] = {}

    def note(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            given = args[0] if args and isinstance(args[0], Tensor) else None
            ref, source = written.get(id(given), (None, None))
            source = source if ref is not None and ref() is given else None
            shapes = (tuple(t.shape) if isinstance(t, Tensor) else None for t in (given, output))
            calls.setdefault(name, Call(name, module, *shapes, source))
            if isinstance(module, nn.Conv2d):
                written[id(output)] = (weakref.ref(output), name)

        return hook

    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        model.eval()
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return list(calls.values())


def find_sites(model: nn.Module, norms: Iterable[str], example: object = None) -> dict[str, Site]:
    """Name -> where that norm stands, for the named norms of any network.

    A *block* is the innermost module that is called and holds a norm and at least two convolutions over maps
    larger than 1x1 (so neither a conv-norm pair nor an SE unit is one). A network without any (a VGG) has one
    block for each resolution. The module of the first convolution, and one named stem, is the stem. Shortcuts
    are known by their names (downsample, shortcut, proj, skip, identity). ``focus`` is the first norm behind
    the block's last convolution whose kernel is larger than 1x1, or, where none follows (DenseNet), the last
    norm in front of it; in a basic block, which ends in such a convolution and its norm and holds another, it
    is the norm behind the first (the other is the place of the paper's ``text``); outside blocks it is the norm behind a depthwise convolution. Stages are the
    resolutions of the blocks' outputs in order of appearance.

    A norm's role is its convolution's: the one it is given the output of, else the next to run. A norm that
    did not run (an auxiliary head) counts as ``final``.
    """
    norms = list(norms)
    wanted = set(norms)
    ran = trace(model, example)
    calls = [c for c in ran if c.name in wanted or _counts(c)]
    order = {call.name: i for i, call in enumerate(calls)}
    home, blocks = _blocks(calls, wanted, {c.name for c in ran})
    members: dict[str, list[Call]] = {}
    for call in calls:
        if home[call.name] in blocks:
            members.setdefault(home[call.name], []).append(call)

    focus, last, number, outputs = set(), set(), {}, {}
    text: dict[str, bool] = {}
    residual = {c.name for c in ran if type(c.module) is not nn.Sequential}  # which adds nothing to its last map
    for name, block in members.items():
        path = [c for c in block if not SHORTCUT.search(c.name)]
        own = [c.name for c in path if c.name in wanted]
        if not own:  # a shortcut of several convolutions
            continue
        number |= {name: i + 1 for i, name in enumerate(own)}
        last.add(own[-1])
        spatial = [order[c.name] for c in path if c.name not in wanted and max(c.module.kernel_size) > 1]
        if spatial:
            behind = [name for name in own if order[name] > spatial[-1]]
            place = behind[0] if behind else own[-1]
            if name in residual and (first := _first_of_basic_block(place, spatial, own, calls, order)):
                text |= {place: True, first: False}
                place = first
            focus.add(place)
        outputs[name] = calls[order[own[-1]]].shape[2:]
    levels = list(dict.fromkeys(outputs.values())) or [None]
    ends = [order[c.name] for block in members.values() for c in block]

    sites = {}
    for name in norms:
        site = Site(model.get_submodule(name).num_features, len(levels) - 1, len(levels), "final")
        if name in order:
            call = calls[order[name]]
            conv = _partner(call, calls, order, wanted)
            role = _role(conv)
            if SHORTCUT.search(name):
                role = "shortcut"
            elif STEM.search(name):
                role = "stem"
            elif home[name] not in blocks:
                within = sum(block.startswith(f"{home[name]}.") for block in members)
                # else a part of a branching block
                trunk = not home[name] or not within or 2 * within > len(members)
                if _depthwise(conv) and call.source:
                    focus.add(name)
                elif trunk and (not ends or order[name] < min(ends)):
                    role = "stem"
                elif trunk and order[name] > max(ends):
                    role = "final"
                elif role != "spatial":
                    role = "transition"
            stage = _stage(outputs.get(home[name], call.shape[2:]), levels)
            site = replace(site, role=role, stage=stage)
        sites[name] = replace(
            site,
            block_norm=number.get(name, 0),
            focus=name in focus,
            last=name in last,
            text=text.get(name),
        )
    return sites


def _first_of_basic_block(
    place: str, spatial: list[int], own: list[str], calls: list[Call], order: dict[str, int]
) -> str | None:
    """The norm behind the first of a basic block's full convolutions; None where ``place``, behind the last of them, is
    not the block's last norm, or the block is another kind. ``spatial``: convolutions by their numbers in ``calls``.
    """
    if place != own[-1] or len(spatial) < 2 or any(_depthwise(calls[i].module) for i in spatial):
        return None
    between = [name for name in own if spatial[0] < order[name] < spatial[1]]
    return between[0] if between else None


def _counts(call: Call) -> bool:
    """A convolution over a map: those of SE units see 1x1."""
    return isinstance(call.module, nn.Conv2d) and call.shape is not None and max(call.shape[2:]) > 1


def _blocks(calls: list[Call], wanted: set[str], called: set[str]) -> tuple[dict[str, str], set[str]]:
    """(call -> the innermost module that could be its block, "" for none; those modules that are blocks)."""
    convs = [c.name for c in calls if c.name not in wanted]
    held = Counter(ancestor for name in convs for ancestor in _ancestors(name))
    normed = {ancestor for c in calls if c.name in wanted for ancestor in _ancestors(c.name)}
    whole = {name for name in normed & called if held[name] >= 2}
    home = {c.name: next((a for a in _ancestors(c.name) if a in whole), "") for c in calls}
    groups = {home[c.name] for c in calls if c.name in wanted} - {""}
    blocks = {g for g in groups if not any(other.startswith(f"{g}.") for other in groups)}
    blocks = {g for g in blocks if g != home[convs[0]] and not STEM.search(g)} if convs else set()
    if blocks:
        return home, blocks
    home = {c.name: "" if STEM.search(c.name) else f"{c.shape[2:]}" for c in calls}
    return home, set(home.values()) - {""}


def _ancestors(name: str) -> list[str]:
    """The modules that hold a module, innermost first, without the network itself."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _partner(call: Call, calls: list[Call], order: dict[str, int], wanted: set[str]) -> nn.Conv2d | None:
    if call.source in order:
        return calls[order[call.source]].module
    following = (c.module for c in calls[order[call.name] + 1 :] if c.name not in wanted)
    return next(following, None)


def _role(conv: nn.Conv2d | None) -> str:
    if conv is None or max(conv.kernel_size) > 1:
        return "spatial"
    return "expand" if conv.out_channels > conv.in_channels else "reduce"


def _depthwise(conv: nn.Conv2d | None) -> bool:
    return conv is not None and 1 < conv.groups == conv.in_channels and max(conv.kernel_size) > 1


def _stage(size: tuple[int, ...], levels: list) -> int:
    """The stage of that resolution; between stages the nearest."""
    if None in levels or size in levels:
        return levels.index(size) if size in levels else 0
    return min(range(len(levels)), key=lambda i: abs(levels[i][0] * levels[i][1] - size[0] * size[1]))
