// The Python module longact._native: addresses in, no torch. Its callers, longact/kernels/*.py, have
// checked every tensor before its address comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "channel_magnitude_cpu.h"
#include "device_table.h"
#include "gather_columns_cpu.h"
#include "masked_adamw_cpu.h"
#include "masked_adamw_cuda.h"

namespace py = pybind11;

namespace longact {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// lr, lr_tensor, beta1, beta2, eps, weight_decay, maximize, zero_grad, stochastic, seed
using GroupTuple = std::tuple<double, Address, double, double, double, double, bool, bool, bool, uint64_t>;

std::vector<AdamWGroup> native_groups(const std::vector<GroupTuple>& tuples) {
  std::vector<AdamWGroup> groups(tuples.size());
  for (size_t i = 0; i < tuples.size(); ++i) {
    AdamWGroup& g = groups[i];
    Address lr_tensor;
    std::tie(g.lr, lr_tensor, g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize, g.zero_grad, g.stochastic,
             g.seed) = tuples[i];
    g.lr_tensor = pointer<const float>(lr_tensor);
  }
  return groups;
}

// The tensors of an optimizer on one device, kept between steps; an entry is set again only when it
// changes.
class AdamWTable {
 public:
  void resize(size_t size) {
    tensors_.resize(size);
    changed_ = true;
  }
  size_t size() const { return tensors_.size(); }
  void clear(size_t index) {
    tensors_.at(index) = {};
    changed_ = true;
  }

  void set(size_t index, Address param, Address master, Address exp_avg, Address exp_avg_sq,
           Address max_exp_avg_sq, Address step, Address ages, Address rows, Address num_selected_tensor,
           int64_t num_selected, int64_t num_rows, int64_t row_len, int param_dtype, int grad_dtype,
           int moment_dtype, int group, uint32_t key, bool compact) {
    AdamWTensor& t = tensors_.at(index);
    t.param = pointer<void>(param);
    t.master = pointer<float>(master);
    t.exp_avg = pointer<void>(exp_avg);
    t.exp_avg_sq = pointer<void>(exp_avg_sq);
    t.max_exp_avg_sq = pointer<void>(max_exp_avg_sq);
    t.step = pointer<float>(step);
    t.ages = pointer<int32_t>(ages);
    t.rows = pointer<const int32_t>(rows);
    t.num_selected_tensor = pointer<const int32_t>(num_selected_tensor);
    t.num_selected = num_selected;
    t.num_rows = num_rows;
    t.row_len = row_len;
    t.group = group;
    t.key = key;
    t.param_dtype = static_cast<DType>(param_dtype);
    t.grad_dtype = static_cast<DType>(grad_dtype);
    t.moment_dtype = static_cast<DType>(moment_dtype);
    t.compact = compact;
    changed_ = true;
  }

  // On the CPU.
  void update(const std::vector<Address>& grads, const std::vector<GroupTuple>& groups, double grad_scale,
              int threads, const std::string& isa) {
    const std::vector<AdamWGroup> native = native_groups(groups);
    const std::vector<const void*> pointers = checked_grads(grads, native);
    py::gil_scoped_release release;
    masked_adamw_cpu(tensors_, pointers, native, grad_scale, threads, isa);
  }

  // For the GPU: how many bytes of the packed table must be uploaded before the next launch.
  size_t pack(const std::vector<Address>& grads, const std::vector<GroupTuple>& groups) {
    const std::vector<AdamWGroup> native = native_groups(groups);
    const size_t bytes = device_table_.pack(tensors_, checked_grads(grads, native), native, changed_);
    changed_ = false;
    return bytes;
  }
  size_t packed_size() const { return device_table_.image().size(); }
  void write(Address to, size_t bytes) const {
    if (bytes > packed_size()) throw std::invalid_argument("write: more bytes than were packed");
    std::memcpy(pointer<void>(to), device_table_.image().data(), bytes);
  }
  // (chunks, which are the thread blocks of the one launch; bytes that a step reads and writes)
  std::tuple<int64_t, int64_t> plan() const { return {device_table_.num_chunks(), device_table_.bytes()}; }

#if defined(LONGACT_HAS_CUDA)
  void launch(Address table, Address blocks_done, Address grad_scale, Address found_inf, int device,
              Address stream) const {
    AdamWLaunch launch = device_table_.launch(pointer<const char>(table));
    launch.blocks_done = pointer<uint32_t>(blocks_done);
    launch.grad_scale = pointer<const float>(grad_scale);
    launch.found_inf = pointer<const float>(found_inf);
    masked_adamw_cuda(launch, device, stream);
  }
#endif

