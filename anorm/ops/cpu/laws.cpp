// Coefficients of the laws that matter most (BN, GN with LN and IN, AN over BN), forward and backward in one call each,
// for training mode. The equations are in README.md; the operators' signatures, shapes and meaning in laws.py.

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>

#include "cells.h"

namespace anorm {

// Arguments of the kernels: row-major (N, C), (K, C), (N, K) and (C) arrays; A is float or double.
template <class A>
struct BatchLaw {
  int64_t n, c, hw;
  double eps;
  const A *mean, *var, *weight;
  A *centre, *scale, *rstd, *unbiased;
};

template <class A>
struct BatchLawBackward {
  int64_t n, c, hw;
  const A *dscale, *dshift, *scale, *rstd;
  A *dvar2, *dmean1, *dweight, *dbias;
};

template <class A>
struct GroupLaw {
  int64_t n, c, groups;
  double eps;
  const A *mean, *var, *weight;
  A *centre, *scale, *rstd;
};

template <class A>
struct GroupLawBackward {
  int64_t n, c, groups, hw;
  const A *dscale, *dshift, *scale, *rstd;
  A *dvar2, *dmean1, *dweight, *dbias;
};

template <class A>
struct AttentiveLaw {
  int64_t n, c, k;
  double unbias, descriptor_eps;
  const A *mean, *var, *mix_weight, *mix_bias, *fc, *rstd, *attention;
  A *scale, *shift, *descriptor_scale, *logits;
};

template <class A>
struct AttentiveLawBackward {
  int64_t n, c, k, hw;
  double unbias;
  const A *dscale, *dshift, *mean, *centre, *scale, *rstd, *descriptor_scale, *attention, *mix_weight, *mix_bias, *fc;
  const A* dlogits;
  A *dattention, *dvar2, *dmean1, *dmix_weight, *dmix_bias, *dfc;
};

template <class A>
struct ExciteLaw {
  int64_t n, c, hidden;
  const A *mean, *centre, *base, *bias;  // (N, C), (C): scale and shift of the norm below
  const A *first, *first_bias, *second, *second_bias;  // (hidden, C), (hidden), (C, hidden), (C)
  A *scale, *shift, *work;                             // (N, C), (N, C), (N, C + hidden)
};

template <class A>
struct LawKernels {
  void (*batch)(const BatchLaw<A>&, int64_t, int64_t);
  void (*batch_backward)(const BatchLawBackward<A>&, int64_t, int64_t);
  void (*group)(const GroupLaw<A>&, int64_t, int64_t);
  void (*group_backward)(const GroupLawBackward<A>&, int64_t, int64_t);
  void (*group_parameters_backward)(const GroupLawBackward<A>&, int64_t, int64_t);
  void (*attention_logits)(const AttentiveLaw<A>&, int64_t, int64_t);
  void (*mix)(const AttentiveLaw<A>&, int64_t, int64_t);
  void (*attention_backward)(const AttentiveLawBackward<A>&, int64_t, int64_t);
  void (*mixture_backward)(const AttentiveLawBackward<A>&, int64_t, int64_t);
  void (*excite)(const ExciteLaw<A>&, int64_t, int64_t);
};

}  // namespace anorm

#define ANORM_KERNELS "laws.h"
#include "isa.h"

