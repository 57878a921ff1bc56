// Typed access to a thread's registers, and adapters from plain functions to instructions.
#pragma once

#include <string>
#include <type_traits>
#include <unordered_map>

#include "simt/ptx/kernel.h"

namespace simt::ptx {

template <class T>
T get(const Lane& lane, int reg) {
  const uint64_t bits = lane.registers[static_cast<size_t>(reg)];
  if constexpr (std::is_same_v<T, bool>) {
    return (bits & 1u) != 0;
  } else {
    return from_bits<T>(bits);
  }
}

template <class T>
void put(Lane& lane, int reg, T value) {
  uint64_t& bits = lane.registers[static_cast<size_t>(reg)];
  if constexpr (std::is_integral_v<T>) {
    bits = static_cast<uint64_t>(value);  // sign-extended if signed
  } else {
    bits = to_bits(value);
  }
}

// Instruction::run for a function of values: operands in, result out.
template <auto function>
struct Lift;

template <class Result, class... Operands, Result (*function)(Operands...)>
struct Lift<function> {
  static void run(Lane& lane, const Instruction& i) { call(lane, i, std::index_sequence_for<Operands...>{}); }

 private:
  template <size_t... n>
  static void call(Lane& lane, const Instruction& i, std::index_sequence<n...>) {
    put(lane, i.to[0], function(get<Operands>(lane, i.from[n])...));
  }
};

using Table = std::unordered_map<std::string, Handler>;

// Each function adds the instructions of one kind.
void add_arithmetic(Table& table);
void add_conversions(Table& table);
void add_memory(Table& table);
void add_cooperation(Table& table);

// The PTX name of a type, such as b32, u32, s32, f32.
template <class T>
std::string type_name(char kind) {
  return "." + std::string(1, kind) + std::to_string(8 * sizeof(T));
}

template <class T>
std::string type_name() {
  return type_name<T>(std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 's' : 'u');
}

}  // namespace simt::ptx
