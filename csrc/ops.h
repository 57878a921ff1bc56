// What is common to the contracts of all ops. An op's own contract stands at the top of ops/STEM.h; its schema, checks
// and Meta kernel in ops/STEM.cpp; its maths in core/, its back ends in cpu/STEM.cpp and cuda/STEM_glue.cpp.
//
//   weight      [rows, cols] float32, float16 or bfloat16; rows = output channels, cols = input channels. Contiguous
//               columns (stride(1) == 1 where cols > 1), any row stride >= cols, so a column slice of a matrix works.
//   formula     a name of kFormulas (core/score.h): how a weight is scored. "score" is the caller's own score, passed
//               as `moment`.
//   column      [cols] float32, contiguous; needed by scaled, ria, cosp and cosp_exact, refused where not needed.
//   moment      [rows, cols] float32, contiguous; needed by cosp, cosp_exact and score, else refused.
//   order       Higher score = keep; among equal scores the lower column first (group "matrix": the lower row, then
//               column). The number kept is exact on every device, whatever the ties; -0.0 equals +0.0.
//   pruned      becomes +0.0, whatever its sign was. A kept weight keeps its bits.
//   not finite  NaN or infinity in weight, column, moment or in a score (by overflow) raises ValueError that names op,
//               argument and first bad index, and leaves the weight unchanged. On CUDA the check is deferred: see
//               cuda/not_finite.h.
//   empty       rows == 0 or cols == 0 is legal and changes nothing.
//   tensors     strided, with their numbers in memory: negative and conjugate views, zeros without memory, sparse,
//   nested
//               and quantized tensors are refused (ops/plain.h), also ones that reach beyond their storage. What is
//               written shares no element with another argument.
//   devices     all tensors on one device. CPU results do not depend on the number of threads. On CUDA every op can be
//               captured in a CUDA graph: it neither waits for the device nor allocates but by torch's allocator.
//   errors      ValueError "op: argument must be ... (got ...)", raised before anything is written.
//   order of arguments: the same in the schema, in ace_ext.ops and in the C++ functions; what is mutated (!) comes
//   first.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace ace {

using OptionalTensor = std::optional<at::Tensor>;

}  // namespace ace
