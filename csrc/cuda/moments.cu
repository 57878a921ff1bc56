// update_moments_, inverse_square_norm and the squares of update_cosine_moment_.
#include "cuda/dispatch.cuh"
#include "cuda/moments.cuh"
#include "cuda/moments.h"
#include "cuda/token_squares.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 4;

// Enough chunks to fill the device. The number depends only on the device and the shape, so results are reproducible.
cudaError_t cut_tokens(const Activations& x, Chunks* cut) {
  cut->strips = (x.cols + kMomentColumns - 1) / kMomentColumns;
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for(kMaxBlocks, kWaves, &blocks));
  const int64_t wanted = std::max<int64_t>(1, blocks / std::max<int64_t>(1, cut->strips));
  const int64_t least = kRowsOfBlock;      // with shorter chunks, partial states would cost more than reading x
  const int64_t most = 32 * kRowsOfBlock;  // bounds the number of float32 merges of one state
  const int64_t each = std::clamp((x.tokens + wanted - 1) / wanted, least, most);
  cut->tokens_each = (each + kRowsOfBlock - 1) / kRowsOfBlock * kRowsOfBlock;
  cut->chunks = (x.tokens + cut->tokens_each - 1) / cut->tokens_each;
  return cudaSuccess;
}

template <class Real>
cudaError_t merge_partials(const Partials& partials, const Chunks& cut, int64_t cols, void* weight_sum, void* mean,
                           void* m2, const NotFinite& report, cudaStream_t stream) {
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for((cols + kMomentThreads - 1) / kMomentThreads, kWaves, &blocks));
  Real* weight = static_cast<Real*>(weight_sum);
  ACE_RETURN_IF_ERROR(launch(merge_partials_kernel<Real>, {blocks, kMomentThreads, 0, stream}, partials, cut.chunks,
                             cols, static_cast<const Real*>(weight), static_cast<Real*>(mean), static_cast<Real*>(m2),
                             report));
  return launch(add_weight_kernel<Real>, {1, kWarpSize, 0, stream}, partials, cut.chunks, weight);
}

}  // namespace

cudaError_t update_moments_bytes(const Activations& x, size_t* bytes) {
  Chunks cut;
  ACE_RETURN_IF_ERROR(cut_tokens(x, &cut));
  *bytes = sizeof(float) * static_cast<size_t>(cut.chunks * (2 * x.cols + 1));
  return cudaSuccess;
}

cudaError_t launch_update_moments(const Activations& x, const float* token_weight, bool wide, void* weight_sum,
                                  void* mean, void* m2, void* workspace, int code, cudaStream_t stream) {
  if (x.tokens == 0) return cudaSuccess;
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  Chunks cut;
  ACE_RETURN_IF_ERROR(cut_tokens(x, &cut));
  cut.strips = std::max<int64_t>(1, cut.strips);  // without columns the tokens' weight still counts
  float* mean_partials = static_cast<float*>(workspace);
  float* m2_partials = mean_partials + cut.chunks * x.cols;
  const Partials partials{m2_partials + cut.chunks * x.cols, mean_partials, m2_partials};
  ACE_RETURN_IF_ERROR(with_dtype(x.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const T* data = static_cast<const T*>(x.data);
    const Tokens<T> tokens{data, token_weight, x.tokens, x.cols, x.stride, rows_aligned(data, x.stride)};
    int64_t blocks = 0;
    ACE_RETURN_IF_ERROR(blocks_for(cut.strips * cut.chunks, kWaves, &blocks));
    return launch(partial_moments_kernel<T>, {blocks, kMomentThreads, 0, stream}, tokens, cut, partials, report);
  }));
  return wide ? merge_partials<double>(partials, cut, x.cols, weight_sum, mean, m2, report, stream)
              : merge_partials<float>(partials, cut, x.cols, weight_sum, mean, m2, report, stream);
}

cudaError_t launch_inverse_square_norm(const Activations& a, float* r, int code, cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  return with_dtype(a.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const T* data = static_cast<const T*>(a.data);
    int64_t blocks = 0;
    ACE_RETURN_IF_ERROR(blocks_for((a.tokens + kNormWarps - 1) / kNormWarps, 4 * kWaves, &blocks));
    return launch(inverse_square_norm_kernel<T>, {blocks, kNormThreads, 0, stream}, data, a.tokens, a.cols, a.stride,
                  rows_aligned(data, a.stride), r, report);
  });
}

cudaError_t launch_scaled_squares(const Activations& v, const float* r, void* out, cudaStream_t stream) {
  if (v.tokens == 0 || v.cols == 0) return cudaSuccess;
  return with_dtype(v.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const T* data = static_cast<const T*>(v.data);
    BFloat16* squares = static_cast<BFloat16*>(out);
    const int64_t tiles = v.tokens * tiles_per_row(v.cols);
    int64_t blocks = 0;
    ACE_RETURN_IF_ERROR(blocks_for(tiles, 4 * kWaves, &blocks));
    return launch(scaled_squares_kernel<T>, {blocks, kTileThreads, 0, stream}, data, tiles, v.cols, v.stride,
                  rows_aligned(data, v.stride), r, squares, rows_aligned(squares, v.cols));
  });
}

}  // namespace ace::cuda
