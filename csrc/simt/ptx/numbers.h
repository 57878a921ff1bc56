// A GPU's arithmetic: NaN has one bit pattern, and integers wrap.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simt/engine.h"

namespace simt::ptx {

// The bit pattern of any NaN that a GPU computes.
template <class T>
T canonical(T value) {
  if constexpr (std::is_same_v<T, float>) {
    return value == value ? value : from_bits<float>(0x7fffffffu);
  } else if constexpr (std::is_same_v<T, double>) {
    return value == value ? value : from_bits<double>(0xfff8000000000000ull);
  } else {
    return value;
  }
}

// The type in which sums and products are computed.
template <class T>
using Wide = std::conditional_t<std::is_floating_point_v<T>, T, uint64_t>;

// An integer of twice the width.
template <class T>
struct TwiceOf;
template <>
struct TwiceOf<int16_t> {
  using type = int32_t;
};
template <>
struct TwiceOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct TwiceOf<int32_t> {
  using type = int64_t;
};
template <>
struct TwiceOf<uint32_t> {
  using type = uint64_t;
};
__extension__ typedef __int128 Int128;
__extension__ typedef unsigned __int128 UInt128;
template <>
struct TwiceOf<int64_t> {
  using type = Int128;
};
template <>
struct TwiceOf<uint64_t> {
  using type = UInt128;
};
template <class T>
using Twice = typename TwiceOf<T>::type;

}  // namespace simt::ptx
