// The Gram matrix of a Linear's inputs.
//
//   update_gram_(gram!, x, mirror=True)
//       x [T, d] float32/float16/bfloat16, contiguous columns; gram [d, d] float32, contiguous and symmetric. gram +=
//       sum_t x_t x_t^T. Products of bfloat16 are exact; products of float32 follow torch's float32 matmul setting
//       (full float32 by default). Sums are float32. The lower half is computed; with mirror it is then copied to the
//       upper, so gram is symmetric. Else the upper half is undefined until a call with mirror, for which T may be 0.
//       So many short x cost one copy. The order of sums may depend on the number of threads, as in torch's products.
//       AMX takes bfloat16 below 2^-126 for zero, and such products too. T == 0 adds nothing. NaN or infinity in x
//       makes entries of gram NaN or infinite. On the CPU only: on CUDA callers use torch.addmm with an out_dtype (not
//       run on a GPU).
#pragma once

#include "ops.h"

namespace ace {

void check_update_gram(const at::Tensor& gram, const at::Tensor& x);

}  // namespace ace
