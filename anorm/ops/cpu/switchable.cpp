// Coefficients of switchable normalization over IN, LN and BN, forward and backward in one call each, for training
// mode. The operators' signatures, shapes and meaning are in laws.py.

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>

#include "cells.h"

namespace anorm {

// Arguments of the kernels: row-major (N, C), (N), (C) and (3) arrays; A is float or double.
template <class A>
struct SwitchLaw {
  int64_t n, c;
  double unbias, eps;
  const A *mean, *var, *weight;
  const A *of_means, *of_vars;  // (3): the shares of IN, LN, BN
  A *layer_mean, *layer_var, *batch_mean, *batch_var, *centre, *scale, *rstd;
};

template <class A>
struct SwitchLawBackward {
  int64_t n, c, hw;
  double unbias;
  const A *dscale, *dshift, *mean, *var, *scale, *rstd, *layer_mean, *batch_mean;
  const A *of_means, *of_vars;
  A *instance_dmean, *instance_dvar, *layer_dmean, *layer_dvar;  // (N)
  A *batch_dmean, *batch_dvar, *dweight, *dbias;                 // (C)
  A *dvar2, *dmean1;
};

template <class A>
struct SwitchKernels {
  void (*layer)(const SwitchLaw<A>&, int64_t, int64_t);
  void (*batch)(const SwitchLaw<A>&, int64_t, int64_t);
  void (*mix)(const SwitchLaw<A>&, int64_t, int64_t);
  void (*layer_backward)(const SwitchLawBackward<A>&, int64_t, int64_t);
  void (*batch_backward)(const SwitchLawBackward<A>&, int64_t, int64_t);
  void (*instance_backward)(const SwitchLawBackward<A>&, int64_t, int64_t);
};

}  // namespace anorm

#define ANORM_KERNELS "switchable.h"
#include "isa.h"

