#pragma once

#include <string>
#include <vector>

#include "tensor_table.h"

namespace longact {

// One AdamW step over every tensor of the table, with one gradient for each (docs/algorithm.md).
// Gradients are divided by `grad_scale`. `threads` is an upper bound; small tables run on the calling
// thread.
void masked_adamw_cpu(const std::vector<AdamWTensor>& tensors, const std::vector<const void*>& grads,
                      const std::vector<AdamWGroup>& groups, double grad_scale, int threads,
                      const std::string& isa);

}  // namespace longact
