// Compiles a header of kernels once for each instruction set, each in a namespace of its own, and says which to call.
//
//     #define ANORM_KERNELS "passes.h"
//     #include "isa.h"
//
// Only kernels lie between the pragmas: whatever they need from the standard library or from ATen is included before,
// so that no inline function of a library is ever compiled for an instruction set that the machine may lack.

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER static inline __attribute__((always_inline))
#define INLINE_METHOD inline __attribute__((always_inline))

namespace anorm {

namespace baseline {
#define ANORM_BYTES 16
#include "vector.h"
#include ANORM_KERNELS
#undef ANORM_BYTES
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define ANORM_BYTES 32
#include "vector.h"
#include ANORM_KERNELS
#undef ANORM_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
#define ANORM_BYTES 64
#include "vector.h"
#include ANORM_KERNELS
#undef ANORM_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

enum class Isa { baseline, avx2, avx512 };

// The widest instruction set of this machine, or the narrower one that ANORM_CPU_ISA names.
inline Isa detect_isa() {
  Isa widest = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    widest = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      widest = Isa::avx512;
    }
  }
#endif
  const char* asked = std::getenv("ANORM_CPU_ISA");
  const std::string name = asked == nullptr ? "" : asked;
  return std::min(widest, name == "baseline" ? Isa::baseline : name == "avx2" ? Isa::avx2 : Isa::avx512);
}

inline const Isa isa = detect_isa();

}  // namespace anorm

// The expression in the namespace of this machine's instruction set.
#if defined(__x86_64__)
#define ANORM_DISPATCH(expression)                          \
  (isa == Isa::avx512 ? avx512::expression : isa == Isa::avx2 ? avx2::expression : baseline::expression)
#else
#define ANORM_DISPATCH(expression) (baseline::expression)
#endif
