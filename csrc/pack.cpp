#include "pack.hpp"

#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace thinkmid {
namespace {

// Indices by falling key; equal keys keep their order, so that every rank and every build finds the same packing.
template <class T>
std::vector<int64_t> falling(const std::vector<T>& keys) {
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  return order;
}

}  // namespace

std::vector<int64_t> best_fit(const std::vector<int64_t>& lengths, int64_t capacity) {
  std::vector<int64_t> bin_of(lengths.size());
  std::set<std::pair<int64_t, int64_t>> open;  // (room left, bin)
  int64_t num_bins = 0;
  for (int64_t item : falling(lengths)) {
    const int64_t length = lengths[item];
    auto best = open.lower_bound({length, 0});
    int64_t room = capacity, bin = num_bins;
    if (best != open.end()) {
      std::tie(room, bin) = *best;
      open.erase(best);
    } else {
      ++num_bins;
    }
    open.insert({room - length, bin});
    bin_of[item] = bin;
  }
  return bin_of;
}

std::vector<int64_t> balance(const std::vector<double>& costs, const std::vector<int64_t>& lengths, int64_t capacity,
                             int64_t num_bins) {
  if (costs.size() != lengths.size()) throw std::invalid_argument("costs and lengths differ in number");
  std::vector<int64_t> bin_of(lengths.size());
  std::vector<int64_t> room(num_bins, capacity);
  using Bin = std::pair<double, int64_t>;  // (cost so far, bin)
  std::set<Bin> bins;
  for (int64_t b = 0; b < num_bins; ++b) bins.insert({0.0, b});
  for (int64_t item : falling(costs)) {
    auto at = std::find_if(bins.begin(), bins.end(), [&](const Bin& b) { return room[b.second] >= lengths[item]; });
    if (at == bins.end()) return {};
    const auto [cost, bin] = *at;
    bins.erase(at);
    bins.insert({cost + costs[item], bin});
    room[bin] -= lengths[item];
    bin_of[item] = bin;
  }
  return bin_of;
}

}  // namespace thinkmid
