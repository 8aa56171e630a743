// One element's AdamW update, shared by every native path.
//
// Compiled without fast-math and without fused multiply-add, so that every instruction set, thread
// count and device that rounds as IEEE 754 says gives the same bits.
#pragma once

#include <cmath>

#include "dtypes.h"
#include "tensor_table.h"

namespace longact {

// What the elements of one row have in common at one step.
template <typename T>
struct AdamWCoefficients {
  T grad_factor;  // sign of `maximize` over the gradient scale
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T eps;
  T decay;           // 1 - lr * weight_decay
  T step_size;       // lr / (1 - beta1^age)
  T inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^age)
};

namespace {

// `age` counts this update too: 1 at a row's first one. Bias corrections are computed in double.
template <typename T>
inline AdamWCoefficients<T> adamw_coefficients(const AdamWGroup& group, double grad_scale,
                                               double age) {
  const double bias1 = 1.0 - pow(group.beta1, age);
  const double bias2 = 1.0 - pow(group.beta2, age);
  AdamWCoefficients<T> c;
  c.grad_factor = static_cast<T>((group.maximize ? -1.0 : 1.0) / grad_scale);
  c.beta1 = static_cast<T>(group.beta1);
  c.one_minus_beta1 = static_cast<T>(1.0 - group.beta1);
  c.beta2 = static_cast<T>(group.beta2);
  c.one_minus_beta2 = static_cast<T>(1.0 - group.beta2);
  c.eps = static_cast<T>(group.eps);
  c.decay = static_cast<T>(1.0 - group.lr * group.weight_decay);
  c.step_size = static_cast<T>(group.lr / bias1);
  c.inv_sqrt_bias2 = static_cast<T>(1.0 / sqrt(bias2));
  return c;
}

LONGACT_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
LONGACT_HOST_DEVICE double square_root(double x) { return sqrt(x); }

// `kZeroGrad`: the gradient is taken as zero and not read. `kAmsgrad`: `vmax` holds the running
// maximum of `v`, which then divides.
template <typename T, bool kZeroGrad, bool kAmsgrad>
LONGACT_HOST_DEVICE void adamw_element(const AdamWCoefficients<T>& c, T& p, const T* grad, T& m, T& v,
                                       T* vmax) {
  const T g = kZeroGrad ? T(0) : *grad * c.grad_factor;
  m = c.beta1 * m + c.one_minus_beta1 * g;
  v = c.beta2 * v + c.one_minus_beta2 * (g * g);
  T second = v;
  if (kAmsgrad) {
    // Written so that a NaN in either wins, as torch.maximum has it.
    *vmax = (v > *vmax || v != v) ? v : *vmax;
    second = *vmax;
  }
  p = c.decay * p - c.step_size * m / (square_root(second) * c.inv_sqrt_bias2 + c.eps);
}

}  // namespace
}  // namespace longact
