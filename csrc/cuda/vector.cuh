// Eight consecutive values at a time, in 16-byte loads and stores where the alignment allows it.
#pragma once

#include <type_traits>

#include "cuda/bits.cuh"

namespace ace::cuda {

constexpr int kPack = 8;  // one 16-byte load of 16-bit values, two of 32-bit ones

template <class T>
struct alignas(16) Quad {  // 16 bytes of values
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

template <class T>
struct Pack {
  T value[kPack];
};

// The same values in whole words, as loaded: each 16-bit value of a word is widened by one instruction where it is
// used. Values of a separate 16-bit type would cost three instructions each.
template <class T>
struct Words {
  static constexpr int kInWord = 4 / sizeof(T);
  static constexpr int kCount = kPack / kInWord;
  uint32_t word[kCount];

  ACE_DEVICE float at(int e) const {
    const uint32_t bits = word[e / kInWord];
    if constexpr (std::is_same_v<T, BFloat16>) {
      return bits_float(e % 2 == 0 ? bits << 16 : bits & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, Half>) {
      return to_float(Half{static_cast<uint16_t>(e % 2 == 0 ? bits : bits >> 16)});
    } else {
      return bits_float(bits);
    }
  }
};

// Sixteen bytes. On a device a type of the CUDA runtime, which nvcc moves in one instruction.
ACE_DEVICE void load_line(const void* p, uint32_t* word) {
#if defined(__CUDACC__)
  const uint4 line = *static_cast<const uint4*>(p);
  word[0] = line.x, word[1] = line.y, word[2] = line.z, word[3] = line.w;
#else
  std::memcpy(word, __builtin_assume_aligned(p, 16), 16);
#endif
}

// Four bytes, the address a multiple of four.
ACE_DEVICE uint32_t load_word(const void* p) {
#if defined(__CUDACC__)
  return *static_cast<const uint32_t*>(p);
#else
  uint32_t word;
  std::memcpy(&word, __builtin_assume_aligned(p, 4), 4);
  return word;
#endif
}

ACE_DEVICE void store_shared_line(void* p, const uint32_t* word) {
#if defined(__CUDACC__)
  *static_cast<uint4*>(p) = make_uint4(word[0], word[1], word[2], word[3]);
#else
  std::memcpy(__builtin_assume_aligned(p, 16), word, 16);
#endif
}

// Stores to global memory. nvcc would store words made by inline assembly one by one.
ACE_DEVICE void store_line(void* p, const uint32_t* word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(word[0]),
               "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
#else
  std::memcpy(__builtin_assume_aligned(p, 16), word, 16);
#endif
}

// p[0..kPack), p 16-byte aligned.
template <class T>
ACE_DEVICE Words<T> load_words(const T* p) {
  Words<T> words;
  ACE_UNROLL
  for (int w = 0; w < Words<T>::kCount; w += 4) load_line(p + w * Words<T>::kInWord, words.word + w);
  return words;
}

// The number of the pack's columns from j on that are within the row; 0 or less beyond its end.
ACE_DEVICE int pack_count(int64_t cols, int64_t j) { return cols - j < kPack ? static_cast<int>(cols - j) : kPack; }

// p[0..count) and zeros beyond. `whole`: count is kPack, and p is 16-byte aligned.
template <class T>
ACE_DEVICE Words<T> load_words(const T* p, int count, bool whole) {
  if (whole) return load_words(p);
  Words<T> words{};
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) {
    if (e >= count) continue;
    uint32_t bits = 0;
    std::memcpy(&bits, p + e, sizeof(T));
    words.word[e / Words<T>::kInWord] |= bits << (e % Words<T>::kInWord * 16);
  }
  return words;
}

// `kept`: bit 31 of word e is set if value e is kept; the others become +0.
template <class T>
ACE_DEVICE void zero_rest(Words<T>& words, const uint32_t* kept) {
  ACE_UNROLL
  for (int w = 0; w < Words<T>::kCount; ++w) {
    if constexpr (sizeof(T) == 2) {
      words.word[w] &= halves_of_signs(kept[2 * w], kept[2 * w + 1]);
    } else {
      words.word[w] &= static_cast<uint32_t>(static_cast<int32_t>(kept[w]) >> 31);
    }
  }
}

template <class T>
ACE_DEVICE void store_words(T* p, const Words<T>& words, int count, bool whole) {
  if (whole) {
    ACE_UNROLL
    for (int w = 0; w < Words<T>::kCount; w += 4) store_line(p + w * Words<T>::kInWord, words.word + w);
    return;
  }
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) {
    if (e >= count) continue;
    const uint32_t bits = words.word[e / Words<T>::kInWord] >> (e % Words<T>::kInWord * 16);
    std::memcpy(p + e, &bits, sizeof(T));
  }
}

// Whether all rows, which start at p and are `stride` values apart, are 16-byte aligned.
template <class T>
bool rows_aligned(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace ace::cuda
