// The CPU backend: the passes of README.md over a feature map, and the coefficients of the fused laws.
//
// This file checks and shapes the arguments, splits the work over threads and registers the operators. The kernels are
// in the headers beside it, compiled once for each instruction set and chosen when the library is loaded, so that one
// build runs on every machine of its architecture. No -ffast-math (inf and nan have rules here), and no contraction to
// FMA by the compiler: a mask that is recomputed from x must round exactly as the forward pass did.

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

namespace anorm {

using at::Tensor;

enum class Act : int64_t { none, relu, relu6 };
enum class Through { nothing, mean, mean_var };  // which moments carry a gradient back to x

// A coefficient per channel, shared by the batch (stride 0) or one row per instance.
struct Coefficient {
  const void* data = nullptr;
  int64_t stride = 0;
  template <class A>
  const A* at(int64_t n) const {
    return static_cast<const A*>(data) + n * stride;
  }
};

// The arguments of a pass; a kernel reads those it needs.
struct Pass {
  int64_t n = 0, c = 0, hw = 0;
  double per_cell = 0;                       // 1 / hw
  int64_t segments = 1, segment_rows = 0;  // channels_last reductions: how the hw rows of an instance are cut
  const void *x = nullptr, *dy = nullptr;
  const void* y = nullptr;  // the residual (forward) or the output whose sign is the mask (backward)
  void* out = nullptr;      // a map
  void *first = nullptr, *second = nullptr;  // (N, C) results
  double* partial = nullptr;                 // (N, segments, 2, C)
  Coefficient centre, scale, shift, mean, dvar2, dmean1;

  template <class T>
  const T* x_at(int64_t i) const { return static_cast<const T*>(x) + i; }
  template <class T>
  const T* dy_at(int64_t i) const { return static_cast<const T*>(dy) + i; }
  template <class T>
  const T* y_at(int64_t i) const { return static_cast<const T*>(y) + i; }
  template <class T>
  T* out_at(int64_t i) const { return static_cast<T*>(out) + i; }
  template <class A>
  A* first_at(int64_t i) const { return static_cast<A*>(first) + i; }
  template <class A>
  A* second_at(int64_t i) const { return static_cast<A*>(second) + i; }
};

using Kernel = void (*)(const Pass&, int64_t begin, int64_t end);

struct Passes {
  virtual Kernel moments(bool channels_last, bool var) const = 0;
  virtual Kernel merge(bool moments) const = 0;
  virtual Kernel affine(bool channels_last, Act act, bool residual) const = 0;
  virtual Kernel affine_backward(bool channels_last, Act act, bool residual) const = 0;
  virtual Kernel moments_backward(bool channels_last, Act act, Through through) const = 0;
};

}  // namespace anorm

#define ANORM_KERNELS "passes.h"
#include "isa.h"

