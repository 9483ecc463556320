// The four passes over the feature map. Included once per instruction set by passes.cpp, after vector.h.
//
// A kernel works on a range of items, and what it writes for an item depends on that item alone, never on the range:
// results are the same for any number of threads. NCHW items are planes (n, c) of hw values. Channels_last items are
// rows (n, position) of c values in the elementwise passes, and segments (n, s) of rows in the reductions; the sums of
// several segments are merged in order afterwards.
//
// Sums run in registers over at most 32 values per lane and continue in double. A span that is not a multiple of a
// register ends with a register that overlaps the one before: it counts nothing twice and writes the same values again.

// ---- activations -------------------------------------------------------------------------------------------------------

template <Act act, class V>
INLINE V activate(V z) {  // comparisons are false for NaN, which therefore passes
  if constexpr (act != Act::none) z = z <= 0 ? V{} : z;
  if constexpr (act == Act::relu6) z = z >= 6 ? V{} + 6 : z;
  return z;
}

// The largest float32 that rounds to 0 in T, and the smallest that rounds to 6: with these the mask of the rounded
// value is read off the unrounded one. Half of the smallest subnormal is a tie and goes to the even 0; the midpoint
// below 6 is a tie and goes to 6, whose last bit is even.
template <class T>
struct Rounding {
  static constexpr T zero = 0, six = 6;
};
template <>
struct Rounding<c10::BFloat16> {
  static constexpr float zero = 0x1p-134f, six = 6 - 0x1p-6f;
};
template <>
struct Rounding<c10::Half> {
  static constexpr float zero = 0x1p-25f, six = 6 - 0x1p-9f;
};

// g where the activation of T(z) lets the gradient pass, else 0. z is not yet rounded to T.
template <Act act, class T, class V>
INLINE V gate(V z, V g) {
  if constexpr (act != Act::none) g = z <= Rounding<T>::zero ? V{} : g;
  if constexpr (act == Act::relu6) g = z >= Rounding<T>::six ? V{} : g;
  return g;
}

// ---- coefficients ----------------------------------------------------------------------------------------------------

constexpr int64_t kRun = 32;

template <class V>
struct Coefficients {
  V centre, scale, shift;
};

// ---- what a reduction adds up ----------------------------------------------------------------------------------------

// (Eq. 1) x
template <class T>
struct MeanTerms {
  const T* x;
  INLINE_MEMBER MeanTerms of(const Pass& p, int64_t at) { return {p.x_at<T>(at)}; }
  template <class V>
  INLINE_METHOD void add(int64_t i, const Coefficients<V>&, V& first, V&) const {
    first += load<V>(x + i);
  }
};

// (Eq. 1) x - centre and its square
template <class T>
struct MomentTerms {
  const T* x;
  INLINE_MEMBER MomentTerms of(const Pass& p, int64_t at) { return {p.x_at<T>(at)}; }
  template <class V>
  INLINE_METHOD void add(int64_t i, const Coefficients<V>& k, V& first, V& second) const {
    V d = load<V>(x + i) - k.centre;
    first += d;
    second = multiply_add(d, d, second);
  }
};

// (Eq. 3) g and g (x - centre); the mask is recomputed from x
template <class T, Act act>
struct GradientTerms {
  const T *dy, *x;
  INLINE_MEMBER GradientTerms of(const Pass& p, int64_t at) { return {p.dy_at<T>(at), p.x_at<T>(at)}; }
  template <class V>
  INLINE_METHOD void add(int64_t i, const Coefficients<V>& k, V& first, V& second) const {
    V d = load<V>(x + i) - k.centre;
    V g = gate<act, T>(multiply_add(k.scale, d, k.shift), load<V>(dy + i));
    first += g;
    second = multiply_add(g, d, second);
  }
};

