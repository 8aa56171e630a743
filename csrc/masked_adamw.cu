// The masked AdamW step on a GPU: every parameter of a model in one launch.
//
// A thread block takes one chunk: up to 16,384 elements of a flat tensor, or the rows that hold about
// as many. Its threads first work out each row's place and coefficients, then share the rows'
// elements, 8 at a time in accesses of 16 bytes. Rows that are not selected cost no traffic: rows are
// reached through the list of selected ones. The arithmetic is adamw_math.h's, without fused multiply-add:
// the bits are those of the CPU path.
#include "masked_adamw_cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>

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
constexpr int kVector = 8;       // elements: one access of 16 bytes in bf16, two in fp32
static_assert(kVector == kRandomGroup, "a vector takes the random bits of one group");
static_assert(kChunkElements % kVector == 0, "chunks of a flat tensor stay aligned");
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
  int vectors, rest;  // whole vectors of a row, and the elements after them
  bool zero_grad, stochastic;
};

struct Bytes8 {
  uint4 low, high;
};

// Streaming accesses: nothing is used twice in a step.
__device__ __forceinline__ Bytes8 load_vector(const void* base, DType dtype, int64_t at) {
  const auto* from = reinterpret_cast<const uint4*>(static_cast<const char*>(base) + at * dtype_size(dtype));
  Bytes8 bytes{};
  bytes.low = __ldcs(from);
  if (dtype == DType::kFloat32) bytes.high = __ldcs(from + 1);
  return bytes;
}

