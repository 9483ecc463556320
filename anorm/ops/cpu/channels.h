// Loops over the channels of (N, C) coefficients. Included once per instruction set, after cells.h
// and vector.h.

// Calls body.at<V>(c) for the channels [begin, end), the last register overlapping the one before it if need be.
template <class A, class Body>
INLINE void cover(const Body& body, int64_t begin, int64_t end) {
  using V = typename Register<A>::type;
  constexpr int64_t W = lanes<V>;
  int64_t c = begin;
  for (; c + W <= end; c += W) body.template at<V>(c);
  if (c < end && end - begin >= W) {
    body.template at<V>(end - W);
  } else {
    for (; c < end; ++c) body.template at<A>(c);
  }
}

// Sum over channels of what term.at<V>(c) adds to two sums.
template <class A, class Term>
INLINE void channel_sums(const Term& term, int64_t c, A& first, A& second) {
  using V = typename Register<A>::type;
  constexpr int64_t W = lanes<V>;
  V a{}, b{};
  int64_t i = 0;
  for (; i + W <= c; i += W) term.template add<V>(i, a, b);
  first = lane_sum<V>(a);
  second = lane_sum<V>(b);
  for (; i < c; ++i) term.template add<A>(i, first, second);
}

// Mean and biased variance over the batch of the channels [c0, c0 + width), a block; instances' variances times `unbias`.
template <class A>
INLINE void pool_block(const A* mean_, const A* var_, double unbias, int64_t n, int64_t c, int64_t c0, int64_t width,
                       double* mean, double* var) {
  std::fill_n(mean, width, 0.0);
  std::fill_n(var, width, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    const A *m = mean_ + i * c + c0, *v = var_ + i * c + c0;
    for (int64_t j = 0; j < width; ++j) mean[j] += m[j];
    for (int64_t j = 0; j < width; ++j) var[j] += unbias * v[j];
  }
  for (int64_t j = 0; j < width; ++j) mean[j] /= n;
  for (int64_t i = 0; i < n; ++i) {
    const A* m = mean_ + i * c + c0;
    for (int64_t j = 0; j < width; ++j) var[j] += (m[j] - mean[j]) * (m[j] - mean[j]);
  }
  for (int64_t j = 0; j < width; ++j) var[j] /= n;
}
