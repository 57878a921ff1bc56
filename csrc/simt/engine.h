// The parts of the host emulator's threads: coordinates, launch settings and the arithmetic of warp collectives.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3() = default;
  Dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;      // of a block
constexpr size_t kMaxShared = 227 * 1024;   // dynamic shared memory of a block, as on sm_90
constexpr unsigned char kUnwritten = 0xA5;  // dynamic shared memory before a kernel writes it

// Settings of the following launches. Tests change them.
struct Settings {
  unsigned order = 0;       // 0: thread ids ascending; 1: descending; else shuffled anew each round with this seed
  int dropped_barrier = 0;  // skips the n-th __syncthreads() of each thread (from 1), to test its effect
  size_t max_shared = kMaxShared;  // of the simulated device; tests lower it to force the path of long rows
  int processors = 2;              // multiprocessors that the device claims to have
  int device = 0;                  // the current one
};

inline Settings settings;

// One CUDA thread: the state that its intrinsics need.
struct Thread {
  Dim3 index;  // threadIdx
  unsigned lane = 0, warp = 0;
  int barriers = 0;  // __syncthreads() passed
};

enum class Op { sync, shuffle, ballot };

// A lane's operand of a collective, and the lane that a shuffle reads.
struct Offer {
  uint64_t value = 0;
  unsigned source = 0;
};

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "simt: %s\n", why);
  std::abort();
}

// One lane's result, given the operands of the `present` lanes.
inline uint64_t collect(Op op, const Offer* offers, unsigned present, unsigned lane) {
  switch (op) {
    case Op::sync: return 0;
    case Op::shuffle:
      if ((present >> offers[lane].source & 1u) == 0) die("a shuffle reads a lane that is not there");
      return offers[offers[lane].source].value;
    case Op::ballot: {
      uint64_t votes = 0;
      for (unsigned l = 0; l < kWarp; ++l) {
        if ((present >> l & 1u) != 0) votes |= static_cast<uint64_t>(offers[l].value != 0) << l;
      }
      return votes;
    }
  }
  die("unknown collective");
}

// The number of lanes of a warp in a block of n threads.
inline unsigned lanes_of(unsigned n, unsigned warp) {
  const unsigned lanes = n - warp * kWarp;
  return lanes >= kWarp ? 0xffffffffu : (1u << lanes) - 1u;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt
