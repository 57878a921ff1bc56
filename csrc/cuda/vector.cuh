// Eight consecutive values at a time, in 16-byte loads and stores where the address allows it.
#pragma once

#include "cuda/platform.cuh"

namespace ace::cuda {

constexpr int kPack = 8;  // one 16-byte load of 16-bit values, two of 32-bit ones

template <class T>
struct alignas(16) Quad {  // what one load brings
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

template <class T>
struct Pack {
  T value[kPack];
};

// How many of the pack at column j lie within the row; 0 or less beyond its end.
ACE_DEVICE int pack_count(int64_t cols, int64_t j) { return cols - j < kPack ? static_cast<int>(cols - j) : kPack; }

// p[0..count) and T{} beyond. `aligned`: p is a multiple of 16 bytes.
template <class T>
ACE_DEVICE Pack<T> load_pack(const T* p, int count, bool aligned) {
  Pack<T> pack;
  if (aligned && count >= kPack) {
    ACE_UNROLL
    for (int q = 0; q < kPack / Quad<T>::kSize; ++q) {
      const Quad<T> quad = reinterpret_cast<const Quad<T>*>(p)[q];
      ACE_UNROLL
      for (int e = 0; e < Quad<T>::kSize; ++e) pack.value[q * Quad<T>::kSize + e] = quad.value[e];
    }
  } else {
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) pack.value[e] = e < count ? p[e] : T{};
  }
  return pack;
}

template <class T>
ACE_DEVICE void store_pack(T* p, const Pack<T>& pack, int count, bool aligned) {
  if (aligned && count >= kPack) {
    ACE_UNROLL
    for (int q = 0; q < kPack / Quad<T>::kSize; ++q) {
      Quad<T> quad;
      ACE_UNROLL
      for (int e = 0; e < Quad<T>::kSize; ++e) quad.value[e] = pack.value[q * Quad<T>::kSize + e];
      reinterpret_cast<Quad<T>*>(p)[q] = quad;
    }
  } else {
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      if (e < count) p[e] = pack.value[e];
    }
  }
}

// store_pack of values that inline assembly made (to_bfloat16): nvcc stores such values one by one.
ACE_DEVICE void store_converted(BFloat16* p, const Pack<BFloat16>& pack, int count, bool aligned) {
#if defined(__CUDA_ARCH__)
  if (aligned && count >= kPack) {
    const auto word = [&](int i) { return pack.value[i].bits | static_cast<uint32_t>(pack.value[i + 1].bits) << 16; };
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(word(0)),
                 "r"(word(2)), "r"(word(4)), "r"(word(6))
                 : "memory");
    return;
  }
#endif
  store_pack(p, pack, count, aligned);
}

// Whether rows that start at p and lie `stride` values apart all start on 16 bytes.
template <class T>
bool rows_aligned(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace ace::cuda
