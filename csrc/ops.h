// The common part of the contracts of all ops. An op's own contract is at the top of ops/STEM.h, its schema, checks and
// Meta kernel are in ops/STEM.cpp, its maths is in core/, and its back ends are cpu/STEM.cpp and cuda/STEM_glue.cpp.
//
//   weight      [rows, cols] float32, float16 or bfloat16; rows = output channels, cols = input channels. Contiguous
//               columns (stride(1) == 1 where cols > 1), any row stride >= cols, so a column slice of a matrix works.
//   formula     a name of kFormulas (core/score.h): how a weight is scored. "score" is the caller's own score, passed
//               as `moment`.
//   column      [cols] float32, contiguous; needed by scaled, ria, cosp and cosp_exact, else refused.
//   moment      [rows, cols] float32, contiguous; needed by cosp, cosp_exact and score, else refused.
//   order       Higher score = keep; among equal scores the lower column first (group "matrix": the lower row, then
//               column). The number kept is exact on every device, whatever the ties; -0.0 equals +0.0.
//   pruned      weights become +0.0, whatever their sign. Kept weights keep their bits.
//   not finite  NaN or infinity in weight, column, moment or in a score (by overflow) raises ValueError that names op,
//               argument and first bad index, and leaves the weight unchanged. On CUDA the check is deferred: see
//               cuda/not_finite.h.
//   empty       rows == 0 or cols == 0 is allowed and changes nothing.
//   tensors     strided, with their values in memory. Negative and conjugate views, zero tensors without memory, and
//               sparse, nested and quantized tensors are refused (ops/plain.h), also tensors that reach beyond their
//               storage. A written tensor shares no element with another argument.
//   devices     all tensors on one device, CPU or CUDA (update_gram_, admm_change_ and admm_update_: CPU). CPU results
//               do not depend on the number of threads. On CUDA every op can be captured in a CUDA graph: it does not
//               wait for the device, and it allocates only by torch's allocator.
//   errors      ValueError "op: argument must be ... (got ...)", raised before anything is written.
//   arguments   in the same order in the schema, in ace_ext.ops and in the C++ functions; mutated ones (!) come first.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace ace {

using OptionalTensor = std::optional<at::Tensor>;

}  // namespace ace
