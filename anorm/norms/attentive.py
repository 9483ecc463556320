"""Attentive Normalization (Li, Sun and Wu, ECCV 2020): a mixture of K affine maps weighted by the instance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, partialmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.algebra import Affine, Moments, pool_batch, squeeze, standardize, then, unbias
from anorm.norms.base import (
    Choice,
    Norm,
    ParamNeeds,
    Parts,
    Site,
    around,
    called_as_is,
    checked_eps,
    fully_connected,
    moments_of,
    without_autocast,
)
from anorm.norms.batch import BatchNorm
from anorm.norms.build import build, build_base
from anorm.ops.fused import FusedLaw, RunningLaw, Tensors

__all__ = ["NORMS", "Attention", "AttentiveGroupNorm", "AttentiveNorm", "fused_an"]


def hsigmoid(a: Tensor) -> Tensor:
    """min(max(a + 3, 0), 6) / 6 (torch's own hardsigmoid multiplies by a float32 sixth, even in float64)."""
    return F.relu6(a + 3.0) / 6.0


def reverse_rsd(moments: Moments, eps: float) -> Tensor:
    """mean / sqrt(v n/(n-1) + eps), the reverse of the relative standard deviation; n = 1 keeps v."""
    mean, var, n = moments
    return mean * torch.rsqrt(var * unbias(n) + eps)


INPUTS = ("rsd", "rsd_paper", "mean", "mean_std")
ATTENTIONS = ("a1", "a2", "se")
ACTIVATIONS = {
    "hsigmoid": hsigmoid,
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=1),
    "relu": F.relu,
}
PUBLISHED_K = {4: (10, 10, 20, 20), 7: (5, 5, 5, 5, 10, 10, 10)}
"""Components for each stage, by the number of stages (section 3.3; MobileNetV2's seven from the authors' configs)."""


