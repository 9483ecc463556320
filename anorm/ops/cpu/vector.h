// Vectors of one register, and how each storage type is loaded into and stored from them.
//
// Included once per instruction set by passes.cpp, inside a namespace of its own; ANORM_BYTES is the width of a register.
// Everything is written for a type V that is either such a vector or a plain scalar: operators, comparisons and the
// ternary select mean the same for both, so the narrow rest of a map runs through the very same code.

template <class A>
struct Register {
  typedef A type __attribute__((vector_size(ANORM_BYTES)));
};

// Lane type and number of lanes.
template <class V>
struct Shape {
  using Lane = std::remove_cvref_t<decltype(std::declval<V&>()[0])>;
  static constexpr int64_t lanes = sizeof(V) / sizeof(Lane);
};
template <>
struct Shape<float> {
  using Lane = float;
  static constexpr int64_t lanes = 1;
};
template <>
struct Shape<double> {
  using Lane = double;
  static constexpr int64_t lanes = 1;
};
template <class V>
constexpr int64_t lanes = Shape<V>::lanes;

// An integer vector of the lanes of V, or a scalar integer.
template <class V, class I>
struct Integers {
  typedef I type __attribute__((vector_size(sizeof(I) * lanes<V>)));
};

template <class V, class A>
INLINE V splat(A a) {
  return a - V{};  // a + 0 would turn -0 into 0
}

// a * b + c in one rounding where the instruction set has it; the compiler itself may not contract (a mask recomputed
// in backward must round as the forward pass did), so every use is written out.
template <class V>
INLINE V multiply_add(V a, V b, V c) {
#if ANORM_BYTES == 64
  if constexpr (std::is_same_v<typename Shape<V>::Lane, float> && lanes<V> == 16)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else if constexpr (lanes<V> == 8)
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  else
    return std::fma(a, b, c);
#elif ANORM_BYTES == 32
  if constexpr (std::is_same_v<typename Shape<V>::Lane, float> && lanes<V> == 8)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else if constexpr (lanes<V> == 4)
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  else
    return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// ---- storage -------------------------------------------------------------------------------------------------------

template <class V, class T>
struct Storage {  // T is the lane type: float or double
  INLINE_MEMBER V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  INLINE_MEMBER void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
};

template <class T>
struct ScalarStorage {
  INLINE_MEMBER float load(const T* p) { return static_cast<float>(*p); }
  INLINE_MEMBER void store(T* p, float v) { *p = static_cast<T>(v); }
};
template <>
struct Storage<float, c10::BFloat16> : ScalarStorage<c10::BFloat16> {};
template <>
struct Storage<float, c10::Half> : ScalarStorage<c10::Half> {};

template <class V>
struct Storage<V, c10::BFloat16> {
  using Bits = typename Integers<V, uint32_t>::type;
  using Packed = typename Integers<V, uint16_t>::type;
  INLINE_MEMBER V load(const c10::BFloat16* p) {
    Packed packed;
    std::memcpy(&packed, p, sizeof packed);
    return (V)(__builtin_convertvector(packed, Bits) << 16);
  }
  INLINE_MEMBER void store(c10::BFloat16* p, V v) {  // round to nearest, ties to even; NaN becomes the quiet NaN
    Bits bits = (Bits)v;
    bits = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
    bits = v != v ? Bits{} + 0x7fc0 : bits;
    Packed packed = __builtin_convertvector(bits, Packed);
    std::memcpy(p, &packed, sizeof packed);
  }
};

template <class V>
struct Storage<V, c10::Half> {
  using Bits = typename Integers<V, uint32_t>::type;
  using Packed = typename Integers<V, uint16_t>::type;
#if ANORM_BYTES == 64
  INLINE_MEMBER V load(const c10::Half* p) { return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  INLINE_MEMBER void store(c10::Half* p, V v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif ANORM_BYTES == 32
  INLINE_MEMBER V load(const c10::Half* p) { return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  INLINE_MEMBER void store(c10::Half* p, V v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  INLINE_MEMBER V load(const c10::Half* p) {
    Packed packed;
    std::memcpy(&packed, p, sizeof packed);
    Bits bits = __builtin_convertvector(packed, Bits);
    Bits magnitude = (bits & 0x7fff) << 13;
    Bits value = (Bits)((V)magnitude * 0x1p112f);  // re-biases the exponent, exact for subnormals too
    value = magnitude >= 0x0f800000u ? value | 0x7f800000u : value;  // inf and NaN
    return (V)(value | ((bits & 0x8000) << 16));
  }
  INLINE_MEMBER void store(c10::Half* p, V v) {  // round to nearest, ties to even
    Bits bits = (Bits)v;
    Bits sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    V scaled = (V)magnitude * 0x1p112f * 0x1p-110f;  // what overflows a half is now inf
    Bits exponent = (bits << 1) & 0xff000000u;
    exponent = exponent < 0x71000000u ? Bits{} + 0x71000000u : exponent;  // subnormals share one exponent
    Bits rounded = (Bits)((V)((exponent >> 1) + 0x07800000u) + scaled);   // the addition rounds at the last bit of a half
    Bits half = ((rounded >> 13) & 0x7c00) + (rounded & 0x0fff);
    half = magnitude > 0x7f800000u ? Bits{} + 0x7e00 : half;
    Packed packed = __builtin_convertvector(half | sign, Packed);
    std::memcpy(p, &packed, sizeof packed);
  }
#endif
};

template <class V, class T>
INLINE V load(const T* p) {
  return Storage<V, T>::load(p);
}
template <class V, class T>
INLINE void store(T* p, V v) {
  Storage<V, T>::store(p, v);
}

// ---- reductions over the lanes ---------------------------------------------------------------------------------------

// The sum of the lanes, always in the same order: halves are added until one lane is left.
template <class V>
INLINE typename Shape<V>::Lane lane_sum(V v) {
  using A = typename Shape<V>::Lane;
  if constexpr (lanes<V> == 1) {
    return v;
  } else if constexpr (lanes<V> == 2) {
    return v[0] + v[1];
  } else {
    typedef A Half __attribute__((vector_size(sizeof(V) / 2)));
    struct {
      Half low, high;
    } halves;
    std::memcpy(&halves, &v, sizeof v);
    return lane_sum<Half>(halves.low + halves.high);
  }
}

// The last `count` lanes of v, zero in the others: a load that overlaps what was already counted counts nothing twice.
template <class V>
INLINE V last_lanes(V v, int64_t count) {
  if constexpr (lanes<V> == 1) {
    return v;
  } else {
    using Lane = std::conditional_t<sizeof(typename Shape<V>::Lane) == 4, int32_t, int64_t>;
    typename Integers<V, Lane>::type index;
    for (Lane i = 0; i < Lane(lanes<V>); ++i) index[i] = i;
    return index >= Lane(lanes<V> - count) ? v : V{};
  }
}
