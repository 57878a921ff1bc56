// One fibre a CUDA thread, all in one OS thread: fast, and the order in which threads run is ours to choose. A fibre
// runs until it waits at a barrier or a warp collective; x86-64 only (elsewhere use the thread engine).
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "simt/engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN(...) __VA_ARGS__
// A fibre's frames are left and entered again all the time: looking for uses after return costs 20 times the time.
extern "C" __attribute__((used)) inline const char* __asan_default_options() {
  return "detect_stack_use_after_return=0";
}
#else
#define SIMT_ASAN(...)
#endif

#if !defined(__x86_64__)
#error "the fibre engine switches stacks in x86-64 assembly: build with -DACE_SIMT_THREADS"
#endif

namespace simt {

enum class State { ready, at_barrier, at_collective, done };

struct Fiber : Thread {
  State state = State::ready;
  Op op = Op::sync;
  uint64_t result = 0;
  int line = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  SIMT_ASAN(void* fake_stack = nullptr;)
};

struct Runtime {
  Dim3 grid, block, block_index;
  std::vector<Fiber> fibers;
  std::vector<Offer> offers;  // one a fibre
  std::vector<unsigned char> shared;
  std::function<void()> body;
  Fiber* current = nullptr;
  unsigned threads = 0, live = 0, waiting = 0;
  int votes = 0, result = 0;  // of __syncthreads_count
  void* main_stack_pointer = nullptr;
  SIMT_ASAN(void* main_fake_stack = nullptr; const void* main_bottom = nullptr; size_t main_size = 0;)
};

inline Runtime runtime;
constexpr size_t kStackBytes = 256 * 1024;

// Saves the registers that a call preserves, then continues on the other stack.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp,(%rdi)\n movq "
      "%rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

inline void yield_fiber(bool last = false) {
  Fiber& fiber = *runtime.current;
  SIMT_ASAN(__sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, runtime.main_bottom, runtime.main_size);)
  switch_stack(&fiber.stack_pointer, runtime.main_stack_pointer);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(fiber.fake_stack, &runtime.main_bottom, &runtime.main_size);)
  (void)last;
}

inline void release_barrier() {
  for (unsigned i = 0; i < runtime.threads; ++i) {
    if (runtime.fibers[i].state == State::at_barrier) runtime.fibers[i].state = State::ready;
  }
  runtime.waiting = 0;
  runtime.result = runtime.votes;
  runtime.votes = 0;
}

inline void fiber_main() {
  SIMT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &runtime.main_bottom, &runtime.main_size);)
  runtime.body();
  runtime.current->state = State::done;
  if (--runtime.live > 0 && runtime.waiting == runtime.live) release_barrier();
  yield_fiber(true);
  die("a finished fibre was resumed");
}

inline void resume(Fiber& fiber) {
  runtime.current = &fiber;
  SIMT_ASAN(__sanitizer_start_switch_fiber(&runtime.main_fake_stack, fiber.stack, kStackBytes);)
  switch_stack(&runtime.main_stack_pointer, fiber.stack_pointer);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(runtime.main_fake_stack, nullptr, nullptr);)
}

// --- what the intrinsics call ---

inline Thread& self() { return *runtime.current; }
inline const Dim3& block_index() { return runtime.block_index; }
inline const Dim3& block_dim() { return runtime.block; }
inline const Dim3& grid_dim() { return runtime.grid; }
inline void* shared_memory() { return runtime.shared.data(); }
inline size_t shared_size() { return runtime.shared.size(); }

// Returns how many threads came with vote != 0.
inline int barrier(int vote, int line) {
  Fiber& fiber = *runtime.current;
  fiber.state = State::at_barrier;
  fiber.line = line;
  runtime.votes += vote != 0;
  if (++runtime.waiting == runtime.live) release_barrier();
  yield_fiber();
  return runtime.result;
}

// All lanes of the warp that are in `mask` must come with the same op; the last to arrive serves them all.
inline uint64_t collective(Op op, unsigned mask, Offer offer, int line) {
  Fiber& fiber = *runtime.current;
  const unsigned first = fiber.warp * kWarp, expected = mask & lanes_of(runtime.threads, fiber.warp);
  if ((mask >> fiber.lane & 1u) == 0) die("a lane calls a collective whose mask leaves it out");
  fiber.state = State::at_collective;
  fiber.op = op;
  fiber.line = line;
  runtime.offers[first + fiber.lane] = offer;
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((expected >> l & 1u) == 0) continue;
    const Fiber& other = runtime.fibers[first + l];
    if (other.state == State::done) die("a collective waits for a lane that has exited");
    if (other.state != State::at_collective || other.op != op) {
      yield_fiber();
      return fiber.result;
    }
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((expected >> l & 1u) == 0) continue;
    Fiber& other = runtime.fibers[first + l];
    other.result = collect(op, &runtime.offers[first], expected, l);
    other.state = State::ready;
  }
  yield_fiber();  // the last to arrive yields too, so that no lane gets a head start
  return fiber.result;
}

inline void prepare(Fiber& fiber, unsigned i) {
  if (fiber.stack == nullptr) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) die("no memory for a fibre's stack");
    fiber.stack = static_cast<char*>(stack);
  }
  const Dim3& block = runtime.block;
  fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  fiber.lane = i % kWarp;
  fiber.warp = i / kWarp;
  fiber.barriers = 0;
  fiber.state = State::ready;
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

[[noreturn]] inline void die_of_deadlock() {
  for (unsigned i = 0, shown = 0; i < runtime.threads && shown < 8; ++i) {
    const Fiber& fiber = runtime.fibers[i];
    if (fiber.state == State::done) continue;
    ++shown;
    std::fprintf(stderr, "simt: thread %u waits at a %s, line %d\n", i,
                 fiber.state == State::at_barrier ? "barrier" : "warp collective", fiber.line);
  }
  die("deadlock: a divergent barrier or mismatched warp masks");
}

inline void run_block(size_t shared_bytes, std::vector<unsigned>& order, std::mt19937& random) {
  runtime.shared.assign(shared_bytes, kUnwritten);
  runtime.shared.shrink_to_fit();  // so that AddressSanitizer sees the exact end
  runtime.live = runtime.threads;
  runtime.waiting = 0;
  runtime.votes = 0;
  for (unsigned i = 0; i < runtime.threads; ++i) prepare(runtime.fibers[i], i);
  while (runtime.live > 0) {
    bool moved = false;
    if (settings.order > 1) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      if (runtime.fibers[i].state != State::ready) continue;
      moved = true;
      resume(runtime.fibers[i]);
    }
    if (!moved) die_of_deadlock();
  }
}

// Runs body() as every thread of every block, block after block.
inline void run(Dim3 grid, Dim3 block, size_t shared_bytes, std::function<void()> body) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || shared_bytes > kMaxShared) die("bad launch configuration");
  runtime.grid = grid;
  runtime.block = block;
  runtime.threads = threads;
  runtime.body = std::move(body);
  if (runtime.fibers.size() < threads) runtime.fibers.resize(threads);
  runtime.offers.resize(runtime.fibers.size());
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = settings.order == 1 ? threads - 1 - i : i;
  std::mt19937 random(settings.order);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        runtime.block_index = {x, y, z};
        run_block(shared_bytes, order, random);
      }
    }
  }
}

}  // namespace simt
