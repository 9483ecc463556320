// Coefficients of the fused laws, (N, C) -> (N, C). Included once per instruction set by laws.cpp, after vector.h.
//
// Sums over the batch run in double or in short runs; sums over channels and over mixtures run in registers.

#include "channels.h"

// ---- batch statistics: mu = E_n[m], var = E_n[v] + E_n[(m - mu)^2] ---------------------------------------------------

// (Eq. 6) BN: statistics of the blocks [begin, end) of channels.
template <class A>
void batch_statistics(const BatchLaw<A>& p, int64_t begin, int64_t end) {
  for (int64_t c0 = begin * kBlock; c0 < std::min(end * kBlock, p.c); c0 += kBlock) {
    const int64_t width = std::min(kBlock, p.c - c0);
    double mean[kBlock], var[kBlock];
    pool_block<A>(p.mean, p.var, 1, p.n, p.c, c0, width, mean, var);
    const double count = double(p.n) * p.hw, unbias = count > 1 ? count / (count - 1) : 1;
    for (int64_t j = 0; j < width; ++j) {
      p.centre[c0 + j] = A(mean[j]);
      p.rstd[c0 + j] = A(1 / std::sqrt(var[j] + p.eps));
      p.unbiased[c0 + j] = A(var[j] * unbias);
      if (p.scale != nullptr) p.scale[c0 + j] = p.weight == nullptr ? p.rstd[c0 + j] : p.rstd[c0 + j] * p.weight[c0 + j];
    }
  }
}

// (Eq. 7) dvar2 = 2 dvar / M and dmean1 = dmu / M with M = N HW:  dvar = -r^2/2 s sum_n ds,  dmu = -s sum_n db,  s = weight r.
template <class A>
void batch_statistics_backward(const BatchLawBackward<A>& p, int64_t begin, int64_t end) {
  for (int64_t c0 = begin * kBlock; c0 < std::min(end * kBlock, p.c); c0 += kBlock) {
    const int64_t width = std::min(kBlock, p.c - c0);
    double ds[kBlock] = {}, db[kBlock] = {};
    for (int64_t n = 0; n < p.n; ++n) {
      const A *a = p.dscale + n * p.c + c0, *b = p.dshift + n * p.c + c0;
      for (int64_t j = 0; j < width; ++j) ds[j] += a[j];
      for (int64_t j = 0; j < width; ++j) db[j] += b[j];
    }
    const double count = double(p.n) * p.hw;
    for (int64_t j = 0; j < width; ++j) {
      const double r = p.rstd[c0 + j], s = p.scale[c0 + j];
      p.dvar2[c0 + j] = A(-r * r * s * ds[j] / count);
      p.dmean1[c0 + j] = A(-s * db[j] / count);
      p.dweight[c0 + j] = A(r * ds[j]);
      p.dbias[c0 + j] = A(db[j]);
    }
  }
}

// ---- group statistics ------------------------------------------------------------------------------------------------

template <class A>
struct SumTerm {
  const A* m;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V&) const {
    first += load<V>(m + c);
  }
};

template <class A>
struct SpreadTerm {  // v + (m - mu)^2, m - mu
  const A *m, *v;
  A mu;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    V d = load<V>(m + c) - splat<V>(mu);
    first += multiply_add(d, d, load<V>(v + c));
    second += d;
  }
};

// (Eq. 8) GN: statistics of the groups [begin, end).
template <class A>
void group_statistics(const GroupLaw<A>& p, int64_t begin, int64_t end) {
  const int64_t width = p.c / p.groups;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / p.groups, c = item % p.groups * width, at = n * p.c + c;
    A sum, spread, rest;
    channel_sums<A>(SumTerm<A>{p.mean + at}, width, sum, rest);
    const A mu = sum / A(width);
    channel_sums<A>(SpreadTerm<A>{p.mean + at, p.var + at, mu}, width, spread, rest);
    const double correction = double(rest) / width;
    const double centre = mu + correction, variance = double(spread) / width - correction * correction;
    const A rstd = A(1 / std::sqrt(variance + p.eps));
    for (int64_t j = 0; j < width; ++j) p.centre[at + j] = A(centre);
    for (int64_t j = 0; j < width; ++j) p.rstd[at + j] = rstd;
    for (int64_t j = 0; j < width; ++j) p.scale[at + j] = p.weight == nullptr ? rstd : rstd * p.weight[c + j];
  }
}

