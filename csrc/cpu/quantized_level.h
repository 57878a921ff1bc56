// Chooses and calls the loops over a packed matrix of quantized survivors that suit this processor.
#pragma once

#include "cpu/packed_level.h"
#include "cpu/quantized_avx2.h"
#include "cpu/quantized_avx512.h"
#include "cpu/quantized_madd.h"
#include "cpu/quantized_neon.h"
#include "cpu/quantized_portable.h"
#include "cpu/quantized_tiles.h"
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

// Tokens one after the other, each a Token, which has size(words, group_words) and write(x, cols, words, group_words,
// out).
template <class Token>
struct EachToken {
  static int64_t size(int64_t tokens, int64_t words, int64_t group_words) {
    return tokens * Token::size(words, group_words);
  }
  template <class S>
  static void write(const S* x, int64_t stride, int64_t tokens, int64_t cols, int64_t words, int64_t group_words,
                    uint8_t* out) {
    for (int64_t t = 0; t < tokens; ++t)
      Token::write(x + t * stride, cols, words, group_words, out + t * Token::size(words, group_words));
  }
};

// Calls action(product, Input{}) with the loop for so many tokens, a few, and the kind of x that it wants: WideInput,
// or one with size(tokens, words, group_words), its bytes, and write(x, stride, tokens, cols, words, group_words, out),
// which makes it of x [tokens, cols], `stride` apart.
template <int kBits, class S, class Action>
void with_quantized_product(PackedLevel level, [[maybe_unused]] int64_t tokens, Action&& action) {
#if ACE_PACKED_X86
  if constexpr (!std::is_same_v<S, float>) {
    using Codes = std::conditional_t<kBits == 8, avx512vnni::Codes8, avx512vnni::Codes4>;
    if (level == PackedLevel::avx512_amx && tokens > 1)
      return action(&amx::quantized_product<kBits, S>, amx::TiledInput{});
    if (level >= PackedLevel::avx512_vnni)
      return action(&avx512vnni::quantized_product<Codes, S>, EachToken<avx512vnni::FixedInput<Codes::kOffset>>{});
    if (level == PackedLevel::avx2) return action(&avx2::fixed_product<kBits, S>, EachToken<avx2::FixedHalves>{});
  }
#endif
  with_quantized_loops<kBits, S>(level, [&](auto* product, auto*) { action(product, WideInput{}); });
}

}  // namespace ace::cpu
