// From the launchers' plain arguments to the kernels' types. Host code.
#pragma once

#include "cuda/arguments.h"
#include "cuda/launch.cuh"
#include "cuda/scored.cuh"

namespace ace::cuda {

// Calls action(T{}) with the core type. With ACE_WITHOUT_HALF, as in tests under sanitizers, there are no kernels for
// Half: they read and write the same places as those for BFloat16.
template <class Action>
cudaError_t with_dtype(Dtype dtype, Action&& action) {
  switch (dtype) {
#ifdef ACE_WITHOUT_HALF
    case Dtype::float16: return cudaErrorInvalidValue;
#else
    case Dtype::float16: return action(Half{});
#endif
    case Dtype::bfloat16: return action(BFloat16{});
    default: return action(float{});
  }
}

// The sums of the ria score, in a workspace of score_sums_bytes.
struct ScoreSums {
  float* row;     // [rows]
  float* column;  // [cols]
};

cudaError_t launch_score_sums(const ScoredArguments& matrix, void* workspace, ScoreSums* sums, cudaStream_t stream);

template <class T>
Scored<T> scored(const ScoredArguments& m, const ScoreSums& sums) {
  T* weight = static_cast<T*>(m.weight);
  return {weight,
          m.column,
          m.moment,
          sums.row,
          sums.column,
          m.rows,
          m.cols,
          m.stride,
          rows_aligned(weight, m.stride),
          rows_aligned(m.column, 0) && rows_aligned(sums.column, 0),
          rows_aligned(m.moment, m.cols)};
}

// Computes the sums if the formula reads them, then calls action(formula, Scored<T>). Does nothing for an empty weight.
template <class Action>
cudaError_t with_scored(const ScoredArguments& m, void* sums_workspace, cudaStream_t stream, Action&& action) {
  if (m.rows == 0 || m.cols == 0) return cudaSuccess;
  ScoreSums sums{nullptr, nullptr};
  if (m.formula == Formula::ria) ACE_RETURN_IF_ERROR(launch_score_sums(m, sums_workspace, &sums, stream));
  return with_formula(m.formula, [&](auto formula) {
    return with_dtype(m.dtype, [&](auto scalar) { return action(formula, scored<decltype(scalar)>(m, sums)); });
  });
}

template <class T>
int64_t tile_count(const Scored<T>& matrix) {
  return matrix.rows * tiles_per_row(matrix.cols);
}

}  // namespace ace::cuda
