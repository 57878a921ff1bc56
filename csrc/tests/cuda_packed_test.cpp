// The CUDA kernels of packed_linear and unpack_bitmap on the host, against plain sums in double. Numbers have few
// digits, so that products and sums are exact in float32 and any order gives the same bits. Buffers have the exact
// size.
#include <random>

#include "cuda/packed.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

// A number of magnitude 1/2 to 4 with few digits, exact in every type.
template <class T>
T draw(std::mt19937& random) {
  const float size = static_cast<float>(1 + random() % 8) * 0.5f;
  T value;
  round_to(random() % 2 ? size : -size, &value);
  return value;
}

template <class T>
struct PackedCase {
  PackedCase(int64_t rows, int64_t cols, unsigned share, bool ragged, unsigned seed)
      : random(seed), rows(rows), cols(cols), words((cols + 63) / 64), bitmap(static_cast<size_t>(8 * rows * words)) {
    keep = ragged ? 0 : cols * share / 100;
    for (int64_t i = 0; i < rows; ++i) {
      int64_t left = keep;
      for (int64_t j = 0; j < cols; ++j) {
        const bool stored = ragged ? random() % 100 < share : static_cast<int64_t>(random() % (cols - j)) < left;
        left -= stored;
        dense.push_back(stored ? draw<T>(random) : T{});
        if (!stored) continue;
        values.push_back(dense.back());
        bitmap[static_cast<size_t>(8 * i * words + j / 8)] |= static_cast<uint8_t>(1u << (j % 8));
      }
      row_start.push_back(static_cast<int64_t>(values.size()));
    }
    values.shrink_to_fit();
    uniform = !ragged;
  }

  PackedArguments arguments() const {
    return {bitmap.data(), values.data(), uniform ? nullptr : row_start.data(), rows,
            cols,          words,         static_cast<int64_t>(values.size()),  keep,
            dtype_of<T>()};
  }

  void expect_products(int64_t tokens, bool with_bias) {
    const int64_t stride = cols + 3;
    std::vector<T> x(static_cast<size_t>((tokens - 1) * stride + cols)), bias(static_cast<size_t>(rows)),
        out(static_cast<size_t>(tokens * rows));
    for (T& value : x) value = draw<T>(random);
    for (T& value : bias) value = draw<T>(random);
    const Activations inputs{x.data(), tokens, cols, stride, dtype_of<T>()};
    ASSERT_EQ(launch_packed_linear(arguments(), inputs, with_bias ? bias.data() : nullptr, out.data(), nullptr),
              cudaSuccess);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < rows; ++i) {
        double sum = with_bias ? static_cast<double>(to_float(bias[static_cast<size_t>(i)])) : 0.0;
        for (int64_t j = 0; j < cols; ++j)
          sum += static_cast<double>(to_float(dense[static_cast<size_t>(i * cols + j)])) *
                 static_cast<double>(to_float(x[static_cast<size_t>(t * stride + j)]));
        T rounded;
        round_to(static_cast<float>(sum), &rounded);
        ASSERT_EQ(bits_of(out[static_cast<size_t>(t * rows + i)]), bits_of(rounded))
            << "token " << t << " row " << i << " cols " << cols;
      }
    }
  }

  void expect_unpacked() {
    std::vector<T> out(dense.size(), draw<T>(random));
    ASSERT_EQ(launch_unpack_bitmap(arguments(), out.data(), nullptr), cudaSuccess);
    for (size_t n = 0; n < out.size(); ++n) ASSERT_EQ(bits_of(out[n]), bits_of(dense[n])) << n;
  }

  std::mt19937 random;
  int64_t rows, cols, words, keep;
  std::vector<uint8_t> bitmap;
  std::vector<T> dense, values;
  std::vector<int64_t> row_start{0};
  bool uniform;
};

template <class T>
class CudaPacked : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};
TYPED_TEST_SUITE(CudaPacked, Dtypes);

TYPED_TEST(CudaPacked, ProductsAreThoseOfTheDenseMatrix) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    unsigned seed = 0;
    for (const int64_t cols : {1, 31, 64, 65, 1030}) {
      for (const bool ragged : {false, true}) {
        PackedCase<TypeParam> one(5, cols, 50, ragged, ++seed);
        for (const int64_t tokens : {1, 2, 15, 16}) one.expect_products(tokens, tokens % 2 != 0);  // 15: 8, 4, 2, 1
        one.expect_unpacked();
      }
    }
  }
}

TYPED_TEST(CudaPacked, AnyShareOfSurvivors) {
  for (const unsigned share : {0u, 3u, 97u, 100u}) {
    PackedCase<TypeParam> one(3, 1100, share, true, share);
    one.expect_products(3, true);
    one.expect_unpacked();
  }
}

TYPED_TEST(CudaPacked, MoreRowsThanWarpsOfTheGrid) {
  simt::settings.processors = 1;
  PackedCase<TypeParam> one(70, 40, 50, false, 4);
  one.expect_products(1, false);
  one.expect_unpacked();
}

TYPED_TEST(CudaPacked, NothingToDo) {
  PackedCase<TypeParam> none(0, 64, 50, true, 1);
  EXPECT_EQ(
      launch_packed_linear(none.arguments(), {nullptr, 3, 64, 64, dtype_of<TypeParam>()}, nullptr, nullptr, nullptr),
      cudaSuccess);
  PackedCase<TypeParam> no_columns(2, 0, 50, true, 1);
  no_columns.expect_products(1, true);
  no_columns.expect_unpacked();
}

// Bits and starts that claim more values than exist: results are wrong but finite, and nothing outside the buffers is
// accessed.
TYPED_TEST(CudaPacked, WrongCountsReadNothingOutside) {
  for (const int64_t start : {int64_t{0}, int64_t{1} << 60, -(int64_t{1} << 60), int64_t{7}}) {
    PackedCase<TypeParam> one(4, 1030, 10, true, 6);
    std::fill(one.bitmap.begin(), one.bitmap.end(), uint8_t{255});
    one.row_start[1] = start;
    const std::vector<TypeParam> x(3 * 1030);
    std::vector<TypeParam> out(3 * 4), dense(4 * 1030);
    ASSERT_EQ(launch_packed_linear(one.arguments(), {x.data(), 3, 1030, 1030, dtype_of<TypeParam>()}, nullptr,
                                   out.data(), nullptr),
              cudaSuccess);
    for (const TypeParam value : out) ASSERT_EQ(to_float(value), 0.0f);
    ASSERT_EQ(launch_unpack_bitmap(one.arguments(), dense.data(), nullptr), cudaSuccess);
  }
}

}  // namespace
}  // namespace ace::cuda
