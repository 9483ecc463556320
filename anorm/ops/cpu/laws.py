"""Coefficients of BN, GN, AN over BN and SN in one call each way, and of AN, SE and SN in evaluation, on a CPU.

They replace a law and its autograd, so that a layer is six calls:

    mean, var = moments(x)                                   forward
    centre, scale, ..., = an_coefficients(mean, var, ...)
    y = affine(x, centre, scale, shift, residual, act)
    dscale, dshift, g = affine_backward(dy, x, centre, scale, shift, y, act)          backward
    dvar2, dmean1, ... = an_coefficients_backward(dscale, dshift, ...)
    dx = moments_backward(dy or g, x, centre, scale, shift, about, dvar2, dmean1, act)

``about`` is what dvar2 multiplies x's distance from: the centre for BN and GN, the instance's mean for AN and SN.
mean and var are the instances' moments (N, C), hw their H * W. Parameters may have any floating dtype; all results have
that of the statistics, and a parameter's gradient its shape. What is named ``unbiased`` is what a running variance
takes in: var M/(M-1) over M values (var itself if M = 1).
"""

from __future__ import annotations

from anorm.ops.cpu.library import operator

__all__ = [
    "an_coefficients",
    "an_coefficients_backward",
    "an_running_coefficients",
    "bn_coefficients",
    "bn_coefficients_backward",
    "gn_coefficients",
    "gn_coefficients_backward",
    "se_running_coefficients",
    "sn_coefficients",
    "sn_coefficients_backward",
    "sn_running_coefficients",
]


def _shaped(shapes: str, like: tuple[int, ...] = (), k: int | None = None):
    """A shape function that makes one tensor a word of ``shapes``, then one like each argument that ``like`` counts.

    N and C are those of the first argument, K the number of values of the argument that ``k`` counts.
    """

    def fake(*arguments):
        first = arguments[0]
        sizes = {"N": first.shape[0], "C": first.shape[1], "3": 3}
        if k is not None:
            sizes["K"] = arguments[k].numel()
        made = [first.new_empty([sizes[letter] for letter in word]) for word in shapes.split()]
        return *made, *(first.new_empty(arguments[i].shape) for i in like)

    return fake


# BN: centre = mu = E_n[m], var = E_n[v] + E_n[(m - mu)^2], rstd = (var + eps)^(-1/2), scale = weight * rstd; the shift
# is the bias itself.
bn_coefficients = operator(
    "bn_coefficients(Tensor mean, Tensor var, Tensor? weight, int hw, float eps)"
    " -> (Tensor centre, Tensor scale, Tensor rstd, Tensor unbiased)",
    _shaped("C C C C"),
)
bn_coefficients_backward = operator(
    "bn_coefficients_backward(Tensor dscale, Tensor dshift, Tensor scale, Tensor rstd, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dweight, Tensor dbias)",
    _shaped("C C C C"),
)

# GN: the moments of a group pool those of its C / groups channels as BN's pool those of the batch; one group is LN over
# (C, H, W), C groups are IN.
gn_coefficients = operator(
    "gn_coefficients(Tensor mean, Tensor var, Tensor? weight, int groups, float eps)"
    " -> (Tensor centre, Tensor scale, Tensor rstd)",
    _shaped("NC NC NC"),
)
gn_coefficients_backward = operator(
    "gn_coefficients_backward(Tensor dscale, Tensor dshift, Tensor scale, Tensor rstd, int groups, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dweight, Tensor dbias)",
    _shaped("NC NC C C"),
)