namespace anorm {

const Passes& passes(at::ScalarType type) { return ANORM_DISPATCH(passes(type)); }

std::string instruction_set() { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

// ---- arguments -------------------------------------------------------------------------------------------------------

struct Map {
  Tensor x;
  bool channels_last;
  at::ScalarType acc;
};

// x as a dense map. Channels that lie next to each other stay so.
Map dense(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "expected a feature map (N, C, H, W), got ", x.dim(), " dimensions");
  const auto type = x.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                    "expected float32, float64, bfloat16 or float16, got ", type);
  const auto acc = type == at::kDouble ? at::kDouble : at::kFloat;
  if (x.is_contiguous()) return {x, x.size(2) * x.size(3) == 1, acc};  // 1x1: rows of channels in either layout
  if (x.is_contiguous(at::MemoryFormat::ChannelsLast)) return {x, true, acc};
  const bool last = x.stride(1) == 1 && x.size(1) > 1;
  return dense(x.contiguous(last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
}

// Another map (a gradient, a residual) with the memory order and dtype of x.
Tensor like(const Tensor& other, const Map& map) {
  TORCH_CHECK_VALUE(other.sizes() == map.x.sizes(), "expected shape ", map.x.sizes(), ", got ", other.sizes());
  const auto format = map.channels_last && !map.x.is_contiguous() ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return other.to(map.x.scalar_type()).contiguous(format);
}

// Keeps the tensors whose memory a Pass points into.
class Call {
 public:
  Pass pass;

  explicit Call(const Map& map) : map_(map), passes_(passes(map.x.scalar_type())) {
    pass.n = map.x.size(0);
    pass.c = map.x.size(1);
    pass.hw = map.x.size(2) * map.x.size(3);
    pass.per_cell = 1.0 / static_cast<double>(pass.hw);
    pass.x = map.x.const_data_ptr();
  }

  Coefficient coefficient(const Tensor& t) {
    TORCH_CHECK_VALUE((t.dim() == 1 && t.size(0) == pass.c) || (t.dim() == 2 && t.size(0) == pass.n && t.size(1) == pass.c),
                      "expected coefficients of shape (", pass.c, ",) or (", pass.n, ", ", pass.c, "), got ", t.sizes());
    kept_.push_back(t.to(map_.acc));
    if (pass.c > 1 && t.stride(-1) != 1) kept_.back() = kept_.back().contiguous();
    const Tensor& k = kept_.back();
    return {k.const_data_ptr(), k.dim() == 1 ? 0 : k.stride(0)};
  }

  const void* map(const Tensor& t) {
    kept_.push_back(like(t, map_));
    return kept_.back().const_data_ptr();
  }

  Tensor cells() const { return at::empty({pass.n, pass.c}, map_.x.options().dtype(map_.acc).memory_format({})); }

  const Passes& kernels() const { return passes_; }

  void elementwise(Kernel kernel) const {
    const bool rows = map_.channels_last;
    const int64_t span = rows ? pass.c : pass.hw;
    if (span > 0) run(kernel, pass.n * (rows ? pass.hw : pass.c), kGrain / span);
  }

  void reduce(Kernel kernel, Kernel merge) {
    if (!map_.channels_last) return run(kernel, pass.n * pass.c, kGrain / std::max<int64_t>(pass.hw, 1));
    // About 128 KiB a segment: its first rows are still in cache when they are read again.
    const int64_t row_bytes = std::max<int64_t>(pass.c * map_.x.element_size(), 1);
    const int64_t most = std::max<int64_t>((128 << 10) / row_bytes, 8);
    pass.segments = std::max<int64_t>((pass.hw + most - 1) / most, 1);
    pass.segment_rows = (pass.hw + pass.segments - 1) / pass.segments;
    pass.segments = pass.segment_rows > 0 ? (pass.hw + pass.segment_rows - 1) / pass.segment_rows : 1;
    if (pass.segments > 1) {
      kept_.push_back(at::empty({pass.n, pass.segments, 2, pass.c}, map_.x.options().dtype(at::kDouble).memory_format({})));
      pass.partial = kept_.back().data_ptr<double>();
    }
    run(kernel, pass.n * pass.segments, kGrain / std::max<int64_t>(pass.segment_rows * pass.c, 1));
    if (pass.segments > 1) run(merge, pass.n, kGrain / std::max<int64_t>(pass.segments * pass.c, 1));
  }

 private:
  static constexpr int64_t kGrain = at::internal::GRAIN_SIZE;

  void run(Kernel kernel, int64_t items, int64_t grain) const {
    at::parallel_for(0, items, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) { kernel(pass, begin, end); });
  }

  const Map& map_;
  const Passes& passes_;
  c10::SmallVector<Tensor, 8> kept_;
};

// ---- the passes ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Map map = dense(x);
  Call call(map);
  Tensor mean = call.cells(), var = call.cells();
  call.pass.first = mean.data_ptr();
  call.pass.second = var.data_ptr();
  call.reduce(call.kernels().moments(map.channels_last, true), call.kernels().merge(true));
  return {mean, var};
}

Tensor mean(const Tensor& x) {
  const Map map = dense(x);
  Call call(map);
  Tensor mean = call.cells(), unused = call.cells();
  call.pass.first = mean.data_ptr();
  call.pass.second = unused.data_ptr();
  call.reduce(call.kernels().moments(map.channels_last, false), call.kernels().merge(true));
  return mean;
}

