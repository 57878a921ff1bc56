// The loops over a packed matrix of quantized survivors, for every instruction set of this processor, against plain
// sums. Buffers have the exact size, so that AddressSanitizer detects a read beyond them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/quantized_level.h"
#include "cpu/quantized_panel.h"
#include "tests/packed_sample.h"

namespace ace::cpu {
namespace {

// A random matrix: dense codes and scales, and its packed form.
template <class S, int kBits>
struct Quantized {
  Quantized(int64_t rows, int64_t cols, int64_t group_words, unsigned share, std::mt19937& random)
      : rows(rows),
        cols(cols),
        words((cols + 63) / 64),
        group_words(group_words),
        groups((words + group_words - 1) / group_words),
        bitmap(static_cast<size_t>(8 * rows * words)) {
    row_start.push_back(0);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t survivors = 0;
      for (int64_t column = 0; column < cols; ++column) {
        const bool stored = random() % 100 < share;
        const unsigned code = random() % (1u << kBits);
        dense.push_back(stored ? signed_code(code) : 0);
        if (!stored) continue;
        bitmap[static_cast<size_t>(8 * row * words + column / 8)] |= static_cast<uint8_t>(1u << (column % 8));
        if (survivors++ * kBits % 8 == 0)
          codes.push_back(static_cast<uint8_t>(code));
        else
          codes.back() |= static_cast<uint8_t>(code << 4);
      }
      row_start.push_back(static_cast<int64_t>(codes.size()));
    }
    codes.shrink_to_fit();
    for (int64_t i = 0; i < rows * groups; ++i) scales.push_back(draw<S>(random));
  }
  static int signed_code(unsigned code) { return static_cast<int>(code) - (code >> (kBits - 1) << kBits); }
  float scale(int64_t row, int64_t column) const {
    return to_float(scales[static_cast<size_t>(row * groups + column / 64 / group_words)]);
  }
  int code(int64_t row, int64_t column) const { return dense[static_cast<size_t>(row * cols + column)]; }
  QuantizedMatrix<S> matrix() const {
    return {bitmap.data(), words,  codes.data(), static_cast<int64_t>(codes.size()), row_start.data(), 0,
            scales.data(), groups, group_words};
  }
  int64_t rows, cols, words, group_words, groups;
  std::vector<uint8_t> bitmap, codes;
  std::vector<int> dense;
  std::vector<S> scales;
  std::vector<int64_t> row_start;
};

std::unique_ptr<char[]> space_for(int64_t words) {
  return std::make_unique<char[]>(static_cast<size_t>(QuantizedSpace::size(words)));
}

template <class S, int kBits>
struct Kind {
  using Scale = S;
  static constexpr int bits = kBits;
};
template <class K>
class QuantizedLoops : public testing::Test {};
using Kinds =
    testing::Types<Kind<float, 8>, Kind<Half, 8>, Kind<BFloat16, 8>, Kind<float, 4>, Kind<Half, 4>, Kind<BFloat16, 4>>;
TYPED_TEST_SUITE(QuantizedLoops, Kinds);

// x [tokens, cols] of small numbers: products with codes and scales, and their sums, are exact in float in any order.
std::vector<float> inputs(int64_t tokens, int64_t cols, std::mt19937& random) {
  std::vector<float> x;
  for (int64_t i = 0; i < tokens * cols; ++i) x.push_back(static_cast<float>(random() % 9) - 4.0f);
  return x;
}

template <class Sample>
double exact(const Sample& sample, const float* x, int64_t row) {
  double sum = 0.0;
  for (int64_t j = 0; j < sample.cols; ++j)
    sum += static_cast<double>(sample.code(row, j)) * static_cast<double>(sample.scale(row, j)) *
           static_cast<double>(x[j]);
  return sum;
}

// A float in a type that has this number, or nearly.
template <class S>
S exactly(float value) {
  if constexpr (std::is_same_v<S, float>) {
    return value;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    return to_bfloat16(value);
  } else {
    const uint32_t sign = float_bits(value) >> 16 & 0x8000u, size = float_bits(value) & 0x7fffffffu;
    const bool normal = size >= 113u << 23;
    const auto steps = static_cast<uint32_t>(std::abs(value) * (normal ? 0.0f : 16777216.0f));
    return {static_cast<uint16_t>(sign | (normal ? (size >> 13) - (112u << 10) : steps))};
  }
}

// Tokens as a loop wants them, of x [tokens, cols] and scales of type S.
template <class Input, class S>
struct Given {
  using X = std::conditional_t<std::is_same_v<Input, WideInput>, float, uint8_t>;

