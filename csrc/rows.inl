// One row of the row kernel, for the instruction set of the file that includes this. See simd.hpp.
#include <algorithm>
#include <limits>
#include <vector>

#include "rows.hpp"
#include "simd.hpp"

namespace thinkmid::THINKMID_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 1024;  // scores between two looks at the maximum: 4 KiB, which stay in the first cache

// Calls f(v, offset, n) for the vectors of [begin, end); the last may hold n < kLanes numbers, filled up with -inf.
template <class F>
THINKMID_INLINE void for_each(const float* p, int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(load(p + i), i, kLanes);
  if (i < end) f(load_part(p + i, end - i, -kInf), i, end - i);
}

// exp(s - max) summed, and its product with s - max: what log-sum-exp and entropy are made of.
struct Sums {
  float max = -kInf;
  double of_exp = 0, of_product = 0;
};

// Turns scores into logits s, in place.
void to_logits(const Rows& k, float* z, float inv_temperature) {
  const float cap = k.softcap, inv_cap = cap > 0 ? 1 / cap : 0;
  for_each(z, 0, k.vocab, [&](vf s, int64_t i, int64_t n) {
    if (k.bias) s += get(k.bias + i, n);
    if (cap > 0) s = cap * vtanh(s * inv_cap);
    put(z + i, s * inv_temperature, n);
  });
}

// With kKeep, exp(s - maximum so far) is left in kept, and that maximum in block_max for each block: then the second
// sweep is a multiplication.
template <bool kEntropy, bool kKeep>
Sums sweep(const float* s, int64_t vocab, float* kept, float* block_max) {
  Sums sums;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, vocab);
    vf most = splat(-kInf);
    for_each(s, begin, end, [&](vf v, int64_t, int64_t) { most = vmax(v, most); });
    const float here = hmax(most);
    if (here == -kInf && sums.max == -kInf) {  // nothing but -inf so far, from which no difference may be formed
      if (kKeep) std::fill(kept + begin, kept + end, 0.0f), block_max[begin / kBlock] = 0;
      continue;
    }
    if (!(here <= sums.max)) {  // also for NaN, which stays
      const double down = double(sums.max) - here, shrink = std::exp(down);
      if (sums.of_exp > 0) sums.of_product = shrink * (sums.of_product + sums.of_exp * down);
      sums.of_exp *= shrink;
      sums.max = here;
    }
    if (kKeep) block_max[begin / kBlock] = sums.max;
    vf of_exp = splat(0), of_product = splat(0);
    const float max = sums.max;
    for_each(s, begin, end, [&](vf v, int64_t i, int64_t n) {
      const vf d = v - max, e = vexp_down(d);
      if (kKeep) put(kept + i, e, n);
      of_exp += e;
      // -inf has no part in the entropy, and 0 * -inf would be NaN
      if (kEntropy) of_product += select(e == 0, splat(0), e * d);
    });
    sums.of_exp += hsum(of_exp);
    if (kEntropy) sums.of_product += hsum(of_product);
  }
  return sums;
}

// d loss / d score = -p (g + e (log p + entropy)) / temperature * slope of the softcap, p = scale * exp(s - shift).
struct Slope {
  float g, e, shift, scale, lse, entropy, inv_temperature, to_tanh;
};

template <bool kEntropy, bool kSoftcap>
void gradient(const float* s, float* out, int64_t vocab, const Slope& k) {
  const float factor = -k.g * k.scale * k.inv_temperature, bend = -k.e * k.scale * k.inv_temperature;
  for_each(s, 0, vocab, [&](vf v, int64_t i, int64_t n) {
    const vf p = vexp(v - k.shift);
    vf d = p * factor;
    if (kEntropy) d += select(p == 0, splat(0), p * bend * (v - k.lse + k.entropy));
    if (kSoftcap) {
      const vf t = v * k.to_tanh;
      d *= 1.0f - t * t;
    }
    put(out + i, d, n);
  });
}

// The gradient from what sweep kept: e times a factor of its block.
void gradient_of_kept(float* out, int64_t vocab, const float* block_max, const Sums& sums, double factor) {
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, vocab);
    const float f = factor * std::exp(double(block_max[begin / kBlock]) - sums.max) / sums.of_exp;
    for_each(out, begin, end, [&](vf e, int64_t i, int64_t n) { put(out + i, e * f, n); });
  }
}

}  // namespace

void row(const Rows& k, int64_t r) {
  float *z = k.z + r * k.z_stride, *out = k.out + r * k.out_stride;
  const float inv_temperature = k.temperature ? 1 / k.temperature[r] : 1;
  if (k.bias || k.softcap > 0 || inv_temperature != 1) to_logits(k, z, inv_temperature);
  const float at_target = z[k.targets[r]];
  double logp, entropy = 0;
  const bool keeps = k.mode == Mode::kPolicy && k.softcap == 0 && k.policy.entropy_coef == 0;
  std::vector<float> block_max(keeps ? (k.vocab + kBlock - 1) / kBlock : 0);
  Sums sums;
  Slope slope{0, 0, 0, 1, 0, 0, inv_temperature, k.softcap > 0 ? 1 / (inv_temperature * k.softcap) : 0};
  if (k.mode == Mode::kGrad) {
    logp = k.logp[r];
    if (k.dlogp) slope.g = k.dlogp[r];
    if (k.dentropy) slope.e = k.dentropy[r], entropy = k.entropy[r];
    slope.shift = slope.lse = k.lse[r];
  } else {
    auto* first = keeps ? (k.entropy ? sweep<true, true> : sweep<false, true>)
                        : (k.entropy ? sweep<true, false> : sweep<false, false>);
    sums = first(z, k.vocab, out, block_max.data());
    const double lse = sums.max + std::log(sums.of_exp);
    logp = at_target - lse;
    entropy = k.entropy ? std::log(sums.of_exp) - sums.of_product / sums.of_exp : 0;
    k.logp[r] = logp, k.lse[r] = lse;
    if (k.entropy) k.entropy[r] = entropy;
    if (k.mode == Mode::kStats) return;
    const Term term = policy_term(k.policy, r, logp, entropy);
    slope.g = term.dlogp, slope.e = term.dentropy;
    slope.shift = sums.max, slope.scale = 1 / sums.of_exp, slope.lse = lse;
  }
  slope.entropy = entropy;
  if (slope.g == 0 && slope.e == 0) {
    std::fill(out, out + k.vocab, 0.0f);
    return;
  }
  const bool bent = slope.e != 0;
  if (keeps)
    gradient_of_kept(out, k.vocab, block_max.data(), sums, -double(slope.g) * inv_temperature);
  else
    (k.softcap > 0 ? (bent ? gradient<true, true> : gradient<false, true>)
                   : (bent ? gradient<true, false> : gradient<false, false>))(z, out, k.vocab, slope);
  // of the target, 1 - p is formed from its log-prob: near 1 the difference would lose what is left of it
  double d = -slope.g * std::expm1(logp);
  if (bent) d -= slope.e * std::exp(logp) * (logp + entropy);
  const double t = at_target * slope.to_tanh;
  out[k.targets[r]] = d * inv_temperature * (k.softcap > 0 ? 1 - t * t : 1);
}

}  // namespace thinkmid::THINKMID_ISA
