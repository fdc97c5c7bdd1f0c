#include "rows.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "isa.hpp"

namespace thinkmid {

// As in thinkmid/kernels/policy.py, _rows_torch, where each choice has its reason.
Term policy_term(const Policy& k, int64_t r, double logp, double entropy) {
  const double adv = k.adv[r], old = k.old_logp ? k.old_logp[r] : logp;
  Term t{};
  t.ratio = logp == old ? 1 : std::exp(logp - old);
  const double plain = adv == 0 ? 0 : t.ratio * adv;
  const double bound = std::clamp(t.ratio, 1 - k.clip_low, 1 + k.clip_high) * adv;
  t.clipped = bound < plain;
  double objective = t.clipped ? bound : plain;
  const bool dual = adv < 0 && k.dual_clip * adv > objective;
  if (dual) objective = k.dual_clip * adv;
  const double slope = t.clipped || dual ? 0 : plain;
  t.gap = k.sampler_logp ? old - k.sampler_logp[r] : 0;
  const double raw = t.gap == 0 ? 1 : std::exp(t.gap);
  t.capped = raw >= k.is_cap;
  t.importance = t.capped ? k.is_cap : raw;
  t.loss = -t.importance * objective;
  t.dlogp = -t.importance * slope;
  if (k.ref_logp) {
    const double delta = k.ref_logp[r] - logp, up = std::exp(delta);
    t.kl = up - delta - 1;
    if (k.beta != 0) t.loss += k.beta * t.kl, t.dlogp += k.beta * (1 - up);
  }
  if (k.entropy_coef != 0) t.loss -= k.entropy_coef * entropy, t.dentropy = -k.entropy_coef;
  const double scale = (k.mask ? k.mask[r] : 1) * k.inv_denom;
  if (scale == 0) {  // whatever the row holds, NaN included
    t.loss = t.dlogp = t.dentropy = 0;
  } else {
    t.loss *= scale, t.dlogp *= scale, t.dentropy *= scale;
  }
  return t;
}

void run_policy(const Policy& k, int64_t num_rows, const float* logp, const float* entropy, float* loss, float* dlogp,
                float* sums) {
  // blocks of one size, summed in their order, whatever the number of threads
  const int64_t block = 1024, num_blocks = (num_rows + block - 1) / block;
  std::vector<std::array<double, 10>> parts(num_blocks);
#pragma omp parallel for schedule(static) if (num_blocks > 1)
  for (int64_t b = 0; b < num_blocks; ++b) {
    auto& part = parts[b];
    part.fill(0);
    for (int64_t r = b * block; r < std::min(num_rows, (b + 1) * block); ++r) {
      const double h = entropy ? entropy[r] : 0;
      const Term t = policy_term(k, r, logp[r], h);
      loss[r] = t.loss, dlogp[r] = t.dlogp;
      if (k.mask && k.mask[r] == 0) continue;
      const bool high = t.clipped && k.adv[r] > 0;
      const double gap = std::abs(t.gap);
      const double row[9] = {1,   t.ratio,          double(t.clipped && !high), double(high),
                             gap, double(t.capped), t.importance,               t.kl,
                             h};
      for (int i = 0; i < 9; ++i) part[i] += row[i];
      if (gap > part[9] || std::isnan(gap)) part[9] = gap;  // and nothing exceeds NaN
    }
  }
  double total[10] = {};
  for (const auto& part : parts) {
    for (int i = 0; i < 9; ++i) total[i] += part[i];
    if (part[9] > total[9] || std::isnan(part[9])) total[9] = part[9];
  }
  std::copy(total, total + 10, sums);
}

void run_rows(const Rows& rows) {
  auto* row = THINKMID_PICK(row);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows.num_rows; ++r) row(rows, r);
}

}  // namespace thinkmid
