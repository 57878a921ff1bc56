// Instructions that compute: a result from values of one type.
#include <algorithm>
#include <cmath>

#include "simt/ptx/numbers.h"
#include "simt/ptx/registers.h"

namespace simt::ptx {
namespace {

// Integers wrap: computed unsigned in 64 bits, then truncated.
template <class T>
T add(T a, T b) {
  return canonical(static_cast<T>(Wide<T>(a) + Wide<T>(b)));
}
template <class T>
T subtract(T a, T b) {
  return canonical(static_cast<T>(Wide<T>(a) - Wide<T>(b)));
}
template <class T>
T multiply(T a, T b) {
  return canonical(static_cast<T>(Wide<T>(a) * Wide<T>(b)));
}
template <class T>
T multiply_add(T a, T b, T c) {
  return static_cast<T>(Wide<T>(a) * Wide<T>(b) + Wide<T>(c));
}
template <class T>
T fused(T a, T b, T c) {
  return canonical(std::fma(a, b, c));
}
template <class T>
T negate(T a) {
  return std::is_floating_point_v<T> ? canonical(-a) : subtract(T{}, a);
}
template <class T>
T magnitude(T a) {
  return a < T{} ? negate(a) : std::is_floating_point_v<T> ? canonical(std::abs(a)) : a;
}
template <class T>
T reciprocal(T a) {
  return canonical(T{1} / a);
}
template <class T>
T root(T a) {
  return canonical(std::sqrt(a));
}

template <class T>
T divide(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return canonical(a / b);
  } else {
    if (b == 0) die("PTX divides an integer by zero");
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? negate(a) : static_cast<T>(a / b);
  }
}

template <class T>
T remainder_of(T a, T b) {
  if (b == 0) die("PTX divides an integer by zero");
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{} : static_cast<T>(a % b);
}

// The number where one operand is NaN.
template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return canonical(std::fmin(a, b));
  return std::min(a, b);
}

template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return canonical(std::fmax(a, b));
  return std::max(a, b);
}

template <class T>
Twice<T> multiply_wide(T a, T b) {
  return static_cast<Twice<T>>(Twice<T>(a) * Twice<T>(b));
}
template <class T>
Twice<T> multiply_wide_add(T a, T b, Twice<T> c) {
  return add(multiply_wide(a, b), c);
}
template <class T>
T multiply_high(T a, T b) {
  return static_cast<T>((Twice<T>(a) * Twice<T>(b)) >> 8 * sizeof(T));
}

template <class T>
T bits_and(T a, T b) {
  return static_cast<T>(a & b);
}
template <class T>
T bits_or(T a, T b) {
  return static_cast<T>(a | b);
}
template <class T>
T bits_xor(T a, T b) {
  return static_cast<T>(a ^ b);
}
template <class T>
T complement(T a) {
  return std::is_same_v<T, bool> ? static_cast<T>(!a) : static_cast<T>(~Wide<T>(a));
}

// A shift by the width or more gives 0, or the sign.
template <class T>
T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T{} : static_cast<T>(Wide<T>(a) << n);
}

template <class T>
T shift_right(T a, uint32_t n) {
  const unsigned most = 8 * sizeof(T) - 1;
  if (n > most) return a < T{} ? static_cast<T>(-1) : T{};
  return static_cast<T>(a >> n);
}

template <class T>
T select(T a, T b, bool first) {
  return first ? a : b;
}
template <class T>
T copy(T a) {
  return a;
}

uint32_t ones32(uint32_t a) { return static_cast<uint32_t>(__builtin_popcount(a)); }
uint32_t ones64(uint64_t a) { return static_cast<uint32_t>(__builtin_popcountll(a)); }
uint32_t leading_zeros(uint32_t a) { return a == 0 ? 32u : static_cast<uint32_t>(__builtin_clz(a)); }

template <class T>
T insert_bits(T from, T into, uint32_t position, uint32_t length) {
  position &= 255u;
  length &= 255u;
  if (position >= 8 * sizeof(T)) return into;
  const T field = length >= 8 * sizeof(T) ? static_cast<T>(~T{}) : static_cast<T>((T{1} << length) - 1);
  return static_cast<T>((into & ~(field << position)) | ((from & field) << position));
}

template <class T>
T extract_bits(T from, uint32_t position, uint32_t length) {
  position &= 255u;
  length &= 255u;
  const T field = length >= 8 * sizeof(T) ? static_cast<T>(~T{}) : static_cast<T>((T{1} << length) - 1);
  return static_cast<T>(shift_right(from, position) & field);
}

