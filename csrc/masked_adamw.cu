// The masked AdamW step on a GPU: every parameter of a model in one launch.
//
// A thread block takes one chunk: up to 16,384 elements of a flat tensor, or the rows that hold about
// as many. Its threads first work out each row's place and coefficients, then share the rows'
// elements. Rows that are not selected cost no traffic: rows are reached through the list of selected
// ones. The arithmetic is adamw_math.h's, without fused multiply-add: the bits are those of the CPU path.
#include "masked_adamw_cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <type_traits>

#include "adamw_math.h"
#include "rounding.h"

#ifndef LONGACT_LAUNCH  // tests/cuda_on_host has one of its own
#define LONGACT_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace longact {
namespace {

#ifndef LONGACT_BLOCK_THREADS  // fewer make tests under a sanitizer bearable
#define LONGACT_BLOCK_THREADS 256
#endif
constexpr int kThreads = LONGACT_BLOCK_THREADS;
constexpr int kBlocksPerSM = 4;  // 64 registers a thread: half of the threads an SM can hold
// A thread takes 4 elements at a time, or 8 where all buffers are of 16 bits: accesses of 16 bytes to the
// widest of them, and those of neighbouring threads touch. Twice as wide in fp32, two accesses would
// each touch every second 16 bytes, which doubles the writes that the L2 cache sees.
constexpr int kQuad = 4;
static_assert(kRandomGroup == 2 * kQuad, "a vector draws from one group of random bits");
static_assert(kChunkElements % kRandomGroup == 0, "chunks of a flat tensor stay aligned");
static_assert(kChunkRows <= kThreads, "one thread prepares one row");

// A run of elements with the same coefficients: a row, or a flat tensor's chunk.
struct Row {
  int64_t at, state_at;  // its first element in the parameter, and in the moments
  AdamWCoefficients<float> coefficients;
  bool valid, has_grad;
};

// What the threads of a block share; in registers it would cost half of the occupancy.
struct Chunk {
  AdamWTensor t;
  const void* grad;
  RandomKey random;
  int64_t num_selected;
  int64_t begin;      // of the chunk: an element of a flat tensor, else a position among the rows to visit
  int num_rows;       // a flat tensor's chunk is one row
  int vector;         // elements: 4 or 8
  int vectors, rest;  // of a row: whole vectors, and the elements after them
  bool zero_grad, stochastic;
};

// A vector of 8 is of 16-bit elements always.
template <int kVector>
__device__ __forceinline__ bool is_wide(DType dtype) {
  return kVector == kQuad && dtype == DType::kFloat32;
}

template <int kVector, typename T>
__device__ __forceinline__ T* address(T* base, DType dtype, int64_t at) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(base) + at * (is_wide<kVector>(dtype) ? 4 : 2);
}

// Streaming accesses: nothing is used twice in a step.
template <int kVector>
__device__ __forceinline__ uint4 load_vector(const void* base, DType dtype, int64_t at) {
  const void* from = address<kVector>(base, dtype, at);
  if (kVector == 2 * kQuad || is_wide<kVector>(dtype)) return __ldcs(static_cast<const uint4*>(from));
  const uint2 half = __ldcs(static_cast<const uint2*>(from));
  return {half.x, half.y, 0, 0};
}

template <int kVector>
__device__ __forceinline__ void store_vector(void* base, DType dtype, int64_t at, const uint4& bits) {
  void* to = address<kVector>(base, dtype, at);
  if (kVector == 2 * kQuad || is_wide<kVector>(dtype)) {
    __stcs(static_cast<uint4*>(to), bits);
  } else {
    __stcs(static_cast<uint2*>(to), uint2{bits.x, bits.y});
  }
}

// Four of a vector's elements: its only four, or of 8 the first (`quad` 0) or the last.
template <int kVector>
__device__ __forceinline__ void unpack(const uint4& bits, DType dtype, int quad, float (&x)[kQuad]) {
  if (is_wide<kVector>(dtype)) {
    x[0] = bit_cast<float>(bits.x);
    x[1] = bit_cast<float>(bits.y);
    x[2] = bit_cast<float>(bits.z);
    x[3] = bit_cast<float>(bits.w);
    return;
  }
  const uint32_t words[2] = {quad == 0 ? bits.x : bits.z, quad == 0 ? bits.y : bits.w};
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const auto half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    x[i] = dtype == DType::kBFloat16 ? bfloat16_to_float(half) : float16_to_float(half);
  }
}

// `round(value, i)`: the 16 bits of element i of the four.
template <typename Round>
__device__ __forceinline__ void pack_halves(const float (&x)[kQuad], int quad, uint4& bits, Round round) {
  const uint32_t low = round(x[0], 0) | static_cast<uint32_t>(round(x[1], 1)) << 16;
  const uint32_t high = round(x[2], 2) | static_cast<uint32_t>(round(x[3], 3)) << 16;
  (quad == 0 ? bits.x : bits.z) = low;
  (quad == 0 ? bits.y : bits.w) = high;
}

