// score: the scores themselves, float32 [rows, cols] contiguous. For inspection: the pruning kernels never store
// scores. A score that is not finite is written and raises the flag.
#pragma once

#include "cuda/scored.cuh"

namespace ace::cuda {

template <class F, class T>
__global__ void __launch_bounds__(kTileThreads)
    score_kernel(Scored<T> matrix, int64_t tiles, float* out, bool out_aligned, NotFinite report) {
  bool finite = true;
  for_scored_packs<F>(matrix, tiles,
                      [&](const ScoredRow<T>& row, const ColumnTerms<F>& columns, int64_t i, int64_t j, int count,
                          const Words<T>& weight) {
                        Pack<float> score;
                        finite &= pack_scores(row, columns, j, count, weight, &score);
                        Words<float> words;
                        ACE_UNROLL
                        for (int e = 0; e < kPack; ++e) words.word[e] = float_bits(score.value[e]);
                        store_words(out + i * matrix.cols + j, words, count, out_aligned && count >= kPack);
                      });
  if (!finite) raise_flag(report);
}

}  // namespace ace::cuda
