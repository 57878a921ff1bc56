// packed_linear, unpack_bitmap.
#include "cuda/dispatch.cuh"
#include "cuda/packed.cuh"
#include "cuda/packed_launch.cuh"

namespace ace::cuda {
namespace {

template <class T>
PackedRows<T> rows_of(const PackedArguments& m) {
  const T* values = static_cast<const T*>(m.values);
  return {m.bitmap, values, m.row_start, m.rows, m.cols, m.words, m.survivors, m.keep, rows_aligned(values, 0)};
}

}  // namespace

cudaError_t launch_packed_linear(const PackedArguments& m, const Activations& x, const void* bias, void* out,
                                 cudaStream_t stream) {
  if (m.rows == 0 || x.tokens == 0) return cudaSuccess;
  Launch at;
  ACE_RETURN_IF_ERROR(packed_grid(m.rows, stream, &at));
  return with_dtype(m.dtype, [&](auto type) {
    using T = decltype(type);
    return in_token_blocks(x.tokens, [&](auto count, int64_t first) {
      return launch(packed_linear_kernel<T, decltype(count)::value>, at, rows_of<T>(m),
                    static_cast<const T*>(x.data) + first * x.stride, x.stride, static_cast<const T*>(bias),
                    static_cast<T*>(out) + first * m.rows);
    });
  });
}

cudaError_t launch_unpack_bitmap(const PackedArguments& m, void* out, cudaStream_t stream) {
  if (m.rows == 0 || m.cols == 0) return cudaSuccess;
  Launch at;
  ACE_RETURN_IF_ERROR(packed_grid(m.rows, stream, &at));
  return with_dtype(m.dtype, [&](auto type) {
    using T = decltype(type);
    return launch(unpack_bitmap_kernel<T>, at, rows_of<T>(m), static_cast<T*>(out));
  });
}

}  // namespace ace::cuda
