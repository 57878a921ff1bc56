// Rows of a matrix for threads that finish at different times: each thread has a share, and one that has finished its
// own takes rows from the end of another's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace ace::cpu {

struct RowRange {
  int64_t begin, end;
};

class RowShares {
 public:
  // `rows` rows in `count` shares, of as many rows as possible.
  RowShares(int64_t rows, int64_t count) : rows_(rows), left_(static_cast<size_t>(count)) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    for (int64_t i = 0; i < count; ++i)
      left_[static_cast<size_t>(i)] = packed(blocks * i / count, blocks * (i + 1) / count);
  }

  int64_t count() const { return static_cast<int64_t>(left_.size()); }

  // Calls action(begin, end) until no share has rows, those of share `own` first. Every row is given once, whatever
  // the number of threads.
  template <class Action>
  void work(int64_t own, Action&& action) {
    for (int64_t i = 0; i < count(); ++i) {
      auto& share = left_[static_cast<size_t>((own + i) % count())];
      for (RowRange range = take(share, i == 0); range.begin < range.end; range = take(share, i == 0))
        action(range.begin, range.end);
    }
  }

 private:
  static constexpr int64_t kBlock = 16;  // rows; a multiple of what loops handle at a time
  static constexpr int64_t kPart = 6;    // the owner takes a sixth of what is left, so that the parts become short

  static uint64_t packed(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }

  // Blocks from the beginning for the owner, and half of the rest from the end for another.
  RowRange take(std::atomic<uint64_t>& share, bool owner) {
    uint64_t found = share.load(std::memory_order_relaxed);
    for (;;) {
      const auto begin = static_cast<int64_t>(found >> 32), end = static_cast<int64_t>(found & 0xffffffffu);
      const int64_t count = owner ? (end - begin + kPart - 1) / kPart : (end - begin + 1) / 2;
      if (count == 0) return {0, 0};
      const int64_t first = owner ? begin : end - count;
      const uint64_t rest = owner ? packed(begin + count, end) : packed(begin, end - count);
      if (share.compare_exchange_weak(found, rest, std::memory_order_relaxed))
        return {first * kBlock, std::min(rows_, (first + count) * kBlock)};
    }
  }

  int64_t rows_;
  std::vector<std::atomic<uint64_t>> left_;  // of each share, its first block and the end: 32 bits each
};

}  // namespace ace::cpu
