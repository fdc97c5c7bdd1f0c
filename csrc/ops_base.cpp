#define THINKMID_ISA base
#define THINKMID_LANES 4
#include "ops.inl"
