// Launchers of ops/across.h. Workspaces have prune_matrix_bytes (prune.h); counts must be zero on entry.
#pragma once

#include "core/radix_select.h"
#include "cuda/arguments.h"

namespace ace::cuda {

cudaError_t launch_score_histogram(const ScoredArguments& matrix, uint32_t prefix, int level, int64_t* counts,
                                   void* workspace, void* sums, int code, cudaStream_t stream);

cudaError_t launch_prune_at(const ScoredArguments& matrix, Cut cut, void* workspace, void* sums, int code,
                            cudaStream_t stream);

}  // namespace ace::cuda
