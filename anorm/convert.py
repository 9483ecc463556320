"""Other people's networks: their BatchNorm2d layers replaced by any law, starting as the same function where that can be.

    model = timm.create_model("efficientnet_b0", pretrained=True)
    print(anorm.convert(model, norm="an"))
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from anorm.archs import foreign
from anorm.archs.base import MakeNorm
from anorm.archs.trace import find_sites
from anorm.norms.attentive import ACTIVATIONS, AttentiveNorm
from anorm.norms.base import Norm, RunningNorm, Site
from anorm.norms.build import lookup_norm, set_sync
from anorm.norms.placement import WORDS, Placement
from anorm.norms.squeeze_excite import SqueezeExcite
from anorm.norms.switchable import SwitchableNorm

__all__ = ["Report", "Row", "convert", "create", "start_as"]

Where = str | int | list | dict | Callable[[str, nn.Module], bool]

NORM = re.compile(r"(Batch|Layer|Group|Group1|Instance|RMS|Rms|Evo|Response)Norm|^InplaceAbn")
FUSED = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


@dataclass
class Row:
    """One norm of the network. ``now``: what it became; None where it was left as it was, for the reason ``why``.
    ``same``: whether it starts as the same function: "yes", "in evaluation", "no", "not known"."""

    name: str
    channels: int
    was: str
    now: str | None = None
    stage: int | None = None
    role: str = ""
    same: str = ""
    why: str = ""


@dataclass
class Report:
    """What ``convert`` did; ``stages``: the resolutions found. ``str(report)`` is a table."""

    network: str
    stages: int = 0
    rows: list[Row] = field(default_factory=list)

    @property
    def swapped(self) -> list[Row]:
        return [row for row in self.rows if row.now]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if not row.now]

    @property
    def identical(self) -> bool:
        """Whether every new layer starts as the function it replaces, in training and in evaluation."""
        return all(row.same == "yes" for row in self.swapped)

    def summary(self) -> str:
        """One line, such as "an x16 (same function at the start); kept: 37 not at this place"."""
        became = ", ".join(f"{now} x{n}" for now, n in Counter(row.now for row in self.swapped).most_common())
        start = "" if self.identical else "not "
        reasons = ", ".join(f"{n} {why}" for why, n in Counter(row.why for row in self.kept).most_common())
        return f"{became} ({start}the same function at the start)" + (f"; kept: {reasons}" if reasons else "")

    def __str__(self) -> str:
        lines = [("layer", "C", "was", "now", "stage", "role", "same start", "why")]
        for row in self.rows:
            stage = "" if row.stage is None else str(row.stage + 1)
            lines.append((row.name, str(row.channels), row.was, row.now or "-", stage, row.role, row.same, row.why))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join((f"{self.network}: {self.summary()}", *table))


def convert(
    model: nn.Module,
    norm: str | dict | MakeNorm = "an",
    where: Where = "published",
    k: int | list[int] | None = None,
    keep: bool = True,
    elsewhere: str | dict | None = None,
    example: object = None,
    **options,
) -> Report:
    """Replace BatchNorm2d layers of any network, in place.

    Args:
        model: a network of torch, torchvision, timm or your own. timm's BatchNormAct2d keeps its activation and drop.
        norm: a law's name (``anorm.list_norms()``); {name: ..., place: ..., options}; "timm:NAME" for a layer of timm
            as it is; or a callable from ``Site`` to a module.
        where: "published": where the law's paper puts it; for AN behind a block's last convolution larger than 1x1,
            depthwise or not, whatever its kernel (``anorm.archs.trace.find_sites`` says what a block is). Or "all", a
            role and the other words of ``anorm.norms.placement.Placement``; or a regular expression searched for in
            the layers' names; or a callable (name, layer) -> bool.
        k: AN's components, a number or one for each stage (a stage is a resolution, ``report.stages`` of them);
            default: the published 10, 10, 20, 20 where there are four stages, else 10.
        keep: carry affine, running statistics, eps and momentum over and start as the same function where the law
            allows it (``start_as``). False: the law's own initialisation.
        elsewhere: a law for the layers that ``where`` leaves out; None leaves them as they are.
        example: what to call the model with, for a model that cannot be traced with images alone.
        options: of the law.

    Left as they are, and said so: frozen layers (FrozenBatchNorm2d, an affine that does not require gradients),
    layers with hooks or parametrizations, subclasses with a forward of their own. Layers that a network shares stay
    shared. Build the optimizer afterwards. Whether a layer starts as the same function is measured, in float64, in
    both modes. Raises ValueError, with the network untouched, when nothing would be replaced or an option does not fit.
    """
    if isinstance(norm, dict):
        options, norm = {**norm, **options}, norm["name"]
        del options["name"]
        where, elsewhere = options.pop("place", where), options.pop("elsewhere", elsewhere)
    if k is not None:
        options["k"] = k
    law = _Law(norm, options)
    others = _Law(*_named(elsewhere)) if elsewhere is not None else None
    chosen = _chooser(norm, where)

    layers = {name: layer for name, layer in model.named_modules() if _is_norm(layer)}
    inside = {child for layer in layers.values() for child in layer.modules() if child is not layer}
    layers = {name: layer for name, layer in layers.items() if layer not in inside}
    if "" in layers:
        raise ValueError(f"{type(model).__name__} is itself the layer to replace: give convert the network that holds it")
    refused = {name: _refusal(layer) for name, layer in layers.items()}
    names = [name for name, reason in refused.items() if reason is None]
    sites = find_sites(model, names, example) if names else {}
    report = Report(type(model).__name__, max((site.stages for site in sites.values()), default=0))
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        row = Row(name, _channels(layer), type(layer).__name__, why=refused[name] or "")
        report.rows.append(row)
        if refused[name]:
            continue
        site = sites[name]
        row.stage, row.role = site.stage, site.role
        maker = law if chosen(name, layer, site) else others
        if maker is None:
            row.why = "not at this place"
            continue
        new[layer] = maker.replace(layer, site, keep, next(model.parameters(), None))
        row.now = maker.label
        row.same, row.why = _measure(layer, new[layer])
    if not new:
        raise ValueError(_nothing(report, where))
    for module in list(model.modules()):
        for child, layer in list(module._modules.items()):
            if layer in new:
                setattr(module, child, new[layer])
    return report


def create(
    arch: str, norm: str | dict | MakeNorm | None = "bn", num_classes: int = 1000, in_channels: int = 3, **options
) -> nn.Module:
    """A network of another library, ``timm:NAME`` or ``torchvision:NAME``, with this project's norms.

    Args:
        arch: the library and its name of the network.
        norm: as in ``convert``; every BatchNorm2d that the law's place leaves out becomes the law's ``elsewhere`` (BN,
            the same function). None leaves the network as its library made it.
        num_classes, in_channels: of the classifier and the images.
        options: of the library's function (timm: ``pretrained=True``, ``drop_path_rate=0.1``; torchvision: ``weights``).

    The result has ``forward_stages(x)``, ``feature_info`` and ``norm_summary``; the library's own model is ``.network``.
    """
    model = foreign.load(arch, num_classes, in_channels, **options)
    model.norm_summary = ""
    if norm is not None:
        elsewhere = None
        if not callable(norm):
            name, law_options = _named(norm)
            elsewhere = "bn" if name.startswith("timm:") else Placement(name, **law_options).elsewhere
        model.norm_summary = convert(model.network, norm, elsewhere=elsewhere).summary()
    return model


class _Law:
    """Makes the layers: from a law's name, a layer of timm, or a callable."""

    def __init__(self, norm: str | MakeNorm, options: dict) -> None:
        self.norm, self.options = norm, options
        self.label = norm if isinstance(norm, str) else getattr(norm, "__name__", type(norm).__name__)
        self.timm = isinstance(norm, str) and norm.startswith("timm:")
        if callable(norm) and options:
            raise ValueError(f"a callable norm takes its options itself: drop {', '.join(options)}")
        base = options.get("base")
        self.given = {"eps", "momentum"} & {*options, *(base if isinstance(base, dict) else ())}
        if isinstance(norm, str) and not self.timm:
            Placement(norm, "all", **options)  # unknown names and options stop here
            self.takes_affine = "affine" in inspect.signature(lookup_norm(norm)).parameters

    def replace(self, old: nn.Module, site: Site, keep: bool, like: Tensor | None) -> nn.Module:
        """The new layer for ``old`` on its device, in its dtype and mode, with its activation and drop."""
        act, drop = getattr(old, "act", nn.Identity()), getattr(old, "drop", nn.Identity())
        if self.timm:
            new = foreign.timm_norm(self.norm[5:], site.channels, act, drop, self.options)
        else:
            fused = FUSED.get(type(act)) if isinstance(drop, nn.Identity) and not callable(self.norm) else None
            new = core = self._make(Site(**{**vars(site), "act": fused}), old.affine)
            if fused is None and not (isinstance(act, nn.Identity) and isinstance(drop, nn.Identity)):
                new = nn.Sequential(OrderedDict(norm=core, drop=drop, act=act))
        like = next((t for t in (old.weight, old.running_mean, like) if t is not None), torch.empty(0))
        core = new.norm if isinstance(new, nn.Sequential) else new
        core.to(like.device, like.dtype).train(old.training)
        if isinstance(old, nn.SyncBatchNorm):
            set_sync(core, True)
        if keep:
            _carry(old, core, self.given)
        return new

    def _make(self, site: Site, affine: bool) -> nn.Module:
        if callable(self.norm):
            return self.norm(site)
        options = self.options
        if not affine and self.takes_affine:
            options = {"affine": False, **options}
        return Placement(self.norm, "all", **options)(site)


