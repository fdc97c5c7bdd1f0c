// One key head of one sequence, for the instruction set of the file that includes this. See simd.hpp.
#include <algorithm>
#include <cmath>
#include <limits>

#include "decode.hpp"
#include "simd.hpp"

namespace thinkmid::THINKMID_ISA {
namespace {

// Keys that are seen, [skipped, length), counted from `start`, where a vector begins.
struct Seen {
  int64_t start, skipped, length;
};

Seen seen(int64_t oldest, int64_t length) {
  if (oldest >= length) return {0, 0, 0};
  const int64_t start = std::max<int64_t>(oldest, 0) / kLanes * kLanes;
  return {start, std::max<int64_t>(oldest, 0) - start, length - start};
}

// q (kGroup, width) times keys (width, max): scores (kGroup, stride) of the first `length` positions, -inf for the first
// `skipped` and up to the end of the last vector.
template <int kGroup>
THINKMID_INLINE void score(const float* q, const float* keys, int64_t width, int64_t max, int64_t skipped,
                           int64_t length, float scale, float* scores, int64_t stride) {
  for (int64_t j = 0; j < length; j += kLanes) {
    vf sum[kGroup];
    for (int g = 0; g < kGroup; ++g) sum[g] = splat(0);
    for (int64_t c = 0; c < width; ++c) {
      const vf key = load(keys + c * max + j);
      for (int g = 0; g < kGroup; ++g) sum[g] += q[g * width + c] * key;
    }
    for (int g = 0; g < kGroup; ++g) {
      store(scores + g * stride + j, sum[g] * scale);
      for (int64_t i = length; i < j + kLanes; ++i) scores[g * stride + i] = -std::numeric_limits<float>::infinity();
    }
  }
  for (int g = 0; g < kGroup; ++g)
    for (int64_t i = 0; i < skipped; ++i) scores[g * stride + i] = -std::numeric_limits<float>::infinity();
}

// exp(scores - max) in place, and one over their sum.
THINKMID_INLINE float soften(float* scores, int64_t size) {
  vf most = splat(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < size; j += kLanes) most = vmax(load(scores + j), most);
  const float max = hmax(most);
  vf sum = splat(0);
  for (int64_t j = 0; j < size; j += kLanes) {
    const vf e = vexp(load(scores + j) - max);
    store(scores + j, e);
    sum += e;
  }
  return 1 / hsum(sum);
}

// out (kGroup, width) += p (kGroup, stride) times values (length, width), columns [c, c + n).
template <int kGroup>
THINKMID_INLINE void mix(const float* p, int64_t stride, const float* values, int64_t width, int64_t length, int64_t c,
                         int64_t n, vf* out) {
  for (int64_t j = 0; j < length; ++j) {
    const float* at = values + j * width + c;
    const vf value = get(at, n);
    for (int g = 0; g < kGroup; ++g) out[g] += p[g * stride + j] * value;
  }
}

template <int kGroup>
void heads(const Decode& k, int64_t row, int64_t head, int64_t first, float* scores) {
  const int64_t width = k.width, num_own = k.count[row] + 1, num_before = k.prefix_length[row];
  const int64_t oldest = k.window ? num_before + num_own - k.window : 0;  // the first key that is seen, of both
  const Seen before = seen(oldest, num_before), own = seen(oldest - num_before, num_own);
  const int64_t prefix_at = k.slot[row] * k.num_keys + head, own_at = row * k.num_keys + head;
  const float* prefix_k = k.prefix_k + prefix_at * width * k.prefix_max + before.start;
  const float* prefix_v = k.prefix_v + (prefix_at * k.prefix_max + before.start) * width;
  const float* own_k = k.own_k + own_at * width * k.own_max + own.start;
  const float* own_v = k.own_v + (own_at * k.own_max + own.start) * width;
  const int64_t own_start = (before.length + kLanes - 1) / kLanes * kLanes;
  const int64_t stride = own_start + (own.length + kLanes - 1) / kLanes * kLanes;
  const int64_t at = (own_at * k.group + first) * width;
  const float scale = 1 / std::sqrt(float(width));
  score<kGroup>(k.q + at, prefix_k, width, k.prefix_max, before.skipped, before.length, scale, scores, stride);
  score<kGroup>(k.q + at, own_k, width, k.own_max, own.skipped, own.length, scale, scores + own_start, stride);
  float inverse[kGroup];
  for (int g = 0; g < kGroup; ++g) inverse[g] = soften(scores + g * stride, stride);
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t n = std::min(kLanes, width - c);
    vf out[kGroup];
    for (int g = 0; g < kGroup; ++g) out[g] = splat(0);
    mix<kGroup>(scores, stride, prefix_v, width, before.length, c, n, out);
    mix<kGroup>(scores + own_start, stride, own_v, width, own.length, c, n, out);
    for (int g = 0; g < kGroup; ++g) put(k.out + at + g * width + c, out[g] * inverse[g], n);
  }
}

}  // namespace

void decode_head(const Decode& args, int64_t row, int64_t head, float* scores) {
  const Decode k = args;
  const int64_t at = row * k.num_keys + head, width = k.width, count = k.count[row];
  for (int64_t c = 0; c < width; ++c) {
    k.own_k[(at * width + c) * k.own_max + count] = k.k[at * width + c];
    k.own_v[(at * k.own_max + count) * width + c] = k.v[at * width + c];
  }
  int64_t g = 0;
  for (; g + 4 <= k.group; g += 4) heads<4>(k, row, head, g, scores);
  for (; g + 2 <= k.group; g += 2) heads<2>(k, row, head, g, scores);
  for (; g < k.group; ++g) heads<1>(k, row, head, g, scores);
}

}  // namespace thinkmid::THINKMID_ISA
