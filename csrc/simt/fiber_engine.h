// One fibre for each CUDA thread, all in one OS thread: fast, and the order of threads can be chosen. A fibre runs
// until it waits at a barrier or a warp collective.
#pragma once

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "simt/engine.h"
#include "simt/sanitizers.h"
#include "simt/stack.h"

namespace simt {

enum class State { ready, at_barrier, at_collective, done };

struct Fiber : Thread {
  State state = State::ready;
  Op op = Op::sync;
  uint64_t result = 0;
  int line = 0;
  unsigned rounds = 0, collectives = 0;  // barriers and collectives of this block that it has reached
  Stack stack;
};

struct Runtime {
  Dim3 grid, block, block_index;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);  // never moved: fibres wait inside their own functions
  std::vector<Offer> offers = std::vector<Offer>(kMaxThreads);  // one a fibre
  std::vector<unsigned char> shared;
  std::function<void()> body;
  Fiber* current = nullptr;
  unsigned threads = 0, live = 0, waiting = 0;
  int votes = 0, result = 0;  // of __syncthreads_count
  Stack main;
  // Synchronisation points for ThreadSanitizer. Rounds alternate between two, because a thread may reach the next
  // barrier before another has left this one, which orders nothing between the two threads.
  char begun = 0, ended = 0, at_barrier[2] = {}, at_collective[kMaxThreads / kWarp][2] = {};
};

inline Runtime runtime;

inline void yield_fiber() { switch_stack(runtime.current->stack, runtime.main); }

inline void resume(Fiber& fiber) {
  runtime.current = &fiber;
  switch_stack(runtime.main, fiber.stack);
}

inline void release_barrier() {
  for (unsigned i = 0; i < runtime.threads; ++i) {
    if (runtime.fibers[i].state == State::at_barrier) runtime.fibers[i].state = State::ready;
  }
  runtime.waiting = 0;
  runtime.result = runtime.votes;
  runtime.votes = 0;
}

inline void finish_thread() {
  const Unwatched engine;
  runtime.current->state = State::done;
  if (--runtime.live > 0 && runtime.waiting == runtime.live) release_barrier();
  yield_fiber();
}

// A fibre runs one block after another.
[[noreturn]] inline void fiber_main() {
  arrive(runtime.main, runtime.current->stack);
  while (true) {
    acquire(&runtime.begun);
    runtime.body();
    release(&runtime.ended);
    finish_thread();
  }
}

// --- called by the intrinsics ---

inline Thread& self() { return *runtime.current; }
inline const Dim3& block_index() { return runtime.block_index; }
inline const Dim3& block_dim() { return runtime.block; }
inline const Dim3& grid_dim() { return runtime.grid; }
inline void* shared_memory() { return runtime.shared.data(); }
inline size_t shared_size() { return runtime.shared.size(); }

// Returns how many threads came with vote != 0.
inline int barrier(int vote, int line) {
  const Unwatched engine;
  Fiber& fiber = *runtime.current;
  char* meeting = &runtime.at_barrier[fiber.rounds++ % 2];
  release(meeting);
  fiber.state = State::at_barrier;
  fiber.line = line;
  runtime.votes += vote != 0;
  if (++runtime.waiting == runtime.live) release_barrier();
  yield_fiber();
  acquire(meeting);
  return runtime.result;
}

// Whether all of these lanes, of the warp whose first thread is `first`, have reached a collective of this kind.
inline bool all_lanes_wait(unsigned first, unsigned lanes, Op op) {
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((lanes >> l & 1u) == 0) continue;
    const Fiber& lane = runtime.fibers[first + l];
    if (lane.state == State::done) die("a collective waits for a lane that has exited");
    if (lane.state != State::at_collective || lane.op != op) return false;
  }
  return true;
}

// __syncthreads(), or nothing if a test skips it.
inline void sync_threads(int line) {
  if (++self().barriers != settings.dropped_barrier) barrier(0, line);
}

// All lanes of the warp that are in `mask` must call the same op; the last to arrive computes all results.
inline uint64_t collective(Op op, unsigned mask, Offer offer, int line) {
  const Unwatched engine;
  Fiber& fiber = *runtime.current;
  const unsigned first = fiber.warp * kWarp, expected = mask & lanes_of(runtime.threads, fiber.warp);
  if ((mask >> fiber.lane & 1u) == 0) die("a lane calls a collective whose mask leaves it out");
  char* meeting = &runtime.at_collective[fiber.warp][fiber.collectives++ % 2];
  if (op == Op::sync) release(meeting);  // shuffles and ballots do not order memory accesses
  fiber.state = State::at_collective;
  fiber.op = op;
  fiber.line = line;
  runtime.offers[first + fiber.lane] = offer;
  if (all_lanes_wait(first, expected, op)) {
    for (unsigned l = 0; l < kWarp; ++l) {
      if ((expected >> l & 1u) == 0) continue;
      Fiber& other = runtime.fibers[first + l];
      other.result = collect(op, &runtime.offers[first], expected, l);
      other.state = State::ready;
    }
  }
  yield_fiber();  // the last to arrive yields too, so that no lane runs ahead
  if (op == Op::sync) acquire(meeting);
  return fiber.result;
}

inline void prepare(Fiber& fiber, unsigned i) {
  if (!fiber.stack.exists()) make_stack(fiber.stack, &fiber_main);
  const Dim3& block = runtime.block;
  fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  fiber.lane = i % kWarp;
  fiber.warp = i / kWarp;
  fiber.barriers = 0;
  fiber.rounds = fiber.collectives = 0;
  fiber.state = State::ready;
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
  runtime.shared.shrink_to_fit();  // so that AddressSanitizer knows the exact end
  runtime.live = runtime.threads;
  runtime.waiting = 0;
  runtime.votes = 0;
  for (unsigned i = 0; i < runtime.threads; ++i) prepare(runtime.fibers[i], i);
  release(&runtime.begun);
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
  acquire(&runtime.ended);
}

// Runs body() as every thread of every block, block after block.
inline void run(Dim3 grid, Dim3 block, size_t shared_bytes, std::function<void()> body) {
  const Unwatched engine;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || shared_bytes > kMaxShared) die("bad launch configuration");
  runtime.grid = grid;
  runtime.block = block;
  runtime.threads = threads;
  runtime.body = std::move(body);
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