// Four bytes of eight, by a selector of four bits each; its upper bit asks for the byte's sign instead.
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (unsigned n = 0; n < 4; ++n) {
    const uint32_t choice = selector >> 4 * n & 15u;
    const auto byte = static_cast<uint32_t>(bytes >> 8 * (choice & 7u) & 255u);
    result |= ((choice & 8u) == 0 ? byte : (byte & 128u) != 0 ? 255u : 0u) << 8 * n;
  }
  return result;
}

// A function of three bits, given by its result for 0xf0, 0xcc and 0xaa.
uint32_t of_three(uint32_t a, uint32_t b, uint32_t c, uint32_t function) {
  uint32_t result = 0;
  for (unsigned bit = 0; bit < 32; ++bit) {
    const uint32_t at = (a >> bit & 1u) << 2 | (b >> bit & 1u) << 1 | (c >> bit & 1u);
    result |= (function >> at & 1u) << bit;
  }
  return result;
}

template <class T>
void add_numbers(Table& table) {
  const std::string type = type_name<T>(), round = std::is_floating_point_v<T> ? ".rn" : "";
  for (const std::string& r : {std::string(), round}) {
    table["add" + r + type] = Lift<add<T>>::run;
    table["sub" + r + type] = Lift<subtract<T>>::run;
    table["mul" + r + type] = Lift<multiply<T>>::run;
  }
  table["div" + round + type] = Lift<divide<T>>::run;
  table["min" + type] = Lift<smaller<T>>::run;
  table["max" + type] = Lift<larger<T>>::run;
  table["selp" + type] = Lift<select<T>>::run;
  table["mov" + type] = Lift<copy<T>>::run;
  if constexpr (std::is_signed_v<T>) {
    table["neg" + type] = Lift<negate<T>>::run;
    table["abs" + type] = Lift<magnitude<T>>::run;
  }
  if constexpr (std::is_floating_point_v<T>) {
    table["fma.rn" + type] = Lift<fused<T>>::run;
    table["rcp.rn" + type] = Lift<reciprocal<T>>::run;
    table["sqrt.rn" + type] = Lift<root<T>>::run;
  } else {
    table["mul.lo" + type] = Lift<multiply<T>>::run;
    table["mad.lo" + type] = Lift<multiply_add<T>>::run;
    table["mul.hi" + type] = Lift<multiply_high<T>>::run;
    table["rem" + type] = Lift<remainder_of<T>>::run;
    table["shr" + type] = Lift<shift_right<T>>::run;
    if constexpr (sizeof(T) < 8) {
      table["mul.wide" + type] = Lift<multiply_wide<T>>::run;
      table["mad.wide" + type] = Lift<multiply_wide_add<T>>::run;
    }
  }
}

template <class T>
void add_bits(Table& table) {
  const std::string type = std::is_same_v<T, bool> ? ".pred" : type_name<T>('b');
  table["and" + type] = Lift<bits_and<T>>::run;
  table["or" + type] = Lift<bits_or<T>>::run;
  table["xor" + type] = Lift<bits_xor<T>>::run;
  table["not" + type] = Lift<complement<T>>::run;
  table["mov" + type] = Lift<copy<T>>::run;
  if constexpr (!std::is_same_v<T, bool>) {
    table["selp" + type] = Lift<select<T>>::run;
    table["shl" + type] = Lift<shift_left<T>>::run;
    table["shr" + type] = Lift<shift_right<T>>::run;
  }
}

}  // namespace

void add_arithmetic(Table& table) {
  add_numbers<uint16_t>(table);
  add_numbers<int16_t>(table);
  add_numbers<uint32_t>(table);
  add_numbers<int32_t>(table);
  add_numbers<uint64_t>(table);
  add_numbers<int64_t>(table);
  add_numbers<float>(table);
  add_numbers<double>(table);
  add_bits<bool>(table);
  add_bits<uint16_t>(table);
  add_bits<uint32_t>(table);
  add_bits<uint64_t>(table);
  table["popc.b32"] = Lift<ones32>::run;
  table["popc.b64"] = Lift<ones64>::run;
  table["clz.b32"] = Lift<leading_zeros>::run;
  table["bfi.b32"] = Lift<insert_bits<uint32_t>>::run;
  table["bfi.b64"] = Lift<insert_bits<uint64_t>>::run;
  table["bfe.u32"] = Lift<extract_bits<uint32_t>>::run;
  table["bfe.u64"] = Lift<extract_bits<uint64_t>>::run;
  table["lop3.b32"] = Lift<of_three>::run;
  table["prmt.b32"] = Lift<permute>::run;
}

}  // namespace simt::ptx