template <class A>
struct ProductTerm {  // s ds, s db
  const A *s, *ds, *db;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    first = multiply_add(load<V>(s + c), load<V>(ds + c), first);
    second = multiply_add(load<V>(s + c), load<V>(db + c), second);
  }
};

// (Eq. 9) dvar2 = 2 dvar / M and dmean1 = dmu / M with M = HW C/G, as for the batch.
template <class A>
void group_statistics_backward(const GroupLawBackward<A>& p, int64_t begin, int64_t end) {
  const int64_t width = p.c / p.groups;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t at = item / p.groups * p.c + item % p.groups * width;
    A through_var, through_mean;
    channel_sums<A>(ProductTerm<A>{p.scale + at, p.dscale + at, p.dshift + at}, width, through_var, through_mean);
    const double count = double(p.hw) * width, r = p.rstd[at];
    const A dvar2 = A(-r * r * through_var / count), dmean1 = A(-through_mean / count);
    for (int64_t j = 0; j < width; ++j) p.dvar2[at + j] = dvar2;
    for (int64_t j = 0; j < width; ++j) p.dmean1[at + j] = dmean1;
  }
}

// (Eq. 10) dweight = sum_n r ds, dbias = sum_n db.
template <class A>
void group_parameters_backward(const GroupLawBackward<A>& p, int64_t begin, int64_t end) {
  for (int64_t c0 = begin * kBlock; c0 < std::min(end * kBlock, p.c); c0 += kBlock) {
    const int64_t width = std::min(kBlock, p.c - c0);
    double dw[kBlock] = {}, db[kBlock] = {};
    for (int64_t n = 0; n < p.n; ++n) {
      const A *r = p.rstd + n * p.c + c0, *a = p.dscale + n * p.c + c0, *b = p.dshift + n * p.c + c0;
      for (int64_t j = 0; j < width; ++j) dw[j] += double(r[j]) * a[j];
      for (int64_t j = 0; j < width; ++j) db[j] += b[j];
    }
    for (int64_t j = 0; j < width; ++j) {
      p.dweight[c0 + j] = A(dw[j]);
      p.dbias[c0 + j] = A(db[j]);
    }
  }
}

// ---- attentive normalization -----------------------------------------------------------------------------------------

// Two rows of a (K, C) matrix against one (or two) rows of C values.
template <class A>
struct DescriptorTerm {  // <m q, W_k>, <m q, W_l>
  const A *m, *q, *w_k, *w_l;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    V d = load<V>(m + c) * load<V>(q + c);
    first = multiply_add(d, load<V>(w_k + c), first);
    second = multiply_add(d, load<V>(w_l + c), second);
  }
};

// q = (v u + eps)^(-1/2), with u = HW/(HW-1) for the unbiased variance.
template <class A>
struct DescriptorScale {
  const A* v;
  A* q;
  A unbias, eps;
  template <class V>
  INLINE_METHOD void at(int64_t c) const {
    V t = multiply_add(load<V>(v + c), splat<V>(unbias), splat<V>(eps));
    A lane[lanes<V>];
    store<V>(lane, t);
    for (int64_t j = 0; j < lanes<V>; ++j) lane[j] = A(1) / std::sqrt(lane[j]);
    store<V>(q + c, load<V>(lane));
  }
};

// (Eq. 11) a_{n,k} = <m q, W_k> for instances [begin, end).
template <class A>
void attention_logits(const AttentiveLaw<A>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const A *m = p.mean + n * p.c, *v = p.var + n * p.c;
    A* q = p.descriptor_scale + n * p.c;
    cover<A>(DescriptorScale<A>{v, q, A(p.unbias), A(p.descriptor_eps)}, 0, p.c);
    for (int64_t k = 0; k < p.k; k += 2) {
      const int64_t l = std::min(k + 1, p.k - 1);
      A first, second;
      channel_sums<A>(DescriptorTerm<A>{m, q, p.fc + k * p.c, p.fc + l * p.c}, p.c, first, second);
      p.logits[n * p.k + k] = first;
      p.logits[n * p.k + l] = second;
    }
  }
}

