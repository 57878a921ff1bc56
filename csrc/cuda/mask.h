// Launchers of ops/mask.h: the kernels of prune_rows, prune_matrix and prune_nm with another outcome (outcome.cuh). The
// weight is not written; mask [rows, cols].
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

cudaError_t launch_mask_rows(const ScoredArguments& matrix, int64_t keep_k, bool* mask, void* sums, int code,
                             cudaStream_t stream);

// the workspace has prune_matrix_bytes
cudaError_t launch_mask_matrix(const ScoredArguments& matrix, int64_t keep_k, bool* mask, void* workspace, void* sums,
                               int code, cudaStream_t stream);

cudaError_t launch_mask_nm(const ScoredArguments& matrix, int keep_n, int group_m, bool* mask, void* sums, int code,
                           cudaStream_t stream);

}  // namespace ace::cuda
