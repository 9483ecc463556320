"""Other people's networks: their BatchNorm2d layers replaced by any law, starting as the same function where
that can be.

    model = timm.create_model("efficientnet_b0", pretrained=True)
    print(anorm.convert(model, norm="an"))
"""

from __future__ import annotations

import inspect
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anorm.archs import foreign
from anorm.archs.base import MakeNorm
from anorm.archs.trace import find_sites
from anorm.norms.base import Norm, Site
from anorm.norms.build import lookup_norm, set_sync
from anorm.norms.carry import carry, compare
from anorm.norms.placement import WORDS, Placement

__all__ = ["Report", "Row", "convert", "create"]

Where = str | int | list | dict | Callable[[str, nn.Module], bool]

NORM = re.compile(r"(Batch|Layer|Group|Group1|Instance|RMS|Rms|Evo|Response)Norm|^InplaceAbn")
FUSED = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


@dataclass
class Row:
    """One norm of the network. ``now``: what it became; None where it was left as it was, for the reason
    ``why``. ``same``: whether it starts as the same function: "yes", "in evaluation", "no", "not known"."""

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
        words = {row.same for row in self.swapped}
        start = "the same function at the start" if self.identical else "not the same function at the start"
        if "not known" in words and words <= {"not known", "yes"}:
            start = "not known whether the same function at the start"
        reasons = ", ".join(f"{n} {why}" for why, n in Counter(row.why for row in self.kept).most_common())
        return f"{became} ({start})" + (f"; kept: {reasons}" if reasons else "")

    def __str__(self) -> str:
        lines = [("layer", "C", "was", "now", "stage", "role", "same start", "why")]
        for row in self.rows:
            stage = "" if row.stage is None else str(row.stage + 1)
            lines.append(
                (row.name, str(row.channels), row.was, row.now or "-", stage, row.role, row.same, row.why)
            )
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
        model: a network of torch, torchvision, timm or your own. timm's BatchNormAct2d keeps its activation
            and drop.
        norm: a law's name (``anorm.list_norms()``); {name: ..., place: ..., options}; "timm:NAME" for a layer
            of timm as it is; or a callable from ``Site`` to a module.
        where: "published": where the law's paper puts it; for AN behind a block's last convolution larger
            than 1x1, depthwise or not, whatever its kernel (``anorm.archs.trace.find_sites`` says what a
            block is). Or "all", a role and the other words of ``anorm.norms.placement.Placement``; or a
            regular expression searched for in the layers' names; or a callable (name, layer) -> bool.
        k: AN's components, a number or one for each stage (a stage is a resolution, ``report.stages`` of
            them); default: the published 10, 10, 20, 20 where there are four stages, else 10.
        keep: carry affine, running statistics, eps and momentum over and start as the same function where the
            law allows it (``anorm.norms.carry.start_as``). False: the law's own initialisation.
        elsewhere: a law for the layers that ``where`` leaves out; None leaves them as they are.
        example: what to call the model with, for a model that cannot be traced with images alone.
        options: of the law.

    Left as they are, and said so: frozen layers (FrozenBatchNorm2d, an affine that does not require
    gradients), layers with hooks or parametrizations, subclasses with a forward of their own. Layers that a
    network shares stay shared. Build the optimizer afterwards. Whether a layer starts as the same function is
    measured, in float64, in both modes. Raises ValueError, with the network untouched, when nothing would be
    replaced or an option does not fit.
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

    layers = {name: layer for name, layer in model.named_modules() if is_norm(layer)}
    inside = {child for layer in layers.values() for child in layer.modules() if child is not layer}
    layers = {name: layer for name, layer in layers.items() if layer not in inside}
    if "" in layers:
        raise ValueError(
            f"{type(model).__name__} is itself the layer to replace: give convert the network that holds it"
        )
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
        row.same, row.why = compare(layer, new[layer])
    if not new:
        raise ValueError(_nothing(report, where))
    for module in list(model.modules()):
        for child, layer in list(module._modules.items()):
            if layer in new:
                setattr(module, child, new[layer])
    return report


