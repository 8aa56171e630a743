// What the native core is told about tensors: raw addresses, sizes and types, and nothing of torch.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace longact {

// Hyperparameters of one param_group at one step.
struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
  const float* lr_tensor;  // on the GPU, read there in place of lr; or null
  uint64_t seed;           // of stochastic rounding
  bool maximize;
  bool zero_grad;   // inactive="zero_grad": unselected rows are updated with a gradient of zero
  bool stochastic;  // bf16 parameters without a master are rounded stochastically
};

// One parameter (a null `step`: none, the entry is skipped), seen as `num_rows` contiguous rows of
// `row_len` elements. The gradient has the same layout; so have the moments and the master, or, if
// `compact`, they hold one row for each selected row.
struct AdamWTensor {
  void* param;
  float* master;  // the parameter in fp32, which the update then reads and writes; or null
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;         // null without amsgrad
  float* step;                  // updates of this parameter so far
  int32_t* ages;                // updates of each row so far, indexed like the rows of the moments; or null
  const int32_t* rows;          // selected rows, ascending
  const int32_t* num_selected_tensor;  // on the GPU, how many of `rows` count now; null: num_selected of them
  int64_t num_selected;         // length of `rows`; negative: all rows are selected
  int64_t num_rows;
  int64_t row_len;
  int32_t group;
  uint32_t key;  // names the parameter in stochastic rounding
  DType param_dtype, grad_dtype, moment_dtype;
  bool compact;

  LONGACT_HOST_DEVICE bool all_selected() const { return num_selected < 0; }
  // Without rows or ages every element has the same coefficients.
  LONGACT_HOST_DEVICE bool flat() const { return all_selected() && ages == nullptr; }
  // zero_grad visits every row, freeze only the selected ones.
  LONGACT_HOST_DEVICE int64_t rows_to_visit(bool zero_grad) const {
    return all_selected() || zero_grad ? num_rows : num_selected;
  }
};

}  // namespace longact
