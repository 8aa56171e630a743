#include "device_table.h"

#include <cstring>
#include <utility>

namespace longact {
namespace {

int64_t element_bytes(const AdamWTensor& t, bool has_grad) {
  const int64_t moments = t.max_exp_avg_sq != nullptr ? 3 : 2;
  const int64_t param = dtype_size(t.param_dtype);
  return (t.master != nullptr ? param + 2 * 4 : 2 * param) + (has_grad ? dtype_size(t.grad_dtype) : 0) +
         2 * moments * dtype_size(t.moment_dtype);
}

int64_t step_bytes(const AdamWTensor& t, bool zero_grad) {
  if (t.flat()) return t.num_rows * t.row_len * element_bytes(t, true);
  const int64_t visited = t.rows_to_visit(zero_grad);
  const int64_t with_grad = t.all_selected() ? visited : t.num_selected;
  return with_grad * t.row_len * element_bytes(t, true) +
         (visited - with_grad) * t.row_len * element_bytes(t, false) +
         (t.ages != nullptr ? visited * 2 * int64_t{sizeof(int32_t)} : 0) +
         (t.all_selected() ? 0 : t.num_selected * int64_t{sizeof(int32_t)});
}

constexpr size_t aligned(size_t offset) { return (offset + 15) / 16 * 16; }

template <typename T>
void put(std::vector<char>& image, size_t at, const std::vector<T>& values) {
  if (!values.empty()) std::memcpy(image.data() + at, values.data(), values.size() * sizeof(T));
}

}  // namespace

size_t DeviceTable::pack(const std::vector<AdamWTensor>& tensors, const std::vector<const void*>& grads,
                         const std::vector<AdamWGroup>& groups, bool tensors_changed) {
  // What changes most often comes first: groups (a scheduled lr), gradients, tensors.
  const size_t grads_at = aligned(groups.size() * sizeof(AdamWGroup));
  const size_t tensors_at = aligned(grads_at + grads.size() * sizeof(void*));
  const size_t first_chunk_at = aligned(tensors_at + tensors.size() * sizeof(AdamWTensor));
  const size_t size = aligned(first_chunk_at + tensors.size() * sizeof(int64_t));

  const size_t tail = tensors_changed || size != image_.size() || grads_at != grads_ ? 0 : tensors_at;
  std::vector<char> image(size);
  put(image, 0, groups);
  put(image, grads_at, grads);
  if (tail != 0) {
    std::memcpy(image.data() + tail, image_.data() + tail, size - tail);
    const bool same = std::memcmp(image.data(), image_.data(), tail) == 0;
    image_ = std::move(image);
    return same ? 0 : tail;
  }

  put(image, tensors_at, tensors);
  std::vector<int64_t> first_chunk;
  bytes_ = num_chunks_ = 0;
  for (const AdamWTensor& t : tensors) {
    first_chunk.push_back(num_chunks_);
    if (t.step == nullptr) continue;
    const bool zero_grad = groups[t.group].zero_grad;
    const int64_t length = t.flat() ? t.num_rows * t.row_len : t.rows_to_visit(zero_grad);
    // Rows without elements still grow older.
    num_chunks_ += (length + chunk_length(t) - 1) / chunk_length(t);
    bytes_ += step_bytes(t, zero_grad);
  }
  put(image, first_chunk_at, first_chunk);
  num_tensors_ = tensors.size();
  grads_ = grads_at;
  tensors_ = tensors_at;
  first_chunk_ = first_chunk_at;
  image_ = std::move(image);
  return size;
}

AdamWLaunch DeviceTable::launch(const char* device) const {
  AdamWLaunch launch{};
  launch.groups = reinterpret_cast<const AdamWGroup*>(device);
  launch.grads = reinterpret_cast<const void* const*>(device + grads_);
  launch.tensors = reinterpret_cast<const AdamWTensor*>(device + tensors_);
  launch.first_chunk = reinterpret_cast<const int64_t*>(device + first_chunk_);
  launch.num_chunks = num_chunks_;
  launch.num_tensors = static_cast<int32_t>(num_tensors_);
  return launch;
}

}  // namespace longact
