// Loads, stores, atomics, and moves that split or join registers. Every address must be a multiple of the access size,
// and shared addresses must be within the block's memory. Global addresses are host addresses, so AddressSanitizer
// checks them.
#include "simt/ptx/registers.h"

namespace simt::ptx {
namespace {

enum class Space { param, shared, global };

// The address at which an instruction reads or writes `bytes`; it is the first operand.
template <Space space>
char* place(Lane& lane, const Instruction& i, size_t bytes) {
  char* at = nullptr;
  if constexpr (space == Space::param) {
    const auto n = static_cast<size_t>(i.from[0]);
    const auto offset = static_cast<size_t>(i.offset);
    if (n >= lane.kernel.parameter_bytes.size() || offset + bytes > lane.kernel.parameter_bytes[n]) {
      fault(lane, i, "reads beyond a parameter");
    }
    return const_cast<char*>(static_cast<const char*>(lane.parameters[n])) + offset;
  } else if constexpr (space == Space::shared) {
    const int64_t offset = int64_t{get<uint32_t>(lane, i.from[0])} + i.offset - kSharedWindow;
    if (offset < 0 || static_cast<size_t>(offset) + bytes > shared_size()) {
      fault(lane, i, "an address outside the block's shared memory, byte " + std::to_string(offset));
    }
    at = static_cast<char*>(shared_memory()) + offset;
  } else {
    at = reinterpret_cast<char*>(get<uint64_t>(lane, i.from[0]) + static_cast<uint64_t>(i.offset));
  }
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) {
    fault(lane, i, "an address that is not a multiple of the " + std::to_string(bytes) + " bytes that are accessed");
  }
  return at;
}

template <Space space, class T, int width>
void load(Lane& lane, const Instruction& i) {
  const char* at = place<space>(lane, i, width * sizeof(T));
  for (int n = 0; n < width; ++n) {
    T value;
    std::memcpy(&value, at + static_cast<size_t>(n) * sizeof(T), sizeof value);
    put(lane, i.to[n], value);
  }
}

template <Space space, class T, int width>
void store(Lane& lane, const Instruction& i) {
  char* at = place<space>(lane, i, width * sizeof(T));
  for (int n = 0; n < width; ++n) {
    const T value = get<T>(lane, i.from[n + 1]);
    std::memcpy(at + static_cast<size_t>(n) * sizeof(T), &value, sizeof value);
  }
}

enum class Atomic { add, max };

template <Space space, Atomic what, class T>
void atomic(Lane& lane, const Instruction& i) {
  T* at = reinterpret_cast<T*>(place<space>(lane, i, sizeof(T)));
  const T value = get<T>(lane, i.from[1]);
  T seen = __atomic_load_n(at, __ATOMIC_RELAXED);
  T wanted;
  do {
    wanted = what == Atomic::max ? (seen < value ? value : seen) : static_cast<T>(seen + value);
  } while (!__atomic_compare_exchange_n(at, &seen, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  put(lane, i.to[0], seen);
}

// Two halves as one value, and back.
template <class Whole, class Half>
void join(Lane& lane, const Instruction& i) {
  const auto low = static_cast<Whole>(get<Half>(lane, i.from[0])),
             high = static_cast<Whole>(get<Half>(lane, i.from[1]));
  put(lane, i.to[0], static_cast<Whole>(high << 8 * sizeof(Half) | low));
}

template <class Whole, class Half>
void split(Lane& lane, const Instruction& i) {
  const Whole value = get<Whole>(lane, i.from[0]);
  put(lane, i.to[0], static_cast<Half>(value));
  put(lane, i.to[1], static_cast<Half>(value >> 8 * sizeof(Half)));
}

template <Space space, class T, int width>
void add_access(Table& table, const std::string& name, const std::string& type) {
  const std::string where = name + (width == 1 ? "" : ".v" + std::to_string(width)) + type;
  table["ld." + where] = load<space, T, width>;
  if constexpr (space != Space::param) table["st." + where] = store<space, T, width>;
  if constexpr (space == Space::global) table["ld.global.nc" + where.substr(name.size())] = load<space, T, width>;
}

template <Space space, class T>
void add_widths(Table& table, const std::string& name, const std::string& type) {
  add_access<space, T, 1>(table, name, type);
  add_access<space, T, 2>(table, name, type);
  if constexpr (sizeof(T) < 8 || space == Space::param) add_access<space, T, 4>(table, name, type);
}

template <Space space, class T>
void add_type(Table& table, const std::string& name) {
  add_widths<space, T>(table, name, type_name<T>());
  if constexpr (std::is_unsigned_v<T>) add_widths<space, T>(table, name, type_name<T>('b'));
}

template <Space space, class... T>
void add_types(Table& table, const std::string& name) {
  (add_type<space, T>(table, name), ...);
}

template <Space space>
void add_space(Table& table, const std::string& name) {
  add_types<space, uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t, float, double>(table,
                                                                                                            name);
}

template <Space space>
void add_atomics(Table& table, const std::string& name) {
  for (const std::string& kind : {std::string("atom."), std::string("red.")}) {
    table[kind + name + ".add.u32"] = atomic<space, Atomic::add, uint32_t>;
    table[kind + name + ".add.u64"] = atomic<space, Atomic::add, uint64_t>;
    table[kind + name + ".max.s32"] = atomic<space, Atomic::max, int32_t>;
  }
}

}  // namespace

void add_memory(Table& table) {
  add_space<Space::param>(table, "param");
  add_space<Space::shared>(table, "shared");
  add_space<Space::global>(table, "global");
  add_atomics<Space::shared>(table, "shared");
  add_atomics<Space::global>(table, "global");
  table["mov.b32.join"] = join<uint32_t, uint16_t>;
  table["mov.b64.join"] = join<uint64_t, uint32_t>;
  table["mov.b32.split"] = split<uint32_t, uint16_t>;
  table["mov.b64.split"] = split<uint64_t, uint32_t>;
  table["cvta.to.global.u64"] = table.at("mov.u64");  // a generic address is a global one
}

}  // namespace simt::ptx