template <int kVector>
__device__ __forceinline__ void pack(const float (&x)[kQuad], DType dtype, int quad, uint4& bits) {
  if (is_wide<kVector>(dtype)) {
    bits = {bit_cast<uint32_t>(x[0]), bit_cast<uint32_t>(x[1]), bit_cast<uint32_t>(x[2]),
            bit_cast<uint32_t>(x[3])};
  } else if (dtype == DType::kBFloat16) {
    pack_halves(x, quad, bits, [](float value, int) { return float_to_bfloat16(value); });
  } else {
    pack_halves(x, quad, bits, [](float value, int) { return float_to_float16(value); });
  }
}

__device__ __forceinline__ float load_one(const void* base, DType dtype, int64_t at) {
  if (dtype == DType::kFloat32) return __ldcs(static_cast<const float*>(base) + at);
  const uint16_t bits = __ldcs(static_cast<const unsigned short*>(base) + at);
  return dtype == DType::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

__device__ __forceinline__ void store_one(void* base, DType dtype, int64_t at, float x) {
  if (dtype == DType::kFloat32) {
    __stcs(static_cast<float*>(base) + at, x);
  } else {
    __stcs(static_cast<unsigned short*>(base) + at,
           dtype == DType::kBFloat16 ? float_to_bfloat16(x) : float_to_float16(x));
  }
}

// The vector at `at` of the parameter and `state_at` of the moments; all aligned.
template <int kVector>
__device__ __forceinline__ void update_vector(const Chunk& chunk, const Row& row, int64_t at,
                                              int64_t state_at) {
  const AdamWTensor& t = chunk.t;
  const AdamWCoefficients<float>& c = row.coefficients;
  const bool has_master = kVector == kQuad && t.master != nullptr;
  const DType source_dtype = has_master ? DType::kFloat32 : t.param_dtype;
  // All loads before the first use, so that they are in flight together.
  const void* source = has_master ? t.master : t.param;
  uint4 p_bits = load_vector<kVector>(source, source_dtype, has_master ? state_at : at);
  uint4 g_bits{};
  if (row.has_grad) g_bits = load_vector<kVector>(chunk.grad, t.grad_dtype, at);
  uint4 m_bits = load_vector<kVector>(t.exp_avg, t.moment_dtype, state_at);
  uint4 v_bits = load_vector<kVector>(t.exp_avg_sq, t.moment_dtype, state_at);
  uint4 vmax_bits{}, rounded{};

#pragma unroll
  for (int quad = 0; quad < kVector / kQuad; ++quad) {
    float p[kQuad], g[kQuad], m[kQuad], v[kQuad];
    unpack<kVector>(p_bits, source_dtype, quad, p);
    unpack<kVector>(g_bits, t.grad_dtype, quad, g);
    unpack<kVector>(m_bits, t.moment_dtype, quad, m);
    unpack<kVector>(v_bits, t.moment_dtype, quad, v);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) update_moments(c, row.has_grad ? g[i] * c.grad_factor : 0.0f, m[i], v[i]);
    pack<kVector>(m, t.moment_dtype, quad, m_bits);
    pack<kVector>(v, t.moment_dtype, quad, v_bits);
    if (t.max_exp_avg_sq != nullptr) {
      float vmax[kQuad];
      if (quad == 0) vmax_bits = load_vector<kVector>(t.max_exp_avg_sq, t.moment_dtype, state_at);
      unpack<kVector>(vmax_bits, t.moment_dtype, quad, vmax);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) v[i] = running_max(vmax[i], v[i]);
      pack<kVector>(v, t.moment_dtype, quad, vmax_bits);
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) update_param(c, p[i], m[i], v[i]);
    if (has_master) pack<kVector>(p, DType::kFloat32, quad, p_bits);
    if (chunk.stochastic) {
      const RandomBits random = random_bits(chunk.random, static_cast<uint64_t>(at) / kRandomGroup);
      const int lane = static_cast<int>(at % kRandomGroup) + quad * kQuad;
      pack_halves(p, quad, rounded, [&](float value, int i) {
        return round_to_bfloat16(value, bits_of_lane(random, lane + i));
      });
    } else {
      pack<kVector>(p, t.param_dtype, quad, rounded);
    }
  }
  store_vector<kVector>(t.exp_avg, t.moment_dtype, state_at, m_bits);
  store_vector<kVector>(t.exp_avg_sq, t.moment_dtype, state_at, v_bits);
  if (t.max_exp_avg_sq != nullptr) {
    store_vector<kVector>(t.max_exp_avg_sq, t.moment_dtype, state_at, vmax_bits);
  }
  if (has_master) store_vector<kVector>(t.master, DType::kFloat32, state_at, p_bits);
  store_vector<kVector>(t.param, t.param_dtype, at, rounded);
}

