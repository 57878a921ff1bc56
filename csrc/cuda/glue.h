// From torch tensors to the launchers' plain arguments, for the *_glue.cpp files. Only these files see both torch and
// the launchers; of torch's CUDA headers they include c10/cuda only. Each op: check, guard, workspace, launch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/arguments.h"
#include "cuda/not_finite.h"
#include "ops.h"

namespace ace::cuda {

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf: return Dtype::float16;
    case at::kBFloat16: return Dtype::bfloat16;
    default: return Dtype::float32;
  }
}

inline cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline const float* optional_data(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// Memory that stays valid until the stream has run the op: the caching allocator reuses it in stream order.
inline at::Tensor workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// A checked weight with the inputs of its formula, and the workspace of its sums.
struct ScoredTensors {
  // `written`: the op prunes the weight; else it only reads it.
  ScoredTensors(const at::Tensor& weight, Formula formula, const OptionalTensor& column, const OptionalTensor& moment,
                bool written)
      : arguments{written ? weight.mutable_data_ptr() : const_cast<void*>(weight.const_data_ptr()),
                  optional_data(column),
                  optional_data(moment),
                  weight.size(0),
                  weight.size(1),
                  weight.stride(0),
                  dtype_of(weight),
                  formula},
        workspace(cuda::workspace(score_sums_bytes(arguments), weight)) {}

  void* sums() const { return workspace.mutable_data_ptr(); }

  ScoredArguments arguments;
  at::Tensor workspace;
};

}  // namespace ace::cuda
