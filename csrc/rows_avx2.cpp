#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.hpp"

#if defined(THINKMID_X86)
#define THINKMID_ISA avx2
#define THINKMID_LANES 8
#include "rows.inl"
#endif
