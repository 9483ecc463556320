"""Adaptive Fusion Normalization (Zhou and Chen, 2023): ASR-Norm's networks on the statistics of the batch."""

from __future__ import annotations

from functools import partialmethod

import torch
from torch import Tensor, nn

from anorm.algebra import Affine, Moments, pool_batch, unbias
from anorm.norms.asr import Adaptation
from anorm.norms.base import ParamNeeds, Parts, RunningNorm

__all__ = ["NORMS", "AdaptiveFusionNorm", "AdaptiveFusionNormAsReleased"]


class AdaptiveFusionNorm(RunningNorm):
    """y = gamma^ (x - mu^) / sigma^ + beta^, from mu and sigma over (N, H, W) by small networks (eq. 1-8).

    ``anorm.norms.asr.Adaptation`` writes the equations out. With all lambdas 0 it is BN.

    Gradients flow through the statistics. In training mu and sigma are the batch's; in evaluation the
    encoders too are fed with the running mean and sqrt(running variance + eps), which are tracked as BN's
    are, so that training and evaluation are one function and a batch norm's statistics, weight and bias carry
    over by name.

    Paper and released code differ in much. The defaults follow the paper, where it is silent the code, and
    put guards where either of them breaks; ``afn_as_released`` is the released layer. "As released" the layer
    is transductive: in evaluation it takes the batch's statistics, and what it answers for an image depends
    on the others in the batch.

    Args:
        channels: C.
        act: activation after the norm, or None.
        standardize_ratio: bottleneck C / ratio of mu^ and sigma^: 2 (section 4.1 and code; section 3.1 says
            16).
        rescale_ratio: bottleneck C / ratio of gamma^ and beta^: 16 (section 4.1 and code).
        rescale_min: least width of the latter; C/16 alone is a single hidden unit for 16 channels, which
            dies, and none below, where the code's gamma^ and beta^ are constants.
        share: which encoders are one: "both" pairs (code), "standardize" (f and g only, all that the paper
            says) or "none".
        sigma_act: "relu" (paper, code): at the start about half the entries of sigma_stan are 0; or
            "softplus".
        mix_start: start of lambda_mu and lambda_sigma: "paper", sigmoid(-3) = 0.047; "code", where the
            sigmoid is applied twice, 0.512 (half the channels start with a gain of 2); or the value before
            the sigmoid. Below -3 the slope l (1 - l) vanishes.
        rescale_lambda: lambda_gamma and lambda_beta, which start at sigmoid(-5) = 0.0067: "sigmoid", bounded
            in 0..1 as the other two; "free" (code), which may turn negative or large; "none", 1.
        granularity: one lambda a "layer" (paper, code), or a "channel" (the code's first version).
        floor: least sigma^ as a part of sigma. (1 - lambda_sigma) sigma is its only other bound, so that
            channels without sigma_stan get a gain of 21 at a raw lambda of 3 and of 404 at 6. 0 (code) for no
            floor.
        form: "mix" (paper, code) or "residual", which is BN exactly while the decoders are zero (see
            ``Adaptation``).
        decoders: "default" (torch's, as in the code) or "zero". form=residual decoders=zero starts as the
            identity on a pretrained BN; with form=mix sigma^ still shrinks by 1 - lambda_sigma.
        dropout: of mu and sigma before the standardizing encoders, in training: 0 (paper) or 0.3 (code).
        variance: in training, "biased" (eq. 1) or "unbiased" (code; guarded where N*H*W = 1). The tracked one
            is unbiased.
        eps: the paper has none; BN's. 1e-6 in the code.
        eps_place: "inside", sigma = sqrt(var + eps), or "outside", sqrt(var) + eps (code), where the root's
            infinite slope at a dead channel is cut off by a tiny number. sigma is fed to the networks with
            its eps.
        momentum: weight of the new batch in the running statistics; None for their cumulative average.
        eval_stats: "running", or "batch" (code; the paper does not say).

    ``sync=True`` pools the statistics over processes; without it each process has its own, as the code has
    it. The paper replaces every BN; the released model builders keep BN in the stem, in shortcuts and in the
    first block of each stage. State: ``weight``, ``bias`` (gamma_bias, beta_bias), ``running_*`` as in BN;
    ``adapt.*``. Weight decay spares lambdas and the networks' biases (the code decays all). Raises ValueError
    in training when N*H*W = 1.
    """

    beside_bn = ("adapt.",)

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
        floor: float = 0.1,
        form: str = "mix",
        decoders: str = "default",
        dropout: float = 0.0,
        variance: str = "biased",
        eps: float = 1e-5,
        eps_place: str = "inside",
        momentum: float | None = 0.1,
        eval_stats: str = "running",
    ) -> None:
        super().__init__(channels, act, eps, momentum)
        for name, value, known in (
            ("variance", variance, ("biased", "unbiased")),
            ("eps_place", eps_place, ("inside", "outside")),
            ("eval_stats", eval_stats, ("running", "batch")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is neither {known[0]!r} nor {known[1]!r}")
        self.variance, self.eps_place, self.eval_stats = variance, eps_place, eval_stats
        self._make_affine(True)
        self._make_buffers()
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
            form,
            decoders,
            dropout,
        )

    def needs(self) -> str:
        return "mean_var" if self.from_batch else "none"

    def law(self, moments: Moments | None) -> Affine:
        return self.adapt(*self._seen(moments), self.weight, self.bias, self.learning)

    def parts(self, moments: Moments | None) -> Parts:
        return self.adapt.parts(*self._seen(moments), self.weight, self.bias, self.learning)

    def _seen(self, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """mu and sigma (C), as the networks see them."""
        mean, var = self.batch_statistics(moments)
        if self.variance == "unbiased" and self.from_batch:
            count = pool_batch(moments, self.sync and self.learning).count
            var = var * unbias(count)
        # running statistics of a half-precision model: the networks compute in float32
        mean, var = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (mean, var))
        return mean, self._std(var)

    def _std(self, var: Tensor) -> Tensor:
        if self.eps_place == "inside":
            return (var + self.epsilon).sqrt()
        # sqrt has an infinite slope at 0 (a dead channel): keep it a tiny distance away
        return (var + torch.finfo(var.dtype).tiny ** 0.5).sqrt() + self.epsilon

    def zero_init(self) -> None:
        self.adapt.zero_rescaling(self.weight)
        nn.init.zeros_(self.bias)

    def param_needs(self) -> dict[str, ParamNeeds]:
        return super().param_needs() | self.adapt.param_needs("adapt.")


class AdaptiveFusionNormAsReleased(AdaptiveFusionNorm):
    """AFN as its authors released it, batch statistics in evaluation included.

    Guarded only where the released layer gives NaN or cannot be built: dead channels, one value, fewer than
    16 channels.
    """

    __init__ = partialmethod(
        AdaptiveFusionNorm.__init__,
        rescale_min=1,
        mix_start="code",
        rescale_lambda="free",
        floor=0.0,
        dropout=0.3,
        variance="unbiased",
        eps=1e-6,
        eps_place="outside",
        eval_stats="batch",
    )


class AdaptiveFusionNormFromIdentity(AdaptiveFusionNorm):
    """AFN that starts as the batch norm it replaces: the residual form, with decoders of zero."""

    __init__ = partialmethod(AdaptiveFusionNorm.__init__, form="residual", decoders="zero")


NORMS = {
    "afn": AdaptiveFusionNorm,
    "afn_as_released": AdaptiveFusionNormAsReleased,
    "afn_identity": AdaptiveFusionNormFromIdentity,
}
