// Which of the instruction sets that simd.hpp is compiled for runs on this CPU.
#pragma once
#include <string>
#include <vector>

// the wide ones need GCC's target pragma; everything else runs the baseline
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define THINKMID_X86 1
#endif

namespace thinkmid {

enum class Isa { base, avx2, avx512 };

// What runs: the widest that the CPU has, unless use_isa said otherwise.
Isa isa();
std::string isa_name();

// All that this CPU can run, narrowest first.
std::vector<std::string> isas();

// For tests: from now on run this one. Throws std::invalid_argument for a name that is not in isas().
void use_isa(const std::string& name);

}  // namespace thinkmid

// The function of the instruction set that runs: THINKMID_PICK(f)(args) for thinkmid::avx512::f and its siblings.
#if defined(THINKMID_X86)
#define THINKMID_PICK(f)                                        \
  (::thinkmid::isa() == ::thinkmid::Isa::avx512 ? &::thinkmid::avx512::f \
   : ::thinkmid::isa() == ::thinkmid::Isa::avx2 ? &::thinkmid::avx2::f   \
                                                : &::thinkmid::base::f)
#else
#define THINKMID_PICK(f) (&::thinkmid::base::f)
#endif