// (Eq. 3, 4) The same; the mask is read off y, and g is kept: it is the residual's gradient.
template <class T, Act act>
struct ResidualGradientTerms {
  const T *dy, *x, *y;
  T* g;
  INLINE_MEMBER ResidualGradientTerms of(const Pass& p, int64_t at) {
    return {p.dy_at<T>(at), p.x_at<T>(at), p.y_at<T>(at), p.out_at<T>(at)};
  }
  template <class V>
  INLINE_METHOD void add(int64_t i, const Coefficients<V>& k, V& first, V& second) const {
    V d = load<V>(x + i) - k.centre;
    V gated = gate<act, typename Shape<V>::Lane>(load<V>(y + i), load<V>(dy + i));
    store<V>(g + i, gated);
    first += gated;
    second = multiply_add(gated, d, second);
  }
};

// ---- reductions, NCHW ------------------------------------------------------------------------------------------------

template <class V, class Terms>
INLINE void span_sums(const Terms& terms, const Coefficients<V>& k, int64_t n, double& first, double& second) {
  constexpr int64_t W = lanes<V>;
  first = second = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(n, i + kRun * 4 * W);
    V a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{};
    for (; i + 4 * W <= end; i += 4 * W) {
      terms.add(i, k, a0, b0);
      terms.add(i + W, k, a1, b1);
      terms.add(i + 2 * W, k, a2, b2);
      terms.add(i + 3 * W, k, a3, b3);
    }
    for (; i + W <= end; i += W) terms.add(i, k, a0, b0);
    if (i < end) {  // only at the end of the span, where end == n
      V a{}, b{};
      terms.add(n - W, k, a, b);
      a1 += last_lanes(a, n - i);
      b1 += last_lanes(b, n - i);
      i = n;
    }
    first += lane_sum<V>((a0 + a1) + (a2 + a3));
    second += lane_sum<V>((b0 + b1) + (b2 + b3));
  }
}

// The shift for the sums of squares: a mean, so that one outlier does not spoil it; 0 where it is not finite.
template <class V>
INLINE V finite_or_zero(V mean) {
  return mean - mean == V{} ? mean : V{};
}

template <class V, class T, class A>
INLINE void plane_moments(const Pass& p, int64_t r) {
  const int64_t head = std::min<int64_t>(p.hw, 1024);
  double first, second;
  span_sums<V>(MeanTerms<T>::of(p, r * p.hw), Coefficients<V>{}, head, first, second);
  const A shift = finite_or_zero<A>(A(first) / A(head));
  span_sums<V>(MomentTerms<T>::of(p, r * p.hw), Coefficients<V>{splat<V>(shift)}, p.hw, first, second);
  const double offset = first * p.per_cell, spread = second * p.per_cell - offset * offset;
  *p.first_at<A>(r) = A(shift + offset);
  *p.second_at<A>(r) = A(spread < 0 ? 0 : spread);
}

template <class V, class T, class A>
INLINE void plane_mean(const Pass& p, int64_t r) {
  double sum, unused;
  span_sums<V>(MeanTerms<T>::of(p, r * p.hw), Coefficients<V>{}, p.hw, sum, unused);
  *p.first_at<A>(r) = A(sum / p.hw);
}

template <class V, class Terms, class A>
INLINE void plane_gradients(const Pass& p, int64_t r) {
  const int64_t n = r / p.c, c = r % p.c;
  Coefficients<V> k{splat<V>(p.centre.at<A>(n)[c]), splat<V>(p.scale.at<A>(n)[c]), splat<V>(p.shift.at<A>(n)[c])};
  double dshift, dscale;
  span_sums<V>(Terms::of(p, r * p.hw), k, p.hw, dshift, dscale);
  *p.first_at<A>(r) = A(dshift);
  *p.second_at<A>(r) = A(dscale);
}

// (Eq. 1) Mean and variance of the planes [begin, end).
template <class T, class A>
void moments_nchw(const Pass& p, int64_t begin, int64_t end) {
  using V = typename Register<A>::type;
  if (p.hw >= lanes<V>) {
    for (int64_t r = begin; r < end; ++r) plane_moments<V, T, A>(p, r);
  } else {
    for (int64_t r = begin; r < end; ++r) plane_moments<A, T, A>(p, r);
  }
}

