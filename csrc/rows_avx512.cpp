#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.hpp"

#if defined(THINKMID_X86)
#define THINKMID_ISA avx512
#define THINKMID_LANES 16
#include "rows.inl"
#endif
