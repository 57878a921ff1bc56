// The loops over a packed bfloat16 matrix for many tokens, with AMX tiles and with panels, against plain sums.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "tests/packed_sample.h"

#if ACE_PACKED_X86
namespace ace::cpu {
namespace {

// out [tokens, rows] is the product of x [tokens, 64 words], rounded once: sums of these numbers are exact in any
// order.
void expect_products(const Sample<BFloat16>& sample, const std::vector<BFloat16>& x, int64_t tokens,
                     const BFloat16* bias, const std::vector<BFloat16>& out) {
  const int64_t cols = sample.cols, stride = sample.words * 64;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < sample.rows; ++i) {
      float sum = bias ? to_float(bias[i]) : 0.0f;
      for (int64_t j = 0; j < cols; ++j)
        sum += to_float(sample.dense[static_cast<size_t>(i * cols + j)]) *
               to_float(x[static_cast<size_t>(t * stride + j)]);
      ASSERT_TRUE(same_bits(out[static_cast<size_t>(t * sample.rows + i)], to_bfloat16(sum)))
          << sample.rows << " x " << cols << ", " << tokens << " tokens";
    }
  }
}

// Panels of one tile and of several, the last one with few rows, and up to four blocks of tokens.
TEST(PackedTiles, ProductsAreThoseOfTheDenseMatrix) {
  if (!amx::available()) GTEST_SKIP() << "this processor has no AMX";
  std::mt19937 random(6);
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{37, 1}, {150, 65}, {16, 600}, {37, 1134}}) {
    const Sample<BFloat16> sample(rows, cols, 50, random);
    const avx512bf16::PackedRows source{sample.matrix()};
    std::vector<BFloat16> bias;
    for (int64_t i = 0; i < rows; ++i) bias.push_back(draw<BFloat16>(random));
    const int64_t stride = sample.words * 64;
    for (const int64_t tokens : {1, 16, 20, 47, 64, 70}) {
      std::vector<BFloat16> x(static_cast<size_t>(tokens * stride)), out(static_cast<size_t>(tokens * rows));
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < cols; ++j) x[static_cast<size_t>(t * stride + j)] = draw<BFloat16>(random);
      multiply_tiles(source, x.data(), tokens, tokens % 2 ? bias.data() : nullptr, rows, rows / 2, out.data());
      expect_products(sample, x, tokens, tokens % 2 ? bias.data() : nullptr, out);
    }
  }
}

TEST(PackedTiles, WrongCountsReadNothingOutside) {
  if (!amx::available()) GTEST_SKIP() << "this processor has no AMX";
  std::mt19937 random(7);
  Sample<BFloat16> sample(4, 128, 10, random);
  std::fill(sample.bitmap.begin(), sample.bitmap.end(), uint8_t{255});
  sample.row_start[1] = int64_t{1} << 60;
  const std::vector<BFloat16> x(3 * 128);
  std::vector<BFloat16> out(3 * 4);
  multiply_tiles(avx512bf16::PackedRows{sample.matrix()}, x.data(), 3, nullptr, 4, 2, out.data());
}

TEST(PackedPanels, ProductsAreThoseOfTheDenseMatrix) {
  if (!has_panels()) GTEST_SKIP() << "this processor has no bf16 instructions of AVX-512";
  std::mt19937 random(9);
  // One panel; parts of one by the inputs' share of the cache; two of 65 words and of 64, and tiles that lack rows.
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{37, 1}, {150, 65}, {3, 2100}, {70, 8250}}) {
    const Sample<BFloat16> sample(rows, cols, 50, random);
    std::vector<BFloat16> bias;
    for (int64_t i = 0; i < rows; ++i) bias.push_back(draw<BFloat16>(random));
    const int64_t stride = sample.words * 64;
    for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 13}) {
      std::vector<BFloat16> x(static_cast<size_t>(tokens * stride)), out(static_cast<size_t>(tokens * rows));
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < cols; ++j) x[static_cast<size_t>(t * stride + j)] = draw<BFloat16>(random);
      multiply_panels(sample.matrix(), x.data(), tokens, tokens % 2 ? bias.data() : nullptr, rows, cols, rows / 2,
                      out.data());
      expect_products(sample, x, tokens, tokens % 2 ? bias.data() : nullptr, out);
    }
  }
}

// The sum of one row and one token in the order of the header.
__attribute__((target("avx512f,avx512bf16"))) float sum_in_order(const BFloat16* weights, const BFloat16* x,
                                                                 int64_t cols) {
  const int64_t length = cols > 1024 ? 1024 : 512;
  float sum = 0.0f;
  for (int64_t first = 0; first < cols; first += length) {
    __m512 run = _mm512_setzero_ps();
    for (int64_t j = first; j < std::min(first + length, cols); j += 2) {
      BFloat16 w[2] = {weights[j], {}}, input[2] = {x[j], {}};
      if (j + 1 < cols) w[1] = weights[j + 1], input[1] = x[j + 1];
      int32_t pair[2];
      std::memcpy(&pair[0], w, sizeof w);
      std::memcpy(&pair[1], input, sizeof input);
      run = _mm512_dpbf16_ps(run, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair[0])),
                             reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair[1])));
    }
    sum += _mm512_cvtss_f32(run);
  }
  return sum;
}

// Numbers with full mantissas; the second half of each row is the first half negated, and columns are shuffled. The sum
// is then only its rounding error, which another order changes in nearly every entry.
TEST(PackedPanels, SumsAreFormedInTheOrderOfDenseProducts) {
  if (!has_panels()) GTEST_SKIP() << "this processor has no bf16 instructions of AVX-512";
  std::mt19937 random(10);
  std::normal_distribution<float> normal;
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{37, 63}, {64, 576}, {70, 1024}, {3, 1100}, {20, 2112}, {17, 8300}}) {
    Sample<BFloat16> sample(rows, cols, 0, random);
    const int64_t tokens = 8, stride = sample.words * 64, half = cols / 2;
    std::vector<int64_t> places(static_cast<size_t>(cols));
    for (int64_t j = 0; j < cols; ++j) places[static_cast<size_t>(j)] = j;
    std::shuffle(places.begin(), places.end(), random);
    std::vector<BFloat16> x(static_cast<size_t>(tokens * stride)), out(static_cast<size_t>(tokens * rows));
    for (int64_t j = 0; j < half; ++j) {
      const int64_t here = places[static_cast<size_t>(j)], there = places[static_cast<size_t>(half + j)];
      for (int64_t t = 0; t < tokens; ++t)
        x[static_cast<size_t>(t * stride + here)] = x[static_cast<size_t>(t * stride + there)] =
            to_bfloat16(normal(random));
      for (int64_t i = 0; i < rows; ++i) {
        const float weight = random() % 2 ? normal(random) : 0.0f;
        sample.dense[static_cast<size_t>(i * cols + here)] = to_bfloat16(weight);
        sample.dense[static_cast<size_t>(i * cols + there)] = to_bfloat16(-weight);
      }
    }
    sample.pack();
    multiply_panels(sample.matrix(), x.data(), tokens, nullptr, rows, cols, rows / 3, out.data());
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < rows; ++i)
        ASSERT_TRUE(same_bits(out[static_cast<size_t>(t * rows + i)],
                              to_bfloat16(sum_in_order(&sample.dense[static_cast<size_t>(i * cols)],
                                                       &x[static_cast<size_t>(t * stride)], cols))))
            << rows << " x " << cols << ", token " << t << ", row " << i;
  }
}

}  // namespace
}  // namespace ace::cpu
#endif
