#include <algorithm>
#include <limits>

#define THINKMID_ISA avx2
#define THINKMID_LANES 8
#include "rows.inl"
