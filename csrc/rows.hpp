// The row kernel of the fused head: from a row of scores to its log-prob, and to the gradient written over it.
#pragma once
#include <cstdint>

namespace thinkmid {

// What a row's coefficient is made of, beside its log-prob. Pointers may be null but for adv.
struct Policy {
  const float *adv, *old_logp, *sampler_logp, *ref_logp, *mask;
  double inv_denom, clip_low, clip_high, is_cap, dual_clip, beta, entropy_coef;
};

// Of one row of the policy's loss.
struct Term {
  double loss, dlogp, dentropy;
  double ratio, gap, importance, kl;
  bool clipped, capped;
};

Term policy_term(const Policy& policy, int64_t row, double logp, double entropy);

enum class Mode { kStats, kGrad, kPolicy };

// (num_rows, vocab) scores z and gradients out, which may be z; everything else has num_rows elements, bias has vocab.
struct Rows {
  Mode mode;
  int64_t num_rows, vocab, z_stride, out_stride;
  float softcap;  // 0: none
  float *z, *out;
  const int64_t* targets;
  const float *temperature, *bias;  // null: 1 and 0
  float *logp, *entropy, *lse;      // kGrad reads them, the others write; entropy null: not wanted
  const float *dlogp, *dentropy;    // kGrad; null: 0
  Policy policy;                    // kPolicy
};

void run_rows(const Rows& rows);

// logp, entropy (or null), and loss, dlogp per row; sums in the order of thinkmid.kernels.policy.Metrics.
void run_policy(const Policy& policy, int64_t num_rows, const float* logp, const float* entropy, float* loss,
                float* dlogp, float* sums);

namespace avx512 {
void row(const Rows& rows, int64_t r);
}
namespace avx2 {
void row(const Rows& rows, int64_t r);
}
namespace base {
void row(const Rows& rows, int64_t r);
}

}  // namespace thinkmid