 private:
  std::vector<const void*> checked_grads(const std::vector<Address>& grads,
                                         const std::vector<AdamWGroup>& groups) const {
    if (grads.size() != tensors_.size()) {
      throw std::invalid_argument("update: " + std::to_string(grads.size()) + " gradients for " +
                                  std::to_string(tensors_.size()) + " parameters");
    }
    std::vector<const void*> pointers;
    pointers.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      const int32_t group = tensors_[i].group;
      if (group < 0 || static_cast<size_t>(group) >= groups.size()) {
        throw std::invalid_argument("update: no group " + std::to_string(group));
      }
      pointers.push_back(pointer<const void>(grads[i]));
    }
    return pointers;
  }

  std::vector<AdamWTensor> tensors_;
  bool changed_ = true;  // since the last pack
  DeviceTable device_table_;
};

void channel_magnitude(int metric, int dtype, Address y, int64_t stride, Address mask, int64_t tokens,
                       int64_t channels, Address total, Address counted, int threads, const std::string& isa) {
  py::gil_scoped_release release;
  const int64_t count =
      channel_magnitude_cpu(static_cast<Metric>(metric), static_cast<DType>(dtype), pointer<const void>(y),
                            stride, pointer<const uint8_t>(mask), tokens, channels, pointer<float>(total),
                            threads, isa);
  if (counted != 0) *pointer<int64_t>(counted) += count;
}

void gather_columns(int64_t element_size, Address from, int64_t stride, int64_t tokens, int64_t channels,
                    Address columns, int64_t num_columns, Address to, int threads) {
  py::gil_scoped_release release;
  gather_columns_cpu(element_size, pointer<const void>(from), stride, tokens, channels,
                     pointer<const int32_t>(columns), num_columns, pointer<void>(to), threads);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : available_cpu_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of longact. Private: use longact.FusedMaskedAdam and torch.ops.longact.";
  m.def("instruction_sets", &instruction_sets, "Usable here, fastest first.");
  m.attr("openmp") =
#if defined(_OPENMP)
      true;
#else
      false;
#endif
  m.def("channel_magnitude", &channel_magnitude, py::arg("metric"), py::arg("dtype"), py::arg("y"),
        py::arg("stride"), py::arg("mask"), py::arg("tokens"), py::arg("channels"), py::arg("total"),
        py::arg("counted"), py::arg("threads"), py::arg("isa") = "");
  m.def("gather_columns", &gather_columns, py::arg("element_size"), py::arg("source"), py::arg("stride"),
        py::arg("tokens"), py::arg("channels"), py::arg("columns"), py::arg("num_columns"), py::arg("to"),
        py::arg("threads"));
#if defined(LONGACT_HAS_CUDA)
  m.attr("cuda") = LONGACT_CUDA_ARCHS;
  m.def("cuda_unusable", &cuda_unusable, py::arg("device"), "Why kernels cannot run on it, or ''.");
#else
  m.attr("cuda") = py::none();
#endif
  // module_local: the tests load a second build of this module beside the installed one.
  py::class_<AdamWTable>(m, "AdamWTable", py::module_local())
      .def(py::init<>())
      .def("__len__", &AdamWTable::size)
      .def("resize", &AdamWTable::resize, py::arg("size"))
      .def("clear", &AdamWTable::clear, py::arg("index"))
      .def("set", &AdamWTable::set, py::arg("index"), py::arg("param"), py::arg("master"), py::arg("exp_avg"),
           py::arg("exp_avg_sq"), py::arg("max_exp_avg_sq"), py::arg("step"), py::arg("ages"), py::arg("rows"),
           py::arg("num_selected_tensor"), py::arg("num_selected"), py::arg("num_rows"), py::arg("row_len"),
           py::arg("param_dtype"), py::arg("grad_dtype"), py::arg("moment_dtype"), py::arg("group"),
           py::arg("key"), py::arg("compact"))
      .def("update", &AdamWTable::update, py::arg("grads"), py::arg("groups"), py::arg("grad_scale"),
           py::arg("threads"), py::arg("isa") = "")
#if defined(LONGACT_HAS_CUDA)
      .def("launch", &AdamWTable::launch, py::arg("table"), py::arg("blocks_done"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("device"), py::arg("stream"))
#endif
      .def("pack", &AdamWTable::pack, py::arg("grads"), py::arg("groups"))
      .def_property_readonly("packed_size", &AdamWTable::packed_size)
      .def("write", &AdamWTable::write, py::arg("to"), py::arg("bytes"))
      .def("plan", &AdamWTable::plan);
}

}  // namespace longact
