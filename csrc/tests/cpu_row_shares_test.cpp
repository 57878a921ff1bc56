#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "cpu/row_shares.h"

namespace ace::cpu {
namespace {

struct Case {
  int64_t rows, shares;
};
const Case kCases[] = {{1, 1}, {1, 3}, {15, 2}, {16, 2}, {17, 2}, {100, 7}, {1000, 2}, {4097, 4}};

TEST(RowShares, OneThreadGetsEveryRowOnce) {
  for (const auto& [rows, count] : kCases)
    for (int64_t own = 0; own < count; ++own) {
      RowShares shares(rows, count);
      std::vector<int> given(static_cast<size_t>(rows));
      shares.work(own, [&](int64_t begin, int64_t end) {
        ASSERT_LT(begin, end);
        for (; begin < end; ++begin) ++given.at(static_cast<size_t>(begin));
      });
      EXPECT_EQ(given, std::vector<int>(static_cast<size_t>(rows), 1)) << rows << " rows, share " << own;
      shares.work(0, [](int64_t, int64_t) { FAIL() << "nothing is left"; });
    }
}

TEST(RowShares, TheOwnersRowsComeInOrderAndFromItsShare) {
  RowShares shares(1024, 2);
  int64_t next = 512;
  shares.work(1, [&](int64_t begin, int64_t end) {
    if (next == 1024) return;  // the other's rows
    EXPECT_EQ(begin, next);
    next = end;
  });
  EXPECT_EQ(next, 1024);
}

TEST(RowShares, ThreadsGetEveryRowOnceTogether) {
  for (const auto& [rows, count] : kCases)
    for (int round = 0; round < 20; ++round) {
      RowShares shares(rows, count);
      std::vector<int> given(static_cast<size_t>(rows));
      std::vector<std::thread> threads;
      for (int64_t own = 0; own < count; ++own)
        threads.emplace_back([&, own] {
          shares.work(own, [&](int64_t begin, int64_t end) {
            for (; begin < end; ++begin) ++given[static_cast<size_t>(begin)];  // a row given twice is a data race
          });
        });
      for (std::thread& thread : threads) thread.join();
      EXPECT_EQ(given, std::vector<int>(static_cast<size_t>(rows), 1)) << rows << " rows, " << count << " threads";
    }
}

}  // namespace
}  // namespace ace::cpu
