// packed_linear, unpack_bitmap.
#include "cuda/dispatch.cuh"
#include "cuda/packed.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 16;

template <class T>
PackedRows<T> rows_of(const PackedArguments& m) {
  const T* values = static_cast<const T*>(m.values);
  return {m.bitmap, values, m.row_start, m.rows, m.cols, m.words, m.survivors, m.keep, rows_aligned(values, 0)};
}

cudaError_t grid_of(const PackedArguments& m, cudaStream_t stream, Launch* at) {
  *at = {0, kPackedWarps * kWarpSize, 0, stream};
  return blocks_for((m.rows + kPackedWarps - 1) / kPackedWarps, kWaves, &at->blocks);
}

}  // namespace

cudaError_t launch_packed_linear(const PackedArguments& m, const Activations& x, const void* bias, void* out,
                                 cudaStream_t stream) {
  if (m.rows == 0 || x.tokens == 0) return cudaSuccess;
  Launch at;
  ACE_RETURN_IF_ERROR(grid_of(m, stream, &at));
  return with_dtype(m.dtype, [&](auto type) {
    using T = decltype(type);
    int64_t first = 0;
    const auto some = [&](auto count) {
      constexpr int kTokens = decltype(count)::value;
      for (; first + kTokens <= x.tokens; first += kTokens) {
        const T* tokens = static_cast<const T*>(x.data) + first * x.stride;
        ACE_RETURN_IF_ERROR(launch(packed_linear_kernel<T, kTokens>, at, rows_of<T>(m), tokens, x.stride,
                                   static_cast<const T*>(bias), static_cast<T*>(out) + first * m.rows));
      }
      return cudaSuccess;
    };
    ACE_RETURN_IF_ERROR(some(std::integral_constant<int, 16>{}));
    ACE_RETURN_IF_ERROR(some(std::integral_constant<int, 8>{}));
    ACE_RETURN_IF_ERROR(some(std::integral_constant<int, 4>{}));
    ACE_RETURN_IF_ERROR(some(std::integral_constant<int, 2>{}));
    return some(std::integral_constant<int, 1>{});
  });
}

cudaError_t launch_unpack_bitmap(const PackedArguments& m, void* out, cudaStream_t stream) {
  if (m.rows == 0 || m.cols == 0) return cudaSuccess;
  Launch at;
  ACE_RETURN_IF_ERROR(grid_of(m, stream, &at));
  return with_dtype(m.dtype, [&](auto type) {
    using T = decltype(type);
    return launch(unpack_bitmap_kernel<T>, at, rows_of<T>(m), static_cast<T*>(out));
  });
}

}  // namespace ace::cuda
