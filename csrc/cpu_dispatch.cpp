// Chooses the instruction set by the processor that runs, not by the one that built.
#include <stdexcept>

#include "cpu_kernels.h"

namespace longact {

extern const CpuKernels kCpuKernels_baseline;
#if defined(LONGACT_X86_KERNELS)
extern const CpuKernels kCpuKernels_avx2;
#endif

const std::vector<const CpuKernels*>& available_cpu_kernels() {
  static const std::vector<const CpuKernels*> available = [] {
    std::vector<const CpuKernels*> found;
#if defined(LONGACT_X86_KERNELS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found.push_back(&kCpuKernels_avx2);
#endif
    found.push_back(&kCpuKernels_baseline);
    return found;
  }();
  return available;
}

const CpuKernels& cpu_kernels(const std::string& isa) {
  const auto& available = available_cpu_kernels();
  if (isa.empty()) return *available.front();
  std::string names;
  for (const CpuKernels* kernels : available) {
    if (isa == kernels->name) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("instruction set '" + isa + "' is not available here; choose one of: " + names);
}

}  // namespace longact