def create(
    arch: str,
    norm: str | dict | MakeNorm | None = "bn",
    num_classes: int = 1000,
    in_channels: int = 3,
    **options,
) -> nn.Module:
    """A network of another library, ``timm:NAME`` or ``torchvision:NAME``, with this project's norms.

    Args:
        arch: the library and its name of the network.
        norm: as in ``convert``; every BatchNorm2d that the law's place leaves out becomes the law's
            ``elsewhere`` (BN, the same function). None leaves the network as its library made it.
        num_classes, in_channels: of the classifier and the images.
        options: of the library's function (timm: ``pretrained=True``, ``drop_path_rate=0.1``; torchvision:
            ``weights``).

    The result has ``forward_stages(x)``, ``feature_info`` and ``norm_summary``; the library's own model is
    ``.network``.
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
            fused = (
                FUSED.get(type(act)) if isinstance(drop, nn.Identity) and not callable(self.norm) else None
            )
            new = core = self._make(Site(**{**vars(site), "act": fused}), old.affine)
            if fused is None and not (isinstance(act, nn.Identity) and isinstance(drop, nn.Identity)):
                new = nn.Sequential(OrderedDict(norm=core, drop=drop, act=act))
        like = next((t for t in (old.weight, old.running_mean, like) if t is not None), torch.empty(0))
        core = new.norm if isinstance(new, nn.Sequential) else new
        _place(core, like, like if old.running_mean is None else old.running_mean)
        core.train(old.training)
        if old.affine and old.bias is None and self._takes_affine():
            core.register_parameter("bias", None)
        if isinstance(old, nn.SyncBatchNorm):
            set_sync(core, True)
        if keep:
            carry(old, core, self.given)
        return new

    def _takes_affine(self) -> bool:
        return not self.timm and not callable(self.norm) and self.takes_affine

    def _make(self, site: Site, affine: bool) -> nn.Module:
        if callable(self.norm):
            return self.norm(site)
        options = self.options
        if not affine and self.takes_affine:
            options = {"affine": False, **options}
        return Placement(self.norm, "all", **options)(site)


def _place(layer: nn.Module, parameters_as: Tensor, buffers_as: Tensor) -> None:
    """Give a new layer the dtype and device of these; accelerate's init_empty_weights leaves buffers on the CPU beside
    parameters of the meta device.
    """
    if parameters_as.device == buffers_as.device:
        layer.to(parameters_as.device, parameters_as.dtype)
        return
    for module in layer.modules():
        for name, tensor in module.named_parameters(recurse=False):
            moved = tensor.detach().to(parameters_as.device, parameters_as.dtype)
            module.register_parameter(name, nn.Parameter(moved, requires_grad=tensor.requires_grad))
        for name, tensor in module.named_buffers(recurse=False):
            dtype = buffers_as.dtype if tensor.is_floating_point() else tensor.dtype
            setattr(module, name, tensor.to(buffers_as.device, dtype))


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer of any library normalizes: by its type, or by its type's name where that holds no weights of
    convolutions or linear layers.
    """
    if isinstance(layer, (Norm, nn.BatchNorm2d, nn.SyncBatchNorm)):
        return True
    holds_weights = any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in layer.modules())
    return bool(NORM.search(type(layer).__name__)) and not holds_weights


def _channels(layer: nn.Module) -> int:
    if isinstance(layer, Norm):
        return layer.channels
    named = getattr(layer, "num_features", None)
    return named if named is not None else getattr(getattr(layer, "weight", None), "numel", int)()


def _refusal(layer: nn.Module) -> str | None:
    """Why a norm is left as it is; None where it can be replaced."""
    if "Frozen" in type(layer).__name__:
        return "frozen: its statistics and affine are constants"
    if isinstance(layer, Norm) or not isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
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
    if any(
        getattr(layer, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
    ):
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
            raise ValueError(
                f"where={where!r} is neither one of {', '.join(WORDS)} nor a pattern: {error}"
            ) from error
        return lambda name, layer, site: bool(pattern.search(name))
    law = norm if isinstance(norm, str) and not norm.startswith("timm:") else "bn"
    placement = Placement(law, where)
    return lambda name, layer, site: placement.includes(site)


def _nothing(report: Report, where: Where) -> str:
    """Why nothing was replaced, in words."""
    start = f"nothing to replace in {report.network}: "
    if all(row.why == "not a BatchNorm2d" for row in report.rows):
        others = ", ".join(f"{was} x{n}" for was, n in Counter(row.was for row in report.rows).items())
        return f"{start}it has no BatchNorm2d ({others or 'no norm at all'}), and only that is replaced"
    reasons = "; ".join(f"{n} {why}" for why, n in Counter(row.why for row in report.kept).items())
    roles = ", ".join(
        f"{role} x{n}" for role, n in Counter(row.role for row in report.kept if row.role).items()
    )
    hint = (
        f"; where={where!r} names none of them (roles: {roles}): try where='all', or a pattern of names"
        if roles
        else ""
    )
    frozen = any(row.why.startswith("frozen") for row in report.kept)
    return start + reasons + ("; unfreeze them first" if frozen and not roles else "") + hint
