// The CUDA kernels of quantized_linear and unpack_quantized on the host, against plain sums in double. Numbers have few
// digits, so that products and sums are exact in float32 and any order gives the same bits. Buffers have the exact
// size.
#include <random>

#include "cuda/quantized.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

template <class T>
T rounded(float value) {
  T result;
  round_to(value, &result);
  return result;
}

// A matrix of codes with every value that `bits` allow; scales are powers of two, exact in every type.
template <class T>
struct QuantizedCase {
  struct Options {
    int bits;
    int64_t group;
    unsigned share;  // per cent of survivors
    bool ragged;     // rows have different numbers of survivors
    unsigned seed;
  };

  QuantizedCase(int64_t rows, int64_t cols, const Options& options)
      : random(options.seed),
        options(options),
        rows(rows),
        cols(cols),
        words((cols + 63) / 64),
        groups((cols + options.group - 1) / options.group),
        bitmap(static_cast<size_t>(8 * rows * words)) {
    for (int64_t i = 0; i < rows; ++i) add_row(i);
    codes.shrink_to_fit();
    for (int64_t n = 0; n < rows * groups; ++n)
      scales.push_back(rounded<T>(0.25f * static_cast<float>(1u << random() % 4)));
  }

  void add_row(int64_t i) {
    const int64_t keep = cols * options.share / 100;
    int64_t left = keep, place = 0;
    for (int64_t j = 0; j < cols; ++j) {
      const bool stored =
          options.ragged ? random() % 100 < options.share : static_cast<int64_t>(random() % (cols - j)) < left;
      left -= stored;
      dense.push_back(0);
      kept.push_back(stored);
      if (!stored) continue;
      const int code = static_cast<int>(random() % (1u << options.bits)) - (1 << (options.bits - 1));
      dense.back() = code;
      bitmap[static_cast<size_t>(8 * i * words + j / 8)] |= static_cast<uint8_t>(1u << (j % 8));
      if (options.bits == 8) {
        codes.push_back(static_cast<uint8_t>(code));
      } else if (place++ % 2 == 0) {
        codes.push_back(static_cast<uint8_t>(code & 15));
      } else {
        codes.back() |= static_cast<uint8_t>((code & 15) << 4);
      }
    }
    row_start.push_back(static_cast<int64_t>(codes.size()));
  }

  QuantizedArguments arguments() const {
    const auto bytes = static_cast<int64_t>(codes.size());
    return {bitmap.data(), codes.data(), options.ragged ? row_start.data() : nullptr,
            scales.data(), rows,         cols,
            words,         bytes,        rows == 0 ? 0 : bytes / rows,
            options.group, options.bits, dtype_of<T>()};
  }

  T scale(int64_t i, int64_t j) const { return scales[static_cast<size_t>(i * groups + j / options.group)]; }

  void expect_products(int64_t tokens, bool with_bias, int64_t padding) {
    const int64_t stride = cols + padding;
    std::vector<T> x(static_cast<size_t>((tokens - 1) * stride + cols)), bias(static_cast<size_t>(rows)),
        out(static_cast<size_t>(tokens * rows));
    const auto draw = [&] { return rounded<T>(0.5f * static_cast<float>(static_cast<int>(random() % 17) - 8)); };
    for (T& value : x) value = draw();
    for (T& value : bias) value = draw();
    const Activations inputs{x.data(), tokens, cols, stride, dtype_of<T>()};
    ASSERT_EQ(launch_quantized_linear(arguments(), inputs, with_bias ? bias.data() : nullptr, out.data(), nullptr),
              cudaSuccess);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < rows; ++i) {
        double sum = with_bias ? static_cast<double>(to_float(bias[static_cast<size_t>(i)])) : 0.0;
        for (int64_t j = 0; j < cols; ++j) {
          sum += static_cast<double>(dense[static_cast<size_t>(i * cols + j)]) *
                 static_cast<double>(to_float(scale(i, j))) *
                 static_cast<double>(to_float(x[static_cast<size_t>(t * stride + j)]));
        }
        ASSERT_EQ(bits_of(out[static_cast<size_t>(t * rows + i)]), bits_of(rounded<T>(static_cast<float>(sum))))
            << "token " << t << " row " << i << " cols " << cols << " bits " << options.bits << " group "
            << options.group;
      }
    }
  }

  void expect_unpacked() {
    std::vector<T> out(dense.size(), rounded<T>(7.0f));
    ASSERT_EQ(launch_unpack_quantized(arguments(), out.data(), nullptr), cudaSuccess);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const auto n = static_cast<size_t>(i * cols + j);
        const T value = kept[n] ? rounded<T>(static_cast<float>(dense[n]) * to_float(scale(i, j)) + 0.0f) : T{};
        ASSERT_EQ(bits_of(out[n]), bits_of(value)) << "row " << i << " column " << j << " bits " << options.bits;
      }
    }
  }

  std::mt19937 random;
  Options options;
  int64_t rows, cols, words, groups;
  std::vector<uint8_t> bitmap, codes;
  std::vector<int> dense;
  std::vector<bool> kept;
  std::vector<T> scales;
  std::vector<int64_t> row_start{0};
};

template <class T>
class CudaQuantized : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};
TYPED_TEST_SUITE(CudaQuantized, Dtypes);

TYPED_TEST(CudaQuantized, ProductsAreThoseOfTheDenseMatrix) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    unsigned seed = 0;
    for (const int64_t cols : {1, 31, 64, 65, 1030}) {
      for (const int bits : {8, 4}) {
        for (const bool ragged : {false, true}) {
          QuantizedCase<TypeParam> one(5, cols, {bits, 64, 50, ragged, ++seed});
          for (const int64_t tokens : {1, 2, 15, 16})
            one.expect_products(tokens, tokens % 2 != 0, 3);  // 15: 8, 4, 2, 1
          one.expect_unpacked();
        }
      }
    }
  }
}

