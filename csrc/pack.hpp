// Packing of lengths into bins and balancing of costs over bins.
#pragma once
#include <cstdint>
#include <vector>

namespace thinkmid {

// Best-fit decreasing: the bin of each item. An item longer than the capacity gets a bin of its own.
std::vector<int64_t> best_fit(const std::vector<int64_t>& lengths, int64_t capacity);

// Longest processing time into num_bins: each item, dearest first, goes to the cheapest bin that has room.
// Empty when some item finds no room.
std::vector<int64_t> balance(const std::vector<double>& costs, const std::vector<int64_t>& lengths, int64_t capacity,
                             int64_t num_bins);

}  // namespace thinkmid