  Given(const std::vector<float>& x, int64_t tokens, int64_t cols, int64_t words, int64_t group_words) {
    if constexpr (std::is_same_v<Input, WideInput>)
      stride = words * 64;
    else
      stride = Input::size(tokens, words, group_words) / tokens;
    if constexpr (std::is_same_v<Input, WideInput>) {
      data.resize(static_cast<size_t>(tokens * stride));
      for (int64_t t = 0; t < tokens; ++t) std::copy_n(x.data() + t * cols, cols, data.begin() + t * stride);
    } else {
      data.resize(static_cast<size_t>(Input::size(tokens, words, group_words)));
      std::vector<S> exact;
      for (int64_t i = 0; i < tokens * cols; ++i) exact.push_back(exactly<S>(x[static_cast<size_t>(i)]));
      exact.shrink_to_fit();
      Input::write(exact.data(), cols, tokens, cols, words, group_words, data.data());
    }
  }
  int64_t stride;
  std::vector<X> data;
};

struct Shape {
  int64_t rows, cols, group_words;
};
const Shape kShapes[] = {{5, 0, 1},    {5, 1, 1},   {5, 31, 2},   {5, 64, 1},    {9, 65, 1}, {9, 65, 2},
                         {23, 200, 2}, {7, 449, 3}, {5, 1134, 2}, {6, 1134, 64}, {3, 320, 4}};

TYPED_TEST(QuantizedLoops, ProductsAreThoseOfTheDenseMatrix) {
  using S = typename TypeParam::Scale;
  std::mt19937 random(3);
  for (const auto& [rows, cols, group_words] : kShapes) {
    for (const unsigned share : {0u, 3u, 50u, 100u}) {
      const Quantized<S, TypeParam::bits> sample(rows, cols, group_words, share, random);
      const auto space = space_for(sample.words);
      for (const PackedLevel level : levels()) {
        for (const int64_t tokens : {1, 2, 3, 4, 9, 17}) {
          with_quantized_product<TypeParam::bits, S>(level, tokens, [&](auto* loop, auto input) {
            const std::vector<float> given = inputs(tokens, cols, random);
            const Given<decltype(input), S> x(given, tokens, cols, sample.words, group_words);
            std::vector<float> out(static_cast<size_t>(tokens * rows));
            loop({sample.matrix(), x.data.data(), x.stride, out.data(), rows}, tokens, 0, rows, space.get());
            for (int64_t t = 0; t < tokens; ++t)
              for (int64_t i = 0; i < rows; ++i)
                ASSERT_EQ(static_cast<double>(out[static_cast<size_t>(t * rows + i)]),
                          exact(sample, given.data() + t * cols, i))
                    << "level " << static_cast<int>(level) << " cols " << cols << " tokens " << tokens;
          });
        }
      }
    }
  }
}

// As in cpu_packed_test.cpp.
TYPED_TEST(QuantizedLoops, ARowHasTheSameBitsInAnyRange) {
  using S = typename TypeParam::Scale;
  std::mt19937 random(10);
  const int64_t rows = 23, cols = 449, tokens = 15;
  const Quantized<S, TypeParam::bits> sample(rows, cols, 2, 50, random);
  const auto space = space_for(sample.words);
  std::vector<float> given;
  for (int64_t i = 0; i < tokens * cols; ++i) given.push_back(static_cast<float>(random() % 1000) / 999.0f);
  for (const PackedLevel level : levels()) {
    with_quantized_product<TypeParam::bits, S>(level, tokens, [&](auto* loop, auto input) {
      const Given<decltype(input), S> x(given, tokens, cols, sample.words, 2);
      std::vector<float> whole(static_cast<size_t>(tokens * rows)), parts(whole.size());
      const auto multiply = [&](std::vector<float>& out, int64_t begin, int64_t end) {
        loop({sample.matrix(), x.data.data(), x.stride, out.data(), rows}, tokens, begin, end, space.get());
      };
      multiply(whole, 0, rows);
      for (int64_t begin = 0; begin < rows; begin += 3) multiply(parts, begin, std::min(begin + 3, rows));
      ASSERT_EQ(whole, parts) << "level " << static_cast<int>(level);
    });
  }
}

// Codes of -128 and -8 and the largest inputs give the largest sums that a lane of integers must hold.
TYPED_TEST(QuantizedLoops, TheLargestSumsFit) {
  using S = typename TypeParam::Scale;
  constexpr int kBits = TypeParam::bits, kLeast = -(1 << (kBits - 1));
  std::mt19937 random(9);
  Quantized<S, kBits> sample(3, 256, 2, 100, random);
  std::fill(sample.codes.begin(), sample.codes.end(), kBits == 8 ? 0x80 : 0x88);
  std::fill(sample.dense.begin(), sample.dense.end(), kLeast);
  std::fill(sample.scales.begin(), sample.scales.end(), exactly<S>(1.0f));
  const auto space = space_for(sample.words);
  for (const float size : {32512.0f, -32512.0f, 32640.0f, -32640.0f}) {  // bfloat16's neighbours of 32639
    const std::vector<float> given(512, size);
    for (const PackedLevel level : levels())
      for (const int64_t tokens : {1, 2})
        with_quantized_product<kBits, S>(level, tokens, [&](auto* loop, auto input) {
          const Given<decltype(input), S> x(given, tokens, 256, sample.words, 2);
          std::vector<float> out(static_cast<size_t>(3 * tokens));
          loop({sample.matrix(), x.data.data(), x.stride, out.data(), 3}, tokens, 0, 3, space.get());
          for (const float value : out) ASSERT_EQ(value, 256.0f * kLeast * size) << "level " << static_cast<int>(level);
        });
  }
}

TYPED_TEST(QuantizedLoops, UnpackingGivesCodesTimesScales) {
  using S = typename TypeParam::Scale;
  std::mt19937 random(4);
  for (const auto& [rows, cols, group_words] : kShapes) {
    const Quantized<S, TypeParam::bits> sample(rows, cols, group_words, 50, random);
    const auto space = space_for(sample.words);
    for (const PackedLevel level : levels()) {
      with_quantized_loops<TypeParam::bits, S>(level, [&](auto*, auto* unpack) {
        std::vector<float> out(static_cast<size_t>(2 * cols));
        unpack(sample.matrix(), 1, 3, cols, out.data(), space.get());
        for (int64_t i = 0; i < 2; ++i)
          for (int64_t j = 0; j < cols; ++j) {
            const float weight = out[static_cast<size_t>(i * cols + j)];
            ASSERT_EQ(weight, static_cast<float>(sample.code(1 + i, j)) * sample.scale(1 + i, j))
                << "level " << static_cast<int>(level);
            ASSERT_FALSE(weight == 0.0f && std::signbit(weight)) << "level " << static_cast<int>(level);
          }
      });
    }
  }
}

// A matrix whose bits, starts and number of codes disagree, as in cpu_packed_test.cpp.
template <class S, int kBits>
struct Damaged {
  explicit Damaged(std::mt19937& random)
      : sample(1 + random() % 12, 1 + random() % 300, 1 + random() % 4, random() % 101, random) {
    const unsigned kind = random() % 6;
    if (kind == 0) sample.codes.resize(random() % (sample.codes.size() + 1));
    if (kind == 1)
      for (uint8_t& byte : sample.bitmap) byte = static_cast<uint8_t>(random());
    if (kind == 2) std::fill(sample.bitmap.begin(), sample.bitmap.end(), uint8_t{255});
    if (kind == 3) std::swap(sample.row_start.front(), sample.row_start.back());
    if (kind == 4)
      for (int64_t& start : sample.row_start) start = any(random);
    if (kind == 5) sample.codes.clear();
    sample.codes.shrink_to_fit();
    uniform = random() % 3 == 0;
    keep = uniform ? static_cast<int64_t>(random() % 400) : 0;
  }
  static int64_t any(std::mt19937& random) {
    const int64_t size = int64_t{1} << random() % 63;
    return random() % 2 ? size - static_cast<int64_t>(random() % 3) : -size;
  }
  QuantizedMatrix<S> matrix() const {
    QuantizedMatrix<S> matrix = sample.matrix();
    if (uniform) matrix.row_start = nullptr;
    matrix.keep = keep;
    return matrix;
  }
  Quantized<S, kBits> sample;
  bool uniform;
  int64_t keep;
};

#if ACE_PACKED_X86
template <int kBits>
void multiply_panels(const QuantizedMatrix<BFloat16>& matrix, const BFloat16* x, int64_t tokens, const BFloat16* bias,
                     int64_t rows, int64_t cols, int64_t cut, BFloat16* out) {
  using Rows = avx512bf16::QuantizedRows<kBits>;
  const avx512bf16::PanelShape shape = avx512bf16::panel_shape(matrix.words);
  const auto panel = aligned<BFloat16>(avx512bf16::kPanelRows * shape.stride);
  const auto pairs = aligned<BFloat16>(avx512bf16::kPanelRows * avx512bf16::kLongRun);
  const auto sums = aligned<float>(tokens * avx512bf16::kPanelRows);
  const avx512bf16::PanelSpace space{panel.get(), pairs.get(), sums.get()};
  const Rows source{matrix, std::shared_ptr<BFloat16[]>(new BFloat16[Rows::space_size(shape.words)]())};
  const avx512bf16::PanelProduct<Rows> product{source, cols, x, matrix.words * 64, tokens, bias, out, rows};
  avx512bf16::panel_product(product, 0, cut, shape, space);
  avx512bf16::panel_product(product, cut, rows, shape, space);
}

template <int kBits>
avx512bf16::QuantizedRows<kBits> rows_for_tiles(const QuantizedMatrix<BFloat16>& matrix) {
  using Rows = avx512bf16::QuantizedRows<kBits>;
  return {matrix, std::shared_ptr<BFloat16[]>(new BFloat16[Rows::space_size(amx::kPanelWords)]())};
}
#endif

TYPED_TEST(QuantizedLoops, DamagedInputsReadNothingOutside) {
  using S = typename TypeParam::Scale;
  std::mt19937 random(8);
  for (int round = 0; round < 300; ++round) {
    const Damaged<S, TypeParam::bits> damaged(random);
    const auto& sample = damaged.sample;
    const int64_t tokens = 1 + random() % 9;
    for (const PackedLevel level : levels()) {
      const auto space = space_for(sample.words);
      with_quantized_product<TypeParam::bits, S>(level, tokens, [&](auto* loop, auto input) {
        const std::vector<float> zeros(static_cast<size_t>(tokens * sample.cols));
        const Given<decltype(input), S> x(zeros, tokens, sample.cols, sample.words, sample.group_words);
        std::vector<float> out(static_cast<size_t>(tokens * sample.rows));
        loop({damaged.matrix(), x.data.data(), x.stride, out.data(), sample.rows}, tokens, 0, sample.rows, space.get());
        for (const float value : out) ASSERT_EQ(value, 0.0f);  // of inputs that are all 0
      });
      with_quantized_loops<TypeParam::bits, S>(level, [&](auto*, auto* unpack) {
        std::vector<float> dense(static_cast<size_t>(sample.rows * sample.cols));
        unpack(damaged.matrix(), 0, sample.rows, sample.cols, dense.data(), space.get());
      });
    }
#if ACE_PACKED_X86
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (!has_panels()) continue;
      const std::vector<BFloat16> x(static_cast<size_t>(tokens * sample.words * 64));
      std::vector<BFloat16> out(static_cast<size_t>(tokens * sample.rows));
      multiply_panels<TypeParam::bits>(damaged.matrix(), x.data(), tokens, nullptr, sample.rows, sample.cols, 0,
                                       out.data());
      for (const BFloat16 value : out) ASSERT_EQ(to_float(value), 0.0f);
      if (!amx::available()) continue;
      multiply_tiles(rows_for_tiles<TypeParam::bits>(damaged.matrix()), x.data(), tokens, nullptr, sample.rows, 0,
                     out.data());
      for (const BFloat16 value : out) ASSERT_EQ(to_float(value), 0.0f);
    }
#endif
  }
}