__device__ __forceinline__ void update_one(const Chunk& chunk, const Row& row, int64_t at, int64_t state_at) {
  const AdamWTensor& t = chunk.t;
  const AdamWCoefficients<float>& c = row.coefficients;
  float p = t.master != nullptr ? __ldcs(t.master + state_at) : load_one(t.param, t.param_dtype, at);
  const float g = row.has_grad ? load_one(chunk.grad, t.grad_dtype, at) * c.grad_factor : 0.0f;
  float m = load_one(t.exp_avg, t.moment_dtype, state_at);
  float v = load_one(t.exp_avg_sq, t.moment_dtype, state_at);
  update_moments(c, g, m, v);
  store_one(t.exp_avg, t.moment_dtype, state_at, m);
  store_one(t.exp_avg_sq, t.moment_dtype, state_at, v);
  if (t.max_exp_avg_sq != nullptr) {
    v = running_max(load_one(t.max_exp_avg_sq, t.moment_dtype, state_at), v);
    store_one(t.max_exp_avg_sq, t.moment_dtype, state_at, v);
  }
  update_param(c, p, m, v);
  if (t.master != nullptr) __stcs(t.master + state_at, p);
  if (chunk.stochastic) {
    const RandomBits bits = random_bits(chunk.random, static_cast<uint64_t>(at) / kRandomGroup);
    __stcs(static_cast<unsigned short*>(t.param) + at,
           round_to_bfloat16(p, bits_of_lane(bits, static_cast<int>(at % kRandomGroup))));
  } else {
    store_one(t.param, t.param_dtype, at, p);
  }
}