template <class A>
struct Mixture {  // scale = r sum_k lambda_k G_k, shift = sum_k lambda_k B_k
  const A *attention, *weight, *bias, *rstd;
  A *scale, *shift;
  int64_t k, c;
  template <class V>
  INLINE_METHOD void at(int64_t i) const {
    V s{}, b{};
    for (int64_t j = 0; j < k; ++j) {
      V lambda = splat<V>(attention[j]);
      s = multiply_add(lambda, load<V>(weight + j * c + i), s);
      b = multiply_add(lambda, load<V>(bias + j * c + i), b);
    }
    store<V>(scale + i, s * load<V>(rstd + i));
    store<V>(shift + i, b);
  }
};

// (Eq. 13) AN: coefficients of the instances [begin, end).
template <class A>
void mix(const AttentiveLaw<A>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t at = n * p.c;
    cover<A>(Mixture<A>{p.attention + n * p.k, p.mix_weight, p.mix_bias, p.rstd, p.scale + at, p.shift + at, p.k, p.c}, 0, p.c);
  }
}

template <class A>
struct AttentionTerm {  // (r ds) G_k + db B_k, and the same for l
  const A *r, *ds, *db, *weight_k, *bias_k, *weight_l, *bias_l;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    V s = load<V>(r + c) * load<V>(ds + c), b = load<V>(db + c);
    first = multiply_add(s, load<V>(weight_k + c), multiply_add(b, load<V>(bias_k + c), first));
    second = multiply_add(s, load<V>(weight_l + c), multiply_add(b, load<V>(bias_l + c), second));
  }
};

// (Eq. 14) The gradient of the attention lambda_{n,k}, for instances [begin, end).
template <class A>
void attention_backward(const AttentiveLawBackward<A>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const A *ds = p.dscale + n * p.c, *db = p.dshift + n * p.c;
    for (int64_t k = 0; k < p.k; k += 2) {
      const int64_t l = std::min(k + 1, p.k - 1);
      A first, second;
      channel_sums<A>(AttentionTerm<A>{p.rstd, ds, db, p.mix_weight + k * p.c, p.mix_bias + k * p.c,
                                       p.mix_weight + l * p.c, p.mix_bias + l * p.c},
                      p.c, first, second);
      p.dattention[n * p.k + k] = first;
      p.dattention[n * p.k + l] = second;
    }
  }
}

// Gradients of one register of channels: of the mixtures and the fully connected layer, and through the moments.
template <class A>
struct MixtureBackward {
  const AttentiveLawBackward<A>& p;

  // sum_n of a per-instance weight times what is loaded at (n, c): short runs, then their sum.
  template <class V>
  INLINE_METHOD void at(int64_t c) const {
    constexpr int64_t kRun = 16;
    const V r = load<V>(p.rstd + c), mu = load<V>(p.centre + c);
    V sds{}, sdb{};
    for (int64_t n0 = 0; n0 < p.n; n0 += kRun) {
      V a{}, b{};
      for (int64_t n = n0; n < std::min(p.n, n0 + kRun); ++n) {
        const int64_t i = n * p.c + c;
        a = multiply_add(load<V>(p.scale + i), load<V>(p.dscale + i), a);
        b = multiply_add(load<V>(p.scale + i), load<V>(p.dshift + i), b);
      }
      sds += a;
      sdb += b;
    }
    for (int64_t k = 0; k < p.k; ++k) {
      V dweight{}, dbias{}, dfc{};
      for (int64_t n0 = 0; n0 < p.n; n0 += kRun) {
        V a{}, b{}, f{};
        for (int64_t n = n0; n < std::min(p.n, n0 + kRun); ++n) {
          const int64_t i = n * p.c + c;
          const V lambda = splat<V>(p.attention[n * p.k + k]), da = splat<V>(p.dlogits[n * p.k + k]);
          a = multiply_add(lambda, load<V>(p.dscale + i), a);
          b = multiply_add(lambda, load<V>(p.dshift + i), b);
          f = multiply_add(da, load<V>(p.mean + i) * load<V>(p.descriptor_scale + i), f);
        }
        dweight += a;
        dbias += b;
        dfc += f;
      }
      store<V>(p.dmix_weight + k * p.c + c, r * dweight);
      store<V>(p.dmix_bias + k * p.c + c, dbias);
      store<V>(p.dfc + k * p.c + c, dfc);
    }
    // dx = s g + dvar2 (x - m) + dmean1: the batch's part of both, and the descriptor's
    const V per_cell = splat<V>(A(1) / A(p.hw)), per_batch = splat<V>(A(1) / (A(p.n) * A(p.hw)));
    const V batch_dvar2 = V{} - r * r * sds * per_batch, batch_dmean1 = V{} - sdb * per_batch;
    for (int64_t n = 0; n < p.n; ++n) {
      const int64_t i = n * p.c + c;
      V ddescriptor{};
      for (int64_t k = 0; k < p.k; ++k) {
        ddescriptor = multiply_add(splat<V>(p.dlogits[n * p.k + k]), load<V>(p.fc + k * p.c + c), ddescriptor);
      }
      const V m = load<V>(p.mean + i), q = load<V>(p.descriptor_scale + i), dq = ddescriptor * q;
      store<V>(p.dvar2 + i, batch_dvar2 - splat<V>(A(p.unbias)) * dq * m * q * q * per_cell);
      store<V>(p.dmean1 + i, multiply_add(dq, per_cell, multiply_add(batch_dvar2, m - mu, batch_dmean1)));
    }
  }
};

