#include "rows.hpp"

#include <algorithm>
#include <cmath>

#include "isa.hpp"

namespace thinkmid {

// As in thinkmid/kernels/policy.py, _rows_torch, where each choice has its reason.
Term policy_term(const Policy& k, int64_t r, double logp, double entropy) {
  const double adv = k.adv[r], old = k.old_logp ? k.old_logp[r] : logp;
  Term t{};
  t.ratio = std::exp(logp - old);
  const double plain = adv == 0 ? 0 : t.ratio * adv;
  const double bound = std::clamp(t.ratio, 1 - k.clip_low, 1 + k.clip_high) * adv;
  t.clipped = bound < plain;
  double objective = t.clipped ? bound : plain;
  const bool dual = adv < 0 && k.dual_clip * adv > objective;
  if (dual) objective = k.dual_clip * adv;
  const double slope = t.clipped || dual ? 0 : plain;
  t.gap = k.sampler_logp ? old - k.sampler_logp[r] : 0;
  const double raw = std::exp(t.gap);
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
  double total[9] = {}, gap_max = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const double h = entropy ? entropy[r] : 0;
    const Term t = policy_term(k, r, logp[r], h);
    loss[r] = t.loss, dlogp[r] = t.dlogp;
    if (k.mask && k.mask[r] == 0) continue;
    const bool high = t.clipped && k.adv[r] > 0;
    const double row[9] = {1,           t.ratio,           double(t.clipped && !high), double(high), std::abs(t.gap),
                           double(t.capped), t.importance, t.kl,                       h};
    for (int i = 0; i < 9; ++i) total[i] += row[i];
    if (row[4] > gap_max || std::isnan(row[4])) gap_max = row[4];  // and nothing exceeds NaN
  }
  std::copy(total, total + 9, sums);
  sums[9] = gap_max;
}

void run_rows(const Rows& rows) {
  auto* row = THINKMID_PICK(row);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows.num_rows; ++r) row(rows, r);
}

}  // namespace thinkmid
