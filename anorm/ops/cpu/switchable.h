// Coefficients of switchable normalization, (N, C) -> (N, C). Included once per instruction set by switchable.cpp,
// after vector.h. Sums over the batch run in double, sums over channels in registers.

#include "channels.h"

template <class A>
struct InstanceTerm {  // m, v u
  const A *m, *v;
  A unbias;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    first += load<V>(m + c);
    second = multiply_add(load<V>(v + c), splat<V>(unbias), second);
  }
};

template <class A>
struct DistanceTerm {  // (m - mu)^2, m - mu
  const A* m;
  A mu;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    const V d = load<V>(m + c) - splat<V>(mu);
    first = multiply_add(d, d, first);
    second += d;
  }
};

// (Eq. 17) Mean and variance over all channels of the instances [begin, end).
template <class A>
void layer_statistics(const SwitchLaw<A>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const A *m = p.mean + n * p.c, *v = p.var + n * p.c;
    A sum, within, between, rest;
    channel_sums<A>(InstanceTerm<A>{m, v, A(p.unbias)}, p.c, sum, within);
    const A mu = sum / A(p.c);
    channel_sums<A>(DistanceTerm<A>{m, mu}, p.c, between, rest);
    const double correction = double(rest) / p.c;
    p.layer_mean[n] = A(mu + correction);
    p.layer_var[n] = A((double(within) + double(between)) / p.c - correction * correction);
  }
}

// (Eq. 17) Mean and variance over the batch of the blocks [begin, end) of channels.
template <class A>
void batch_statistics(const SwitchLaw<A>& p, int64_t begin, int64_t end) {
  for (int64_t c0 = begin * kBlock; c0 < std::min(end * kBlock, p.c); c0 += kBlock) {
    const int64_t width = std::min(kBlock, p.c - c0);
    double mean[kBlock], var[kBlock];
    pool_block<A>(p.mean, p.var, p.unbias, p.n, p.c, c0, width, mean, var);
    for (int64_t j = 0; j < width; ++j) {
      p.batch_mean[c0 + j] = A(mean[j]);
      p.batch_var[c0 + j] = A(var[j]);
    }
  }
}

// (Eq. 18) centre = sum_k w_k mu_k,  rstd = (sum_k w'_k var_k + eps)^(-1/2),  scale = weight rstd, of the instances [begin, end).
template <class A>
void switch_statistics(const SwitchLaw<A>& p, int64_t begin, int64_t end) {
  const A *w = p.of_means, *u = p.of_vars;
  const A within = A(u[0] * p.unbias);
  for (int64_t n = begin; n < end; ++n) {
    const A *m = p.mean + n * p.c, *v = p.var + n * p.c;
    A *centre = p.centre + n * p.c, *rstd = p.rstd + n * p.c, *scale = p.scale + n * p.c;
    const A mean = w[1] * p.layer_mean[n], var = u[1] * p.layer_var[n] + A(p.eps);
    for (int64_t c = 0; c < p.c; ++c) centre[c] = w[0] * m[c] + mean + w[2] * p.batch_mean[c];
    for (int64_t c = 0; c < p.c; ++c) rstd[c] = A(1) / std::sqrt(within * v[c] + var + u[2] * p.batch_var[c]);
    for (int64_t c = 0; c < p.c; ++c) scale[c] = p.weight == nullptr ? rstd[c] : rstd[c] * p.weight[c];
  }
}

// ---- backward: dmu = -s db and dsigma2 = -r s (r ds) / 2 are the gradients of the mixed mean and variance ------------

template <class A>
struct MixedTerm {  // dmu, dsigma2
  const A *scale, *rstd, *dscale, *dshift;
  template <class V>
  INLINE_METHOD V dmean(int64_t c) const {
    return V{} - load<V>(scale + c) * load<V>(dshift + c);
  }
  template <class V>
  INLINE_METHOD V dvar(int64_t c) const {
    const V r = load<V>(rstd + c);
    return splat<V>(A(-0.5)) * r * load<V>(scale + c) * (r * load<V>(dscale + c));
  }
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    first += dmean<V>(c);
    second += dvar<V>(c);
  }
};

template <class A>
struct SharesTerm {  // m dmu, v dsigma2
  MixedTerm<A> mixed;
  const A *m, *v;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    first = multiply_add(load<V>(m + c), mixed.template dmean<V>(c), first);
    second = multiply_add(load<V>(v + c), mixed.template dvar<V>(c), second);
  }
};

template <class A>
INLINE MixedTerm<A> mixed_at(const SwitchLawBackward<A>& p, int64_t at) {
  return {p.scale + at, p.rstd + at, p.dscale + at, p.dshift + at};
}

