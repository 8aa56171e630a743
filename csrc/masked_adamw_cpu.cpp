#include "masked_adamw_cpu.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "adamw_math.h"
#include "cpu_kernels.h"

namespace longact {
namespace {

// A piece of one tensor: elements [begin, end) of a flat tensor, or positions [begin, end) in the
// sequence of rows to visit.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

constexpr int64_t kChunkElements = 65536;  // enough rows in a row, and small enough to balance threads
constexpr int64_t kBlock = 1024;           // staged in L1 where a buffer is not of the compute type

// Consecutive rows that share age and presence of a gradient.
struct Span {
  int64_t row, state_row, rows;
  uint32_t age;
  bool has_grad;
};

// Updates consecutive elements of one tensor.
class SpanUpdater {
 public:
  SpanUpdater(const CpuKernels& kernels, const AdamWTensor& tensor, const void* grad,
              const AdamWGroup& group, double grad_scale)
      : kernels_(kernels), tensor_(tensor), grad_(grad), group_(group), grad_scale_(grad_scale) {}

  // `offset`: the first element in the parameter, `state_offset`: the same in the moments; `ahead` and
  // `state_ahead`: how much further the next call's elements lie, or 0.
  void operator()(int64_t offset, int64_t state_offset, int64_t n, uint32_t age, bool has_grad,
                  int64_t ahead, int64_t state_ahead) {
    const AdamWTensor& t = tensor_;
    const bool is_double = t.param_dtype == DType::kFloat64;
    if (age != age_) {
      age_ = age;
      if (is_double) {
        c64_ = adamw_coefficients<double>(group_, group_.lr, grad_scale_, age);
      } else {
        c32_ = adamw_coefficients<float>(group_, group_.lr, grad_scale_, age);
      }
    }
    if (is_double) {
      kernels_.adamw_f64(c64_, at<double>(t.param, offset),
                         has_grad ? at<const double>(grad_, offset) : nullptr,
                         at<double>(t.exp_avg, state_offset), at<double>(t.exp_avg_sq, state_offset),
                         at<double>(t.max_exp_avg_sq, state_offset), n, ahead, state_ahead);
      return;
    }
    if (!staged()) {
      kernels_.adamw_f32(c32_, at<float>(t.param, offset),
                         has_grad ? at<const float>(grad_, offset) : nullptr,
                         at<float>(t.exp_avg, state_offset), at<float>(t.exp_avg_sq, state_offset),
                         at<float>(t.max_exp_avg_sq, state_offset), n, ahead, state_ahead);
      return;
    }
    for (int64_t done = 0; done < n; done += kBlock) {
      const bool last = done + kBlock >= n;
      update_block(offset + done, state_offset + done, std::min(kBlock, n - done), has_grad,
                   last && ahead != 0 ? ahead - done : last ? 0 : kBlock,
                   last && ahead != 0 ? state_ahead - done : last ? 0 : kBlock);
    }
  }

 private:
  template <typename T>
  static T* at(void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<T*>(base) + offset;
  }
  template <typename T>
  static const T* at(const void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
  }

  bool staged() const {
    return tensor_.master != nullptr || tensor_.param_dtype != DType::kFloat32 ||
           tensor_.grad_dtype != DType::kFloat32 || tensor_.moment_dtype != DType::kFloat32;
  }

  // The buffer itself where it is fp32 already, else a converted copy of the block.
  float* stage(DType dtype, const void* base, int64_t offset, int64_t n, int64_t ahead,
               float* block) const {
    if (base == nullptr) return nullptr;
    const char* from = static_cast<const char*>(base) + offset * dtype_size(dtype);
    if (dtype == DType::kFloat32) return reinterpret_cast<float*>(const_cast<char*>(from));
    kernels_.load(dtype, from, block, n, ahead);
    return block;
  }
  void unstage(DType dtype, void* base, int64_t offset, int64_t n, const float* block) const {
    if (base == nullptr || dtype == DType::kFloat32) return;
    kernels_.store(dtype, block, static_cast<char*>(base) + offset * dtype_size(dtype), n);
  }

  void update_block(int64_t offset, int64_t state_offset, int64_t n, bool has_grad, int64_t ahead,
                    int64_t state_ahead) {
    const AdamWTensor& t = tensor_;
    float* p = t.master != nullptr ? t.master + state_offset
                                   : stage(t.param_dtype, t.param, offset, n, ahead, blocks_[0]);
    const float* g = has_grad ? stage(t.grad_dtype, grad_, offset, n, ahead, blocks_[1]) : nullptr;
    float* m = stage(t.moment_dtype, t.exp_avg, state_offset, n, state_ahead, blocks_[2]);
    float* v = stage(t.moment_dtype, t.exp_avg_sq, state_offset, n, state_ahead, blocks_[3]);
    float* vmax = stage(t.moment_dtype, t.max_exp_avg_sq, state_offset, n, state_ahead, blocks_[4]);
    // A block in L1 has nothing to ask for; asking next to it does no harm.
    kernels_.adamw_f32(c32_, p, g, m, v, vmax, n, ahead, state_ahead);
    if (group_.stochastic && t.master == nullptr && t.param_dtype == DType::kBFloat16) {
      const RandomKey key{group_.seed, t.key, static_cast<uint32_t>(*t.step)};
      kernels_.store_stochastic(key, offset, p, static_cast<uint16_t*>(t.param) + offset, n);
    } else {
      unstage(t.param_dtype, t.param, offset, n, p);
    }
    unstage(t.moment_dtype, t.exp_avg, state_offset, n, m);
    unstage(t.moment_dtype, t.exp_avg_sq, state_offset, n, v);
    unstage(t.moment_dtype, t.max_exp_avg_sq, state_offset, n, vmax);
  }

