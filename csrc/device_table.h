// A table as the GPU reads it: cut into chunks, one for each thread block, and packed for one upload.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tensor_table.h"

namespace longact {

// A chunk is that many elements of a flat tensor, or the rows that hold about as many.
constexpr int64_t kChunkElements = 16384;
constexpr int64_t kChunkRows = 64;  // at most: each row's coefficients lie in shared memory

// What the kernel is given; the first four point into the uploaded image.
struct AdamWLaunch {
  const AdamWGroup* groups;
  const void* const* grads;
  const AdamWTensor* tensors;
  const int64_t* first_chunk;  // of each tensor
  int64_t num_chunks;
  int32_t num_tensors;
  uint32_t* blocks_done;    // 0 between launches
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null, or not 0: nothing is updated
};

namespace {

// Elements of a flat tensor, else positions in the sequence of rows to visit.
LONGACT_HOST_DEVICE int64_t chunk_length(const AdamWTensor& t) {
  if (t.flat()) return kChunkElements;
  const int64_t rows = kChunkElements / (t.row_len > 0 ? t.row_len : 1);
  return rows < 1 ? 1 : rows > kChunkRows ? kChunkRows : rows;
}

}  // namespace

class DeviceTable {
 public:
  // Packs the image anew; `tensors_changed`: since the last call, not only gradients and groups.
  // Returns how many of its first bytes differ from the last image: all that must be uploaded.
  size_t pack(const std::vector<AdamWTensor>& tensors, const std::vector<const void*>& grads,
              const std::vector<AdamWGroup>& groups, bool tensors_changed);

  const std::vector<char>& image() const { return image_; }
  // The image lies at `device` on the GPU.
  AdamWLaunch launch(const char* device) const;
  int64_t num_chunks() const { return num_chunks_; }
  // What one step reads and writes in device memory, the table and skipped rows left out.
  int64_t bytes() const { return bytes_; }

 private:
  std::vector<char> image_;
  size_t grads_ = 0, tensors_ = 0, first_chunk_ = 0;  // where each part starts
  size_t num_tensors_ = 0;
  int64_t num_chunks_ = 0, bytes_ = 0;
};

}  // namespace longact
