#include "decode.hpp"

#include <algorithm>
#include <vector>

namespace thinkmid {

void decode_attention(const Decode& k) {
  auto* head = THINKMID_PICK(decode_head);
  int64_t longest = 0;
  for (int64_t row = 0; row < k.num_rows; ++row) longest = std::max(longest, k.count[row] + 1 + k.prefix_length[row]);
  const int64_t heads = k.num_rows * k.num_keys;
  // starting the threads costs as much as some 30 000 products
#pragma omp parallel if (heads * longest * k.group * k.width > 32768)
  {
    std::vector<float> scores(4 * (longest + 32));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads; ++i) head(k, i / k.num_keys, i % k.num_keys, scores.data());
  }
}

}  // namespace thinkmid
