#include <algorithm>
#include <cmath>
#include <limits>

#define THINKMID_ISA base
#define THINKMID_LANES 4
#include "decode.inl"