__device__ __forceinline__ void to_floats(const Bytes8& bytes, DType dtype, float (&x)[kVector]) {
  const uint32_t words[kVector] = {bytes.low.x,  bytes.low.y,  bytes.low.z,  bytes.low.w,
                                   bytes.high.x, bytes.high.y, bytes.high.z, bytes.high.w};
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = bit_cast<float>(words[i]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x[i] = bfloat16_to_float(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x[i] = float16_to_float(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
    }
  }
}

template <typename Round>
__device__ __forceinline__ uint4 pack_halves(const float (&x)[kVector], Round round) {
  uint32_t words[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    words[i] = round(x[2 * i], 2 * i) | static_cast<uint32_t>(round(x[2 * i + 1], 2 * i + 1)) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ void store_vector(void* base, DType dtype, int64_t at, const float (&x)[kVector]) {
  auto* to = reinterpret_cast<uint4*>(static_cast<char*>(base) + at * dtype_size(dtype));
  if (dtype == DType::kFloat32) {
    __stcs(to, uint4{bit_cast<uint32_t>(x[0]), bit_cast<uint32_t>(x[1]), bit_cast<uint32_t>(x[2]),
                     bit_cast<uint32_t>(x[3])});
    __stcs(to + 1, uint4{bit_cast<uint32_t>(x[4]), bit_cast<uint32_t>(x[5]), bit_cast<uint32_t>(x[6]),
                         bit_cast<uint32_t>(x[7])});
  } else if (dtype == DType::kBFloat16) {
    __stcs(to, pack_halves(x, [](float value, int) { return float_to_bfloat16(value); }));
  } else {
    __stcs(to, pack_halves(x, [](float value, int) { return float_to_float16(value); }));
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

// Elements [at, at + 8) of the parameter, [state_at, state_at + 8) of the moments; all aligned.
__device__ __forceinline__ void update_vector(const Chunk& chunk, const Row& row, int64_t at, int64_t state_at) {
  const AdamWTensor& t = chunk.t;
  const bool has_master = t.master != nullptr;
  const DType source_dtype = has_master ? DType::kFloat32 : t.param_dtype;
  // All loads before the first use, so that they are in flight together.
  const Bytes8 p_bytes = load_vector(has_master ? t.master : t.param, source_dtype, has_master ? state_at : at);
  Bytes8 g_bytes{};
  if (row.has_grad) g_bytes = load_vector(chunk.grad, t.grad_dtype, at);
  const Bytes8 m_bytes = load_vector(t.exp_avg, t.moment_dtype, state_at);
  const Bytes8 v_bytes = load_vector(t.exp_avg_sq, t.moment_dtype, state_at);

  const AdamWCoefficients<float>& c = row.coefficients;
  float p[kVector], g[kVector], m[kVector], v[kVector];
  to_floats(p_bytes, source_dtype, p);
  to_floats(g_bytes, t.grad_dtype, g);
  to_floats(m_bytes, t.moment_dtype, m);
  to_floats(v_bytes, t.moment_dtype, v);
#pragma unroll
  for (int i = 0; i < kVector; ++i) update_moments(c, row.has_grad ? g[i] * c.grad_factor : 0.0f, m[i], v[i]);
  store_vector(t.exp_avg, t.moment_dtype, state_at, m);
  store_vector(t.exp_avg_sq, t.moment_dtype, state_at, v);
  if (t.max_exp_avg_sq != nullptr) {
    float vmax[kVector];
    to_floats(load_vector(t.max_exp_avg_sq, t.moment_dtype, state_at), t.moment_dtype, vmax);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = running_max(vmax[i], v[i]);
    store_vector(t.max_exp_avg_sq, t.moment_dtype, state_at, v);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) update_param(c, p[i], m[i], v[i]);
  if (has_master) store_vector(t.master, DType::kFloat32, state_at, p);
  if (chunk.stochastic) {
    const RandomBits bits = random_bits(chunk.random, static_cast<uint64_t>(at) / kRandomGroup);
    __stcs(static_cast<uint4*>(t.param) + at / kVector, pack_halves(p, [&](float value, int lane) {
             return round_to_bfloat16(value, bits_of_lane(bits, lane));
           }));
  } else {
    store_vector(t.param, t.param_dtype, at, p);
  }
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

__device__ Chunk make_chunk(const AdamWLaunch& launch, int64_t chunk) {
  const int tensor = tensor_of_chunk(launch, chunk);
  Chunk c;
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
  c.begin = (chunk - launch.first_chunk[tensor]) * chunk_length(t);

  const bool by_list = !t.all_selected() && !c.zero_grad;
  const int64_t end = t.flat() ? t.num_rows * t.row_len : by_list ? c.num_selected : t.num_rows;
  int64_t length = end - c.begin < chunk_length(t) ? end - c.begin : chunk_length(t);
  if (length < 0) length = 0;  // fewer rows are selected now than there is room for
  c.num_rows = t.flat() ? 1 : static_cast<int>(length);
  const int row_len = static_cast<int>(t.flat() ? length : t.row_len);
  const bool aligned = is_aligned(t.param) && is_aligned(t.master) && is_aligned(c.grad) && is_aligned(t.exp_avg) &&
                       is_aligned(t.exp_avg_sq) && is_aligned(t.max_exp_avg_sq);
  c.vectors = aligned && (t.flat() || row_len % kVector == 0) ? row_len / kVector : 0;
  c.rest = row_len - c.vectors * kVector;
  return c;
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

__device__ void update_chunk(const AdamWLaunch& launch, int64_t chunk) {
  __shared__ Chunk shared;
  __shared__ Row rows[kChunkRows];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared = make_chunk(launch, chunk);
  __syncthreads();
  const Chunk& c = shared;
  if (thread < c.num_rows) rows[thread] = make_row(launch, c, thread);
  __syncthreads();

  for (int i = thread; i < c.num_rows * c.vectors; i += kThreads) {
    const int r = i / c.vectors;
    const int64_t column = (i - r * c.vectors) * int64_t{kVector};
    if (rows[r].valid) update_vector(c, rows[r], rows[r].at + column, rows[r].state_at + column);
  }
  for (int i = thread; i < c.num_rows * c.rest; i += kThreads) {
    const int r = i / c.rest;
    const int64_t column = c.vectors * int64_t{kVector} + (i - r * c.rest);
    if (rows[r].valid) update_one(c, rows[r], rows[r].at + column, rows[r].state_at + column);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    masked_adamw(const __grid_constant__ AdamWLaunch launch) {
  if (launch.found_inf != nullptr && *launch.found_inf != 0.0f) return;
  if (blockIdx.x < launch.first_chunk[launch.num_tensors]) update_chunk(launch, blockIdx.x);

  // Every block reads the steps; the last one to finish counts them.
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(launch.blocks_done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  for (int i = static_cast<int>(threadIdx.x); i < launch.num_tensors; i += kThreads) {
    float* step = launch.tensors[i].step;
    if (step != nullptr) *step += 1.0f;
  }
  if (threadIdx.x == 0) *launch.blocks_done = 0;
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
      return (driver == 0 ? std::string("no NVIDIA driver found: ") : "the NVIDIA driver is for CUDA " + version(driver) + ": ") +
             "longact was built with CUDA " + version(CUDART_VERSION) +
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

void masked_adamw_cuda(const AdamWLaunch& launch, int64_t num_chunks, int device, uintptr_t stream) {
  if (num_chunks > INT32_MAX) throw std::runtime_error("too many elements for one launch");
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    const auto blocks = static_cast<unsigned>(num_chunks > 0 ? num_chunks : 1);
    LONGACT_LAUNCH(masked_adamw, blocks, kThreads, reinterpret_cast<cudaStream_t>(stream), launch);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
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
  cudaGetLastError();  // the error was told; the next call must not meet it
  return error == cudaSuccess ? "" : explain(error, device);
}

}  // namespace longact