// (Eq. 19) Sums over channels, of the instances [begin, end).
template <class A>
void layer_sums(const SwitchLawBackward<A>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const MixedTerm<A> mixed = mixed_at(p, n * p.c);
    channel_sums<A>(mixed, p.c, p.layer_dmean[n], p.layer_dvar[n]);
    channel_sums<A>(SharesTerm<A>{mixed, p.mean + n * p.c, p.var + n * p.c}, p.c, p.instance_dmean[n], p.instance_dvar[n]);
  }
}

// (Eq. 19) Sums over the batch, of the blocks [begin, end) of channels.
template <class A>
void batch_sums(const SwitchLawBackward<A>& p, int64_t begin, int64_t end) {
  for (int64_t c0 = begin * kBlock; c0 < std::min(end * kBlock, p.c); c0 += kBlock) {
    const int64_t width = std::min(kBlock, p.c - c0);
    double dmean[kBlock] = {}, dvar[kBlock] = {}, dweight[kBlock] = {}, dbias[kBlock] = {};
    for (int64_t n = 0; n < p.n; ++n) {
      const int64_t at = n * p.c + c0;
      const A *s = p.scale + at, *r = p.rstd + at, *ds = p.dscale + at, *db = p.dshift + at;
      for (int64_t j = 0; j < width; ++j) dmean[j] -= double(s[j]) * db[j];
      for (int64_t j = 0; j < width; ++j) dvar[j] -= 0.5 * r[j] * s[j] * (double(r[j]) * ds[j]);
      for (int64_t j = 0; j < width; ++j) dweight[j] += double(r[j]) * ds[j];
      for (int64_t j = 0; j < width; ++j) dbias[j] += db[j];
    }
    for (int64_t j = 0; j < width; ++j) {
      p.batch_dmean[c0 + j] = A(dmean[j]);
      p.batch_dvar[c0 + j] = A(dvar[j]);
      p.dweight[c0 + j] = A(dweight[j]);
      p.dbias[c0 + j] = A(dbias[j]);
    }
  }
}

// dvar2 = 2 dv / HW and dmean1 = dm / HW of one instance: each of IN, LN, BN passes on its share.
template <class A>
struct InstanceBackward {
  MixedTerm<A> mixed;
  const A *m, *batch_mean, *batch_dmean, *batch_dvar;
  A layer_mean, layer_dmean, layer_dvar;  // the sums over channels, divided by C
  A w0, w1, w2, u0, u1, u2;               // w2 and u2 divided by N
  A unbias, hw;
  A *dvar2, *dmean1;
  template <class V>
  INLINE_METHOD void at(int64_t c) const {
    const V mean = load<V>(m + c), two = splat<V>(A(2));
    const V by_layer = splat<V>(u1 * layer_dvar), by_batch = splat<V>(u2) * load<V>(batch_dvar + c);
    V dm = multiply_add(splat<V>(w0), mixed.template dmean<V>(c), splat<V>(w1 * layer_dmean));
    dm = multiply_add(splat<V>(w2), load<V>(batch_dmean + c), dm);
    dm = multiply_add(two * by_layer, mean - splat<V>(layer_mean), dm);
    dm = multiply_add(two * by_batch, mean - load<V>(batch_mean + c), dm);
    const V dv = multiply_add(splat<V>(u0), mixed.template dvar<V>(c), by_layer + by_batch);
    store<V>(dvar2 + c, splat<V>(2 * unbias / hw) * dv);
    store<V>(dmean1 + c, splat<V>(1 / hw) * dm);
  }
};

// (Eq. 20) SN: gradients of the moments of the instances [begin, end).
template <class A>
void instance_backward(const SwitchLawBackward<A>& p, int64_t begin, int64_t end) {
  const A *w = p.of_means, *u = p.of_vars, c = A(p.c), batch = A(p.n);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t at = n * p.c;
    cover<A>(InstanceBackward<A>{mixed_at(p, at), p.mean + at, p.batch_mean, p.batch_dmean, p.batch_dvar,
                                 p.layer_mean[n], p.layer_dmean[n] / c, p.layer_dvar[n] / c,
                                 w[0], w[1], w[2] / batch, u[0], u[1], u[2] / batch, A(p.unbias), A(p.hw),
                                 p.dvar2 + at, p.dmean1 + at},
             0, p.c);
  }
}

template <class A>
inline constexpr SwitchKernels<A> switch_kernels = {layer_statistics<A>, batch_statistics<A>, switch_statistics<A>,
                                                    layer_sums<A>,       batch_sums<A>,       instance_backward<A>};
