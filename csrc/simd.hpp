// Vectors of fp32 without intrinsics, for one instruction set per translation unit.
//
// A translation unit defines THINKMID_ISA (avx512, avx2 or base: the namespace, so that equal names of different
// instruction sets never meet) and THINKMID_LANES, includes every standard header it needs, and this header last.
// What follows is compiled for that instruction set. Standard headers come first because their inline functions are
// shared by the whole library: compiled here, they could be the copy that a lesser CPU runs.
#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(THINKMID_ISA) || !defined(THINKMID_LANES)
#error "define THINKMID_ISA and THINKMID_LANES before simd.hpp"
#endif

#if THINKMID_LANES == 16
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#elif THINKMID_LANES == 8
#pragma GCC target("avx2,fma")
#endif

#define THINKMID_INLINE static inline __attribute__((always_inline))

namespace thinkmid::THINKMID_ISA {

constexpr int64_t kLanes = THINKMID_LANES;

typedef float vf __attribute__((vector_size(4 * THINKMID_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * THINKMID_LANES)));  // also the type of a comparison: 0 or -1
typedef uint32_t vu __attribute__((vector_size(4 * THINKMID_LANES)));

THINKMID_INLINE vf splat(float x) { return vf{} + x; }

THINKMID_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

THINKMID_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// The first n < kLanes numbers at p, the rest is fill.
THINKMID_INLINE vf load_part(const float* p, int64_t n, float fill = 0) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}

THINKMID_INLINE void store_part(float* p, vf v, int64_t n) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Of a vector, or of the n < kLanes numbers that are left of one.
THINKMID_INLINE vf get(const float* p, int64_t n) { return n == kLanes ? load(p) : load_part(p, n); }

THINKMID_INLINE void put(float* p, vf v, int64_t n) {
  if (n == kLanes)
    store(p, v);
  else
    store_part(p, v, n);
}

// a where mask is -1, b where it is 0.
THINKMID_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }

THINKMID_INLINE vf vabs(vf x) { return (vf)((vu)x & 0x7fffffffu); }

// The greater one; NaN if either is NaN.
THINKMID_INLINE vf vmax(vf a, vf b) { return ((a > b) | (a != a)) ? a : b; }

// Lane i becomes lane i + by, round and round.
template <int32_t by>
THINKMID_INLINE vf rotate(vf v) {
#if defined(__clang__)
  vf moved;
  for (int64_t i = 0; i < kLanes; ++i) moved[i] = v[(i + by) % kLanes];
  return moved;
#else
#if THINKMID_LANES == 16
  constexpr vi iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif THINKMID_LANES == 8
  constexpr vi iota = {0, 1, 2, 3, 4, 5, 6, 7};
#else
  constexpr vi iota = {0, 1, 2, 3};
#endif
  return __builtin_shuffle(v, (iota + by) & (THINKMID_LANES - 1));
#endif
}

// Sum of the lanes, halves onto halves: the same order wherever it is called.
THINKMID_INLINE float hsum(vf v) {
  if constexpr (kLanes >= 16) v += rotate<8>(v);
  if constexpr (kLanes >= 8) v += rotate<4>(v);
  v += rotate<2>(v);
  v += rotate<1>(v);
  return v[0];
}

// The greatest lane; NaN if any is NaN.
THINKMID_INLINE float hmax(vf v) {
  if constexpr (kLanes >= 16) v = vmax(v, rotate<8>(v));
  if constexpr (kLanes >= 8) v = vmax(v, rotate<4>(v));
  v = vmax(v, rotate<2>(v));
  v = vmax(v, rotate<1>(v));
  return v[0];
}

// e^x of x <= 0 within 1 ulp. 0 below -86.99 (where e^x < 1.7e-38), NaN stays NaN.
THINKMID_INLINE vf vexp_down(vf x) {
  const vf bottom = splat(-87.5f);
  x = bottom > x ? bottom : x;  // false for NaN, which passes
  // adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits
  const vf shifted = x * 1.44269504f + 12582912.0f;
  const vf n = shifted - 12582912.0f;
  // ln 2 in two parts, of which n times the first is exact
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // 2 e^r, |r| <= ln(2) / 2; minimax, error 0.05 ulp
  vf p = splat(2 * 0.0013814465f);
  p = p * r + 2 * 0.008368781f;
  p = p * r + 2 * 0.041668393f;
  p = p * r + 2 * 0.1666652f;
  p = p * r + 2 * 0.49999994f;
  p = (p * r) * r + (r + r) + 2.0f;
  // 2^(n-1) by its exponent: the factor 2 above keeps n = 128 in range, n = -126 gives 0
  return p * (vf)(((vu)shifted << 23) + (126u << 23));
}

// The same of any x; inf above 88.72.
THINKMID_INLINE vf vexp(vf x) {
  const vf top = splat(89.0f);
  return vexp_down(top < x ? top : x);
}

// tanh within 2 ulp, NaN stays NaN.
THINKMID_INLINE vf vtanh(vf u) {
  const vf a = vabs(u);
  // 1 - 2 / (e^2a + 1) cancels near 0: there an odd polynomial, error 0.1 ulp
  const vf far = 1.0f - 2.0f / (vexp(a + a) + 1.0f);
  const vf s = u * u;
  vf q = splat(-0.0057049785f);
  q = q * s + 0.020639079f;
  q = q * s + -0.05373971f;
  q = q * s + 0.13331442f;
  q = q * s + -0.3333328f;
  const vf near = u + u * (s * q);
  const vf signed_far = (vf)((vu)far | ((vu)u & 0x80000000u));
  return a < 0.625f ? near : signed_far;
}

}  // namespace thinkmid::THINKMID_ISA