// Whole packs of inputs are loaded and stored at once.
TYPED_TEST(CudaQuantized, RowsOfInputsThatAreAligned) {
  for (const int bits : {8, 4}) {
    for (const int64_t cols : {256, 264, 1032}) {
      QuantizedCase<TypeParam> one(3, cols, {bits, 128, 60, true, 2});
      one.expect_products(5, false, 8);
      one.expect_unpacked();
    }
  }
}

// Steps of 256 columns within a group, over several groups, and groups that do not divide a chunk of 1024.
TYPED_TEST(CudaQuantized, GroupsOfEveryWidth) {
  for (const int bits : {8, 4}) {
    for (const int64_t group : {64, 128, 192, 256, 320, 832, 1024, 1088, 2240, 1 << 20}) {
      QuantizedCase<TypeParam> one(2, 2200, {bits, group, 50, true, 3});
      one.expect_products(1, false, 0);
      one.expect_unpacked();
    }
    QuantizedCase<TypeParam> widest(2, 100, {bits, int64_t{1} << 48, 50, true, 3});
    widest.expect_products(1, false, 0);
  }
}

TYPED_TEST(CudaQuantized, AnyShareOfSurvivors) {
  for (const int bits : {8, 4}) {
    for (const unsigned share : {0u, 3u, 97u, 100u}) {
      QuantizedCase<TypeParam> one(3, 1100, {bits, 128, share, true, share});
      one.expect_products(3, true, 1);
      one.expect_unpacked();
    }
  }
}

TYPED_TEST(CudaQuantized, MoreRowsThanWarpsOfTheGrid) {
  simt::settings.processors = 1;
  for (const int bits : {8, 4}) {
    QuantizedCase<TypeParam> one(70, 40, {bits, 64, 50, false, 4});
    one.expect_products(1, false, 0);
    one.expect_unpacked();
  }
}

// Scales with all digits: the product is rounded once, to nearest. A code of 0 gives +0, also with a negative scale,
// and so does a column that is not stored, also where the scale is not finite.
TYPED_TEST(CudaQuantized, UnpackedWeightsAreRoundedOnce) {
  for (const int bits : {8, 4}) {
    QuantizedCase<TypeParam> one(4, 300, {bits, 64, 70, true, 5});
    for (TypeParam& scale : one.scales) scale = random_value<TypeParam>(one.random, Values::spread);
    one.expect_unpacked();
    one.scales[0] = not_finite<TypeParam>();
    std::vector<TypeParam> out(one.dense.size());
    ASSERT_EQ(launch_unpack_quantized(one.arguments(), out.data(), nullptr), cudaSuccess);
    for (size_t j = 0; j < 64; ++j) {
      if (one.kept[j]) {
        EXPECT_FALSE(is_finite(to_float(out[j])));
      } else {
        EXPECT_EQ(bits_of(out[j]), 0u);
      }
    }
  }
}

TYPED_TEST(CudaQuantized, NothingToDo) {
  QuantizedCase<TypeParam> none(0, 64, {8, 64, 50, true, 1});
  const Activations inputs{nullptr, 3, 64, 64, dtype_of<TypeParam>()};
  EXPECT_EQ(launch_quantized_linear(none.arguments(), inputs, nullptr, nullptr, nullptr), cudaSuccess);
  QuantizedCase<TypeParam> no_columns(2, 0, {4, 64, 50, true, 1});
  no_columns.expect_products(1, true, 0);
  no_columns.expect_unpacked();
}

TYPED_TEST(CudaQuantized, RowsThatCannotBeCountedAreRefused) {
  QuantizedCase<TypeParam> one(1, 64, {8, 64, 50, true, 1});
  QuantizedArguments arguments = one.arguments();
  arguments.words = int64_t{1} << 31;
  arguments.cols = 64 * arguments.words;
  const Activations inputs{nullptr, 1, arguments.cols, arguments.cols, dtype_of<TypeParam>()};
  EXPECT_EQ(launch_quantized_linear(arguments, inputs, nullptr, nullptr, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(launch_unpack_quantized(arguments, nullptr, nullptr), cudaErrorInvalidValue);
}

// Bits and starts that claim more codes than exist: results are wrong but finite, and nothing outside the buffers is
// accessed.
TYPED_TEST(CudaQuantized, WrongCountsReadNothingOutside) {
  for (const int bits : {8, 4}) {
    for (const int64_t start : {int64_t{0}, int64_t{1} << 60, -(int64_t{1} << 60), int64_t{7}}) {
      QuantizedCase<TypeParam> one(4, 1030, {bits, 128, 10, true, 6});
      std::fill(one.bitmap.begin(), one.bitmap.end(), uint8_t{255});
      one.row_start[1] = start;
      const std::vector<TypeParam> x(3 * 1030);
      std::vector<TypeParam> out(3 * 4), dense(4 * 1030);
      const Activations inputs{x.data(), 3, 1030, 1030, dtype_of<TypeParam>()};
      ASSERT_EQ(launch_quantized_linear(one.arguments(), inputs, nullptr, out.data(), nullptr), cudaSuccess);
      for (const TypeParam value : out) ASSERT_EQ(to_float(value), 0.0f);
      ASSERT_EQ(launch_unpack_quantized(one.arguments(), dense.data(), nullptr), cudaSuccess);
    }
  }
}

}  // namespace
}  // namespace ace::cuda