// (Eq. 1) Mean of the planes [begin, end).
template <class T, class A>
void mean_nchw(const Pass& p, int64_t begin, int64_t end) {
  using V = typename Register<A>::type;
  if (p.hw >= lanes<V>) {
    for (int64_t r = begin; r < end; ++r) plane_mean<V, T, A>(p, r);
  } else {
    for (int64_t r = begin; r < end; ++r) plane_mean<A, T, A>(p, r);
  }
}

// (Eq. 3) Sums over the planes [begin, end).
template <class Terms, class A>
void gradients_nchw(const Pass& p, int64_t begin, int64_t end) {
  using V = typename Register<A>::type;
  if (p.hw >= lanes<V>) {
    for (int64_t r = begin; r < end; ++r) plane_gradients<V, Terms, A>(p, r);
  } else {
    for (int64_t r = begin; r < end; ++r) plane_gradients<A, Terms, A>(p, r);
  }
}

// ---- reductions, channels_last ---------------------------------------------------------------------------------------
// U registers of neighbouring channels at a time, down the rows of a segment. Fewer would fit AVX2's 16 registers better
// and be slower: what counts is how much of a row is read at once.

constexpr int kColumns = 4;

template <class V, int U, class Terms>
INLINE void column_sums(const Terms& terms, const Coefficients<V> (&k)[U], int64_t stride, int64_t rows, double* first,
                        double* second) {
  using A = typename Shape<V>::Lane;
  constexpr int64_t W = lanes<V>;
  for (int64_t j = 0; j < U * W; ++j) first[j] = second[j] = 0;
  for (int64_t r = 0; r < rows;) {
    const int64_t end = std::min(rows, r + kRun);
    V a[U] = {}, b[U] = {};
    for (; r < end; ++r) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) terms.add(r * stride + u * W, k[u], a[u], b[u]);
    }
    A sums[2][U * W];
    std::memcpy(sums[0], a, sizeof a);
    std::memcpy(sums[1], b, sizeof b);
    for (int64_t j = 0; j < U * W; ++j) {
      first[j] += sums[0][j];
      second[j] += sums[1][j];
    }
  }
}

struct Segment {
  int64_t n, index, row, rows;
  Segment(const Pass& p, int64_t item)
      : n(item / p.segments), index(item % p.segments), row(index * p.segment_rows),
        rows(std::min(p.segment_rows, p.hw - row)) {}
};

// Results of one block of channels: final if the map is one segment, else kept until merge().
template <class A>
INLINE void put(const Pass& p, const Segment& s, int64_t c, int64_t count, const double* first, const double* second) {
  if (p.segments == 1) {
    A *f = p.first_at<A>(s.n * p.c + c), *g = p.second_at<A>(s.n * p.c + c);
    for (int64_t j = 0; j < count; ++j) f[j] = A(first[j]);
    for (int64_t j = 0; j < count; ++j) g[j] = A(second[j]);
  } else {
    double* out = p.partial + (s.n * p.segments + s.index) * 2 * p.c + c;
    std::memcpy(out, first, count * sizeof(double));
    std::memcpy(out + p.c, second, count * sizeof(double));
  }
}

// (Eq. 1) Moments of a block of channels of a segment.
template <class T, class A>
struct MomentBlock {
  template <class V, int U>
  INLINE_MEMBER void run(const Pass& p, const Segment& s, int64_t c) {
    constexpr int64_t W = lanes<V>, count = U * W;
    const int64_t at = (s.n * p.hw + s.row) * p.c + c, head = std::min<int64_t>(s.rows, 64);
    Coefficients<V> k[U] = {};
    double first[count], second[count];
    column_sums<V, U>(MeanTerms<T>::of(p, at), k, p.c, head, first, second);
    A shift[count];
    for (int64_t j = 0; j < count; ++j) shift[j] = finite_or_zero<A>(A(first[j] / head));
    for (int u = 0; u < U; ++u) k[u].centre = load<V>(shift + u * W);
    column_sums<V, U>(MomentTerms<T>::of(p, at), k, p.c, s.rows, first, second);
    for (int64_t j = 0; j < count; ++j) {
      const double offset = first[j] / s.rows, spread = second[j] / s.rows - offset * offset;
      first[j] = shift[j] + offset;
      second[j] = spread < 0 ? 0 : spread;
    }
    put<A>(p, s, c, count, first, second);
  }
};

