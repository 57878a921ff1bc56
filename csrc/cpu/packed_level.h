// Chooses and calls the loop over a packed matrix that suits this processor.
#pragma once

#include <type_traits>

#include "cpu/packed_avx2.h"
#include "cpu/packed_avx512.h"
#include "cpu/packed_neon.h"
#include "cpu/packed_panel.h"
#include "cpu/packed_portable.h"
#include "cpu/packed_tiles.h"

namespace ace::cpu {

// All of x86, except the last, ARM's only one.
enum class PackedLevel { portable, avx2, avx512, avx512_vnni, avx512_bf16, avx512_amx, neon };

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define ACE_PACKED_X86 1
#else
#define ACE_PACKED_X86 0
#endif
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__ARM_BIG_ENDIAN)
#define ACE_PACKED_ARM 1
#else
#define ACE_PACKED_ARM 0
#endif

inline PackedLevel highest_packed_level() {
#if ACE_PACKED_X86
  const auto has_all = [](auto... has) { return (has && ...); };
#define ACE_HAS(feature) (__builtin_cpu_supports(feature) != 0)
  if (!has_all(ACE_HAS("avx2"), ACE_HAS("fma"), ACE_HAS("f16c"), ACE_HAS("popcnt"), ACE_HAS("bmi2")))
    return PackedLevel::portable;
  if (!has_all(ACE_HAS("avx512f"), ACE_HAS("avx512bw"), ACE_HAS("avx512vl"), ACE_HAS("avx512dq")))
    return PackedLevel::avx2;
  if (!has_all(ACE_HAS("avx512vbmi"), ACE_HAS("avx512vbmi2"), ACE_HAS("avx512vnni"))) return PackedLevel::avx512;
  if (!ACE_HAS("avx512bf16")) return PackedLevel::avx512_vnni;
  return amx::available() ? PackedLevel::avx512_amx : PackedLevel::avx512_bf16;
#undef ACE_HAS
#elif ACE_PACKED_ARM
  return PackedLevel::neon;
#else
  return PackedLevel::portable;
#endif
}

// Whether torch multiplies weights of type T one number at a time because instructions are missing: on x86 by the
// condition of its oneDNN (the same as in ace_ext.models.products). Not known for other processors.
template <class T>
bool torch_is_slow([[maybe_unused]] PackedLevel level) {
#if ACE_PACKED_X86
  if constexpr (std::is_same_v<T, BFloat16>) return level < PackedLevel::avx512;
  if constexpr (std::is_same_v<T, Half>)
    return level < PackedLevel::avx512 || __builtin_cpu_supports("avx512fp16") == 0;
#endif
  return false;
}

// Calls action(product, unpack, X{}) with the loops for weights of type T, and the input type X of these loops.
template <class T, class Action>
void with_packed_loops(PackedLevel level, Action&& action) {
#if ACE_PACKED_X86
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (level >= PackedLevel::avx512_bf16)
      return action(&avx512bf16::packed_product<avx512bf16::Avx512Bf16>,
                    &avx512bf16::packed_unpack<avx512bf16::Avx512Bf16>, BFloat16{});
  }
  if (level >= PackedLevel::avx512)
    return action(&avx512::packed_product<avx512::Avx512<T>>, &avx512::packed_unpack<avx512::Avx512<T>>, float{});
  if (level == PackedLevel::avx2)
    return action(&avx2::packed_product<avx2::Avx2<T>>, &avx2::packed_unpack<avx2::Avx2<T>>, float{});
#endif
#if ACE_PACKED_ARM
  if (level == PackedLevel::neon)
    return action(&neon::packed_product<neon::Neon<T>>, &neon::packed_unpack<neon::Neon<T>>, float{});
#endif
  action(&portable::packed_product<portable::Plain<T>>, &portable::unpack_bits<T>, float{});
}

}  // namespace ace::cpu
