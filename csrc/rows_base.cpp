#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#define THINKMID_ISA base
#define THINKMID_LANES 4
#include "rows.inl"