// (Eq. 1) Means of a block of channels of a segment.
template <class T, class A>
struct MeanBlock {
  template <class V, int U>
  INLINE_MEMBER void run(const Pass& p, const Segment& s, int64_t c) {
    constexpr int64_t count = U * lanes<V>;
    Coefficients<V> k[U] = {};
    double first[count], second[count];
    column_sums<V, U>(MeanTerms<T>::of(p, (s.n * p.hw + s.row) * p.c + c), k, p.c, s.rows, first, second);
    for (int64_t j = 0; j < count; ++j) first[j] /= s.rows;
    put<A>(p, s, c, count, first, second);
  }
};

// (Eq. 3, 4) Sums over a block of channels of a segment.
template <class Terms, class A>
struct GradientBlock {
  template <class V, int U>
  INLINE_MEMBER void run(const Pass& p, const Segment& s, int64_t c) {
    constexpr int64_t W = lanes<V>, count = U * W;
    Coefficients<V> k[U];
    for (int u = 0; u < U; ++u) {
      k[u] = {load<V>(p.centre.at<A>(s.n) + c + u * W), load<V>(p.scale.at<A>(s.n) + c + u * W),
              load<V>(p.shift.at<A>(s.n) + c + u * W)};
    }
    double first[count], second[count];
    column_sums<V, U>(Terms::of(p, (s.n * p.hw + s.row) * p.c + c), k, p.c, s.rows, first, second);
    put<A>(p, s, c, count, first, second);
  }
};

// (Eq. 1, 3) A reduction over the segments [begin, end).
template <class Block, class A>
void segments_nhwc(const Pass& p, int64_t begin, int64_t end) {
  using V = typename Register<A>::type;
  constexpr int64_t W = lanes<V>;
  for (int64_t item = begin; item < end; ++item) {
    const Segment s(p, item);
    int64_t c = 0;
    for (; c + kColumns * W <= p.c; c += kColumns * W) Block::template run<V, kColumns>(p, s, c);
    for (; c + W <= p.c; c += W) Block::template run<V, 1>(p, s, c);
    if (c < p.c && p.c >= W) {
      Block::template run<V, 1>(p, s, p.c - W);
    } else {
      for (; c < p.c; ++c) Block::template run<A, 1>(p, s, c);
    }
  }
}

// (Eq. 3) Sums of the segments, for instances [begin, end).
template <class A>
void merge_sums(const Pass& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const double* part = p.partial + n * p.segments * 2 * p.c;
    for (int64_t c = 0; c < p.c; ++c) {
      double first = 0, second = 0;
      for (int64_t s = 0; s < p.segments; ++s) {
        first += part[s * 2 * p.c + c];
        second += part[(s * 2 + 1) * p.c + c];
      }
      p.first_at<A>(n * p.c)[c] = A(first);
      p.second_at<A>(n * p.c)[c] = A(second);
    }
  }
}

// (Eq. 1) Law of total variance over the segments: non-negative terms only.
template <class A>
void merge_moments(const Pass& p, int64_t begin, int64_t end) {
  const double last = double(p.hw - (p.segments - 1) * p.segment_rows) / p.hw, other = double(p.segment_rows) / p.hw;
  for (int64_t n = begin; n < end; ++n) {
    const double* part = p.partial + n * p.segments * 2 * p.c;
    for (int64_t c = 0; c < p.c; ++c) {
      double mean = 0, variance = 0;
      for (int64_t s = 0; s < p.segments; ++s) mean += (s + 1 < p.segments ? other : last) * part[s * 2 * p.c + c];
      for (int64_t s = 0; s < p.segments; ++s) {
        const double d = part[s * 2 * p.c + c] - mean;
        variance += (s + 1 < p.segments ? other : last) * (part[(s * 2 + 1) * p.c + c] + d * d);
      }
      p.first_at<A>(n * p.c)[c] = A(mean);
      p.second_at<A>(n * p.c)[c] = A(variance);
    }
  }
}

