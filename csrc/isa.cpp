#include "isa.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace thinkmid {
namespace {

const char* const kNames[] = {"base", "avx2", "avx512"};

Isa widest() {
#if defined(THINKMID_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::base;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return Isa::avx512;
  return Isa::avx2;
#else
  return Isa::base;
#endif
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{widest()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

std::string isa_name() { return kNames[static_cast<int>(isa())]; }

std::vector<std::string> isas() { return {kNames, kNames + static_cast<int>(widest()) + 1}; }

void use_isa(const std::string& name) {
  const std::vector<std::string> names = isas();
  const auto at = std::find(names.begin(), names.end(), name);
  if (at == names.end()) throw std::invalid_argument("this CPU does not run '" + name + "'");
  chosen() = static_cast<Isa>(at - names.begin());
}

}  // namespace thinkmid
