// Refuses kinds of tensors that torch does not pass to a back end unchanged. Lazy negative and conjugate views and zero
// tensors without memory are resolved first: torch clones the argument and copies the result back. That works for ops
// that return what they write; for ours, which return nothing, it crashes. For sparse, nested and quantized tensors
// torch's error is a long list of back ends. Each op refuses all of these by check_plain instead.
#pragma once

namespace ace {

// Registers the refusal for every op of ace_ext. Call once, after the schemas are registered.
void refuse_other_tensors();

}  // namespace ace