#if ACE_PACKED_X86
// Levels whose loops for S multiply integers (quantized_fixed.h).
template <class S>
std::vector<PackedLevel> fixed_levels() {
  std::vector<PackedLevel> found;
  for (const PackedLevel level : levels())
    with_quantized_product<8, S>(level, 1, [&](auto*, auto input) {
      if (!std::is_same_v<decltype(input), WideInput>) found.push_back(level);
    });
  return found;
}

// Magnitudes over the whole range of the type, and zeros: a span's largest is 2^most, others are smaller.
std::vector<float> magnitudes(int64_t count, int most, std::mt19937& random) {
  std::vector<float> x;
  for (int64_t i = 0; i < count; ++i) {
    const float digits = static_cast<float>(128 + random() % 128) * (random() % 2 ? 1.0f : -1.0f);
    const int exponent = most - 7 - static_cast<int>(random() % (random() % 2 ? 3 : 30));
    x.push_back(random() % 8 ? std::ldexp(digits, exponent) : 0.0f);
  }
  return x;
}

// Each x is a whole number of units, and no farther from the given one than the contract allows. A matrix with one
// survivor of code 1 in each row reads them. The last of `tokens` is checked.
template <class S, int kBits>
void check_fixed(PackedLevel level, int64_t tokens, int64_t words, int64_t group_words, int most,
                 std::mt19937& random) {
  const int64_t cols = words * 64, span = group_words % 2 == 0 ? 128 : 64;
  Quantized<S, kBits> unit(cols, cols, group_words, 0, random);
  unit.codes.assign(static_cast<size_t>(cols), 1);
  for (int64_t i = 0; i < cols; ++i) unit.bitmap[static_cast<size_t>(8 * i * words + i / 8)] |= uint8_t(1u << (i % 8));
  std::iota(unit.row_start.begin(), unit.row_start.end(), int64_t{0});
  std::fill(unit.scales.begin(), unit.scales.end(), exactly<S>(1.0f));
  std::vector<float> all = magnitudes(tokens * cols, most, random);
  for (float& value : all) value = to_float(exactly<S>(value));
  const auto space = space_for(words);
  with_quantized_product<kBits, S>(level, tokens, [&](auto* loop, auto input) {
    const Given<decltype(input), S> given(all, tokens, cols, words, group_words);
    std::vector<float> results(static_cast<size_t>(tokens * cols));
    loop({unit.matrix(), given.data.data(), given.stride, results.data(), cols}, tokens, 0, cols, space.get());
    const std::vector<float> x(all.end() - cols, all.end()), out(results.end() - cols, results.end());
    for (int64_t j = 0; j < cols; ++j) {
      double largest = 0.0;
      for (int64_t i = j / span * span; i < std::min(cols, (j / span + 1) * span); ++i)
        largest = std::max(largest, std::abs(static_cast<double>(x[static_cast<size_t>(i)])));
      const double size = static_cast<double>(x[static_cast<size_t>(j)]);
      const double error = std::abs(static_cast<double>(out[static_cast<size_t>(j)]) - size);
      ASSERT_LE(error, std::max(largest / 32639.0, std::ldexp(1.0, -127))) << size << " beside " << largest;
      if (std::abs(size) >= largest / 64.0 && largest >= std::ldexp(1.0, -100)) {
        ASSERT_EQ(error, 0.0) << size << " beside " << largest;
      }
    }
  });
}

