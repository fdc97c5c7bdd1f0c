#include "ops.hpp"

#include <algorithm>
#include <vector>

namespace thinkmid {
namespace {

// below this many numbers starting the threads costs more than they bring: steps of decoding are that small
constexpr int64_t kSerial = 32768;

// f(begin, end) over [0, size) by as many threads as there are, or by this one if the work is small.
template <class F>
void share(int64_t size, int64_t width, F f) {
  if (size * width <= kSerial) return f(0, size);
  const int64_t part = std::max<int64_t>(1, kSerial / 4 / std::max<int64_t>(1, width));
  const int64_t parts = (size + part - 1) / part;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < parts; ++p) f(p * part, std::min(size, (p + 1) * part));
}

}  // namespace

void rms_forward(const RmsForward& k) {
  const auto rows = THINKMID_PICK(rms_forward_rows);
  share(k.num_rows, k.width, [&](int64_t begin, int64_t end) { rows(k, begin, end); });
}

void rms_backward(const RmsBackward& k) {
  const auto rows = THINKMID_PICK(rms_backward_rows);
  if (!k.dweight) {
    share(k.num_rows, k.width, [&](int64_t begin, int64_t end) { rows(k, begin, end, nullptr); });
    return;
  }
  // at most 64 blocks of at least 16 rows, whatever the number of threads: the order of the sum stays
  const int64_t part = std::max<int64_t>(16, (k.num_rows + 63) / 64);
  const int64_t parts = (k.num_rows + part - 1) / part;
  std::vector<float> sums(parts * k.width);  // zeros
#pragma omp parallel for schedule(static) if (k.num_rows * k.width > kSerial)
  for (int64_t p = 0; p < parts; ++p)
    rows(k, p * part, std::min(k.num_rows, (p + 1) * part), sums.data() + p * k.width);
  std::vector<double> total(k.width);
  for (int64_t p = 0; p < parts; ++p)
    for (int64_t i = 0; i < k.width; ++i) total[i] += sums[p * k.width + i];
  std::copy(total.begin(), total.end(), k.dweight);
}

void rope(const Rope& k) {
  const auto rows = THINKMID_PICK(rope_rows);
  share(k.num_rows, k.heads * k.width, [&](int64_t begin, int64_t end) { rows(k, begin, end); });
}

void swiglu(const Swiglu& k, int64_t size) {
  const auto part = THINKMID_PICK(swiglu_part);
  share(size, 1, [&](int64_t begin, int64_t end) { part(k, begin, end); });
}

}  // namespace thinkmid
