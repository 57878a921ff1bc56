// Launchers of ops/score.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

cudaError_t launch_score(const ScoredArguments& matrix, float* out, void* sums, int code, cudaStream_t stream);

}  // namespace ace::cuda