// (Eq. 16) AN: gradients of the blocks [begin, end) of channels.
template <class A>
void mixture_backward(const AttentiveLawBackward<A>& p, int64_t begin, int64_t end) {
  cover<A>(MixtureBackward<A>{p}, begin * kBlock, std::min(end * kBlock, p.c));
}

// ---- squeeze and excitation ------------------------------------------------------------------------------------------

template <class A>
struct Squeeze {  // z = base (m - centre) + bias
  const A *mean, *centre, *base, *bias;
  A* z;
  template <class V>
  INLINE_METHOD void at(int64_t c) const {
    store<V>(z + c, multiply_add(load<V>(base + c), load<V>(mean + c) - load<V>(centre + c), load<V>(bias + c)));
  }
};

template <class A>
struct TwoRowsTerm {  // <x, W_k>, <x, W_l>
  const A *x, *w_k, *w_l;
  template <class V>
  INLINE_METHOD void add(int64_t c, V& first, V& second) const {
    first = multiply_add(load<V>(x + c), load<V>(w_k + c), first);
    second = multiply_add(load<V>(x + c), load<V>(w_l + c), second);
  }
};

// (Eq. 21) SE: coefficients of the instances [begin, end).
template <class A>
void excite(const ExciteLaw<A>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t at = n * p.c;
    A *z = p.work + n * (p.c + p.hidden), *hidden = z + p.c;
    cover<A>(Squeeze<A>{p.mean + at, p.centre, p.base, p.bias, z}, 0, p.c);
    for (int64_t k = 0; k < p.hidden; k += 2) {
      const int64_t l = std::min(k + 1, p.hidden - 1);
      A first, second;
      channel_sums<A>(TwoRowsTerm<A>{z, p.first + k * p.c, p.first + l * p.c}, p.c, first, second);
      if (p.first_bias != nullptr) first += p.first_bias[k], second += p.first_bias[l];
      hidden[k] = first < 0 ? 0 : first;  // a NaN passes
      hidden[l] = second < 0 ? 0 : second;
    }
    for (int64_t k = 0; k < p.c; k += 2) {
      const int64_t l = std::min(k + 1, p.c - 1);
      A gates[2];
      channel_sums<A>(TwoRowsTerm<A>{hidden, p.second + k * p.hidden, p.second + l * p.hidden}, p.hidden, gates[0], gates[1]);
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t c = j == 0 ? k : l;
        const A logit = gates[j] + (p.second_bias == nullptr ? A(0) : p.second_bias[c]);
        const A gate = A(1) / (A(1) + std::exp(-logit));
        p.scale[at + c] = gate * p.base[c];
        p.shift[at + c] = gate * p.bias[c];
      }
    }
  }
}

template <class A>
inline constexpr LawKernels<A> law_kernels = {
    batch_statistics<A>,         batch_statistics_backward<A>, group_statistics<A>,   group_statistics_backward<A>,
    group_parameters_backward<A>, attention_logits<A>,          mix<A>,                attention_backward<A>,
    mixture_backward<A>,         excite<A>,
};
