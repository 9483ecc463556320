"""Weights from files into networks: own checkpoints, safetensors, torchvision's, timm's and the authors'.

A file is read without running anything in it, its names are translated into the network's, and nothing is copied
unless everything fits: a partial match is refused with the list of what is missing.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from anorm.norms.base import outermost_norms
from anorm.norms.batch import BatchNorm

__all__ = ["LoadReport", "compare", "distance_from_bn", "load_weights", "read_state", "translate"]

CONTAINERS = ("model", "state_dict", "model_state_dict", "net", "network")
# DataParallel, FP16Model, torch.compile, Lightning
WRAPPERS = (
    "module.",
    "network.",
    "_orig_mod.",
    "model.",
)


@dataclass
class LoadReport:
    """What happened. ``str(report)`` says it in words.

    style: the naming that was recognised; loaded: number of tensors copied; missing, unexpected: names of the network
    without a tensor in the file, and of the file without a place; mismatched: those whose shapes differ; new_head: the
    classifier was left as the network had it; carried: norms that took over a batch norm's affine and statistics and
    start the rest of their law anew (AFN).
    """

    path: str
    style: str
    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    new_head: bool = False
    carried: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors from {self.path} ({self.style})"]
        if self.new_head:
            parts.append("the classifier is new")
        if self.carried:
            parts.append(
                f"{len(self.carried)} norms keep gamma, beta and statistics of the file's batch norms, their networks are new"
            )
        for what in ("missing", "unexpected", "mismatched"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what}: {_some(names)}")
        return "; ".join(parts)


def load_weights(
    model: nn.Module, path: str | Path, strict: bool = True, head: str = "match", entry: str | None = None
) -> LoadReport:
    """Copy the tensors of a file into ``model``, whatever naming they come in.

    Args:
        model: a network of this package, or any module whose names the file has.
        path: a .safetensors file or one that ``torch.save`` wrote.
        strict: every name must find its place; otherwise nothing is copied. False copies what fits.
        head: "match" (the classifier must fit too) or "replace" (where its shape differs, or the file has none, the
            model's stays as it is, and the report says so). The classifier is what timm's ``default_cfg`` calls it,
            else the last linear layer or convolution that is no part of a norm.
        entry: which entry of a checkpoint holds the weights, for instance "ema"; default: the first known one.

    A file of batch norms fills the norms of a law whose paper starts from them (AFN: ``report.carried``);
    ``distance_from_bn`` says how far the network is from theirs then.

    Raises ValueError for a damaged file, one with pickled objects other than tensors, or one that does not fit.
    """
    if head not in ("match", "replace"):
        raise ValueError(f"head={head!r} is neither 'match' nor 'replace'")
    state = read_state(path, entry)
    # as the file's: DDP, torch.compile, another library's network
    for prefix in _wrapper_prefixes(model.state_dict()):
        model = model.get_submodule(prefix.removesuffix("."))
    target = model.state_dict(keep_vars=True)
    state = _without_convolutions_biases(state, target)
    # a detector knows other programs' names for its parts
    report, fits, names = compare(target, state, path, getattr(model, "translate_names", translate))
    _carry(model, report, fits)
    if head == "replace":
        getattr(model, "forgive_head", partial(_forgive_head, model))(report, fits)
    if strict and not report.complete:
        raise ValueError(_misfit(report, state, target, names, head))
    if not fits:
        raise ValueError(_misfit(report, state, target, names, head))
    with torch.no_grad():
        for place, value in fits.items():
            target[place].copy_(value)
    report.loaded = len(fits)
    return report


def compare(
    target: dict[str, Tensor],
    state: dict[str, Tensor],
    path: str | Path = "the file",
    naming: Callable[[dict, Iterable[str]], tuple[str, dict[str, str]]] | None = None,
) -> tuple[LoadReport, dict[str, Tensor], dict[str, str]]:
    """What of a file's ``state`` has a place in a network's state_dict ``target``; copies nothing, so both
    may be on the meta device. Returns the report, {name in the network: tensor in its shape}, {name in the
    file: name in the network}. ``naming``: in place of ``translate``.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    style, names = (naming or translate)(shapes, target)
    report = LoadReport(str(path), style)
    fits: dict[str, Tensor] = {}
    for name, value in state.items():
        place = names[name]
        if place not in target:
            report.unexpected.append(name)
        elif (shaped := _as_shape(value, target[place].shape)) is None:
            report.mismatched.append(place)
        else:
            fits[place] = shaped
    given = fits.keys() | set(report.mismatched)
    report.missing = [
        name for name in target if name not in given and not name.endswith("num_batches_tracked")
    ]
    return report, fits, names


def read_state(path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """Name -> tensor of a file, on the CPU, without the prefixes of wrappers. ``entry``: see ``load_weights``."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    state = _find_state(content, entry, path)
    for prefix in _wrapper_prefixes(state):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)  # eight bytes of length, then JSON
    return path.suffix == ".safetensors" or start[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: get it again ({error})") from error


def _read_torch(path: Path) -> object:
    try:
        # training scripts save their arguments in one
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        objects = re.search(r".*(GLOBAL|allowlisted).*", str(error))
        if not objects:
            raise ValueError(f"{path} is damaged or no file of weights ({_first_line(error)})") from error
        raise ValueError(
            f"{path} holds Python objects beside tensors, and is refused: unpickling them can run any code. If you "
            "trust where it comes from, save its state_dict alone (torch.save(checkpoint['state_dict'], ...)) where "
            f"the program that wrote it runs ({objects[0].strip()[:160]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged: get it again ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _find_state(content: object, entry: str | None, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict) and entry is None:
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        entry = next((name for name in CONTAINERS if isinstance(content.get(name), dict)), None)
    state = content.get(entry) if isinstance(content, dict) and entry else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        held = (
            f"a dict of {_some(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        )
        wanted = f"no weights under {entry!r}" if entry else f"none of {', '.join(CONTAINERS)}"
        raise ValueError(f"{path} holds {held} and {wanted}: name the entry with the weights (entry=...)")
    return dict(state)


def _wrapper_prefixes(state: dict[str, Tensor]) -> list[str]:
    """Prefixes that every name carries, outermost first: "module." and then "network." of module.network.fc.weight."""
    found: list[str] = []
    while prefix := next((p for p in WRAPPERS if all(n.startswith("".join(found) + p) for n in state)), None):
        found.append(prefix)
    return found


def translate(shapes: dict[str, tuple[int, ...]], target: Iterable[str]) -> tuple[str, dict[str, str]]:
    """(style of a file's names, {name in the file: name in the network}).

    ``shapes`` are the file's names and shapes, ``target`` the network's names. A name that finds no place is mapped to
    something that is not in ``target``.
    """
    target = set(target)
    places = {name: _within_wrapper(name, target) for name in shapes}
    if target.issuperset(places.values()):
        return "own names", places
    for style, mark, rename in STYLES:
        if any(re.search(mark, name) for name in shapes):
            mixtures = {name.removesuffix("weight_") for name in shapes if name.endswith("weight_")}
            renamed = {name: _attention(rename(name, shapes), name, mixtures) for name in shapes}
            return style, {
                name: _within_wrapper(_squeeze(new, target), target) for name, new in renamed.items()
            }
    return "own names", places


def _within_wrapper(name: str, target: set[str]) -> str:
    """bn2.weight -> bn2.base.weight where the network's bn2 wraps another norm (AN, SE)."""
    module, _, leaf = name.rpartition(".")
    inner = f"{module}.base.{leaf}"
    return inner if name not in target and inner in target else name


def _attention(new: str, old: str, mixtures: set[str]) -> str:
    """The tensors of an AN layer: weight_, bias_ (K, C), running statistics and the attention network."""
    new = re.sub(r"\.att(?:entio)?n_weights\.attention\.0\.", ".attention.fc.", new)
    new = re.sub(r"\.att(?:entio)?n_weights\.attention\.1\.", ".attention.norm.", new)
    module, _, leaf = old.rpartition(".")
    if f"{module}." in mixtures and not leaf.endswith("_"):
        return f"{new.removesuffix(leaf)}base.{leaf}"
    return new.removesuffix("_")


def _squeeze(name: str, target: set[str]) -> str:
    """BLOCK.se.fc.0.weight -> the fc1 of the block's one norm that has it; BLOCK.se2.fc.2.weight -> bn2.fc2."""
    if not (match := re.fullmatch(r"(.*\.)se(\d?)\.fc\.([02])\.weight", name)):
        return name
    block, number, layer = match[1], match[2], {"0": "fc1", "2": "fc2"}[match[3]]
    found = [p for p in (f"{block}bn{i}.{layer}.weight" for i in (number or "123")) if p in target]
    return found[0] if len(found) == 1 else name


def _rules(*pairs: tuple[str, str]) -> Callable[[str, dict], str]:
    """A renaming: the first pattern that matches at a name's start is replaced."""

    def rename(name: str, shapes: dict) -> str:
        for pattern, replacement in pairs:
            new, count = re.subn("^" + pattern, replacement, name)
            if count:
                return new
        return name

    return rename


def _aognet(name: str, shapes: dict) -> str:
    """Stages count from 0 there: stage0.stage_0_block_1.stage_0_block_1_node_5_op.conv_norm_ac_2.conv_norm.conv_norm.1
    is stage1.blocks.1.nodes.5.norm2 here (0 is the convolution, 1 the norm).
    """
    conv_norm = {"0": "conv", "1": "norm"}
    if m := re.match(r"stem\.(\d)\.conv_norm\.conv_norm\.([01])\.", name):
        new = f"stem.{m[1]}.{conv_norm[m[2]]}."
    elif m := re.match(r"stage(\d)\.stage_\1_block_0_transition\.0\.conv_norm\.conv_norm\.([01])\.", name):
        new = f"stage{int(m[1]) + 1}.transition.{conv_norm[m[2]]}."
    elif m := re.match(r"stage(\d)\.stage_\1_block_(\d+)\.extra_norm_ac\.0\.", name):
        new = f"stage{int(m[1]) + 1}.blocks.{m[2]}.norm."
    elif m := re.match(
        r"stage(\d)\.stage_\1_block_(\d+)\.stage_\1_block_\2_node_(\d+)_op\."
        r"(?:conv_norm_(?:ac_)?(\d)|shortcut)(?:\.conv_norm){1,2}\.([01])\.",
        name,
    ):
        layer = f"{conv_norm[m[5]]}{m[4]}" if m[4] else f"shortcut.{conv_norm[m[5]]}"
        new = f"stage{int(m[1]) + 1}.blocks.{m[2]}.nodes.{m[3]}.{layer}."
    else:
        return name
    return new + name[m.end() :]


def _timm_mobilenetv2(name: str, shapes: dict) -> str:
    """blocks.2.1.conv_dw.weight -> features.5.conv.1.0.weight; timm counts blocks within a row, torchvision through."""
    blocks = sorted(
        {tuple(map(int, m.groups())) for n in shapes if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", n))}
    )
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    ends |= {"conv_head": f"features.{len(blocks) + 1}.0", "bn2": f"features.{len(blocks) + 1}.1"}
    if m := re.match(r"blocks\.(\d+)\.(\d+)\.(\w+)\.", name):
        block = f"blocks.{m[1]}.{m[2]}."
        if f"{block}conv_pwl.weight" in shapes:
            inner = {
                "conv_pw": "0.0",
                "bn1": "0.1",
                "conv_dw": "1.0",
                "bn2": "1.1",
                "conv_pwl": "2",
                "bn3": "3",
            }
        else:
            inner = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
        if m[3] in inner:
            return f"features.{blocks.index((int(m[1]), int(m[2]))) + 1}.conv.{inner[m[3]]}.{name[m.end() :]}"
    first, _, rest = name.partition(".")
    return f"{ends[first]}.{rest}" if first in ends else name


_DENSENET = _rules(
    (r"stem\.conv1\.conv\.", "features.conv0."),
    (r"stem\.conv1\.bn\.", "features.norm0."),
    (r"layer(\d)\.0\.denselayer(\d+)\.(?:bn|AttnBN2d)(\d)\.", r"features.denseblock\1.denselayer\2.norm\3."),
    (r"layer(\d)\.0\.denselayer(\d+)\.conv", r"features.denseblock\1.denselayer\2.conv"),
    (r"layer(\d)\.1\.bn\.", r"features.transition\1.norm."),
    (r"layer(\d)\.1\.conv\.", r"features.transition\1.conv."),
    (r"layer4\.1\.", "features.norm5."),
)

def _wide_resnet(name: str, shapes: dict) -> str:
    """group0.block1.conv0 of the authors' lists of tensors is layer1.1.conv1.weight here."""
    if m := re.match(r"group(\d)\.block(\d+)\.(bn|conv)([01])", name):
        new = f"layer{int(m[1]) + 1}.{m[2]}.{m[3]}{int(m[4]) + 1}"
    elif m := re.match(r"group(\d)\.block(\d+)\.convdim", name):
        new = f"layer{int(m[1]) + 1}.{m[2]}.shortcut"
    elif m := re.match(r"conv0", name):
        new = "conv1"
    else:
        return name
    rest = name[m.end() :]
    return new + (rest or ".weight")


def _cifar_vgg(name: str, shapes: dict) -> str:
    """features.7.weight -> stage2.0.weight: convolution, norm and ReLU count there, and the pool between stages."""
    convs = sorted(int(n.split(".")[1]) for n, shape in shapes.items() if len(shape) == 4)
    if not (m := re.match(r"features\.(\d+)\.", name)):
        return name
    index, norm = (int(m[1]), 0) if int(m[1]) in convs else (int(m[1]) - 1, 1)
    if index not in convs:
        return name
    starts = [c for before, c in zip([-9, *convs], convs, strict=False) if c - before > 3]  # behind a pool
    stage = sum(start <= index for start in starts)
    within = sum(starts[stage - 1] <= c < index for c in convs)
    return f"stage{stage}.{2 * within + norm}.{name[m.end() :]}"


def _without_convolutions_biases(state: dict[str, Tensor], target: Iterable[str]) -> dict[str, Tensor]:
    """A VGG of the CIFAR zoos has biases in front of its batch norms: there the same function, in training and in
    evaluation, is a running mean that is smaller by the bias.
    """
    if "stage1.0.weight" not in target or "features.1.running_mean" not in state:
        return state
    state = dict(state)
    for name in [n for n in state if re.fullmatch(r"features\.\d+\.bias", n)]:
        index = int(name.split(".")[1])
        mean = f"features.{index + 1}.running_mean"
        if mean in state and state[name.replace("bias", "weight")].dim() == 4:
            state[mean] = state[mean] - state.pop(name)
    return state


STYLES: tuple[tuple[str, str, Callable[[str, dict], str]], ...] = (
    ("AOGNet in the authors' names", r"^stage\d\.stage_\d_block_", _aognet),
    ("DenseNet in the authors' names", r"^layer\d\.0\.denselayer", _DENSENET),
    ("MobileNetV2 in timm's names", r"^conv_stem\.weight$", _timm_mobilenetv2),
    (
        "DenseNet in torchvision's first names",
        r"denselayer\d+\.norm\.1\.",
        _rules((r"(.*denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.")),
    ),
    (
        "CIFAR ResNet with the head \"linear\" or \"shortcut\" layers",
        r"^linear\.(weight|bias)$|^layer\d\.\d+\.shortcut\.\d\.",
        _rules((r"linear\.", "fc."), (r"(layer\d\.\d+)\.shortcut\.(\d)\.", r"\1.downsample.\2.")),
    ),
    (
        "wide ResNet with \"block1.layer.0\"",
        r"^block\d\.layer\.\d+\.",
        _rules(
            (r"block(\d)\.layer\.(\d+)\.convShortcut\.", r"layer\1.\2.shortcut."),
            (r"block(\d)\.layer\.(\d+)\.", r"layer\1.\2."),
            (r"bn1\.", "bn."),
        ),
    ),
    ("wide ResNet in its authors' names", r"^group\d\.block\d+\.", _wide_resnet),
    ("CIFAR VGG with \"features\"", r"^features\.1\.running_mean$", _cifar_vgg),
    (
        "the authors' names",
        r"AttnBN2d\d|AttnGN\d|att(entio)?n_weights\.attention|\.se\d?\.fc\.",
        _rules((r"(.*\.)?Attn(?:BN2d|GN)(\d)\.", r"\g<1>bn\2.")),
    ),
)
"""Name of a naming, a pattern that only its names contain, and its renaming."""


def _as_shape(value: Tensor, shape: torch.Size) -> Tensor | None:
    """The value in that shape if they differ by trailing ones only: a 1x1 convolution is a linear layer."""
    short, long = sorted((tuple(value.shape), tuple(shape)), key=len)
    if long[: len(short)] != short or any(n != 1 for n in long[len(short) :]):
        return None
    return value.reshape(shape)


def _forgive_head(model: nn.Module, report: LoadReport, fits: dict[str, Tensor]) -> None:
    """Leave the classifier as it is unless the file's fits it entirely."""
    heads = _classifiers(model)
    names = {name for name in model.state_dict() if any(name.startswith(f"{head}.") for head in heads)}
    if names.isdisjoint(report.missing) and names.isdisjoint(report.mismatched):
        return
    report.new_head = True
    report.missing = [name for name in report.missing if name not in names]
    report.mismatched = [name for name in report.mismatched if name not in names]
    for name in names & fits.keys():
        del fits[name]


def _classifiers(model: nn.Module) -> list[str]:
    """Names of the layers that give the logits: by timm's word, else the last that is no part of a norm."""
    declared = (getattr(model, "default_cfg", None) or {}).get("classifier") or ()
    modules = dict(model.named_modules())
    found = [name for name in ([declared] if isinstance(declared, str) else declared) if name in modules]
    if found:
        return found
    norms = tuple(f"{name}." for name, _ in outermost_norms(model))
    for name, module in reversed(modules.items()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(norms):
            return [name]
    raise ValueError("head='replace' needs a network that ends in a linear layer or a convolution")


def _carry(model: nn.Module, report: LoadReport, fits: dict[str, Tensor]) -> None:
    """Take a file of batch norms for a law whose paper starts from them: what the law adds starts anew."""
    missing = set(report.missing)
    for name, norm in outermost_norms(model):
        added = {f"{name}.{own}" for own in norm.state_dict() if own.startswith(norm.beside_bn)} if norm.beside_bn else {}
        if added and missing >= added and f"{name}.running_var" in fits:
            report.carried.append(name)
            missing -= added
    report.missing = [name for name in report.missing if name in missing]


@torch.no_grad()
def distance_from_bn(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """How far a network whose norms took over batch norms is from the network with those: (root mean square of the
    difference of the logits over their standard deviation, share of the images with the same first class).

    images (N, C, H, W), on the model's device; both networks evaluate with running statistics.
    """
    modes = {module: module.training for module in model.modules()}
    laws = [(name, norm) for name, norm in outermost_norms(model) if norm.beside_bn]
    parents = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], norm) for name, norm in laws]
    try:
        model.eval()
        own = model(images)
        for parent, name, norm in parents:
            plain = BatchNorm(norm.channels, norm.act).to(norm.weight)
            plain.load_state_dict({key: norm.state_dict()[key] for key in plain.state_dict()})
            setattr(parent, name, plain.eval())
        plain = model(images)
    finally:
        for parent, name, norm in parents:
            setattr(parent, name, norm)
        for module, training in modes.items():
            module.training = training
    spread = plain.std().clamp_min(torch.finfo(plain.dtype).tiny)
    return (
        float((own - plain).square().mean().sqrt() / spread),
        float((own.argmax(1) == plain.argmax(1)).double().mean()),
    )


def _misfit(report: LoadReport, state: dict[str, Tensor], target: dict, names: dict[str, str], head: str) -> str:
    """The error for a file that does not fit: what is missing, what is left over, what to do."""
    parts = []
    if report.missing:
        parts.append(f"missing in the file ({len(report.missing)}): {_some(report.missing)}")
    if report.unexpected:
        parts.append(f"without a place here ({len(report.unexpected)}): {_some(report.unexpected)}")
    if report.mismatched:
        origin = {place: name for name, place in names.items()}
        shapes = [
            f"{n} {tuple(state[origin[n]].shape)} for {tuple(target[n].shape)}" for n in report.mismatched
        ]
        parts.append(f"other shapes ({len(shapes)}): {_some(shapes)}")
    replace = "head='replace' (another number of classes) or " if head == "match" else ""
    return (
        f"{report.path} does not fit this network (read as {report.style}); nothing was loaded; {'; '.join(parts)}\n"
        "Build the network that the file is of (arch, norm, norm.place, number of classes), or load with "
        f"{replace}strict=False (what fits)."
    )


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f", ... {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
