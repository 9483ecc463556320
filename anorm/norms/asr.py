"""ASR-Norm (Fan et al., CVPR 2021): adaptive standardization and rescaling, and what AFN shares with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.algebra import Affine, Moments, unbias
from anorm.norms.base import Choice, Norm, ParamNeeds, Parts, checked_eps, fully_connected

__all__ = ["NORMS", "Adaptation", "AdaptiveStandardizationRescaling"]

MIX_START = {"paper": -3.0, "code": 1 / (1 + math.exp(3.0))}
"""lambda_mu and lambda_sigma before the sigmoid. The papers start from sigmoid(-3) = 0.047; AFN's code stores
that number as the raw value, so that the sigmoid acts twice: 0.512."""

RESCALE_START = {"sigmoid": -5.0, "free": 1 / (1 + math.exp(5.0)), "none": 1.0}


class AdaptiveStandardizationRescaling(Norm):
    """y = gamma^ (x - mu^) / sigma^ + beta^, from mu and sigma over (H, W) by small networks.

    mu and sigma, (N, C), are of each instance and channel, in training and evaluation; ``Adaptation`` has the
    equations. With all lambdas 0 it is IN.

    The defaults are the equations as restated by Zhou and Chen (AFN, eq. 2-8), with the statistics of this
    package's IN, so that this limit is exact; "code" below is the re-implementation released with AFN.

    Args:
        channels: C.
        act: activation after the norm, or None.
        standardize_ratio: bottleneck C / ratio of mu^ and sigma^: 2 (AFN section 4.1 and code; the code's
            first version had 16).
        rescale_ratio: bottleneck C / ratio of gamma^ and beta^: 16.
        rescale_min: least width of the latter. 16 channels would leave one hidden unit, which dies, and fewer
            none.
        share: which encoders are one: "both" (code), "standardize" (all that the equations say) or
            "none".
        sigma_act: "relu" (paper) or "softplus", which leaves no channel with a sigma_stan and a
            gradient of 0.
        mix_start: start of lambda_mu, lambda_sigma: "paper" (0.047), "code" (0.512), or the value before the
            sigmoid.
        rescale_lambda: lambda_gamma and lambda_beta: "sigmoid" (in 0..1, start 0.0067), "free" (unbounded,
            from the same start: code), or "none" (1: training from scratch, by a comment in the code).
        granularity: one lambda a "layer", or a "channel" (the code's first version).
        fixed_affine: weight and bias do not learn (training from a pretrained network, by the same comment).
        floor: least sigma^ as a part of sigma: where sigma_stan is 0, sigma^ is (1 - lambda_sigma) sigma and
            a growing lambda would raise the gain without limit. 0 (code) for no floor.
        variance: "biased" (eq. 1) or "unbiased" (code; a 1x1 map keeps 0, where the code gives NaN).
        eps: sigma = sqrt(var + eps); IN's here, 1e-6 in the code.

    State: ``weight`` and ``bias`` (C), the paper's gamma_bias and beta_bias; ``adapt.*``.
    """

    def __init__(
        self,
        channels: int,
        act: str | None = None,
        standardize_ratio: int = 2,
        rescale_ratio: int = 16,
        rescale_min: int = 4,
        share: str = "both",
        sigma_act: str = "relu",
        mix_start: str | float = "paper",
        rescale_lambda: str = "sigmoid",
        granularity: str = "layer",
        fixed_affine: bool = False,
        floor: float = 0.1,
        variance: str = "biased",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(channels, act)
        if variance not in ("biased", "unbiased"):
            raise ValueError(f"variance={variance!r} is neither 'biased' nor 'unbiased'")
        self.variance, self.eps = variance, checked_eps(eps)
        self._make_affine(True)
        self.weight.requires_grad_(not fixed_affine)
        self.bias.requires_grad_(not fixed_affine)
        self.adapt = Adaptation(
            channels,
            standardize_ratio,
            rescale_ratio,
            rescale_min,
            share,
            sigma_act,
            mix_start,
            rescale_lambda,
            granularity,
            floor,
        )

    def law(self, moments: Moments) -> Affine:
        return self.adapt(*self._seen(moments), self.weight, self.bias)

    def parts(self, moments: Moments) -> Parts:
        return self.adapt.parts(*self._seen(moments), self.weight, self.bias)

    def _seen(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """mu and sigma (N, C), as the networks see them."""
        mean, var, count = moments
        if self.variance == "unbiased":
            var = var * unbias(count)
        return mean, (var + self.eps).sqrt()

    def zero_init(self) -> None:
        self.adapt.zero_rescaling(self.weight)
        nn.init.zeros_(self.bias)

    def param_needs(self) -> dict[str, ParamNeeds]:
        return super().param_needs() | self.adapt.param_needs("adapt.")


class Adaptation(nn.Module):
    """(mu, sigma), each (C,) or (N, C) -> the affine map y = gamma^ (x - mu^) / sigma^ + beta^ (AFN eq. 2-8).

        mu_stan    = f_dec(relu(f_enc(mu)))                mu^    = l_mu mu_stan + (1 - l_mu) mu
        sigma_stan = relu(g_dec(relu(g_enc(sigma))))       sigma^ = l_sigma sigma_stan + (1 - l_sigma) sigma
        gamma^ = l_gamma sigmoid(phi_dec(relu(phi_enc(sigma)))) + weight
        beta^  = l_beta  tanh(psi_dec(relu(psi_enc(mu))))       + bias

    all one fully connected layer with bias, in torch's default initialisation; gradients flow through mu and
    sigma. ``form="residual"`` is a form of ours that is the plain norm exactly while its decoders are zero:

        mu^    = mu + l_mu mu_stan                         sigma^ = sigma exp(l_sigma g_dec(...))
        gamma^ = l_gamma (sigmoid(...) - 1/2) + weight     beta^ as above

    The arguments are documented at the two laws that have this network.
    """

    def __init__(
        self,
        channels: int,
        standardize_ratio: int,
        rescale_ratio: int,
        rescale_min: int,
        share: str,
        sigma_act: str,
        mix_start: str | float,
        rescale_lambda: str,
        granularity: str,
        floor: float,
        form: str = "mix",
        decoders: str = "default",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("share", share, ("both", "standardize", "none")),
            ("sigma_act", sigma_act, ("relu", "softplus")),
            ("mix_start", mix_start, ("a number", *MIX_START)),
            ("rescale_lambda", rescale_lambda, tuple(RESCALE_START)),
            ("granularity", granularity, ("layer", "channel")),
            ("form", form, ("mix", "residual")),
            ("decoders", decoders, ("default", "zero")),
        ):
            if value not in known and not (name == "mix_start" and isinstance(value, (int, float))):
                raise ValueError(f"{name}={value!r} is none of {', '.join(known)}")
        for name, value in (
            ("standardize_ratio", standardize_ratio),
            ("rescale_ratio", rescale_ratio),
            ("rescale_min", rescale_min),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive number: it sets a bottleneck's width")
        for name, value in (("floor", floor), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} must be at least 0 and below 1")
        self.sigma_act, self.rescale_lambda, self.form = sigma_act, rescale_lambda, form
        self.floor, self.dropout = floor, dropout

        hidden = max(channels // standardize_ratio, 1)
        self.encoder = nn.Linear(channels, hidden)
        self.std_encoder = nn.Linear(channels, hidden) if share == "none" else None
        self.mean_decoder = nn.Linear(hidden, channels)
        self.std_decoder = nn.Linear(hidden, channels)

        hidden = max(channels // rescale_ratio, rescale_min)
        self.rescale_encoder = nn.Linear(channels, hidden)
        self.bias_encoder = None if share == "both" else nn.Linear(channels, hidden)
        self.weight_decoder = nn.Linear(hidden, channels)
        self.bias_decoder = nn.Linear(hidden, channels)
        size = channels if granularity == "channel" else 1
        self.decoders, self.mix_start = decoders, float(MIX_START.get(mix_start, mix_start))
        for name in ("lambda_mean", "lambda_std"):
            self.register_parameter(name, nn.Parameter(torch.empty(size)))
        for name in ("lambda_weight", "lambda_bias"):
            raw = None if rescale_lambda == "none" else nn.Parameter(torch.empty(size))
            self.register_parameter(name, raw)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start the lambdas, and zero decoders, anew; the linear layers have their own such method."""
        for name in ("lambda_mean", "lambda_std"):
            getattr(self, name).fill_(self.mix_start)
        for raw in (self.lambda_weight, self.lambda_bias):
            if raw is not None:
                raw.fill_(RESCALE_START[self.rescale_lambda])
        if self.decoders == "zero":
            for decoder in (self.mean_decoder, self.std_decoder, self.weight_decoder, self.bias_decoder):
                _zero(decoder)

    def forward(
        self, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, learning: bool = False
    ) -> Affine:
        """``learning`` switches the dropout on; only the standardizing encoders see it."""
        new_mean, new_std, gamma, beta = self._four(mean, std, weight, bias, learning)
        return Affine(new_mean, gamma / new_std, beta)

    def parts(self, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, learning: bool = False) -> Parts:
        """The same in parts; the lambdas as gates of the layer (or of each channel)."""
        new_mean, new_std, gamma, beta = self._four(mean, std, weight, bias, learning)
        choices = {
            "lambda of mu": Choice("gates", self.lambda_mean.sigmoid()),
            "lambda of sigma": Choice("gates", self.lambda_std.sigmoid()),
        }
        if self.lambda_weight is not None:
            limit = 1.0 if self.rescale_lambda == "sigmoid" else None
            for name, raw in (("lambda of gamma", self.lambda_weight), ("lambda of beta", self.lambda_bias)):
                choices[name] = Choice("gates", self._rescaling(raw, raw), limit=limit)
        return Parts(Affine(new_mean, 1 / new_std, torch.zeros_like(new_mean)), gamma, beta, choices)

    def _four(
        self, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, learning: bool
    ) -> tuple[Tensor, ...]:
        """mu^, sigma^, gamma^, beta^."""
        new_mean, new_std = self._standardizing(mean, std, learning)
        if self.floor:
            new_std = torch.maximum(new_std, self.floor * std)
        gamma = torch.sigmoid(_decode(self.rescale_encoder, self.weight_decoder, std))
        if self.form == "residual":
            gamma = gamma - 0.5
        gamma = self._rescaling(self.lambda_weight, std) * gamma + weight
        beta = torch.tanh(_decode(self.bias_encoder or self.rescale_encoder, self.bias_decoder, mean))
        beta = self._rescaling(self.lambda_bias, mean) * beta + bias
        return new_mean, new_std, gamma, beta

    def _standardizing(self, mean: Tensor, std: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
        """mu^ and sigma^."""
        seen_mean, seen_std = mean, std
        if self.dropout and learning:
            seen_mean, seen_std = F.dropout(mean, self.dropout), F.dropout(std, self.dropout)
        mean_stan = _decode(self.encoder, self.mean_decoder, seen_mean)
        std_stan = _decode(self.std_encoder or self.encoder, self.std_decoder, seen_std)
        l_mean, l_std = (raw.to(mean.dtype).sigmoid() for raw in (self.lambda_mean, self.lambda_std))
        if self.form == "residual":
            return mean + l_mean * mean_stan, std * torch.exp(l_std * std_stan)
        std_stan = F.relu(std_stan) if self.sigma_act == "relu" else F.softplus(std_stan)
        return l_mean * mean_stan + (1 - l_mean) * mean, l_std * std_stan + (1 - l_std) * std

    def _rescaling(self, raw: Tensor | None, like: Tensor) -> Tensor | float:
        if raw is None:
            return 1.0
        raw = raw.to(like.dtype)
        return raw.sigmoid() if self.rescale_lambda == "sigmoid" else raw

    @torch.no_grad()
    def zero_rescaling(self, weight: Tensor) -> None:
        """gamma^ = 0, beta^ = bias: rescaling decoders 0, weight against the l_gamma sigmoid(0) left."""
        _zero(self.weight_decoder), _zero(self.bias_decoder)
        offset = 0.0 if self.form == "residual" else 0.5
        weight.copy_(-offset * self._rescaling(self.lambda_weight, weight) * torch.ones_like(weight))

    def param_needs(self, prefix: str) -> dict[str, ParamNeeds]:
        """No weight decay for biases and lambdas: it would pull a raw lambda of -3 or -5 towards 1/2."""
        needs = {}
        for name, _ in self.named_parameters():
            role = "control" if name.startswith("lambda") else "attention"
            needs[prefix + name] = ParamNeeds(role, decay=name.endswith(".weight"))
        return needs


def _decode(encoder: nn.Linear, decoder: nn.Linear, statistic: Tensor) -> Tensor:
    return fully_connected(decoder, F.relu(fully_connected(encoder, statistic)))


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


NORMS = {"asrn": AdaptiveStandardizationRescaling}
