// Chooses and calls the loops over a packed matrix of quantized survivors that suit this processor.
#pragma once

#include "cpu/packed_level.h"
#include "cpu/quantized_avx2.h"
#include "cpu/quantized_avx512.h"
#include "cpu/quantized_madd.h"
#include "cpu/quantized_neon.h"
#include "cpu/quantized_portable.h"
#include "cpu/quantized_vnni.h"

namespace ace::cpu {

// Calls action(product, unpack) with the loops for codes of kBits bits, scales of type S and inputs in float32.
template <int kBits, class S, class Action>
void with_quantized_loops(PackedLevel level, Action&& action) {
#if ACE_PACKED_X86
  if (level >= PackedLevel::avx512)
    return action(&avx512::quantized_product<avx512::Quantized, kBits, S>,
                  &avx512::quantized_unpack<avx512::Quantized, kBits, S>);
  if (level == PackedLevel::avx2)
    return action(&avx2::quantized_product<avx2::Quantized, kBits, S>,
                  &avx2::quantized_unpack<avx2::Quantized, kBits, S>);
#endif
#if ACE_PACKED_ARM
  if (level == PackedLevel::neon)
    return action(&neon::quantized_product<neon::Quantized, kBits, S>,
                  &neon::quantized_unpack<neon::Quantized, kBits, S>);
#endif
  action(&portable::quantized_product<portable::Quantized, kBits, S>,
         &portable::quantized_unpack<portable::Quantized, kBits, S>);
}

// x [tokens, 64 words] in float32, as most loops want it.
struct WideInput {};

// Calls action(product, Input{}) with the loop for a few tokens and the kind of x that it wants: WideInput, or one with
// size(words, group_words), the bytes of a token, and write(x, cols, words, group_words, out), which makes it of x
// [cols].
template <int kBits, class S, class Action>
void with_quantized_product(PackedLevel level, Action&& action) {
#if ACE_PACKED_X86
  if constexpr (!std::is_same_v<S, float>) {
    using Codes = std::conditional_t<kBits == 8, avx512vnni::Codes8, avx512vnni::Codes4>;
    if (level >= PackedLevel::avx512_vnni)
      return action(&avx512vnni::quantized_product<Codes, S>, avx512vnni::FixedInput<Codes::kOffset>{});
    if (level == PackedLevel::avx2) return action(&avx2::fixed_product<kBits, S>, avx2::FixedHalves{});
  }
#endif
  with_quantized_loops<kBits, S>(level, [&](auto* product, auto*) { action(product, WideInput{}); });
}

}  // namespace ace::cpu