  const CpuKernels& kernels_;
  const AdamWTensor& tensor_;
  const void* const grad_;
  const AdamWGroup& group_;
  const double grad_scale_;
  uint32_t age_ = 0;  // of the coefficients; ages start at 1
  AdamWCoefficients<float> c32_;
  AdamWCoefficients<double> c64_;
  alignas(64) float blocks_[5][kBlock];
};

// Rows were checked when they were set, but the tensor that holds them is the user's to write to: a few
// microseconds for a whole model against a write out of bounds.
void check_rows(const AdamWTensor& t) {
  int64_t previous = -1;
  for (int64_t i = 0; i < t.num_selected; ++i) {
    const int64_t row = t.rows[i];
    if (row <= previous || row >= t.num_rows) {
      throw std::invalid_argument("rows has " + std::to_string(row) + " after " + std::to_string(previous) +
                                  ": it must hold ascending rows of a parameter that has " +
                                  std::to_string(t.num_rows));
    }
    previous = row;
  }
}

void update_rows(const Chunk& chunk, const AdamWTensor& t, const AdamWGroup& group, SpanUpdater& update) {
  const bool every_row = t.all_selected() || group.zero_grad;
  const bool zeros = !t.all_selected() && group.zero_grad;
  const int32_t* last = zeros ? t.rows + t.num_selected : nullptr;
  const int32_t* next = zeros ? std::lower_bound(t.rows, last, chunk.begin) : nullptr;  // not yet passed

  std::vector<Span> spans;
  spans.reserve(chunk.end - chunk.begin);
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    const int64_t row = every_row ? i : t.rows[i];
    const int64_t state_row = t.compact ? i : row;
    const bool has_grad = !zeros || (next != last && *next == row);
    if (zeros && has_grad) ++next;
    const uint32_t age = static_cast<uint32_t>(t.ages != nullptr ? ++t.ages[state_row] : *t.step);
    if (!spans.empty()) {
      Span& span = spans.back();
      if (row == span.row + span.rows && age == span.age && has_grad == span.has_grad) {
        ++span.rows;
        continue;
      }
    }
    spans.push_back({row, state_row, 1, age, has_grad});
  }
  for (size_t i = 0; i < spans.size(); ++i) {
    const Span& span = spans[i];
    const Span& following = spans[std::min(i + 1, spans.size() - 1)];
    update(span.row * t.row_len, span.state_row * t.row_len, span.rows * t.row_len, span.age,
           span.has_grad, (following.row - span.row) * t.row_len,
           (following.state_row - span.state_row) * t.row_len);
  }
}

}  // namespace

void masked_adamw_cpu(const std::vector<AdamWTensor>& tensors, const std::vector<const void*>& grads,
                      const std::vector<AdamWGroup>& groups, double grad_scale, int threads,
                      const std::string& isa) {
  const CpuKernels& kernels = cpu_kernels(isa);
  for (const AdamWTensor& t : tensors) check_rows(t);  // before the first change
  std::vector<Chunk> chunks;
  int64_t elements = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const AdamWTensor& t = tensors[i];
    if (t.step == nullptr) continue;
    *t.step += 1.0f;
    const int64_t row_len = t.flat() ? 1 : t.row_len;
    const int64_t length = t.flat() ? t.num_rows * t.row_len : t.rows_to_visit(groups[t.group].zero_grad);
    const int64_t chunk = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, row_len));
    for (int64_t begin = 0; begin < length; begin += chunk) {
      chunks.push_back({i, begin, std::min(length, begin + chunk)});
    }
    elements += length * row_len;
  }
  const int64_t count = static_cast<int64_t>(chunks.size());
  threads = static_cast<int>(std::min<int64_t>(threads, 1 + elements / kChunkElements));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    const Chunk& chunk = chunks[i];
    const AdamWTensor& t = tensors[chunk.tensor];
    const AdamWGroup& group = groups[t.group];
    SpanUpdater update(kernels, t, grads[chunk.tensor], group, grad_scale);
    if (t.flat()) {
      update(chunk.begin, chunk.begin, chunk.end - chunk.begin, static_cast<uint32_t>(*t.step), true, 0, 0);
    } else {
      update_rows(chunk, t, group, update);
    }
  }
}

}  // namespace longact
