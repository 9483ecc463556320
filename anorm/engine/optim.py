"""Parameters -> groups -> optimizer. What a parameter needs is declared by the module that makes it, never
read off its name or shape: a K x C mixture is no weight matrix."""

from __future__ import annotations

import fnmatch
import inspect

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from anorm.archs.foreign import Foreign
from anorm.config.settings import Optim
from anorm.convert import is_norm
from anorm.norms.base import Norm, ParamNeeds, outermost_norms
from anorm.norms.statistics import freeze_stats
from anorm.words import nearest

MIXTURES = "mixtures"
"""The word for ``freeze`` that holds AN's learned mixtures and its statistics, and leaves its attention free.
"""

STATISTICS = "stats"
"""The word for ``freeze`` that holds running statistics alone."""


def declared_needs(model: nn.Module) -> dict[str, tuple[ParamNeeds, bool]]:
    """Parameter name -> (its needs, whether they are of a norm). The outermost norm's word counts; those of another
    library's norm have the role "norm".

    Parameters of other modules have the role "bias" where their module calls them so, else "weight".
    """
    needs = {}
    for name, norm in outermost_norms(model):
        needs |= {
            f"{name}.{local}" if name else local: (need, True) for local, need in norm.param_needs().items()
        }
    for name, module in model.named_modules():
        if not isinstance(module, Norm) and is_norm(module):
            for local, _ in module.named_parameters():
                needs.setdefault(f"{name}.{local}" if name else local, (ParamNeeds("norm"), True))
    for name, _ in model.named_parameters():
        if name not in needs:
            needs[name] = (ParamNeeds("bias" if name.rpartition(".")[2] == "bias" else "weight"), False)
    return needs


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_norm: bool = True, layer_decay: float | None = None
) -> list[dict]:
    """Optimizer groups {params, names, roles, weight_decay, lr_scale, clip}; each trainable parameter is in
    exactly one.

    decay_norm: also decay the parameters of norms (the authors' practice). It is one switch for all that a norm learns,
    its attention included: layers that differ in how much of them is attention are compared under one rule.
    layer_decay: the rate of block i of L is multiplied by layer_decay^(L - 1 - i); a block is a child of the
    network, or a child of one of its sequences, in the order of construction.
    """
    needs, groups = declared_needs(model), {}
    blocks: dict[tuple[str, ...], int] = {}
    for name, _ in model.named_parameters():
        blocks.setdefault(_block(model, name), len(blocks))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        need, of_norm = needs[name]
        decay = weight_decay if need.decay and (decay_norm or not of_norm) else 0.0
        scale = need.lr_scale
        if layer_decay is not None:
            scale *= layer_decay ** (len(blocks) - 1 - blocks[_block(model, name)])
        group = groups.setdefault(
            (decay, scale, need.clip),
            {
                "params": [],
                "names": [],
                "roles": [],
                "weight_decay": decay,
                "lr_scale": scale,
                "clip": need.clip,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
        if need.role not in group["roles"]:
            group["roles"].append(need.role)
    if not groups:
        raise ValueError("freeze leaves no parameter to train: freeze less")
    return list(groups.values())


def describe_groups(groups: list[dict]) -> list[str]:
    """One line a group, for the run's header."""
    return [
        f"{'/'.join(g['roles'])}: {sum(p.numel() for p in g['params']):,} parameters, weight decay "
        f"{g['weight_decay']:g}"
        + (f", rate x {g['lr_scale']:g}" if g["lr_scale"] != 1 else "")
        + (f", clip {g['clip']:g}" if g["clip"] else "")
        for g in groups
    ]


def create_optimizer(groups: list[dict], settings: Optim) -> torch.optim.Optimizer:
    """The optimizer ``settings.name`` of timm's factory over ``groups``; raises ValueError in words.

    timm's "sgd" means Nesterov; here ``nesterov`` always says which, as in torch.
    """
    if settings.impl == "apex":
        return _apex_sgd(groups, settings)
    from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers

    if settings.name not in list_optimizers():
        raise ValueError(
            f"optim.name={settings.name}{nearest(settings.name, list_optimizers())} "
            "(timm.optim.list_optimizers() shows all)"
        )
    known = set(inspect.signature(get_optimizer_class(settings.name, bind_defaults=False)).parameters)
    for key in settings.args:
        if key not in known:
            raise ValueError(
                f"optim.args.{key} is no argument of {settings.name}{nearest(key, known - {'params'})}"
            )
    arguments = dict(settings.args)
    if "nesterov" in known:
        arguments["nesterov"] = settings.nesterov
    if settings.impl == "auto" and "fused" in known:
        arguments.setdefault("fused", True)
    elif "foreach" in known:
        arguments.setdefault("foreach", True)
    optimizer = create_optimizer_v2(
        groups,
        opt=settings.name,
        lr=settings.peak_lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        **arguments,
    )
    if isinstance(optimizer, torch.optim.SGD) and settings.momentum and not settings.args.get("dampening"):
        _start_at_rest(optimizer)
    return optimizer


def _start_at_rest(optimizer: torch.optim.SGD) -> None:
    """Zero momentum, which makes the first step what it is without any. torch allocates it in that step and leaves it
    unwritten where a fused kernel skips the step, as it does when fp16 gradients overflow.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the strides of its parameter: a run may continue with another hardware.channels_last, and
    fused kernels take memory as it lies.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _apex_sgd(groups: list[dict], settings: Optim) -> torch.optim.Optimizer:
    if settings.name != "sgd":
        raise ValueError(f"optim.impl=apex has sgd only, not {settings.name}: set optim.impl=auto")
    if settings.args:
        raise ValueError(
            f"optim.impl=apex takes no optim.args ({', '.join(settings.args)}): set optim.impl=auto"
        )
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ValueError(
            "optim.impl=apex needs NVIDIA's apex, built from github.com/NVIDIA/apex (the package named "
            "apex on PyPI is another project); optim.impl=auto uses torch's own fused SGD"
        ) from error
    return FusedSGD(
        groups,
        lr=settings.peak_lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The step's learning rate, scaled as each group asks."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip: float | None) -> Tensor:
    """Unscale, clip, step, in this order. Returns the norm of the whole gradient before clipping.

    Non-finite gradients change nothing, and finding them does not wait for a GPU where the optimizer is fused.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        if group["clip"]:
            torch.nn.utils.clip_grad_norm_(group["params"], group["clip"])
    if scaler.is_enabled():
        scaler.step(optimizer)
    elif norm.device.type == "cpu":
        if norm.isfinite():
            optimizer.step()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        # what GradScaler does for a fused optimizer: the kernel reads the flag
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    else:
        optimizer.step()
    return norm


def freeze(model: nn.Module, words: list[str]) -> list[str]:
    """Stop learning what ``words`` name; returns a line a word that says what it froze.

    A word is a role (weight, bias, norm, mixture, attention, control), ``mixtures`` (AN's mixtures and the
    statistics of its base, attention free: section 3.3 of the paper), or a pattern of parameter names such as
    "layer1.*". A norm whose parameters are all frozen by a role or pattern keeps its running statistics too, but for
    other libraries' norms, which go on tracking theirs: the line says so.

    ``stats`` holds the running statistics of every norm, torch's too, while their affines learn (norm_eval in detection
    codes); ``stats:layer1`` those at and below the modules of that name or pattern. A network may know more words
    (a detector: paper, code, none).
    """
    said, needs = [], declared_needs(model)
    roles = {need.role for need, _ in needs.values()}
    policies = getattr(model, "freeze_policies", {})
    for word in words:
        if word in policies:
            said.append(policies[word]())
            continue
        if word == STATISTICS or word.startswith(f"{STATISTICS}:"):
            said.append(_freeze_statistics(model, word))
            continue
        role = "mixture" if word == MIXTURES else word
        named = {name for name, (need, _) in needs.items() if need.role == role}
        if word not in roles and word != MIXTURES:
            named = {name for name in needs if fnmatch.fnmatchcase(name, word)}
        if not named:
            raise ValueError(
                f"freeze={word} matches nothing: give {MIXTURES}, {STATISTICS}, a role ({', '.join(sorted(roles))}) or a "
                "pattern of parameter names such as layer1.*"
            )
        parameters = dict(model.named_parameters())
        for name in named:
            parameters[name].requires_grad_(False)
        statistics = 0
        for prefix, norm in outermost_norms(model):
            local = {f"{prefix}.{name}" for name in norm.param_needs()}
            if word == MIXTURES and local & named:
                held = norm.base
            elif local and local <= named:
                held = norm
            else:
                continue
            statistics += freeze_stats(held)
        said.append(f"frozen by {word}: {len(named)} parameters, the statistics of {statistics} norms")
        if others := _others_tracking(model, named):
            said[-1] += f"; those of {others} norms of other libraries go on being tracked"
    return said


def _freeze_statistics(model: nn.Module, word: str) -> str:
    pattern = word.partition(":")[2] or "*"
    held = 0
    for name, module in model.named_modules():
        name = name.removeprefix("network.") if isinstance(model, Foreign) else name
        parents = [name, *(name[:i] for i, c in enumerate(name) if c == ".")]
        if isinstance(module, _NormBase) and any(fnmatch.fnmatchcase(part, pattern) for part in parents):
            held += freeze_stats(module)
    if not held:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"freeze={word} holds nothing: no norm with running statistics stands at or below a module of that name; "
            f"the network has {children}"
        )
    return f"frozen by {word}: the statistics of {held} norms, their affines learn"


def _others_tracking(model: nn.Module, frozen: set[str]) -> int:
    """Norms of torch's, all of whose parameters are ``frozen``, with running statistics."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and not isinstance(module, Norm) and module.track_running_stats:
            own = {f"{name}.{local}" for local, _ in module.named_parameters(recurse=False)}
            count += bool(own) and own <= frozen
    return count


def _block(model: nn.Module, name: str) -> tuple[str, ...]:
    if isinstance(model, Foreign):
        model, name = model.network, name.removeprefix("network.")
    parts = name.split(".")
    return tuple(parts[:2] if isinstance(getattr(model, parts[0]), nn.Sequential) else parts[:1])