namespace anorm {

template <class A>
const LawKernels<A>& kernels() {
  return ANORM_DISPATCH(law_kernels<A>);
}

// ---- BN --------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_coefficients(const Tensor& mean_, const Tensor& var_,
                                                           const std::optional<Tensor>& weight_, int64_t hw, double eps) {
  const Cells s(mean_);
  const Tensor mean = s.dense_cells(mean_, "mean"), var = s.dense_cells(var_, "var");
  const auto weight = dense(weight_, s.type, s.c, "weight");
  Tensor centre = s.channels(), scale = s.channels(), rstd = s.channels(), unbiased = s.channels();
  AT_DISPATCH_FLOATING_TYPES(s.type, "bn_coefficients", [&] {
    using A = scalar_t;
    const BatchLaw<A> law{s.n,           s.c,           hw,          eps,          get<A>(mean),    get<A>(var),
                          get<A>(weight), set<A>(centre), set<A>(scale), set<A>(rstd), set<A>(unbiased)};
    run(kernels<A>().batch, law, blocks(s.c), 3 * s.n * kBlock);
  });
  return {centre, scale, rstd, unbiased};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_coefficients_backward(const Tensor& dscale_, const Tensor& dshift_,
                                                                    const Tensor& scale, const Tensor& rstd, int64_t hw) {
  const Cells s(dscale_);
  const Tensor dscale = s.dense_cells(dscale_, "dscale"), dshift = s.dense_cells(dshift_, "dshift");
  Tensor dvar2 = s.channels(), dmean1 = s.channels(), dweight = s.channels(), dbias = s.channels();
  AT_DISPATCH_FLOATING_TYPES(s.type, "bn_coefficients_backward", [&] {
    using A = scalar_t;
    const BatchLawBackward<A> law{s.n,           s.c,          hw,            get<A>(dscale), get<A>(dshift), get<A>(scale),
                                  get<A>(rstd), set<A>(dvar2), set<A>(dmean1), set<A>(dweight), set<A>(dbias)};
    run(kernels<A>().batch_backward, law, blocks(s.c), 2 * s.n * kBlock);
  });
  return {dvar2, dmean1, dweight, dbias};
}

// ---- GN --------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> gn_coefficients(const Tensor& mean_, const Tensor& var_,
                                                   const std::optional<Tensor>& weight_, int64_t groups, double eps) {
  const Cells s(mean_);
  TORCH_CHECK_VALUE(groups > 0 && s.c % groups == 0, groups, " groups do not divide ", s.c, " channels");
  const Tensor mean = s.dense_cells(mean_, "mean"), var = s.dense_cells(var_, "var");
  const auto weight = dense(weight_, s.type, s.c, "weight");
  Tensor centre = s.cells(), scale = s.cells(), rstd = s.cells();
  AT_DISPATCH_FLOATING_TYPES(s.type, "gn_coefficients", [&] {
    using A = scalar_t;
    const GroupLaw<A> law{s.n,         s.c,           groups,         eps,           get<A>(mean),
                          get<A>(var), get<A>(weight), set<A>(centre), set<A>(scale), set<A>(rstd)};
    run(kernels<A>().group, law, s.n * groups, 4 * s.c / groups + 16);
  });
  return {centre, scale, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gn_coefficients_backward(const Tensor& dscale_, const Tensor& dshift_,
                                                                    const Tensor& scale, const Tensor& rstd,
                                                                    int64_t groups, int64_t hw) {
  const Cells s(dscale_);
  const Tensor dscale = s.dense_cells(dscale_, "dscale"), dshift = s.dense_cells(dshift_, "dshift");
  Tensor dvar2 = s.cells(), dmean1 = s.cells(), dweight = s.channels(), dbias = s.channels();
  AT_DISPATCH_FLOATING_TYPES(s.type, "gn_coefficients_backward", [&] {
    using A = scalar_t;
    const GroupLawBackward<A> law{s.n,           s.c,          groups,        hw,             get<A>(dscale),  get<A>(dshift),
                                  get<A>(scale), get<A>(rstd), set<A>(dvar2), set<A>(dmean1), set<A>(dweight), set<A>(dbias)};
    run(kernels<A>().group_backward, law, s.n * groups, 4 * s.c / groups + 16);
    run(kernels<A>().group_parameters_backward, law, blocks(s.c), 2 * s.n * kBlock);
  });
  return {dvar2, dmean1, dweight, dbias};
}

// ---- AN over BN ------------------------------------------------------------------------------------------------------

// (Eq. 12) lambda = hsigmoid(gain * h + offset), h = the logits standardized over the batch. (N, K) is small: one thread.
template <class A>
void attention_norm(const A* logits, const A* gain, const A* offset, double eps, int64_t n, int64_t k, A* standardized,
                    A* attention, A* mean, A* unbiased, A* rstd) {
  for (int64_t j = 0; j < k; ++j) {
    double mu = 0, var = 0;
    for (int64_t i = 0; i < n; ++i) mu += logits[i * k + j];
    mu /= n;
    for (int64_t i = 0; i < n; ++i) var += (logits[i * k + j] - mu) * (logits[i * k + j] - mu);
    var /= n;
    const double r = 1 / std::sqrt(var + eps);
    mean[j] = A(mu);
    unbiased[j] = A(var * unbias(n));
    rstd[j] = A(r);
    for (int64_t i = 0; i < n; ++i) {
      const A h = A((logits[i * k + j] - mu) * r), z = gain[j] * h + offset[j], t = (z + 3) / 6;
      standardized[i * k + j] = h;
      attention[i * k + j] = t < 0 ? 0 : t > 1 ? 1 : t;
    }
  }
}

// (Eq. 15) Gradients of the logits, gain and offset.
template <class A>
void attention_norm_backward(const A* dattention, const A* standardized, const A* gain, const A* offset, const A* rstd,
                             int64_t n, int64_t k, A* dlogits, A* dgain, A* doffset) {
  for (int64_t j = 0; j < k; ++j) {
    double sum = 0, product = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A h = standardized[i * k + j], z = gain[j] * h + offset[j];
      const A dz = z > -3 && z < 3 ? dattention[i * k + j] / 6 : 0;
      dlogits[i * k + j] = dz;
      sum += dz;
      product += double(dz) * h;
    }
    doffset[j] = A(sum);
    dgain[j] = A(product);
    for (int64_t i = 0; i < n; ++i) {
      const double dz = dlogits[i * k + j] - (sum + standardized[i * k + j] * product) / n;
      dlogits[i * k + j] = A(dz * rstd[j] * gain[j]);
    }
  }
}

// (centre, scale, shift, rstd, unbiased, descriptor_scale, attention, standardized, attention mean, unbiased, rstd)
using AttentiveCoefficients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AttentiveCoefficients an_coefficients(const Tensor& mean_, const Tensor& var_, const Tensor& mix_weight_,
                                      const Tensor& mix_bias_, const Tensor& fc_, const Tensor& gain_,
                                      const Tensor& offset_, int64_t hw, double eps, double descriptor_eps,
                                      double attention_eps) {
  const Cells s(mean_);
  const int64_t k = gain_.numel();
  const Tensor mean = s.dense_cells(mean_, "mean"), var = s.dense_cells(var_, "var");
  const Tensor mix_weight = dense(mix_weight_, s.type, k * s.c, "mix_weight");
  const Tensor mix_bias = dense(mix_bias_, s.type, k * s.c, "mix_bias"), fc = dense(fc_, s.type, k * s.c, "fc");
  const Tensor gain = dense(gain_, s.type, k, "gain"), offset = dense(offset_, s.type, k, "offset");
  Tensor centre = s.channels(), rstd = s.channels(), unbiased = s.channels();
  Tensor scale = s.cells(), shift = s.cells(), descriptor_scale = s.cells();
  Tensor logits = at::empty({s.n, k}, s.type), standardized = at::empty_like(logits), attention = at::empty_like(logits);
  Tensor attention_mean = at::empty({k}, s.type), attention_unbiased = at::empty_like(attention_mean);
  Tensor attention_rstd = at::empty_like(attention_mean);
  AT_DISPATCH_FLOATING_TYPES(s.type, "an_coefficients", [&] {
    using A = scalar_t;
    const BatchLaw<A> batch{s.n,     s.c,           hw,      eps,          get<A>(mean),    get<A>(var),
                            nullptr, set<A>(centre), nullptr, set<A>(rstd), set<A>(unbiased)};
    run(kernels<A>().batch, batch, blocks(s.c), 3 * s.n * kBlock);
    const AttentiveLaw<A> law{s.n,
                              s.c,
                              k,
                              unbias(hw),
                              descriptor_eps,
                              get<A>(mean),
                              get<A>(var),
                              get<A>(mix_weight),
                              get<A>(mix_bias),
                              get<A>(fc),
                              get<A>(rstd),
                              get<A>(attention),
                              set<A>(scale),
                              set<A>(shift),
                              set<A>(descriptor_scale),
                              set<A>(logits)};
    run(kernels<A>().attention_logits, law, s.n, s.c * (k / 2 + 4));
    attention_norm<A>(get<A>(logits), get<A>(gain), get<A>(offset), attention_eps, s.n, k, set<A>(standardized),
                      set<A>(attention), set<A>(attention_mean), set<A>(attention_unbiased), set<A>(attention_rstd));
    run(kernels<A>().mix, law, s.n, s.c * k);
  });
  return {centre,    scale,        shift,          rstd,               unbiased,      descriptor_scale,
          attention, standardized, attention_mean, attention_unbiased, attention_rstd};
}

// (dvar2, dmean1, dmix_weight, dmix_bias, dfc, dgain, doffset)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> an_coefficients_backward(
    const Tensor& dscale_, const Tensor& dshift_, const Tensor& mean_, const Tensor& centre, const Tensor& scale,
    const Tensor& rstd, const Tensor& descriptor_scale, const Tensor& attention, const Tensor& standardized,
    const Tensor& attention_rstd, const Tensor& mix_weight_, const Tensor& mix_bias_, const Tensor& fc_,
    const Tensor& gain_, const Tensor& offset_, int64_t hw) {
  const Cells s(mean_);
  const int64_t k = gain_.numel();
  const Tensor dscale = s.dense_cells(dscale_, "dscale"), dshift = s.dense_cells(dshift_, "dshift");
  const Tensor mean = s.dense_cells(mean_, "mean");
  const Tensor mix_weight = dense(mix_weight_, s.type, k * s.c, "mix_weight");
  const Tensor mix_bias = dense(mix_bias_, s.type, k * s.c, "mix_bias"), fc = dense(fc_, s.type, k * s.c, "fc");
  const Tensor gain = dense(gain_, s.type, k, "gain"), offset = dense(offset_, s.type, k, "offset");
  Tensor dvar2 = s.cells(), dmean1 = s.cells();
  Tensor dmix_weight = at::empty_like(mix_weight), dmix_bias = at::empty_like(mix_bias), dfc = at::empty_like(fc);
  Tensor dgain = at::empty_like(gain), doffset = at::empty_like(offset);
  Tensor dattention = at::empty({s.n, k}, s.type), dlogits = at::empty_like(dattention);
  AT_DISPATCH_FLOATING_TYPES(s.type, "an_coefficients_backward", [&] {
    using A = scalar_t;
    const AttentiveLawBackward<A> law{s.n,
                                      s.c,
                                      k,
                                      hw,
                                      unbias(hw),
                                      get<A>(dscale),
                                      get<A>(dshift),
                                      get<A>(mean),
                                      get<A>(centre),
                                      get<A>(scale),
                                      get<A>(rstd),
                                      get<A>(descriptor_scale),
                                      get<A>(attention),
                                      get<A>(mix_weight),
                                      get<A>(mix_bias),
                                      get<A>(fc),
                                      get<A>(dlogits),
                                      set<A>(dattention),
                                      set<A>(dvar2),
                                      set<A>(dmean1),
                                      set<A>(dmix_weight),
                                      set<A>(dmix_bias),
                                      set<A>(dfc)};
    run(kernels<A>().attention_backward, law, s.n, s.c * k);
    attention_norm_backward<A>(get<A>(dattention), get<A>(standardized), get<A>(gain), get<A>(offset),
                               get<A>(attention_rstd), s.n, k, set<A>(dlogits), set<A>(dgain), set<A>(doffset));
    run(kernels<A>().mixture_backward, law, blocks(s.c), 4 * s.n * k * kBlock);
  });
  return {dvar2, dmean1, dmix_weight, dmix_bias, dfc, dgain, doffset};
}

