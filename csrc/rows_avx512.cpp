#include <algorithm>
#include <limits>

#define THINKMID_ISA avx512
#define THINKMID_LANES 16
#include "rows.inl"
