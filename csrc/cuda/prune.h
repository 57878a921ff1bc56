// Launchers of ops/prune.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// threshold [rows]
cudaError_t launch_prune_rows(const ScoredArguments& matrix, int64_t keep_k, float* threshold, void* sums, int code,
                              cudaStream_t stream);

// threshold [1]. The launchers of mask.h and across.h use a workspace of the same size.
size_t prune_matrix_bytes(const ScoredArguments& matrix);
cudaError_t launch_prune_matrix(const ScoredArguments& matrix, int64_t keep_k, float* threshold, void* workspace,
                                void* sums, int code, cudaStream_t stream);

cudaError_t launch_prune_nm(const ScoredArguments& matrix, int keep_n, int group_m, void* sums, int code,
                            cudaStream_t stream);

}  // namespace ace::cuda
