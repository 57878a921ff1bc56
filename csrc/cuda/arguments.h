// The plain arguments of launchers: raw pointers. Launchers do not use torch, allocate or wait; each takes a stream and
// returns an error code. A family's launchers are declared in cuda/STEM.h, their contracts are in ops/STEM.h and at the
// top of each .cuh. Workspaces are 16-byte aligned device memory of the requested size; `code` is the value that an op
// writes to the flag (not_finite.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/score.h"
#include "cuda/platform.cuh"

namespace ace::cuda {

enum class Dtype { float32, float16, bfloat16 };

// A checked weight and the inputs of its formula; pointers to inputs that the formula does not read are null.
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

// Workspace of every op that takes ScoredArguments, in bytes: the sums of the ria score (0 for the others).
size_t score_sums_bytes(const ScoredArguments& matrix);

// The device's flag: 0, or the largest code of an op that met a value that is not finite.
cudaError_t not_finite_flag(int** flag);

}  // namespace ace::cuda
