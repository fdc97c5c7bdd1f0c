// The model's elementwise ops on fp32: RMSNorm, rotary embedding, SwiGLU, forward and backward.
// What each computes stands in thinkmid/kernels/ref.py. Everything is contiguous unless it has a stride.
#pragma once
#include <cstdint>

#include "isa.hpp"

namespace thinkmid {

// y = h / sqrt(mean(h^2) + eps) * weight with h = x + residual, or x where residual and h are null.
struct RmsForward {
  int64_t num_rows, width;
  const float *x, *residual, *weight;
  double eps;
  float *h, *y, *rstd;  // (num_rows, width) twice, (num_rows,) or null
};

// From dy, and dh or null, to dx and the sums of dweight over blocks of rows; dweight and its partial sums may be null.
struct RmsBackward {
  int64_t num_rows, width;
  const float *h, *weight, *rstd, *dy, *dh;
  float *dx, *dweight;
};

// Rotates (num_rows, heads, width) by the angles of each row, or backwards where sign is -1.
struct Rope {
  int64_t num_rows, heads, width, row_stride, head_stride;  // strides of x
  const float *x, *cos, *sin;                               // cos, sin (num_rows, width / 2)
  float sign;
  float* out;
};

struct Swiglu {
  const float *gate, *up, *dout;  // dout null: forward
  float *out, *dgate, *dup;       // forward writes out, backward the others
};

void rms_forward(const RmsForward& k);
void rms_backward(const RmsBackward& k);
void rope(const Rope& k);
void swiglu(const Swiglu& k, int64_t size);

// One instruction set's share of the work: rows or elements from begin to end.
#define THINKMID_OPS                                                                                                \
  void rms_forward_rows(const RmsForward& k, int64_t begin, int64_t end);                                           \
  void rms_backward_rows(const RmsBackward& k, int64_t begin, int64_t end, float* dweight);  /* null, or zeros */   \
  void rope_rows(const Rope& k, int64_t begin, int64_t end);                                                        \
  void swiglu_part(const Swiglu& k, int64_t begin, int64_t end);
namespace avx512 {
THINKMID_OPS
}
namespace avx2 {
THINKMID_OPS
}
namespace base {
THINKMID_OPS
}
#undef THINKMID_OPS

}  // namespace thinkmid
