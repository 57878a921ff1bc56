// What the glue may call: raw pointers and a stream in, an error code out. Nothing here knows torch, allocates or
// waits. Contracts: ops.h and the top of each .cuh. Workspaces are device memory of the size asked for, 16-aligned.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(ACE_SIMT)  // the host runner of the tests
#include "tests/simt/simt.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "core/radix_select.h"
#include "core/score.h"

namespace ace {

enum class Dtype { float32, float16, bfloat16 };

// A checked weight and what its formula reads; pointers that it does not read are null.
struct ScoredArguments {
  void* weight;         // [rows, cols], rows `stride` values apart
  const float* column;  // [cols]
  const float* moment;  // [rows, cols]
  int64_t rows, cols, stride;
  Dtype dtype;
  Formula formula;
};

// [tokens, cols] activations, rows `stride` values apart.
struct Activations {
  const void* data;
  int64_t tokens, cols, stride;
  Dtype dtype;
};

// refine_swaps_: what its contract in refine_swaps.cuh names.
struct SwapArguments {
  const void* weight;
  bool* mask;
  const float* gram;
  int64_t rows, cols, weight_stride, mask_stride, max_swaps;
  int keep_n, group_m;
  Dtype dtype;
};

// obs_block_: what its contract in obs_block.cuh names.
struct ObsArguments {
  float* weight;
  float* error;
  bool* mask;
  const float* factor;
  int64_t rows, width, weight_stride, error_stride, mask_stride, factor_stride;
  int keep_n, group_m;
};

// Workspace of every op that takes ScoredArguments, in bytes: the sums of the ria score (0 for the others).
size_t score_sums_bytes(const ScoredArguments& matrix);

cudaError_t launch_score(const ScoredArguments& matrix, float* out, void* sums, int code, cudaStream_t stream);

cudaError_t launch_prune_rows(const ScoredArguments& matrix, int64_t keep_k, float* threshold, void* sums, int code,
                              cudaStream_t stream);

// The workspace of the next three. Counts must come in as zeros.
size_t prune_matrix_bytes(const ScoredArguments& matrix);
cudaError_t launch_prune_matrix(const ScoredArguments& matrix, int64_t keep_k, float* threshold, void* workspace,
                                void* sums, int code, cudaStream_t stream);
cudaError_t launch_prune_at(const ScoredArguments& matrix, Cut cut, void* workspace, void* sums, int code,
                            cudaStream_t stream);
cudaError_t launch_score_histogram(const ScoredArguments& matrix, uint32_t prefix, int level, int64_t* counts,
                                   void* workspace, void* sums, int code, cudaStream_t stream);

cudaError_t launch_prune_nm(const ScoredArguments& matrix, int keep_n, int group_m, void* sums, int code,
                            cudaStream_t stream);

// token_weight [tokens] or null; the state is float64 if wide, else float32.
cudaError_t update_moments_bytes(const Activations& x, size_t* bytes);
cudaError_t launch_update_moments(const Activations& x, const float* token_weight, bool wide, void* weight_sum,
                                  void* mean, void* m2, void* workspace, int code, cudaStream_t stream);

cudaError_t launch_inverse_square_norm(const Activations& a, float* r, int code, cudaStream_t stream);

// out [tokens, cols] bfloat16: r_t v_tj^2
cudaError_t launch_scaled_squares(const Activations& v, const float* r, void* out, cudaStream_t stream);

// swaps [rows]
cudaError_t refine_swaps_bytes(const SwapArguments& arguments, size_t* bytes);
cudaError_t launch_refine_swaps(const SwapArguments& arguments, int64_t* swaps, void* workspace, int code,
                                cudaStream_t stream);

size_t obs_block_bytes();
cudaError_t launch_obs_block(const ObsArguments& arguments, void* workspace, int code, cudaStream_t stream);

// The device's flag: 0, or the largest code of an op that met something not finite.
cudaError_t not_finite_flag(int** flag);

}  // namespace ace