@torch.no_grad()
def _carry(old: nn.Module, new: nn.Module, given: set[str]) -> None:
    inner = new
    while (below := getattr(inner, "base", getattr(inner, "module", None))) is not None:
        inner = below
    for name in {"eps", "momentum"} - given:
        if hasattr(inner, name):
            setattr(inner, name, getattr(old, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        mine, theirs = getattr(inner, name, None), getattr(old, name)
        if theirs is not None and mine is not None and mine.shape == theirs.shape:
            mine.copy_(theirs)
    if old.running_mean is None and isinstance(inner, RunningNorm):
        inner.eval_stats = "batch"
    ones = torch.ones(old.num_features, dtype=torch.float32)
    start_as(new, ones if old.weight is None else old.weight, 0 * ones if old.bias is None else old.bias)


@singledispatch
def start_as(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Set a new layer to act like BN with this affine, weight and bias (C), as far as its law allows.

    In general: its own ``weight`` and ``bias`` where they have that shape. Register a law's own way with
    ``start_as.register``.
    """
    layer = getattr(layer, "module", layer)
    for name, value in (("weight", weight), ("bias", bias)):
        own = getattr(layer, name, None)
        if isinstance(own, Tensor) and own.shape == value.shape:
            own.copy_(value)


@start_as.register
def _(layer: AttentiveNorm, weight: Tensor, bias: Tensor) -> None:
    """The attention's last affine layer at weight 0 gives every instance the same lambda (1/2 for hsigmoid), so
    gamma_k = gamma / sum_k lambda_k (2 gamma / K), and beta likewise.

    Where that layer is the FC (A1, SE), nothing would ever tell the K components apart: they differ by noise of the
    published size that cancels in the sum.
    """
    last = layer.attention.norm or layer.attention.fc
    last.weight.zero_()
    last.bias.fill_(1.0 if layer.attention.activation == "relu" else 0.0)
    lambdas = ACTIVATIONS[layer.attention.activation](last.bias[None].double())[0, : layer.k]
    for mixture, value in ((layer.weight, weight), (layer.bias, bias)):
        mixture.copy_((value / lambdas.sum().to(value)).expand_as(mixture))
        if last is layer.attention.fc and layer.k > 1:
            noise = 0.1 * torch.randn_like(mixture)
            mixture.add_(noise - noise.mean(0))
    start_as(layer.base, torch.ones_like(weight), torch.zeros_like(bias))


@start_as.register
def _(layer: SqueezeExcite, weight: Tensor, bias: Tensor) -> None:
    """Second FC at 0: every gate is sigmoid(0) = 1/2, made up for by the doubled affine below."""
    for parameter in layer.fc2.parameters():
        parameter.zero_()
    start_as(layer.base, 2 * weight, 2 * bias)


@start_as.register
def _(layer: SwitchableNorm, weight: Tensor, bias: Tensor) -> None:
    """All weight on BN: softmax(0, 0, 20) is one-hot in float32. The switches barely learn from there."""
    start_as.dispatch(nn.Module)(layer, weight, bias)
    if layer.use_bn:
        for control in (layer.mean_weight, layer.var_weight):
            control.copy_(control.new_tensor([0.0, 0.0, 20.0]))


def _measure(old: nn.Module, new: nn.Module) -> tuple[str, str]:
    """("yes", "in evaluation", "no" or "not known", why): the two layers on random features, float64, both modes."""
    reference = next((t for t in (old.weight, old.running_mean) if t is not None), None)
    if reference is not None and reference.device.type == "meta":
        return "not known", "on the meta device"
    tensors = (old.running_mean, old.running_var, old.weight, old.bias)
    mean, var, weight, bias = (None if t is None else t.detach().double() for t in tensors)
    device = None if reference is None else reference.device
    noise = torch.randn(4, old.num_features, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = noise.to(device)
    if mean is not None:
        x = x * (var[:, None, None] + old.eps).sqrt() + mean[:, None, None]
    act = copy.deepcopy(getattr(old, "act", nn.Identity())).double()
    twin = copy.deepcopy(new).double()
    if hasattr(twin, "drop"):
        twin.drop = nn.Identity()
    set_sync(twin, False)
    deviation = []
    for training in (False, True):
        batch = training or mean is None
        stats = (None, None) if batch else (mean, var)
        with torch.no_grad():
            expected = act.train(training)(F.batch_norm(x, *stats, weight, bias, batch, 0.0, old.eps))
            found = twin.train(training)(x)
        deviation.append(float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
    dtype = torch.float32 if reference is None else reference.dtype
    tolerance = 32 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if deviation[0] <= tolerance:
        return ("yes", "") if deviation[1] <= tolerance else ("in evaluation", f"training: off by {deviation[1]:.0%}")
    has_batch = any(isinstance(layer, (RunningNorm, nn.BatchNorm2d)) for layer in new.modules())
    why = "the law cannot be BN exactly" if has_batch else "its statistics are not the batch's"
    return "no", f"{why}: off by {deviation[0]:.0%} on random features"


def _is_norm(layer: nn.Module) -> bool:
    if isinstance(layer, (Norm, nn.BatchNorm2d, nn.SyncBatchNorm)):
        return True
    holds_weights = any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in layer.modules())
    return bool(NORM.search(type(layer).__name__)) and not holds_weights


def _channels(layer: nn.Module) -> int:
    named = getattr(layer, "num_features", getattr(layer, "channels", None))
    return named if named is not None else getattr(getattr(layer, "weight", None), "numel", int)()


def _refusal(layer: nn.Module) -> str | None:
    """Why a norm is left as it is; None where it can be replaced."""
    if "Frozen" in type(layer).__name__:
        return "frozen: its statistics and affine are constants"
    if not isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return "not a BatchNorm2d"
    own = type(layer).forward not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    if own and type(layer).__name__ not in ("BatchNormAct2d", "SyncBatchNormAct"):
        return "a subclass with a forward of its own"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        return "not initialised yet: call the network once"
    if getattr(layer, "process_group", None) is not None:
        return "pools over a process group of its own"
    if any(not p.requires_grad for p in layer.parameters(recurse=False)):
        return "frozen: its affine does not require gradients"
    if parametrize.is_parametrized(layer):
        return "has parametrizations that a new layer would lose"
    if any(getattr(layer, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")):
        return "has hooks that a new layer would lose"
    return None


def _named(norm: str | dict) -> tuple[str, dict]:
    options = {"name": norm} if isinstance(norm, str) else dict(norm)
    return options.pop("name"), options


def _chooser(norm: str | MakeNorm, where: Where) -> Callable[[str, nn.Module, Site], bool]:
    if callable(where):
        return lambda name, layer, site: bool(where(name, layer))
    if isinstance(where, str) and where not in WORDS:
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise ValueError(f"where={where!r} is neither one of {', '.join(WORDS)} nor a pattern: {error}") from error
        return lambda name, layer, site: bool(pattern.search(name))
    law = norm if isinstance(norm, str) and not norm.startswith("timm:") else "bn"
    placement = Placement(law, where)
    return lambda name, layer, site: placement.includes(site)


def _nothing(report: Report, where: Where) -> str:
    """Why nothing was replaced, in words."""
    start = f"nothing to replace in {report.network}: "
    if all(row.why == "not a BatchNorm2d" for row in report.rows):
        others = ", ".join(f"{was} x{n}" for was, n in Counter(row.was for row in report.rows).items())
        return f"{start}it has no BatchNorm2d ({others or 'no norm at all'}); only BatchNorm2d layers are replaced"
    reasons = "; ".join(f"{n} {why}" for why, n in Counter(row.why for row in report.kept).items())
    roles = ", ".join(f"{role} x{n}" for role, n in Counter(row.role for row in report.kept if row.role).items())
    hint = f"; where={where!r} names none of them (roles: {roles}): try where='all', or a pattern of names" if roles else ""
    frozen = any(row.why.startswith("frozen") for row in report.kept)
    return start + reasons + ("; unfreeze them first" if frozen and not roles else "") + hint