namespace anorm {

template <class A>
const SwitchKernels<A>& kernels() {
  return ANORM_DISPATCH(switch_kernels<A>);
}

template <class A>
void softmax(const A* logits, A* shares) {
  const A largest = std::max({logits[0], logits[1], logits[2]});
  double e[3], sum = 0;
  for (int k = 0; k < 3; ++k) sum += e[k] = std::exp(double(logits[k]) - largest);
  for (int k = 0; k < 3; ++k) shares[k] = A(e[k] / sum);
}

template <class A>
void softmax_backward(const A* shares, const double (&dshares)[3], A* dlogits) {
  double mean = 0;
  for (int k = 0; k < 3; ++k) mean += shares[k] * dshares[k];
  for (int k = 0; k < 3; ++k) dlogits[k] = A(shares[k] * (dshares[k] - mean));
}

template <class A>
double sum(const A* a, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += a[i];
  return total;
}

template <class A>
double dot(const A* a, const A* b, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += double(a[i]) * b[i];
  return total;
}

// (centre, scale, rstd, layer mean, layer var, batch mean, batch var, shares of means, shares of variances)
using SwitchCoefficients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// With the statistics of the batch, or those given in their place.
SwitchCoefficients switch_coefficients(const Tensor& mean_, const Tensor& var_, const std::optional<Tensor>& weight_,
                                       const Tensor& mean_weight_, const Tensor& var_weight_,
                                       const std::optional<Tensor>& batch_mean_, const std::optional<Tensor>& batch_var_,
                                       double unbias, double eps) {
  const Cells s(mean_);
  const Tensor mean = s.dense_cells(mean_, "mean"), var = s.dense_cells(var_, "var");
  const auto weight = dense(weight_, s.type, s.c, "weight");
  const Tensor mean_weight = dense(mean_weight_, s.type, 3, "mean_weight");
  const Tensor var_weight = dense(var_weight_, s.type, 3, "var_weight");
  Tensor centre = s.cells(), scale = s.cells(), rstd = s.cells();
  Tensor layer_mean = at::empty({s.n}, s.type), layer_var = at::empty_like(layer_mean);
  const bool given = batch_mean_.has_value();
  Tensor batch_mean = given ? dense(*batch_mean_, s.type, s.c, "running_mean") : s.channels();
  Tensor batch_var = given ? dense(*batch_var_, s.type, s.c, "running_var") : s.channels();
  Tensor of_means = at::empty_like(mean_weight), of_vars = at::empty_like(var_weight);
  AT_DISPATCH_FLOATING_TYPES(s.type, "sn_coefficients", [&] {
    using A = scalar_t;
    softmax<A>(get<A>(mean_weight), set<A>(of_means));
    softmax<A>(get<A>(var_weight), set<A>(of_vars));
    const SwitchLaw<A> law{s.n,
                           s.c,
                           unbias,
                           eps,
                           get<A>(mean),
                           get<A>(var),
                           get<A>(weight),
                           get<A>(of_means),
                           get<A>(of_vars),
                           set<A>(layer_mean),
                           set<A>(layer_var),
                           set<A>(batch_mean),
                           set<A>(batch_var),
                           set<A>(centre),
                           set<A>(scale),
                           set<A>(rstd)};
    run(kernels<A>().layer, law, s.n, 4 * s.c);
    if (!given) run(kernels<A>().batch, law, blocks(s.c), 3 * s.n * kBlock);
    run(kernels<A>().mix, law, s.n, 8 * s.c);
  });
  return {centre, scale, rstd, layer_mean, layer_var, batch_mean, batch_var, of_means, of_vars};
}

SwitchCoefficients sn_coefficients(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                   const Tensor& mean_weight, const Tensor& var_weight, double unbias, double eps) {
  return switch_coefficients(mean, var, weight, mean_weight, var_weight, std::nullopt, std::nullopt, unbias, eps);
}

// (centre, scale)
std::tuple<Tensor, Tensor> sn_running_coefficients(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                                                   const Tensor& mean_weight, const Tensor& var_weight,
                                                   const Tensor& running_mean, const Tensor& running_var, double unbias,
                                                   double eps) {
  const auto made = switch_coefficients(mean, var, weight, mean_weight, var_weight, running_mean, running_var, unbias, eps);
  return {std::get<0>(made), std::get<1>(made)};
}

// (dvar2, dmean1, dweight, dbias, dmean_weight, dvar_weight)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sn_coefficients_backward(
    const Tensor& dscale_, const Tensor& dshift_, const Tensor& mean_, const Tensor& var_, const Tensor& scale,
    const Tensor& rstd, const Tensor& layer_mean, const Tensor& layer_var, const Tensor& batch_mean,
    const Tensor& batch_var, const Tensor& of_means, const Tensor& of_vars, int64_t hw, double unbias) {
  const Cells s(mean_);
  const Tensor dscale = s.dense_cells(dscale_, "dscale"), dshift = s.dense_cells(dshift_, "dshift");
  const Tensor mean = s.dense_cells(mean_, "mean"), var = s.dense_cells(var_, "var");
  Tensor dvar2 = s.cells(), dmean1 = s.cells(), dweight = s.channels(), dbias = s.channels();
  Tensor dmean_weight = at::empty_like(of_means), dvar_weight = at::empty_like(of_vars);
  const Tensor of_instances = at::empty({4, s.n}, s.type), of_channels = at::empty({2, s.c}, s.type);
  AT_DISPATCH_FLOATING_TYPES(s.type, "sn_coefficients_backward", [&] {
    using A = scalar_t;
    A *rows = set<A>(of_instances), *columns = set<A>(of_channels);
    const SwitchLawBackward<A> law{s.n,
                                   s.c,
                                   hw,
                                   unbias,
                                   get<A>(dscale),
                                   get<A>(dshift),
                                   get<A>(mean),
                                   get<A>(var),
                                   get<A>(scale),
                                   get<A>(rstd),
                                   get<A>(layer_mean),
                                   get<A>(batch_mean),
                                   get<A>(of_means),
                                   get<A>(of_vars),
                                   rows,
                                   rows + s.n,
                                   rows + 2 * s.n,
                                   rows + 3 * s.n,
                                   columns,
                                   columns + s.c,
                                   set<A>(dweight),
                                   set<A>(dbias),
                                   set<A>(dvar2),
                                   set<A>(dmean1)};
    run(kernels<A>().layer_backward, law, s.n, 8 * s.c);
    run(kernels<A>().batch_backward, law, blocks(s.c), 6 * s.n * kBlock);
    run(kernels<A>().instance_backward, law, s.n, 12 * s.c);
    softmax_backward<A>(get<A>(of_means),
                        {sum<A>(law.instance_dmean, s.n), dot<A>(law.layer_dmean, get<A>(layer_mean), s.n),
                         dot<A>(law.batch_dmean, get<A>(batch_mean), s.c)},
                        set<A>(dmean_weight));
    softmax_backward<A>(get<A>(of_vars),
                        {unbias * sum<A>(law.instance_dvar, s.n), dot<A>(law.layer_dvar, get<A>(layer_var), s.n),
                         dot<A>(law.batch_dvar, get<A>(batch_var), s.c)},
                        set<A>(dvar_weight));
  });
  return {dvar2, dmean1, dweight, dbias, dmean_weight, dvar_weight};
}

TORCH_LIBRARY_IMPL(anorm_cpu, CPU, m) {
  m.impl("sn_coefficients", sn_coefficients);
  m.impl("sn_running_coefficients", sn_running_coefficients);
  m.impl("sn_coefficients_backward", sn_coefficients_backward);
}

}  // namespace anorm