class AttentiveNorm(Norm):
    """y = (sum_k lambda_nk gamma_kc) * x_hat + sum_k lambda_nk beta_kc, x_hat the base norm without affine (eq. 8, 9).

    lambda = A(x), (N, K), comes from the moments of x by a small network (section 3.3, eq. 11):

        A1: Act(FC(d)), FC with bias      A2: Act(Norm(FC(d))), FC without bias, Norm over the N instances

    with the descriptor d (N, C) of each channel over H x W. The weights are not normalized to sum to one (but for
    softmax), so at the start y is about K/2 times x_hat. Nothing is detached: gradients flow through descriptor,
    weights and statistics. The defaults are what the authors' code computes.

    Args:
        channels: C.
        act: activation after the layer, or None.
        k: number of components. In a network also a list, one number a stage; the default there is the published
            10, 10, 20, 20 (four stages) or 5, 5, 5, 5, 10, 10, 10 (seven).
        base: the norm that standardizes, a name or {name: ..., options}: bn, gn, ln, in, sn.
        input: the descriptor. "rsd": mean / sqrt(var + eps_rsd), the reverse of the relative standard deviation with
            the unbiased variance, v * n / (n - 1), as the code does (n = 1 keeps v = 0, where the code gives NaN);
            "rsd_paper": mean / (std + eps_rsd), the paper's footnote 2, biased, with a safe root at 0; "mean";
            "mean_std": both, concatenated (2C).
        attention: "a2" (published), "a1" (v1 and the COCO heads), or "se": FC-ReLU-FC, a full SE unit of reduction 16.
        activation: "hsigmoid" (published), "sigmoid", "softmax" over K, "relu".
        attention_norm: the norm of A2: "bn" over the N instances (published, needs N >= 2 in training), or "gn" with
            one group over the K values of an instance.
        source: "input" (published): the descriptor is of x; "standardized": of x_hat (footnote 1).
        separate: one set of weights for gamma and another for beta instead of a shared one.
        eps_rsd: the descriptor's epsilon.

    State: ``weight`` and ``bias`` (K, C), initialised to N(1, 0.1) and N(0, 0.1) (section 3.3); ``base.*``;
    ``attention.*``.
    """

    def __init__(
        self,
        channels: int,
        act: str | None = None,
        k: int = 10,
        base: str | dict = "bn",
        input: str = "rsd",
        attention: str = "a2",
        activation: str = "hsigmoid",
        attention_norm: str = "bn",
        source: str = "input",
        separate: bool = False,
        eps_rsd: float = 1e-3,
    ) -> None:
        super().__init__(channels, act)
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k={k!r}: a single layer takes one positive number of components")
        if source not in ("input", "standardized"):
            raise ValueError(f"source={source!r} is neither 'input' nor 'standardized'")
        self.k = k
        self.source = source
        self.separate = separate
        self.weight = nn.Parameter(torch.empty(k, channels))
        self.bias = nn.Parameter(torch.empty(k, channels))
        self.reset_parameters()
        self.base = build_base(base, channels, affine=False)
        weights = 2 * k if separate else k
        self.attention = Attention(channels, weights, input, attention, activation, attention_norm, eps_rsd)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(1.0 + 0.1 * torch.randn_like(self.weight))
        self.bias.copy_(0.1 * torch.randn_like(self.bias))

    @classmethod
    def at(cls, site: Site, k: int | Sequence[int] | None = None, **options) -> AttentiveNorm:
        if k is None:
            k = PUBLISHED_K.get(site.stages, (10,) * site.stages)
        if not isinstance(k, int):
            if len(k) != site.stages:
                raise ValueError(
                    f"k has {len(k)} numbers for the {site.stages} stages of this architecture: {list(k)}"
                )
            k = k[site.stage]
        return super().at(site, k=k, **options)

    @classmethod
    def belongs(cls, site: Site) -> bool:
        return site.focus

    def needs(self) -> str:
        return "mean_var" if "mean_var" in (self.base.needs(), self.attention.needs) else "mean"

    def run(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        if called_as_is(self.base):
            return super().run(x, residual, mask)
        z = self.base(x)
        of = moments_of(z if self.source == "standardized" else x, self.attention.needs == "mean_var")
        with without_autocast(x):
            gamma, beta = self._mixed(self.attention(of))
            return around(z, gamma, beta, self.act, residual, mask)

    def law(self, moments: Moments) -> Affine:
        standardized = self.base.law(moments)
        return then(standardized, *self._mixed(self.mixture_weights(moments, standardized)))

    def parts(self, moments: Moments) -> Parts | None:
        below = self.base.parts(moments)
        if below is None:
            return None
        standardized = then(*below[:3])
        weights = self.mixture_weights(moments, standardized)
        kinds = (
            ("mixture weights of gamma", "mixture weights of beta") if self.separate else ("mixture weights",)
        )
        limit = None if self.attention.activation == "relu" else 1.0
        shown = zip(kinds, weights.chunk(len(kinds), 1), strict=True)
        choices = {name: Choice("mixture", values, limit=limit) for name, values in shown}
        return Parts(standardized, *self._mixed(weights), choices | below.choices)

    def _mixed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta of each instance, (N, C)."""
        for_gamma, for_beta = weights.chunk(2, 1) if self.separate else (weights, weights)
        return for_gamma @ self.weight.to(weights.dtype), for_beta @ self.bias.to(weights.dtype)

    def mixture_weights(self, moments: Moments, standardized: Affine) -> Tensor:
        """lambda (N, K) ((N, 2K) when separate)."""
        if self.source == "standardized":
            mean = squeeze(standardized, moments.mean)
            var = None if moments.var is None else standardized.scale.square() * moments.var
            moments = Moments(mean, var, moments.count)
        return self.attention(moments)

    def fused(self, x: Tensor) -> FusedLaw | RunningLaw | None:
        base, attention = self.base, self.attention
        fc, norm = attention.fc, attention.norm
        published = (
            type(base) is BatchNorm
            and type(norm) is BatchNorm
            and (attention.input, attention.activation, self.source) == ("rsd", "hsigmoid", "input")
            and not self.separate
        )
        if not published or x.numel() == 0:
            return None
        if not (called_as_is(attention, Attention) and called_as_is(fc, nn.Linear) and called_as_is(norm)):
            return None
        parameters = self.weight, self.bias, fc.weight, norm.weight, norm.bias
        eps = base.epsilon, attention.eps, norm.epsilon
        if not (base.from_batch or norm.from_batch):
            statistics = base.running_mean, base.running_var, norm.running_mean, norm.running_var
            return running_an(parameters, statistics, eps)
        if x.shape[0] < 2 or not (base.from_batch and norm.from_batch) or base.tracking != norm.tracking:
            return None
        if base.sync or norm.sync:
            return None

        def track(mean: Tensor, var: Tensor, attention_mean: Tensor, attention_var: Tensor) -> None:
            base.track(mean, var)
            norm.track(attention_mean, attention_var)

        return fused_an(parameters, eps, track if base.tracking else None)

    @torch.no_grad()
    def start_as(self, weight: Tensor, bias: Tensor) -> None:
        """The attention's last affine layer at weight 0 gives every instance the same lambda (1/2 for hsigmoid),
        so gamma_k = gamma / sum_k lambda_k (2 gamma / K), and beta likewise.

        Where that layer is the FC (A1, SE), nothing would ever tell the K components apart: they differ by noise
        of the published size that cancels in the sum.
        """
        last = self.attention.norm or self.attention.fc
        last.weight.zero_()
        last.bias.fill_(1.0 if self.attention.activation == "relu" else 0.0)
        lambdas = ACTIVATIONS[self.attention.activation](last.bias[None].double())[0, : self.k]
        for mixture, value in ((self.weight, weight), (self.bias, bias)):
            mixture.copy_((value / lambdas.sum().to(value)).expand_as(mixture))
            if last is self.attention.fc and self.k > 1:
                noise = 0.1 * torch.randn_like(mixture)
                mixture.add_(noise - noise.mean(0))
        self.base.start_as(torch.ones_like(weight), torch.zeros_like(bias))

    def zero_init(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def param_needs(self) -> dict[str, ParamNeeds]:
        needs = {f"base.{name}": needs for name, needs in self.base.param_needs().items()}
        needs |= {
            f"attention.{name}": ParamNeeds("attention") for name, _ in self.attention.named_parameters()
        }
        return needs | {name: ParamNeeds("mixture") for name in ("weight", "bias")}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"


class AttentiveGroupNorm(AttentiveNorm):
    """AN over GN with A1, as in the box heads of the COCO experiments (section 4.3).

    ``attention="a2"`` normalizes the K values of each instance (GN with one group), as the authors' later code does.
    """

    elsewhere = ("gn", {})

    __init__ = partialmethod(AttentiveNorm.__init__, base="gn", attention="a1", attention_norm="gn")


class Attention(nn.Module):
    """Moments of an instance's channels -> its weights (N, out): descriptor, FC, norm, activation (eq. 10, 11)."""

    def __init__(
        self,
        channels: int,
        out: int,
        input: str,
        attention: str,
        activation: str,
        attention_norm: str,
        eps: float,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("input", input, INPUTS),
            ("attention", attention, ATTENTIONS),
            ("activation", activation, tuple(ACTIVATIONS)),
            ("attention_norm", attention_norm, ("bn", "gn")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is none of {', '.join(known)}")
        self.input, self.activation, self.eps = input, activation, checked_eps(eps)
        self.needs = "mean" if input == "mean" else "mean_var"
        features = 2 * channels if input == "mean_std" else channels
        self.squeeze = None
        if attention == "se":
            hidden = max(features // 16, 1)
            self.squeeze = nn.Linear(features, hidden)
            features = hidden
        self.fc = nn.Linear(features, out, bias=attention != "a2")
        self.reset_parameters()
        self.norm = None
        if attention == "a2":
            self.norm = build(attention_norm, out, **({"groups": 1} if attention_norm == "gn" else {}))
            self.norm.part = True

    def reset_parameters(self) -> None:
        """He initialisation of the FC (fan-out), which replaces that of ``nn.Linear``."""
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out", nonlinearity="relu")
        if self.fc.bias is not None:
            nn.init.zeros_(self.fc.bias)

    def describe(self, moments: Moments) -> Tensor:
        """The descriptor (N, C) or (N, 2C)."""
        mean, var, _ = moments
        if self.input == "mean":
            return mean
        if self.input == "rsd":
            return reverse_rsd(moments, self.eps)
        # sqrt has an infinite slope at 0 (a dead channel): keep it a tiny distance away
        std = (var + torch.finfo(var.dtype).tiny ** 0.5).sqrt()
        return mean / (std + self.eps) if self.input == "rsd_paper" else torch.cat((mean, std), 1)

    def forward(self, moments: Moments) -> Tensor:
        a = self.describe(moments)
        if self.squeeze is not None:
            a = F.relu(fully_connected(self.squeeze, a))
        a = fully_connected(self.fc, a)
        if self.norm is not None and not called_as_is(self.norm):
            a = self.norm(a[:, :, None, None])[:, :, 0, 0]
        elif self.norm is not None:
            # each instance holds one value of each of the outputs: moments (a, 0) of a 1x1 map
            a = squeeze(self.norm.law(Moments(a, torch.zeros_like(a), 1)), a)
        return ACTIVATIONS[self.activation](a)


def fused_an(parameters: Tensors, eps: tuple[float, float, float], track: Callable | None) -> FusedLaw:
    """AN over BN in its published form in one call each way.

    parameters: mixtures of scale and shift (K, C), FC (K, C), weight and bias of the attention norm (K). eps: of the
    base norm, the descriptor, the attention norm. ``track(mean, unbiased variance, mean, unbiased variance)``: of the
    base norm and of the attention norm.
    """

    def law(moments: Moments, p: Tensors) -> Affine:
        mixed_weight, mixed_bias, fc, weight, bias = (t.to(moments.mean.dtype) for t in p)
        a = F.linear(reverse_rsd(moments, eps[1]), fc)
        over_batch = pool_batch(Moments(a, torch.zeros_like(a), 1))
        weights = hsigmoid(squeeze(then(standardize(*over_batch[:2], eps[2]), weight, bias), a))
        return then(standardize(*pool_batch(moments)[:2], eps[0]), weights @ mixed_weight, weights @ mixed_bias)

    return FusedLaw(
        name="an_coefficients",
        parameters=parameters,
        forward=lambda laws, mean, var, count, p: laws.an_coefficients(mean, var, *p, count, *eps),
        affine=lambda saved, p: Affine(*saved[:3]),
        backward=lambda laws, dscale, dshift, mean, saved, p, count: (
            mean,
            *laws.an_coefficients_backward(
                dscale, dshift, mean, *(saved[i] for i in (0, 1, 3, 5, 6, 7, 10)), *p, count
            ),
        ),
        law=law,
        track=None if track is None else lambda saved: track(saved[0], saved[4], saved[8], saved[9]),
    )


def running_an(parameters: Tensors, statistics: Tensors, eps: tuple[float, float, float]) -> RunningLaw:
    """AN over BN in its published form with running statistics, in one call.

    parameters and eps as in ``fused_an``; statistics: running mean and variance of the base norm, of the attention norm.
    """
    centre, *rest = statistics
    return RunningLaw(
        "an_running_coefficients",
        lambda laws, mean, var, count: Affine(
            centre, *laws.an_running_coefficients(mean, var, *parameters, *rest, count, *eps)
        ),
    )


NORMS = {"an": AttentiveNorm, "an_gn": AttentiveGroupNorm}
