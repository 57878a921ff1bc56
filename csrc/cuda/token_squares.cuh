// inverse_square_norm, and the squares whose product update_cosine_moment_ gives to the tensor cores.
//
// Contract
//   r [tokens] float32: r_t = 1 / sum_i a_ti^2; 0 for a row of zeros. Sums of eight squares in float32, added up in
//   float64. A sum that is not finite raises the flag.
//   squares [tokens, cols] bfloat16: r_t v_tj^2, a float32 product rounded once, so within 2^-8 (1 + 2^-14) of its
//   value. With v = a it lies in [0, 1]; with v = x it is x's energy in units of the token's: neither needs more than
//   bfloat16's range, which is float32's, where float16 would overflow at |v| = 256.
#pragma once

#include "cuda/block.cuh"
#include "cuda/scored.cuh"

namespace ace::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarpSize;

// A warp a row.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    inverse_square_norm_kernel(const T* a, int64_t tokens, int64_t cols, int64_t stride, bool aligned, float* r,
                               NotFinite report) {
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kNormWarps + warp_id(); t < tokens;
       t += static_cast<int64_t>(gridDim.x) * kNormWarps) {
    double sum = 0.0;
    for (int64_t j = static_cast<int64_t>(lane_id()) * kPack; j < cols; j += kWarpSize * kPack) {
      const Pack<T> pack = load_pack(a + t * stride + j, pack_count(cols, j), aligned);
      float squares = 0.0f;
      ACE_UNROLL
      for (int e = 0; e < kPack; ++e) squares += to_float(pack.value[e]) * to_float(pack.value[e]);
      sum += static_cast<double>(squares);
    }
    sum = warp_sum(sum);
    if (lane_id() != 0) continue;
    r[t] = sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);
    if (!is_finite(static_cast<float>(sum))) raise_flag(report);
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    scaled_squares_kernel(const T* v, int64_t tiles, int64_t cols, int64_t stride, bool aligned, const float* r,
                          BFloat16* out, bool out_aligned) {
  for_tile_packs(tiles, cols, [&](int64_t t, int64_t j, int count) {
    const float scale = r[t];
    const Pack<T> pack = load_pack(v + t * stride + j, count, aligned);
    Pack<BFloat16> squares;
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      const float value = to_float(pack.value[e]);
      squares.value[e] = to_bfloat16(scale * value * value);
    }
    store_converted(out + t * cols + j, squares, count, out_aligned);
  });
}

}  // namespace ace::cuda
