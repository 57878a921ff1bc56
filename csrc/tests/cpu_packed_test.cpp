// The loops over a packed matrix, for every instruction set of this processor, against plain sums. Buffers have the
// exact size, so that AddressSanitizer detects a read beyond them. (With its option detect_stack_use_after_return,
// which tools/test_cpp.sh turns off, GCC 12 misaligns vectors on the stack and crashes.)
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "tests/packed_sample.h"

namespace ace::cpu {
namespace {

template <class T>
class Packed : public testing::Test {};
using Types = testing::Types<float, Half, BFloat16>;
TYPED_TEST_SUITE(Packed, Types);

TYPED_TEST(Packed, ProductsAreThoseOfTheDenseMatrix) {
  std::mt19937 random(3);
  for (const auto& [rows, cols] :
       std::vector<std::pair<int64_t, int64_t>>{{5, 1}, {5, 31}, {5, 64}, {23, 65}, {23, 200}, {5, 1134}, {43, 134}}) {
    for (const unsigned share : {0u, 3u, 50u, 100u}) {
      const Sample<TypeParam> sample(rows, cols, share, random);
      for (const PackedLevel level : levels()) {
        with_packed_loops<TypeParam>(level, [&](auto* loop, auto*, auto input) {
          using X = decltype(input);
          for (const int64_t tokens : {1, 2, 3, 4, 8, 15}) {
            const int64_t stride = sample.words * 64 + 32;
            std::vector<X> x(static_cast<size_t>(tokens * stride));
            for (int64_t t = 0; t < tokens; ++t)
              for (int64_t j = 0; j < cols; ++j) x[static_cast<size_t>(t * stride + j)] = draw<X>(random);
            std::vector<float> out(static_cast<size_t>(tokens * sample.rows));
            loop(PackedProduct<TypeParam, X>{sample.matrix(), x.data(), stride, out.data(), sample.rows}, tokens, 0,
                 sample.rows);
            for (int64_t t = 0; t < tokens; ++t) {
              for (int64_t i = 0; i < sample.rows; ++i) {
                double sum = 0.0;  // products and sums of these numbers are exact in float, in any order
                for (int64_t j = 0; j < cols; ++j)
                  sum += static_cast<double>(to_float(sample.dense[static_cast<size_t>(i * cols + j)])) *
                         static_cast<double>(to_float(x[static_cast<size_t>(t * stride + j)]));
                ASSERT_EQ(static_cast<double>(out[static_cast<size_t>(t * sample.rows + i)]), sum)
                    << "level " << static_cast<int>(level) << " cols " << cols << " tokens " << tokens;
              }
            }
          }
        });
      }
    }
  }
}

// Threads divide the rows as they come, so a sum must not depend on the rows that it is computed with.
TYPED_TEST(Packed, ARowHasTheSameBitsInAnyRange) {
  std::mt19937 random(6);
  const Sample<TypeParam> sample(23, 449, 50, random);
  for (const PackedLevel level : levels()) {
    with_packed_loops<TypeParam>(level, [&](auto* loop, auto*, auto input) {
      using X = decltype(input);
      const int64_t tokens = 15, stride = sample.words * 64;
      std::vector<X> x(static_cast<size_t>(tokens * stride));
      for (X& value : x) {
        const float wide = std::uniform_real_distribution<float>(-1.0f, 1.0f)(random);
        if constexpr (std::is_same_v<X, float>)
          value = wide;
        else
          value = to_bfloat16(wide);
      }
      std::vector<float> whole(static_cast<size_t>(tokens * sample.rows)), parts(whole.size());
      const auto multiply = [&](std::vector<float>& out, int64_t begin, int64_t end) {
        loop(PackedProduct<TypeParam, X>{sample.matrix(), x.data(), stride, out.data(), sample.rows}, tokens, begin,
             end);
      };
      multiply(whole, 0, sample.rows);
      for (int64_t begin = 0; begin < sample.rows; begin += 4) multiply(parts, begin, std::min(begin + 4, sample.rows));
      ASSERT_EQ(whole, parts) << "level " << static_cast<int>(level);
    });
  }
}

TYPED_TEST(Packed, UnpackingGivesTheDenseMatrix) {
  std::mt19937 random(4);
  for (const int64_t cols : {1, 7, 64, 100, 1134}) {
    const Sample<TypeParam> sample(4, cols, 50, random);
    for (const PackedLevel level : levels()) {
      with_packed_loops<TypeParam>(level, [&](auto*, auto* unpack, auto) {
        std::vector<TypeParam> out(static_cast<size_t>(2 * cols));
        unpack(sample.matrix(), 1, 3, cols, out.data());
        for (size_t j = 0; j < out.size(); ++j)
          ASSERT_TRUE(same_bits(out[j], sample.dense[static_cast<size_t>(cols) + j])) << "level " << int(level);
      });
    }
  }
}

TYPED_TEST(Packed, WrongCountsReadNothingOutside) {
  std::mt19937 random(5);
  Sample<TypeParam> sample(4, 128, 10, random);
  std::fill(sample.bitmap.begin(), sample.bitmap.end(), uint8_t{255});
  for (const int64_t start : {int64_t{0}, int64_t{1} << 60, -(int64_t{1} << 60)}) {
    sample.row_start[1] = start;
    for (const PackedLevel level : levels()) {
      with_packed_loops<TypeParam>(level, [&](auto* loop, auto* unpack, auto input) {
        std::vector<decltype(input)> x(3 * 128);
        std::vector<float> out(3 * 4);
        loop(PackedProduct<TypeParam, decltype(input)>{sample.matrix(), x.data(), 128, out.data(), 4}, 3, 0, 4);
        std::vector<TypeParam> dense(4 * 128);
        unpack(sample.matrix(), 0, 4, 128, dense.data());
      });
    }
  }
}

// A matrix whose header and data disagree: truncated values, bits and starts of another matrix or random ones. Every
// buffer has exactly the size of the layout, so AddressSanitizer detects an access outside.
template <class T>
struct Damaged {
  explicit Damaged(std::mt19937& random) : sample(1 + random() % 12, 1 + random() % 300, random() % 101, random) {
    const unsigned kind = random() % 6;
    if (kind == 0) sample.values.resize(random() % (sample.values.size() + 1));  // cut
    if (kind == 1)
      for (uint8_t& byte : sample.bitmap) byte = static_cast<uint8_t>(random());         // other bits
    if (kind == 2) std::fill(sample.bitmap.begin(), sample.bitmap.end(), uint8_t{255});  // more than there are
    if (kind == 3) std::swap(sample.row_start.front(), sample.row_start.back());         // descending starts
    if (kind == 4)
      for (int64_t& start : sample.row_start) start = any(random);
    if (kind == 5) sample.values.clear();
    sample.values.shrink_to_fit();
    uniform = random() % 3 == 0;
    keep = uniform ? static_cast<int64_t>(random() % 400) : 0;  // more or fewer than there are values
  }
  static int64_t any(std::mt19937& random) {
    const int64_t size = int64_t{1} << random() % 63;
    return random() % 2 ? size - static_cast<int64_t>(random() % 3) : -size;
  }
  PackedMatrix<T> matrix() const {
    return {sample.bitmap.data(),
            sample.words,
            sample.values.data(),
            static_cast<int64_t>(sample.values.size()),
            uniform ? nullptr : sample.row_start.data(),
            keep};
  }
  Sample<T> sample;
  bool uniform;
  int64_t keep;
};

TYPED_TEST(Packed, DamagedInputsReadNothingOutside) {
  std::mt19937 random(8);
  for (int round = 0; round < 300; ++round) {
    const Damaged<TypeParam> damaged(random);
    const Sample<TypeParam>& sample = damaged.sample;
    const int64_t tokens = 1 + random() % 9, stride = sample.words * 64;
    for (const PackedLevel level : levels()) {
      with_packed_loops<TypeParam>(level, [&](auto* loop, auto* unpack, auto input) {
        const std::vector<decltype(input)> x(static_cast<size_t>(tokens * stride));
        std::vector<float> out(static_cast<size_t>(tokens * sample.rows));
        loop({damaged.matrix(), x.data(), stride, out.data(), sample.rows}, tokens, 0, sample.rows);
        for (const float value : out) ASSERT_EQ(value, 0.0f);  // of inputs that are all 0
        std::vector<TypeParam> dense(static_cast<size_t>(sample.rows * sample.cols));
        unpack(damaged.matrix(), 0, sample.rows, sample.cols, dense.data());
      });
    }
#if ACE_PACKED_X86
    if constexpr (std::is_same_v<TypeParam, BFloat16>) {
      if (!has_panels()) continue;
      const std::vector<BFloat16> x(static_cast<size_t>(tokens * stride));
      std::vector<BFloat16> out(static_cast<size_t>(tokens * sample.rows));
      multiply_panels(damaged.matrix(), x.data(), tokens, nullptr, sample.rows, sample.cols, 0, out.data());
      for (const BFloat16 value : out) ASSERT_EQ(to_float(value), 0.0f);
      if (highest_packed_level() != PackedLevel::avx512_amx) continue;
      const avx512bf16::PackedRows source{damaged.matrix()};
      multiply_tiles(source, x.data(), tokens, nullptr, sample.rows, 0, out.data());
      for (const BFloat16 value : out) ASSERT_EQ(to_float(value), 0.0f);
    }
#endif
  }
}

}  // namespace
}  // namespace ace::cpu