// ---- elementwise passes ----------------------------------------------------------------------------------------------
// A span is a plane with one coefficient (NCHW) or a row with a coefficient per channel (channels_last).

template <class V, class A>
struct Same {
  V value;
  INLINE_MEMBER Same of(const Coefficient& k, int64_t n, int64_t c) { return {splat<V>(k.at<A>(n)[c])}; }
  INLINE_METHOD V at(int64_t) const { return value; }
};

template <class V, class A>
struct Each {
  const A* values;
  INLINE_MEMBER Each of(const Coefficient& k, int64_t n, int64_t) { return {k.at<A>(n)}; }
  INLINE_METHOD V at(int64_t i) const { return load<V>(values + i); }
};

// (Eq. 2) y = act(scale (x - centre) + shift [+ residual])
template <class T, Act act, bool residual>
struct Affine {
  template <class V, class K>
  struct Span {
    const T *x, *add;
    T* y;
    K centre, scale, shift;
    Span(const Pass& p, int64_t at, int64_t n, int64_t c)
        : x(p.x_at<T>(at)), add(residual ? p.y_at<T>(at) : nullptr), y(p.out_at<T>(at)), centre(K::of(p.centre, n, c)),
          scale(K::of(p.scale, n, c)), shift(K::of(p.shift, n, c)) {}
    INLINE_METHOD void at(int64_t i) const {
      V z = multiply_add(scale.at(i), load<V>(x + i) - centre.at(i), shift.at(i));
      if constexpr (residual) z += load<V>(add + i);
      store<V>(y + i, activate<act>(z));
    }
  };
};

// (Eq. 5) dx = scale * g [+ dmean1 [+ dvar2 * (x - mean)]]
template <class T, Act act, Through through>
struct InputGradient {
  template <class V, class K>
  struct Span {
    const T *dy, *x;
    T* dx;
    K centre, scale, shift, mean, dvar2, dmean1;
    Span(const Pass& p, int64_t at, int64_t n, int64_t c)
        : dy(p.dy_at<T>(at)), x(p.x_at<T>(at)), dx(p.out_at<T>(at)), centre(K::of(p.centre, n, c)),
          scale(K::of(p.scale, n, c)), shift(K::of(p.shift, n, c)), mean(K::of(p.mean, n, c)),
          dvar2(K::of(p.dvar2, n, c)), dmean1(K::of(p.dmean1, n, c)) {}
    INLINE_METHOD void at(int64_t i) const {
      V s = scale.at(i), g = load<V>(dy + i);
      if constexpr (act != Act::none) g = gate<act, T>(multiply_add(s, load<V>(x + i) - centre.at(i), shift.at(i)), g);
      V d;
      if constexpr (through == Through::nothing) d = s * g;
      if constexpr (through == Through::mean) d = multiply_add(s, g, dmean1.at(i));
      if constexpr (through == Through::mean_var)
        d = multiply_add(s, g, multiply_add(dvar2.at(i), load<V>(x + i) - mean.at(i), dmean1.at(i)));
      store<V>(dx + i, d);
    }
  };
};

template <class V, class Span>
INLINE void sweep(const Span& span, int64_t n) {
  constexpr int64_t W = lanes<V>;
  int64_t i = 0;
  for (; i + W <= n; i += W) span.at(i);
  if (i < n) span.at(n - W);
}

// (Eq. 2, 5) An elementwise pass over the planes [begin, end).
template <class Pointwise, class A>
void planes(const Pass& p, int64_t begin, int64_t end) {
  using V = typename Register<A>::type;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / p.c, c = r % p.c;
    if (p.hw >= lanes<V>) {
      sweep<V>(typename Pointwise::template Span<V, Same<V, A>>(p, r * p.hw, n, c), p.hw);
    } else {
      sweep<A>(typename Pointwise::template Span<A, Same<A, A>>(p, r * p.hw, n, c), p.hw);
    }
  }
}

