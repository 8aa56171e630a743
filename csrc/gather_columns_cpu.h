#pragma once

#include <cstdint>

namespace longact {

// to[i, t] = from[t, columns[i]], elements of 2, 4 or 8 bytes; `stride`: elements between two tokens.
// Throws std::out_of_range, before it writes, for a column outside [0, channels).
void gather_columns_cpu(int64_t element_size, const void* from, int64_t stride, int64_t tokens, int64_t channels,
                        const int32_t* columns, int64_t num_columns, void* to, int threads);

}  // namespace longact
