// quantized_linear, unpack_quantized.
#include "cuda/dispatch.cuh"
#include "cuda/packed_launch.cuh"
#include "cuda/quantized.cuh"

namespace ace::cuda {
namespace {

template <class T>
QuantizedRows<T> rows_of(const QuantizedArguments& m) {
  const int units = static_cast<int>(std::min(m.group / kUnitColumns, std::max<int64_t>(m.words, 1)));
  return {{m.bitmap, m.codes, m.row_start, m.rows, m.cols, m.words, m.bytes, m.keep, rows_aligned(m.codes, 0)},
          static_cast<const T*>(m.scales),
          static_cast<int>((m.cols + m.group - 1) / m.group),
          units,
          kStepUnits / units,
          kStepUnits % units};
}

// Calls action(bits, T{}), with bits as an integral_constant.
template <class Action>
cudaError_t with_codes(const QuantizedArguments& m, Action&& action) {
  return with_dtype(m.dtype, [&](auto type) {
    if (m.bits == 8) return action(std::integral_constant<int, 8>{}, type);
    return action(std::integral_constant<int, 4>{}, type);
  });
}

}  // namespace

cudaError_t launch_quantized_linear(const QuantizedArguments& m, const Activations& x, const void* bias, void* out,
                                    cudaStream_t stream) {
  if (m.rows == 0 || x.tokens == 0) return cudaSuccess;
  if (m.words > kMostWords) return cudaErrorInvalidValue;
  Launch at;
  ACE_RETURN_IF_ERROR(packed_grid(m.rows, stream, &at));
  return with_codes(m, [&](auto bits, auto type) {
    using T = decltype(type);
    constexpr int kBits = decltype(bits)::value;
    const bool aligned = rows_aligned(static_cast<const T*>(x.data), x.stride);
    return in_token_blocks(x.tokens, [&](auto count, int64_t first) {
      return launch(quantized_linear_kernel<T, kBits, decltype(count)::value>, at, rows_of<T>(m),
                    static_cast<const T*>(x.data) + first * x.stride, x.stride, aligned, static_cast<const T*>(bias),
                    static_cast<T*>(out) + first * m.rows);
    });
  });
}

cudaError_t launch_unpack_quantized(const QuantizedArguments& m, void* out, cudaStream_t stream) {
  if (m.rows == 0 || m.cols == 0) return cudaSuccess;
  if (m.words > kMostWords) return cudaErrorInvalidValue;
  Launch at;
  ACE_RETURN_IF_ERROR(packed_grid(m.rows, stream, &at));
  return with_codes(m, [&](auto bits, auto type) {
    using T = decltype(type);
    T* const weight = static_cast<T*>(out);
    return launch(unpack_quantized_kernel<T, decltype(bits)::value>, at, rows_of<T>(m), rows_aligned(weight, m.cols),
                  weight);
  });
}

}  // namespace ace::cuda