// (Eq. 12) with running statistics in place of the batch's.
template <class A>
void attention_of_running(const A* logits, const A* gain, const A* offset, const A* mean, const A* var, double eps, int64_t n,
                          int64_t k, A* attention) {
  for (int64_t j = 0; j < k; ++j) {
    const double r = 1 / std::sqrt(var[j] + eps);
    for (int64_t i = 0; i < n; ++i) {
      const A h = A((logits[i * k + j] - mean[j]) * r), z = gain[j] * h + offset[j], t = (z + 3) / 6;
      attention[i * k + j] = t < 0 ? 0 : t > 1 ? 1 : t;
    }
  }
}

template <class A>
void rstd_of(const A* var, double eps, int64_t c, A* rstd) {
  for (int64_t j = 0; j < c; ++j) rstd[j] = A(1 / std::sqrt(var[j] + eps));
}

// (scale, shift); the centre is running_mean
std::tuple<Tensor, Tensor> an_running_coefficients(const Tensor& mean_, const Tensor& var_, const Tensor& mix_weight_,
                                                   const Tensor& mix_bias_, const Tensor& fc_, const Tensor& gain_,
                                                   const Tensor& offset_, const Tensor& running_var_,
                                                   const Tensor& attention_mean_, const Tensor& attention_var_, int64_t hw,
                                                   double eps, double descriptor_eps, double attention_eps) {
  const Cells s(mean_);
  const int64_t k = gain_.numel();
  const Tensor mean = s.dense_cells(mean_, "mean"), var = s.dense_cells(var_, "var");
  const Tensor mix_weight = dense(mix_weight_, s.type, k * s.c, "mix_weight");
  const Tensor mix_bias = dense(mix_bias_, s.type, k * s.c, "mix_bias"), fc = dense(fc_, s.type, k * s.c, "fc");
  const Tensor gain = dense(gain_, s.type, k, "gain"), offset = dense(offset_, s.type, k, "offset");
  const Tensor running_var = dense(running_var_, s.type, s.c, "running_var");
  const Tensor attention_mean = dense(attention_mean_, s.type, k, "attention_mean");
  const Tensor attention_var = dense(attention_var_, s.type, k, "attention_var");
  Tensor rstd = s.channels(), scale = s.cells(), shift = s.cells(), descriptor_scale = s.cells();
  Tensor logits = at::empty({s.n, k}, s.type), attention = at::empty_like(logits);
  AT_DISPATCH_FLOATING_TYPES(s.type, "an_running_coefficients", [&] {
    using A = scalar_t;
    rstd_of<A>(get<A>(running_var), eps, s.c, set<A>(rstd));
    const AttentiveLaw<A> law{s.n,
                              s.c,
                              k,
                              unbias(hw),
                              descriptor_eps,
                              get<A>(mean),
                              get<A>(var),
                              get<A>(mix_weight),
                              get<A>(mix_bias),
                              get<A>(fc),
                              get<A>(rstd),
                              get<A>(attention),
                              set<A>(scale),
                              set<A>(shift),
                              set<A>(descriptor_scale),
                              set<A>(logits)};
    run(kernels<A>().attention_logits, law, s.n, s.c * (k / 2 + 4));
    attention_of_running<A>(get<A>(logits), get<A>(gain), get<A>(offset), get<A>(attention_mean), get<A>(attention_var),
                            attention_eps, s.n, k, set<A>(attention));
    run(kernels<A>().mix, law, s.n, s.c * k);
  });
  return {scale, shift};
}

