// The model's ops for the instruction set of the file that includes this. See simd.hpp.
#include <algorithm>
#include <cmath>

#include "ops.hpp"
#include "simd.hpp"

namespace thinkmid::THINKMID_ISA {
namespace {

// numbers summed in fp32 before the sum goes into a double
constexpr int64_t kBlock = 1024;

// Each op works on a copy of its arguments: through a reference every store might change them.

// Calls f(offset, n) for the vectors of [begin, end), the last of which may hold n < kLanes numbers.
template <class F>
THINKMID_INLINE void for_each(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, end - i);
}

// Sum of f(offset, n) over [0, size), lane by lane in blocks of kBlock. f gives 0 past the end.
template <class F>
THINKMID_INLINE double sum(int64_t size, F f) {
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    vf even = splat(0), odd = splat(0);  // two chains: an addition takes four cycles
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      even += f(i, kLanes);
      odd += f(i + kLanes, kLanes);
    }
    for_each(i, end, [&](int64_t j, int64_t n) __attribute__((always_inline)) { even += f(j, n); });
    total += hsum(even + odd);
  }
  return total;
}

}  // namespace

void rms_forward_rows(const RmsForward& args, int64_t begin, int64_t end) {
  const RmsForward k = args;
  const int64_t width = k.width;
  for (int64_t r = begin; r < end; ++r) {
    const float* x = k.x + r * width;
    double squares;
    if (k.residual) {
      const float* residual = k.residual + r * width;
      float* h = k.h + r * width;
      squares = sum(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const vf v = get(x + i, n) + get(residual + i, n);
        put(h + i, v, n);
        return v * v;
      });
      x = h;
    } else {
      squares = sum(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const vf v = get(x + i, n);
        return v * v;
      });
    }
    const float rstd = 1 / std::sqrt(squares / width + k.eps);
    float* y = k.y + r * width;
    for_each(0, width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      put(y + i, get(x + i, n) * (rstd * get(k.weight + i, n)), n);
    });
    if (k.rstd) k.rstd[r] = rstd;
  }
}

void rms_backward_rows(const RmsBackward& args, int64_t begin, int64_t end, float* dweight) {
  const RmsBackward k = args;
  const int64_t width = k.width;
  for (int64_t r = begin; r < end; ++r) {
    const float *h = k.h + r * width, *dy = k.dy + r * width, *dh = k.dh ? k.dh + r * width : nullptr;
    float* dx = k.dx + r * width;
    const float rstd = k.rstd[r];
    const double dot = sum(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      return get(dy + i, n) * get(k.weight + i, n) * get(h + i, n);
    });
    const float back = dot / width * rstd * rstd;  // how much of h goes back, before the factor rstd
    for_each(0, width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const vf hi = get(h + i, n), dyi = get(dy + i, n);
      vf v = (dyi * get(k.weight + i, n) - hi * back) * rstd;
      if (dh) v += get(dh + i, n);
      put(dx + i, v, n);
      if (dweight) put(dweight + i, get(dweight + i, n) + dyi * (hi * rstd), n);
    });
  }
}

void rope_rows(const Rope& args, int64_t begin, int64_t end) {
  const Rope k = args;
  const int64_t half = k.width / 2;
  for (int64_t t = begin; t < end; ++t) {
    const float *cos = k.cos + t * half, *sin = k.sin + t * half;
    for (int64_t head = 0; head < k.heads; ++head) {
      const float* x = k.x + t * k.row_stride + head * k.head_stride;
      float* out = k.out + (t * k.heads + head) * k.width;
      for_each(0, half, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const vf a = get(x + i, n), b = get(x + half + i, n), c = get(cos + i, n), s = get(sin + i, n) * k.sign;
        put(out + i, a * c - b * s, n);
        put(out + half + i, b * c + a * s, n);
      });
    }
  }
}

void swiglu_part(const Swiglu& args, int64_t begin, int64_t end) {
  const Swiglu k = args;
  if (!k.dout) {
    for_each(begin, end, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const vf g = get(k.gate + i, n);
      put(k.out + i, g / (1.0f + vexp(-g)) * get(k.up + i, n), n);
    });
    return;
  }
  for_each(begin, end, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf g = get(k.gate + i, n), u = get(k.up + i, n), d = get(k.dout + i, n);
    const vf s = 1.0f / (1.0f + vexp(-g));
    put(k.dgate + i, d * u * (s * (1.0f + g * (1.0f - s))), n);
    put(k.dup + i, d * (g * s), n);
  });
}

}  // namespace thinkmid::THINKMID_ISA
