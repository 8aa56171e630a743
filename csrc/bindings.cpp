// The Python module longact._native: addresses in, no torch. Its callers, longact/kernels/*.py, have
// checked every tensor before its address comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "channel_magnitude_cpu.h"
#include "masked_adamw_cpu.h"

namespace py = pybind11;

namespace longact {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// lr, beta1, beta2, eps, weight_decay, maximize, zero_grad
using GroupTuple = std::tuple<double, double, double, double, double, bool, bool>;

// The tensors of an optimizer, kept between steps; an entry is set again only when it changes.
class AdamWTable {
 public:
  void resize(size_t size) { tensors_.resize(size); }
  size_t size() const { return tensors_.size(); }
  void clear(size_t index) { tensors_.at(index) = {}; }

  void set(size_t index, Address param, Address exp_avg, Address exp_avg_sq, Address max_exp_avg_sq,
           Address step, Address ages, Address rows, int64_t num_selected, int64_t num_rows,
           int64_t row_len, int param_dtype, int grad_dtype, int moment_dtype, int group, bool compact) {
    AdamWTensor& t = tensors_.at(index);
    t.param = pointer<void>(param);
    t.exp_avg = pointer<void>(exp_avg);
    t.exp_avg_sq = pointer<void>(exp_avg_sq);
    t.max_exp_avg_sq = pointer<void>(max_exp_avg_sq);
    t.step = pointer<float>(step);
    t.ages = pointer<int32_t>(ages);
    t.rows = pointer<const int32_t>(rows);
    t.num_selected = num_selected;
    t.num_rows = num_rows;
    t.row_len = row_len;
    t.param_dtype = static_cast<DType>(param_dtype);
    t.grad_dtype = static_cast<DType>(grad_dtype);
    t.moment_dtype = static_cast<DType>(moment_dtype);
    t.group = group;
    t.compact = compact;
  }

  void update(const std::vector<Address>& grads, const std::vector<GroupTuple>& groups,
              double grad_scale, int threads, const std::string& isa) {
    if (grads.size() != tensors_.size()) {
      throw std::invalid_argument("update: " + std::to_string(grads.size()) + " gradients for " +
                                  std::to_string(tensors_.size()) + " parameters");
    }
    std::vector<AdamWGroup> native_groups;
    for (const auto& [lr, beta1, beta2, eps, weight_decay, maximize, zero_grad] : groups) {
      native_groups.push_back({lr, beta1, beta2, eps, weight_decay, maximize, zero_grad});
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      tensors_[i].grad = pointer<const void>(grads[i]);
      if (tensors_[i].group < 0 || static_cast<size_t>(tensors_[i].group) >= native_groups.size()) {
        throw std::invalid_argument("update: no group " + std::to_string(tensors_[i].group));
      }
    }
    py::gil_scoped_release release;
    masked_adamw_cpu(tensors_, native_groups, grad_scale, threads, isa);
  }

 private:
  std::vector<AdamWTensor> tensors_;
};

void channel_magnitude(int metric, int dtype, Address y, int64_t stride, Address mask, int64_t tokens,
                       int64_t channels, Address total, int threads, const std::string& isa) {
  py::gil_scoped_release release;
  channel_magnitude_cpu(static_cast<Metric>(metric), static_cast<DType>(dtype), pointer<const void>(y),
                        stride, pointer<const uint8_t>(mask), tokens, channels, pointer<float>(total),
                        threads, isa);
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
        py::arg("threads"), py::arg("isa") = "");
  py::class_<AdamWTable>(m, "AdamWTable")
      .def(py::init<>())
      .def("__len__", &AdamWTable::size)
      .def("resize", &AdamWTable::resize, py::arg("size"))
      .def("clear", &AdamWTable::clear, py::arg("index"))
      .def("set", &AdamWTable::set, py::arg("index"), py::arg("param"), py::arg("exp_avg"),
           py::arg("exp_avg_sq"), py::arg("max_exp_avg_sq"), py::arg("step"), py::arg("ages"),
           py::arg("rows"), py::arg("num_selected"), py::arg("num_rows"), py::arg("row_len"),
           py::arg("param_dtype"), py::arg("grad_dtype"), py::arg("moment_dtype"), py::arg("group"),
           py::arg("compact"))
      .def("update", &AdamWTable::update, py::arg("grads"), py::arg("groups"), py::arg("grad_scale"),
           py::arg("threads"), py::arg("isa") = "");
}

}  // namespace longact
