// Launchers of ops/moments.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// token_weight [tokens] or null; the state is float64 if wide, else float32.
cudaError_t update_moments_bytes(const Activations& x, size_t* bytes);
cudaError_t launch_update_moments(const Activations& x, const float* token_weight, bool wide, void* weight_sum,
                                  void* mean, void* m2, void* workspace, int code, cudaStream_t stream);

cudaError_t launch_inverse_square_norm(const Activations& a, float* r, int code, cudaStream_t stream);

// out [tokens, cols] bfloat16: r_t v_tj^2
cudaError_t launch_scaled_squares(const Activations& v, const float* r, void* out, cudaStream_t stream);

}  // namespace ace::cuda
