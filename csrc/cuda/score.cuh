// score: the scores themselves, float32 [rows, cols] contiguous. For looking at: the pruning kernels never store them.
// A score that is not finite is written as it is, and raises the flag.
#pragma once

#include "cuda/scored.cuh"

namespace ace::cuda {

template <class F, class T>
__global__ void __launch_bounds__(kTileThreads)
    score_kernel(Scored<T> matrix, int64_t tiles, float* out, bool out_aligned, NotFinite report) {
  bool finite = true;
  for_tile_packs(tiles, matrix.cols, [&](int64_t i, int64_t j, int count) {
    const ScoredRow<T> row = row_of<F>(matrix, i);
    Pack<float> score;
    finite &= pack_scores<F>(row, j, count, load_weights(row, j, count), &score);
    store_pack(out + i * matrix.cols + j, score, count, out_aligned);
  });
  if (!finite) raise_flag(report);
}

}  // namespace ace::cuda