// The last tensor whose first chunk is not after `chunk`: that one, as empty tensors have no chunk.
__device__ int tensor_of_chunk(const AdamWLaunch& launch, int64_t chunk) {
  int low = 0, high = launch.num_tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (launch.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ bool contains(const int32_t* rows, int64_t count, int64_t row) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (rows[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && rows[low] == row;
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}

__device__ void make_chunk(const AdamWLaunch& launch, int64_t chunk, Chunk& c) {
  c.num_rows = c.vectors = c.rest = 0;
  if (chunk >= launch.num_chunks) return;  // of a table whose tensors are all empty
  const int tensor = tensor_of_chunk(launch, chunk);
  c.t = launch.tensors[tensor];
  c.grad = launch.grads[tensor];
  const AdamWTensor& t = c.t;
  const AdamWGroup& group = launch.groups[t.group];
  c.zero_grad = group.zero_grad;
  c.stochastic = group.stochastic && t.master == nullptr && t.param_dtype == DType::kBFloat16;
  c.random = {group.seed, t.key, static_cast<uint32_t>(*t.step + 1.0f)};
  c.num_selected = t.num_selected;
  if (t.num_selected_tensor != nullptr && *t.num_selected_tensor < c.num_selected) {
    c.num_selected = *t.num_selected_tensor;
  }
  const int64_t most = chunk_length(t);
  c.begin = (chunk - launch.first_chunk[tensor]) * most;

  const bool by_list = !t.all_selected() && !c.zero_grad;
  const int64_t end = t.flat() ? t.num_rows * t.row_len : by_list ? c.num_selected : t.num_rows;
  int64_t length = end - c.begin < most ? end - c.begin : most;
  if (length < 0) length = 0;  // fewer rows are selected now than there is room for
  c.num_rows = t.flat() ? 1 : static_cast<int>(length);
  const int row_len = static_cast<int>(t.flat() ? length : t.row_len);
  const bool all_halves = dtype_size(t.param_dtype) == 2 && dtype_size(t.grad_dtype) == 2 &&
                          dtype_size(t.moment_dtype) == 2 && t.master == nullptr;
  c.vector = all_halves && (t.flat() || row_len % (2 * kQuad) == 0) ? 2 * kQuad : kQuad;
  const bool aligned = is_aligned(t.param) && is_aligned(t.master) && is_aligned(c.grad) &&
                       is_aligned(t.exp_avg) && is_aligned(t.exp_avg_sq) && is_aligned(t.max_exp_avg_sq);
  c.vectors = aligned && (t.flat() || row_len % c.vector == 0) ? row_len / c.vector : 0;
  c.rest = row_len - c.vectors * c.vector;
}

// Row number `i` of the chunk; it grows older here, by the one thread that asks for it.
__device__ Row make_row(const AdamWLaunch& launch, const Chunk& c, int i) {
  const AdamWTensor& t = c.t;
  Row row{};
  row.valid = row.has_grad = true;
  uint32_t age = c.random.step;
  if (t.flat()) {
    row.at = row.state_at = c.begin;
  } else {
    const int64_t position = c.begin + i;
    int64_t index = position;
    if (!t.all_selected() && c.zero_grad) {
      row.has_grad = contains(t.rows, c.num_selected, position);
    } else if (!t.all_selected()) {
      // The list is the user's to write to: rows that do not ascend or do not exist are left alone.
      index = t.rows[position];
      row.valid = index >= 0 && index < t.num_rows && (position == 0 || index > t.rows[position - 1]);
      if (!row.valid) return row;
    }
    const int64_t state_index = t.compact ? position : index;
    row.at = index * t.row_len;
    row.state_at = state_index * t.row_len;
    if (t.ages != nullptr) age = static_cast<uint32_t>(++t.ages[state_index]);
  }
  const AdamWGroup& group = launch.groups[t.group];
  const double lr = group.lr_tensor != nullptr ? double(*group.lr_tensor) : group.lr;
  const double grad_scale = launch.grad_scale != nullptr ? double(*launch.grad_scale) : 1.0;
  row.coefficients = adamw_coefficients<float>(group, lr, grad_scale, age);
  return row;
}

__device__ __forceinline__ void update_chunk(const Chunk& c, const Row* rows, int thread) {
  for (int i = thread; i < c.num_rows * c.vectors; i += kThreads) {
    const Row& row = rows[i / c.vectors];
    const int64_t column = int64_t{i % c.vectors} * c.vector;
    if (!row.valid) continue;
    if (c.vector == kQuad) {
      update_vector<kQuad>(c, row, row.at + column, row.state_at + column);
    } else {
      update_vector<2 * kQuad>(c, row, row.at + column, row.state_at + column);
    }
  }
  for (int i = thread; i < c.num_rows * c.rest; i += kThreads) {
    const Row& row = rows[i / c.rest];
    const int64_t column = int64_t{c.vectors} * c.vector + i % c.rest;
    if (row.valid) update_one(c, row, row.at + column, row.state_at + column);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    masked_adamw(const __grid_constant__ AdamWLaunch launch) {
  if (launch.found_inf != nullptr && *launch.found_inf != 0.0f) return;
  __shared__ Chunk chunk;
  __shared__ Row rows[kChunkRows];
  __shared__ bool last;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    make_chunk(launch, blockIdx.x, chunk);
    // Every block has read its step by now, or will not be the last to say so.
    __threadfence();
    last = atomicAdd(launch.blocks_done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (thread < chunk.num_rows) rows[thread] = make_row(launch, chunk, thread);
  if (last) {
    for (int i = thread; i < launch.num_tensors; i += kThreads) {
      float* step = launch.tensors[i].step;
      if (step != nullptr) *step += 1.0f;
    }
    if (thread == 0) *launch.blocks_done = 0;
  }
  __syncthreads();
  update_chunk(chunk, rows, thread);
}

std::string message(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string explain(cudaError_t error, int device) {
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int driver = 0;
      cudaDriverGetVersion(&driver);
      const std::string found = driver == 0 ? std::string("no NVIDIA driver found: ")
                                            : "the NVIDIA driver is for CUDA " + version(driver) + ": ";
      return found + "longact was built with CUDA " + version(CUDART_VERSION) +
             ", install a driver for it, or build longact with an older toolkit";
    }
    case cudaErrorNoDevice:
      return "no CUDA device is visible: " + message(error) + "; see nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion: {
      cudaDeviceProp properties{};
      cudaGetDeviceProperties(&properties, device);
      const std::string arch = std::to_string(properties.major * 10 + properties.minor);
      return std::string("longact was built for ") + LONGACT_CUDA_ARCHS + " and this GPU is sm_" + arch +
             ": install it again with LONGACT_CUDA_ARCHS=" + arch;
    }
    default:
      return message(error);
  }
}

}  // namespace

void masked_adamw_cuda(const AdamWLaunch& launch, int device, uintptr_t stream) {
  const int64_t num_chunks = launch.num_chunks;
  if (num_chunks > INT32_MAX) throw std::runtime_error("too many elements for one launch");
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    const auto blocks = static_cast<unsigned>(num_chunks > 0 ? num_chunks : 1);
    LONGACT_LAUNCH(masked_adamw, blocks, kThreads, reinterpret_cast<cudaStream_t>(stream), launch);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is told here, and the next call must not meet it
    throw std::runtime_error("longact's CUDA kernel cannot run on device " + std::to_string(device) + ": " +
                             explain(error, device));
  }
}

std::string cuda_unusable(int device) {
  int count = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, masked_adamw);
  cudaGetLastError();  // as above
  return error == cudaSuccess ? "" : explain(error, device);
}

}  // namespace longact
