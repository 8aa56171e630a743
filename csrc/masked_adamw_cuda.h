#pragma once

#include <cstdint>
#include <string>

#include "device_table.h"

namespace longact {

// One AdamW step over every tensor of an uploaded table, in one kernel launch on `stream` (a
// cudaStream_t) of `device`, which is the calling thread's device from then on: the caller, whose CUDA
// runtime is another copy, has made it so already. Throws std::runtime_error with CUDA's own message and
// the remedy.
void masked_adamw_cuda(const AdamWLaunch& launch, int device, uintptr_t stream);

// Why the kernel cannot run on `device` of this machine, or "". Sets the device, as above.
std::string cuda_unusable(int device);

}  // namespace longact
