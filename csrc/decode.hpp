// Attention of the newest token of each sequence over its prefix, which siblings share, and over its own tokens.
#pragma once
#include <cstdint>

#include "isa.hpp"

namespace thinkmid {

// B sequences, K key heads of `group` query heads each, width C. Keys lie transposed, so that a vector holds the same
// number of neighbouring keys: (rows, K, C, max), values (rows, K, max, C); max is a multiple of 16, all of it finite.
struct Decode {
  int64_t num_rows, num_keys, group, width, own_max, prefix_max;
  int64_t window;              // newest keys that a query sees, its own included; 0: all
  const float *q, *k, *v;      // (B, K * group, C), (B, K, C): of the newest tokens
  float *own_k, *own_v;        // where the newest keys and values are put, at position count
  const float *prefix_k, *prefix_v;
  const int64_t *count, *slot, *prefix_length;  // (B,): tokens before the newest one; row of the prefix and its tokens
  float* out;                  // (B, K * group, C)
};

void decode_attention(const Decode& decode);

namespace avx512 {
void decode_head(const Decode& args, int64_t row, int64_t head, float* scores);
}
namespace avx2 {
void decode_head(const Decode& args, int64_t row, int64_t head, float* scores);
}
namespace base {
void decode_head(const Decode& args, int64_t row, int64_t head, float* scores);
}

}  // namespace thinkmid