TEST(QuantizedFixed, InputsAreRoundedAsInTheContract) {
  if (fixed_levels<BFloat16>().empty()) GTEST_SKIP() << "needs AVX2";
  std::mt19937 random(6);
  for (const PackedLevel level : fixed_levels<BFloat16>()) {
    for (const int most : {127, 120, 30, 0, -20, -100, -112, -120, -126})
      for (const int64_t words : {1, 2, 5}) {
        check_fixed<BFloat16, 8>(level, 1, words, 1, most, random);
        check_fixed<BFloat16, 4>(level, 2, words, 2, most, random);
      }
    for (const int most : {15, 0, -8}) {
      check_fixed<Half, 8>(level, 1, 3, 2, most, random);
      check_fixed<Half, 4>(level, 2, 3, 1, most, random);
      check_fixed<Half, 8>(level, 11, 3, 2, most, random);
    }
  }
}

TEST(QuantizedFixed, InputsThatAreNotFiniteGiveNaN) {
  if (fixed_levels<BFloat16>().empty()) GTEST_SKIP() << "needs AVX2";
  std::mt19937 random(7);
  const Quantized<BFloat16, 8> sample(9, 320, 2, 50, random);
  const auto space = space_for(sample.words);
  for (const PackedLevel level : fixed_levels<BFloat16>())
    for (const float wrong : {bits_float(0x7f800000), bits_float(0xff800000), bits_float(0x7fc00000)}) {
      std::vector<float> x = inputs(2, 320, random);
      x[random() % 320] = wrong;
      for (const int64_t tokens : {1, 2})
        with_quantized_product<8, BFloat16>(level, tokens, [&](auto* loop, auto input) {
          const Given<decltype(input), BFloat16> given(x, tokens, 320, sample.words, 2);
          std::vector<float> out(static_cast<size_t>(9 * tokens));
          loop({sample.matrix(), given.data.data(), given.stride, out.data(), 9}, tokens, 0, 9, space.get());
          for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(std::isnan(out[i]), i < 9);
        });
    }
}

