// One OS thread a CUDA thread, for ThreadSanitizer: it sees two threads touch the same shared or global word without a
// barrier between them, whatever the order in which they happened to run. Blocks run one after another.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "simt/engine.h"

namespace simt {

// A barrier that adds up votes. (std::barrier is C++20.)
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}

  int wait(int vote) {
    std::unique_lock<std::mutex> lock(mutex_);
    votes_ += vote != 0;
    if (++waiting_ == threads_) {
      result_ = votes_;
      votes_ = 0;
      waiting_ = 0;
      ++round_;
      all_here_.notify_all();
      return result_;
    }
    const unsigned long round = round_;
    all_here_.wait(lock, [&] { return round_ != round; });
    return result_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  unsigned threads_, waiting_ = 0;
  unsigned long round_ = 0;
  int votes_ = 0, result_ = 0;
};

struct Runtime {
  Dim3 grid, block, block_index;
  unsigned threads = 0;
  std::vector<unsigned char> shared;
  std::unique_ptr<Barrier> all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<Offer> offers;  // one a thread
};

inline Runtime runtime;
inline thread_local Thread this_thread;

// --- what the intrinsics call ---

inline Thread& self() { return this_thread; }
inline const Dim3& block_index() { return runtime.block_index; }
inline const Dim3& block_dim() { return runtime.block; }
inline const Dim3& grid_dim() { return runtime.grid; }
inline void* shared_memory() { return runtime.shared.data(); }
inline size_t shared_size() { return runtime.shared.size(); }

inline int barrier(int vote, int /*line*/) { return runtime.all->wait(vote); }

// Only whole warps: all our kernels call collectives with every lane.
inline uint64_t collective(Op op, unsigned mask, Offer offer, int /*line*/) {
  const unsigned lanes = lanes_of(runtime.threads, this_thread.warp);
  if ((mask & lanes) != lanes) die("the thread engine takes collectives of whole warps only");
  Offer* offers = &runtime.offers[this_thread.warp * kWarp];
  offers[this_thread.lane] = offer;
  runtime.warps[this_thread.warp]->wait(0);
  const uint64_t result = collect(op, offers, lanes, this_thread.lane);
  runtime.warps[this_thread.warp]->wait(0);
  return result;
}

// Runs body() as every thread of every block, block after block.
inline void run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || shared_bytes > kMaxShared) die("bad launch configuration");
  runtime.grid = grid;
  runtime.block = block;
  runtime.threads = threads;
  runtime.all = std::make_unique<Barrier>(threads);
  runtime.warps.clear();
  for (unsigned first = 0; first < threads; first += kWarp) {
    runtime.warps.push_back(std::make_unique<Barrier>(threads - first < kWarp ? threads - first : kWarp));
  }
  runtime.offers.assign(threads, Offer{});
  const unsigned long blocks = static_cast<unsigned long>(grid.x) * grid.y * grid.z;
  const auto work = [&](unsigned i) {
    for (unsigned long b = 0; b < blocks; ++b) {
      if (i == 0) {
        runtime.block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                               static_cast<unsigned>(b / grid.x / grid.y)};
        runtime.shared.assign(shared_bytes, kUnwritten);
      }
      this_thread = {{i % block.x, i / block.x % block.y, i / block.x / block.y}, i % kWarp, i / kWarp, 0};
      runtime.all->wait(0);
      body();
      runtime.all->wait(0);
    }
  };
  std::vector<std::thread> team;
  for (unsigned i = 0; i < threads; ++i) team.emplace_back(work, i);
  for (std::thread& member : team) member.join();
}

}  // namespace simt
