// inverse_square_norm, and the squares that update_cosine_moment_ multiplies on tensor cores.
//
// Contract
//   r [tokens] float32: r_t = 1 / sum_i a_ti^2; 0 for a row of zeros. Sums of eight squares in float32, added in
//   float64. A sum that is not finite raises the flag. squares [tokens, cols] bfloat16: r_t v_tj^2, a float32 product
//   rounded once, so within 2^-8 (1 + 2^-14) of its value. For v = a it is in [0, 1]; for v = x it is x's energy
//   relative to the token's. Bfloat16, with the range of float32, holds both; float16 would overflow at |v| = 256.
#pragma once

#include "cuda/block.cuh"
#include "cuda/scored.cuh"

namespace ace::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarpSize;

constexpr int kNormPacks = 4;  // that a thread loads before it uses the first

template <class T>
ACE_DEVICE double sum_of_squares(const Words<T>& words) {
  float sum = words.at(0) * words.at(0);
  ACE_UNROLL
  for (int e = 1; e < kPack; ++e) sum = fmaf(words.at(e), words.at(e), sum);
  return static_cast<double>(sum);
}

// One warp for each row.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    inverse_square_norm_kernel(const T* a, int64_t tokens, int64_t cols, int64_t stride, bool aligned, float* r,
                               NotFinite report) {
  constexpr int64_t kStep = kWarpSize * kPack;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kNormWarps + warp_id(); t < tokens;
       t += static_cast<int64_t>(gridDim.x) * kNormWarps) {
    const T* row = a + t * stride;
    double sum = 0.0;
    int64_t j = static_cast<int64_t>(lane_id()) * kPack;
    for (; aligned && j + (kNormPacks - 1) * kStep + kPack <= cols; j += kNormPacks * kStep) {
      Words<T> words[kNormPacks];
      ACE_UNROLL
      for (int n = 0; n < kNormPacks; ++n) words[n] = load_words(row + j + n * kStep);
      ACE_UNROLL
      for (int n = 0; n < kNormPacks; ++n) sum += sum_of_squares(words[n]);
    }
    for (; j < cols; j += kStep) {
      const int count = pack_count(cols, j);
      sum += sum_of_squares(load_words(row + j, count, aligned && count >= kPack));
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
    const Words<T> words = load_words(v + t * stride + j, count, aligned && count >= kPack);
    Words<BFloat16> squares;
    ACE_UNROLL
    for (int e = 0; e < kPack; e += 2) {
      const auto square = [&](float value) { return static_cast<uint32_t>(to_bfloat16(scale * value * value).bits); };
      squares.word[e / 2] = square(words.at(e)) | square(words.at(e + 1)) << 16;
    }
    store_words(out + t * cols + j, squares, count, out_aligned && count >= kPack);
  });
}

}  // namespace ace::cuda