// Panels of one and of several parts, with rows that end inside a byte, and runs that end with a scale.
// multiply(sample, x, tokens, bias, cut, out) writes a product; x is [tokens, 64 words].
template <int kBits, class Multiply>
void check_panels(const Shape& shape, int64_t tokens, std::mt19937& random, Multiply&& multiply) {
  const int64_t rows = shape.rows, cols = shape.cols;
  const Quantized<BFloat16, kBits> sample(rows, cols, shape.group_words, 50, random);
  const int64_t stride = sample.words * 64;
  const std::vector<float> given = inputs(tokens, cols, random);
  std::vector<BFloat16> x(static_cast<size_t>(tokens * stride));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < cols; ++j)
      x[static_cast<size_t>(t * stride + j)] = to_bfloat16(given[static_cast<size_t>(t * cols + j)]);
  std::vector<BFloat16> bias, out(static_cast<size_t>(tokens * rows));
  for (int64_t i = 0; i < rows; ++i) bias.push_back(draw<BFloat16>(random));
  for (const int64_t cut : {int64_t{0}, rows / 2}) {
    multiply(sample, x.data(), tokens, bias.data(), cut, out.data());
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < rows; ++i) {
        const double sum =
            exact(sample, given.data() + t * cols, i) + static_cast<double>(to_float(bias[static_cast<size_t>(i)]));
        ASSERT_EQ(to_float(out[static_cast<size_t>(t * rows + i)]), to_float(to_bfloat16(static_cast<float>(sum))))
            << "rows " << rows << " cols " << cols << " row " << i << " tokens " << tokens;
      }
  }
}

