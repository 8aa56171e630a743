// What the native core is told about tensors: raw addresses, sizes and types, and nothing of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace longact {

// Hyperparameters of one param_group at one step.
struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  bool zero_grad;  // inactive="zero_grad": unselected rows are updated with a gradient of zero
};

// One parameter (a null `step`: none, the entry is skipped), seen as `num_rows` contiguous rows of `row_len` elements. The gradient has the same
// layout; so have the moments, or, if `compact`, they hold one row for each selected row.
struct AdamWTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  float* step;           // updates of this parameter so far
  int32_t* ages;         // updates of each row so far, indexed like the rows of the moments; or null
  const int32_t* rows;   // selected rows, ascending
  int64_t num_selected;  // length of rows; negative: all rows are selected
  int64_t num_rows;
  int64_t row_len;
  int32_t group;
  DType param_dtype, grad_dtype, moment_dtype;
  bool compact;

  bool all_selected() const { return num_selected < 0; }
};

}  // namespace longact