# AN over BN in its published form (Li, Sun, Wu 2020; descriptor and constants as the authors' code has them):
# BN's mu and rstd; descriptor m * q with q = (v HW/(HW-1) + descriptor_eps)^(-1/2), the factor 1 at HW = 1;
# attention = hsigmoid(gain * BN_N(descriptor @ fc^T) + offset), the BN over the N instances, hsigmoid(z) =
# clip(z + 3, 0, 6) / 6; scale = rstd * (attention @ mix_weight), shift = attention @ mix_bias.
# mix_weight, mix_bias and fc hold K x C values (fc may be K x C x 1 x 1); gain and offset, the attention BN's weight and
# bias, K. ``standardized`` is that BN's output before them.
an_coefficients = operator(
    "an_coefficients(Tensor mean, Tensor var, Tensor mix_weight, Tensor mix_bias, Tensor fc, Tensor gain,"
    " Tensor offset, int hw, float eps, float descriptor_eps, float attention_eps)"
    " -> (Tensor centre, Tensor scale, Tensor shift, Tensor rstd, Tensor unbiased, Tensor descriptor_scale,"
    " Tensor attention, Tensor standardized, Tensor attention_mean, Tensor attention_unbiased, Tensor attention_rstd)",
    _shaped("C NC NC C C NC NK NK K K K", k=5),
)
an_coefficients_backward = operator(
    "an_coefficients_backward(Tensor dscale, Tensor dshift, Tensor mean, Tensor centre, Tensor scale, Tensor rstd,"
    " Tensor descriptor_scale, Tensor attention, Tensor standardized, Tensor attention_rstd, Tensor mix_weight,"
    " Tensor mix_bias, Tensor fc, Tensor gain, Tensor offset, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dmix_weight, Tensor dmix_bias, Tensor dfc, Tensor dgain, Tensor doffset)",
    _shaped("NC NC", like=(10, 11, 12, 13, 14)),
)

# SN over IN, LN and BN (Luo et al. 2019, eq. 3): centre = sum_k w_k mu_k, rstd = (sum_k w'_k var_k + eps)^(-1/2), with
# w and w' the softmax of mean_weight and var_weight (3): ``of_means`` and ``of_vars``. The instance's variance is
# ``unbias`` times var, and those of LN and BN are pooled from it. The shift is the bias itself.
sn_coefficients = operator(
    "sn_coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor mean_weight, Tensor var_weight, float unbias,"
    " float eps) -> (Tensor centre, Tensor scale, Tensor rstd, Tensor layer_mean, Tensor layer_var, Tensor batch_mean,"
    " Tensor batch_var, Tensor of_means, Tensor of_vars)",
    _shaped("NC NC NC N N C C 3 3"),
)
sn_coefficients_backward = operator(
    "sn_coefficients_backward(Tensor dscale, Tensor dshift, Tensor mean, Tensor var, Tensor scale, Tensor rstd,"
    " Tensor layer_mean, Tensor layer_var, Tensor batch_mean, Tensor batch_var, Tensor of_means, Tensor of_vars, int hw,"
    " float unbias)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dweight, Tensor dbias, Tensor dmean_weight, Tensor dvar_weight)",
    _shaped("NC NC C C 3 3"),
)

# In evaluation: running statistics of the base norm and of the attention norm; the centre of AN and SE is running_mean.
an_running_coefficients = operator(
    "an_running_coefficients(Tensor mean, Tensor var, Tensor mix_weight, Tensor mix_bias, Tensor fc, Tensor gain,"
    " Tensor offset, Tensor running_var, Tensor attention_mean, Tensor attention_var, int hw, float eps,"
    " float descriptor_eps, float attention_eps) -> (Tensor scale, Tensor shift)",
    _shaped("NC NC"),
)
se_running_coefficients = operator(
    "se_running_coefficients(Tensor mean, Tensor running_mean, Tensor running_var, Tensor weight, Tensor bias,"
    " Tensor first, Tensor? first_bias, Tensor second, Tensor? second_bias, float eps) -> (Tensor scale, Tensor shift)",
    _shaped("NC NC"),
)
sn_running_coefficients = operator(
    "sn_running_coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor mean_weight, Tensor var_weight,"
    " Tensor running_mean, Tensor running_var, float unbias, float eps) -> (Tensor centre, Tensor scale)",
    _shaped("NC NC"),
)