template <int kBits>
void check_panels_and_tiles(const Shape& shape, std::mt19937& random) {
  check_panels<kBits>(shape, 7, random, [](const auto& sample, auto* x, auto tokens, auto* bias, auto cut, auto* out) {
    multiply_panels<kBits>(sample.matrix(), x, tokens, bias, sample.rows, sample.cols, cut, out);
  });
  if (!amx::available()) return;
  for (const int64_t tokens : {7, 20, 47})
    check_panels<kBits>(shape, tokens, random,
                        [](const auto& sample, auto* x, auto count, auto* bias, auto cut, auto* out) {
                          multiply_tiles(rows_for_tiles<kBits>(sample.matrix()), x, count, bias, sample.rows, cut, out);
                        });
}

TEST(QuantizedPanels, ProductsAreThoseOfTheDenseMatrix) {
  if (!has_panels()) GTEST_SKIP() << "needs AVX-512's bf16 instructions";
  std::mt19937 random(5);
  for (const Shape& shape : {Shape{1, 1, 1}, {70, 64, 2}, {17, 449, 3}, {130, 1134, 2}, {5, 8300, 2}, {4, 8300, 48}}) {
    check_panels_and_tiles<8>(shape, random);
    check_panels_and_tiles<4>(shape, random);
  }
}
#endif

}  // namespace
}  // namespace ace::cpu
