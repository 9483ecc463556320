// What the coefficient operators share: their arguments as dense arrays, and their items over threads.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>

namespace anorm {

using at::Tensor;

// Items over threads, if together they are worth it: `work` is the number of multiply-adds an item costs.
template <class Law>
void run(void (*kernel)(const Law&, int64_t, int64_t), const Law& law, int64_t items, int64_t work) {
  const int64_t grain = std::max<int64_t>(at::internal::GRAIN_SIZE / std::max<int64_t>(work, 1), 1);
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(law, begin, end); });
}

constexpr int64_t kBlock = 64;  // channels that a batch statistic handles at a time

inline int64_t blocks(int64_t c) { return (c + kBlock - 1) / kBlock; }

// A dense tensor of the statistics' dtype with the expected number of values.
inline Tensor dense(const Tensor& t, at::ScalarType type, int64_t count, const char* name) {
  TORCH_CHECK_VALUE(t.numel() == count, name, ": expected ", count, " values, got a tensor of shape ", t.sizes());
  return t.to(type).contiguous();
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t, at::ScalarType type, int64_t count, const char* name) {
  return t ? std::optional<Tensor>(dense(*t, type, count, name)) : std::nullopt;
}

// Dtype and shape of (N, C) statistics.
struct Cells {
  int64_t n, c;
  at::ScalarType type;
  explicit Cells(const Tensor& t) : n(t.size(0)), c(t.size(1)), type(t.scalar_type()) {
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble, "statistics are float32 or float64, got ", type);
  }
  Tensor cells() const { return at::empty({n, c}, type); }
  Tensor channels() const { return at::empty({c}, type); }
  Tensor dense_cells(const Tensor& t, const char* name) const { return dense(t, type, n * c, name); }
};

template <class A>
const A* get(const Tensor& t) {
  return t.const_data_ptr<A>();
}
template <class A>
const A* get(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<A>() : nullptr;
}
template <class A>
A* set(const Tensor& t) {
  return t.mutable_data_ptr<A>();
}
// From the biased variance of so many values to the unbiased one; a single value has none.
inline double unbias(int64_t count) { return count > 1 ? double(count) / double(count - 1) : 1.0; }

}  // namespace anorm