// (Eq. 2, 5) An elementwise pass over the rows [begin, end).
template <class Pointwise, class A>
void rows(const Pass& p, int64_t begin, int64_t end) {
  using V = typename Register<A>::type;
  for (int64_t r = begin; r < end; ++r) {
    if (p.c >= lanes<V>) {
      sweep<V>(typename Pointwise::template Span<V, Each<V, A>>(p, r * p.c, r / p.hw, 0), p.c);
    } else {
      sweep<A>(typename Pointwise::template Span<A, Each<A, A>>(p, r * p.c, r / p.hw, 0), p.c);
    }
  }
}

// ---- the table of kernels --------------------------------------------------------------------------------------------

template <class Pointwise, class A>
constexpr Kernel pointwise(bool channels_last) {
  return channels_last ? rows<Pointwise, A> : planes<Pointwise, A>;
}

template <class T, class A, Act act>
constexpr Kernel affine_kernel(bool channels_last, bool residual) {
  return residual ? pointwise<Affine<T, act, true>, A>(channels_last) : pointwise<Affine<T, act, false>, A>(channels_last);
}

template <class T, class A, Act act>
constexpr Kernel input_gradient_kernel(bool channels_last, Through through) {
  switch (through) {
    case Through::nothing: return pointwise<InputGradient<T, act, Through::nothing>, A>(channels_last);
    case Through::mean: return pointwise<InputGradient<T, act, Through::mean>, A>(channels_last);
    default: return pointwise<InputGradient<T, act, Through::mean_var>, A>(channels_last);
  }
}

template <class Terms, class A>
constexpr Kernel gradients_kernel(bool channels_last) {
  return channels_last ? segments_nhwc<GradientBlock<Terms, A>, A> : gradients_nchw<Terms, A>;
}

template <class T, class A, Act act>
constexpr Kernel affine_backward_kernel(bool channels_last, bool residual) {
  if constexpr (act == Act::none) {
    return gradients_kernel<GradientTerms<T, act>, A>(channels_last);
  } else {
    return residual ? gradients_kernel<ResidualGradientTerms<T, act>, A>(channels_last)
                    : gradients_kernel<GradientTerms<T, act>, A>(channels_last);
  }
}

template <class T, class A>
struct PassTable final : Passes {
  Kernel moments(bool channels_last, bool var) const override {
    if (var) return channels_last ? segments_nhwc<MomentBlock<T, A>, A> : moments_nchw<T, A>;
    return channels_last ? segments_nhwc<MeanBlock<T, A>, A> : mean_nchw<T, A>;
  }
  Kernel merge(bool moments) const override { return moments ? merge_moments<A> : merge_sums<A>; }
  Kernel affine(bool channels_last, Act act, bool residual) const override {
    switch (act) {
      case Act::none: return affine_kernel<T, A, Act::none>(channels_last, residual);
      case Act::relu: return affine_kernel<T, A, Act::relu>(channels_last, residual);
      default: return affine_kernel<T, A, Act::relu6>(channels_last, residual);
    }
  }
  Kernel affine_backward(bool channels_last, Act act, bool residual) const override {
    switch (act) {
      case Act::none: return affine_backward_kernel<T, A, Act::none>(channels_last, residual);
      case Act::relu: return affine_backward_kernel<T, A, Act::relu>(channels_last, residual);
      default: return affine_backward_kernel<T, A, Act::relu6>(channels_last, residual);
    }
  }
  Kernel moments_backward(bool channels_last, Act act, Through through) const override {
    switch (act) {
      case Act::none: return input_gradient_kernel<T, A, Act::none>(channels_last, through);
      case Act::relu: return input_gradient_kernel<T, A, Act::relu>(channels_last, through);
      default: return input_gradient_kernel<T, A, Act::relu6>(channels_last, through);
    }
  }
};

inline const Passes& passes(at::ScalarType type) {
  static const PassTable<float, float> float32;
  static const PassTable<double, double> float64;
  static const PassTable<c10::BFloat16, float> bfloat16;
  static const PassTable<c10::Half, float> float16;
  switch (type) {
    case at::kFloat: return float32;
    case at::kDouble: return float64;
    case at::kBFloat16: return bfloat16;
    default: return float16;
  }
}