// ---- SE over BN ------------------------------------------------------------------------------------------------------

// (scale, shift); the centre is running_mean
std::tuple<Tensor, Tensor> se_running_coefficients(const Tensor& mean_, const Tensor& running_mean_,
                                                   const Tensor& running_var_, const Tensor& weight_, const Tensor& bias_,
                                                   const Tensor& first_, const std::optional<Tensor>& first_bias_,
                                                   const Tensor& second_, const std::optional<Tensor>& second_bias_,
                                                   double eps) {
  const Cells s(mean_);
  const int64_t hidden = first_.size(0);
  const Tensor mean = s.dense_cells(mean_, "mean");
  const Tensor running_mean = dense(running_mean_, s.type, s.c, "running_mean");
  const Tensor running_var = dense(running_var_, s.type, s.c, "running_var");
  const Tensor weight = dense(weight_, s.type, s.c, "weight"), bias = dense(bias_, s.type, s.c, "bias");
  const Tensor first = dense(first_, s.type, hidden * s.c, "first"), second = dense(second_, s.type, hidden * s.c, "second");
  const auto first_bias = dense(first_bias_, s.type, hidden, "first_bias");
  const auto second_bias = dense(second_bias_, s.type, s.c, "second_bias");
  Tensor base = s.channels(), scale = s.cells(), shift = s.cells(), work = at::empty({s.n, s.c + hidden}, s.type);
  AT_DISPATCH_FLOATING_TYPES(s.type, "se_running_coefficients", [&] {
    using A = scalar_t;
    rstd_of<A>(get<A>(running_var), eps, s.c, set<A>(base));
    for (int64_t j = 0; j < s.c; ++j) set<A>(base)[j] *= get<A>(weight)[j];
    const ExciteLaw<A> law{s.n,           s.c,           hidden,          get<A>(mean),        get<A>(running_mean),
                           get<A>(base),  get<A>(bias),  get<A>(first),   get<A>(first_bias),  get<A>(second),
                           get<A>(second_bias), set<A>(scale), set<A>(shift), set<A>(work)};
    run(kernels<A>().excite, law, s.n, s.c * (hidden + 4));
  });
  return {scale, shift};
}

TORCH_LIBRARY_IMPL(anorm_cpu, CPU, m) {
  m.impl("bn_coefficients", bn_coefficients);
  m.impl("bn_coefficients_backward", bn_coefficients_backward);
  m.impl("gn_coefficients", gn_coefficients);
  m.impl("gn_coefficients_backward", gn_coefficients_backward);
  m.impl("an_coefficients", an_coefficients);
  m.impl("an_running_coefficients", an_running_coefficients);
  m.impl("se_running_coefficients", se_running_coefficients);
  m.impl("an_coefficients_backward", an_coefficients_backward);
}

}  // namespace anorm