Tensor affine(const Tensor& x, const Tensor& centre, const Tensor& scale, const Tensor& shift,
              const std::optional<Tensor>& residual, int64_t act) {
  const Map map = dense(x);
  Call call(map);
  Tensor y = at::empty_like(map.x);
  call.pass.centre = call.coefficient(centre);
  call.pass.scale = call.coefficient(scale);
  call.pass.shift = call.coefficient(shift);
  if (residual) call.pass.y = call.map(*residual);
  call.pass.out = y.data_ptr();
  call.elementwise(call.kernels().affine(map.channels_last, Act(act), residual.has_value()));
  return y;
}

std::tuple<Tensor, Tensor> affine_backward(const Tensor& dy, const Tensor& x, const Tensor& centre, const Tensor& scale,
                                           const Tensor& shift, int64_t act) {
  const Map map = dense(x);
  Call call(map);
  Tensor dscale = call.cells(), dshift = call.cells();
  call.pass.dy = call.map(dy);
  call.pass.centre = call.coefficient(centre);
  call.pass.scale = call.coefficient(scale);
  call.pass.shift = call.coefficient(shift);
  call.pass.first = dshift.data_ptr();
  call.pass.second = dscale.data_ptr();
  call.reduce(call.kernels().affine_backward(map.channels_last, Act(act), false), call.kernels().merge(false));
  return {dscale, dshift};
}

std::tuple<Tensor, Tensor, Tensor> affine_backward_residual(const Tensor& dy, const Tensor& x, const Tensor& centre,
                                                            const Tensor& y, int64_t act) {
  const Map map = dense(x);
  Call call(map);
  Tensor dscale = call.cells(), dshift = call.cells(), g = at::empty_like(map.x);
  call.pass.dy = call.map(dy);
  call.pass.y = call.map(y);
  call.pass.out = g.data_ptr();
  call.pass.centre = call.pass.scale = call.pass.shift = call.coefficient(centre);
  call.pass.first = dshift.data_ptr();
  call.pass.second = dscale.data_ptr();
  call.reduce(call.kernels().affine_backward(map.channels_last, Act(act), true), call.kernels().merge(false));
  return {dscale, dshift, g};
}

Tensor moments_backward(const Tensor& dy, const Tensor& x, const Tensor& centre, const Tensor& scale, const Tensor& shift,
                        const std::optional<Tensor>& mean, const std::optional<Tensor>& dvar2,
                        const std::optional<Tensor>& dmean1, int64_t act) {
  const Map map = dense(x);
  Call call(map);
  Tensor dx = at::empty_like(map.x);
  call.pass.dy = call.map(dy);
  call.pass.out = dx.data_ptr();
  Pass& p = call.pass;
  p.centre = call.coefficient(centre);
  p.shift = call.coefficient(shift);
  p.scale = p.mean = p.dvar2 = p.dmean1 = call.coefficient(scale);
  Through through = Through::nothing;
  if (dmean1) {
    through = Through::mean;
    p.dmean1 = call.coefficient(*dmean1);
  }
  if (dvar2) {
    TORCH_CHECK_VALUE(dmean1 && mean, "dvar2 comes with dmean1 and mean");
    through = Through::mean_var;
    p.dvar2 = call.coefficient(*dvar2);
    p.mean = call.coefficient(*mean);
  }
  call.elementwise(call.kernels().moments_backward(map.channels_last, Act(act), through));
  return dx;
}

TORCH_LIBRARY_IMPL(anorm_cpu, CPU, m) {
  m.impl("moments", moments);
  m.impl("mean", mean);
  m.impl("affine", affine);
  m.impl("affine_backward", affine_backward);
  m.impl("affine_backward_residual", affine_backward_residual);
  m.impl("moments_backward", moments_backward);
}
TORCH_LIBRARY_IMPL(anorm_cpu, CompositeExplicitAutograd, m) { m.impl("instruction_set", instruction_set); }

}  // namespace anorm
