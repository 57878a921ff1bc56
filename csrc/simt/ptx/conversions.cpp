// Comparisons, and conversions from one type to another.
#include <cmath>

#include "core/scalar.h"
#include "simt/ptx/numbers.h"
#include "simt/ptx/registers.h"

namespace simt::ptx {
namespace {

// --- setp ---

enum class Order { eq, ne, lt, le, gt, ge };

template <Order order, class T>
bool ordered(T a, T b) {
  switch (order) {
    case Order::eq: return a == b;
    case Order::ne: return a < b || a > b;  // false with NaN
    case Order::lt: return a < b;
    case Order::le: return a <= b;
    case Order::gt: return a > b;
    default: return a >= b;
  }
}

template <class T>
bool any_nan(T a, T b) {
  return a != a || b != b;
}
template <class T>
bool no_nan(T a, T b) {
  return !any_nan(a, b);
}
template <Order order, class T>
bool or_nan(T a, T b) {
  return any_nan(a, b) || ordered<order>(a, b);
}

template <auto compare, class T>
bool and_also(T a, T b, bool c) {
  return compare(a, b) && c;
}
template <auto compare, class T>
bool or_else(T a, T b, bool c) {
  return compare(a, b) || c;
}
template <auto compare, class T>
bool differs(T a, T b, bool c) {
  return compare(a, b) != c;
}

template <auto compare, class T>
void add_comparison(Table& table, const std::string& name, const std::string& type) {
  table["setp." + name + type] = Lift<compare>::run;
  table["setp." + name + ".and" + type] = Lift<and_also<compare, T>>::run;
  table["setp." + name + ".or" + type] = Lift<or_else<compare, T>>::run;
  table["setp." + name + ".xor" + type] = Lift<differs<compare, T>>::run;
}

template <Order order, class T>
void add_order(Table& table, const std::string& name, const std::string& type) {
  add_comparison<ordered<order, T>, T>(table, name, type);
  if constexpr (std::is_floating_point_v<T>) add_comparison<or_nan<order, T>, T>(table, name + "u", type);
}

template <class T>
void add_comparisons(Table& table, const std::string& type) {
  add_order<Order::eq, T>(table, "eq", type);
  add_order<Order::ne, T>(table, "ne", type);
  add_order<Order::lt, T>(table, "lt", type);
  add_order<Order::le, T>(table, "le", type);
  add_order<Order::gt, T>(table, "gt", type);
  add_order<Order::ge, T>(table, "ge", type);
  if constexpr (std::is_floating_point_v<T>) {
    add_comparison<no_nan<T>, T>(table, "num", type);
    add_comparison<any_nan<T>, T>(table, "nan", type);
  }
}

// --- cvt ---

template <class To, class From>
To convert(From value) {
  return canonical(static_cast<To>(value));
}

// The project's own conversions, which are tested for every value against the standard.
float widen_half(uint16_t bits) { return canonical(ace::to_float(ace::Half{bits})); }
float widen_bfloat16(uint16_t bits) { return canonical(ace::to_float(ace::BFloat16{bits})); }
uint16_t narrow_bfloat16(float value) { return ace::to_bfloat16(value).bits; }
uint16_t narrow_half(float value) { return ace::to_half(value).bits; }

template <class To, class From>
void add_conversion(Table& table) {
  constexpr bool kRounds =
      std::is_floating_point_v<To> && !(std::is_floating_point_v<From> && sizeof(To) > sizeof(From));
  table[(kRounds ? "cvt.rn" : "cvt") + type_name<To>() + type_name<From>()] = Lift<convert<To, From>>::run;
}

template <class To, class... From>
void add_conversions_to(Table& table) {
  (add_conversion<To, From>(table), ...);
}

template <class... To>
void add_integer_conversions(Table& table) {
  (add_conversions_to<To, uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(table), ...);
}

}  // namespace

void add_conversions(Table& table) {
  add_comparisons<uint16_t>(table, ".u16");
  add_comparisons<uint32_t>(table, ".u32");
  add_comparisons<uint64_t>(table, ".u64");
  add_comparisons<int16_t>(table, ".s16");
  add_comparisons<int32_t>(table, ".s32");
  add_comparisons<int64_t>(table, ".s64");
  add_comparisons<uint16_t>(table, ".b16");
  add_comparisons<uint32_t>(table, ".b32");
  add_comparisons<uint64_t>(table, ".b64");
  add_comparisons<float>(table, ".f32");
  add_comparisons<double>(table, ".f64");
  add_integer_conversions<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(table);
  add_integer_conversions<float, double>(table);
  add_conversion<float, double>(table);
  add_conversion<double, float>(table);
  table["cvt.f32.f16"] = Lift<widen_half>::run;
  table["cvt.f32.bf16"] = Lift<widen_bfloat16>::run;
  table["cvt.rn.bf16.f32"] = Lift<narrow_bfloat16>::run;
  table["cvt.rn.f16.f32"] = Lift<narrow_half>::run;
}

}  // namespace simt::ptx
