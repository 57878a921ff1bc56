// Tensors that torch would not hand to a back end as they are. What is negative or conjugate only by a mark, or a zero
// without memory, torch resolves first: it clones the argument and copies the result back, which it can do for ops that
// return what they write, and crashes for ours, which do not. Sparse, nested and quantized tensors end in a long list
// of back ends. Each op refuses all of these by check_plain instead.
#pragma once

namespace ace {

// Call once, after the schemas are known: registers the refusal for every op of ace_ext.
void refuse_other_tensors();

}  // namespace ace
