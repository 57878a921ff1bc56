// Inputs for the kernel tests, and the plain C++ core's results for them: scores by the functors, selections by
// select_kth and keep_best. Everything is compared bit for bit.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "core/nm_select.h"
#include "core/order_key.h"
#include "core/radix_select.h"
#include "core/score.h"
#include "cuda/arguments.h"
#include "tests/select_kth.h"

namespace ace::cuda {

template <class T>
constexpr Dtype dtype_of() {
  return std::is_same_v<T, Half> ? Dtype::float16 : std::is_same_v<T, BFloat16> ? Dtype::bfloat16 : Dtype::float32;
}

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

// +inf, -inf or NaN, a different one for each dtype.
template <class T>
T not_finite() {
  const uint32_t bits = dtype_of<T>() == Dtype::float16    ? 0x7c00u
                        : dtype_of<T>() == Dtype::bfloat16 ? 0xff80u
                                                           : 0x7fc00000u;
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

enum class Values { spread, ties };

// Signed numbers of magnitude 1/64 to 2, made from bits so that no conversion is needed. `ties`: few distinct
// magnitudes, and zeros of both signs.
template <class T>
T random_value(std::mt19937& random, Values values) {
  const uint32_t sign = random() & 1u;
  const uint32_t r = values == Values::ties ? random() % 5 : random();
  const uint32_t step = values == Values::ties ? r : r >> 8 & 7u;  // of the exponent
  const uint32_t mantissa = values == Values::ties ? 0u : r >> 12;
  const bool zero = values == Values::ties && r == 4;
  if constexpr (std::is_same_v<T, float>) {
    return bits_float(sign << 31 | (zero ? 0u : (121u + step) << 23 | (mantissa * 8u & 0x7fffffu)));
  } else if constexpr (std::is_same_v<T, Half>) {
    return {static_cast<uint16_t>(sign << 15 | (zero ? 0u : (9u + step) << 10 | (mantissa & 0x3ffu)))};
  } else {
    return {static_cast<uint16_t>(sign << 15 | (zero ? 0u : (121u + step) << 7 | (mantissa & 0x7fu)))};
  }
}

struct Shape {
  int64_t rows, cols;
  int64_t padding = 0;  // stride - cols
  int64_t offset = 0;   // of the first weight from a 16-byte boundary, in values
};

// A weight with the inputs of all formulas.
template <class T>
class Sample {
 public:
  Sample(Shape shape, Formula formula, Values values, unsigned seed = 1) : shape_(shape), formula_(formula) {
    std::mt19937 random(seed);
    const int64_t stride = shape.cols + shape.padding;
    weight_.resize(static_cast<size_t>(shape.rows * stride + shape.offset) + 16 / sizeof(T));
    for (T& w : weight_) w = random_value<T>(random, values);
    // Factors are positive; the caller's score has both signs.
    for (int64_t j = 0; j < shape.cols; ++j) column_.push_back(2.0f + random_value<float>(random, values));
    for (int64_t n = 0; n < shape.rows * shape.cols; ++n) {
      const float value = random_value<float>(random, values);
      moment_.push_back(formula == Formula::given ? value : absolute(value));
    }
    start_ =
        (16 - reinterpret_cast<uintptr_t>(weight_.data()) % 16) % 16 / sizeof(T) + static_cast<size_t>(shape.offset);
  }

  int64_t rows() const { return shape_.rows; }
  int64_t cols() const { return shape_.cols; }
  int64_t stride() const { return shape_.cols + shape_.padding; }
  T& weight(int64_t i, int64_t j) { return weight_[start_ + static_cast<size_t>(i * stride() + j)]; }
  const std::vector<T>& buffer() const { return weight_; }  // rows, padding and all

  ScoredArguments arguments() {
    const bool column = with_formula(formula_, [](auto f) { return f.kColumn; });
    const bool moment = with_formula(formula_, [](auto f) { return f.kMoment; });
    return {weight_.data() + start_,
            column ? column_.data() : nullptr,
            moment ? moment_.data() : nullptr,
            rows(),
            cols(),
            stride(),
            dtype_of<T>(),
            formula_};
  }

  // Row-major scores [rows, cols] by the functors.
  std::vector<float> scores() {
    std::vector<double> row(static_cast<size_t>(rows())), column(static_cast<size_t>(cols()));
    for (int64_t i = 0; i < rows(); ++i) {
      for (int64_t j = 0; j < cols(); ++j) {
        const double size = absolute(to_float(weight(i, j)));
        row[static_cast<size_t>(i)] += size;
        column[static_cast<size_t>(j)] += size;
      }
    }
    std::vector<float> out;
    for (int64_t i = 0; i < rows(); ++i) {
      for (int64_t j = 0; j < cols(); ++j) {
        const ScoreTerms terms{column_[static_cast<size_t>(j)], moment_[static_cast<size_t>(i * cols() + j)],
                               static_cast<float>(row[static_cast<size_t>(i)]),
                               static_cast<float>(column[static_cast<size_t>(j)])};
        out.push_back(
            with_formula(formula_, [&](auto f) { return decltype(f)::value(to_float(weight(i, j)), terms); }));
      }
    }
    return out;
  }

  std::vector<uint32_t> keys() {
    std::vector<uint32_t> out;
    for (const float score : scores()) out.push_back(order_key(score));
    return out;
  }

 private:
  Shape shape_;
  Formula formula_;
  std::vector<T> weight_;
  std::vector<float> column_, moment_;
  size_t start_ = 0;
};

// The plain C++ selection of one group of keys.
inline Cut reference_cut(const std::vector<uint32_t>& keys, int64_t keep_k) {
  std::vector<uint32_t> scratch(keys.size()), counts(kRadixBins);
  return select_kth(keys.data(), static_cast<int64_t>(keys.size()), keep_k, scratch.data(), counts.data());
}

// Calls zero(n) for each key that the cut removes.
template <class Zero>
void apply_reference(const std::vector<uint32_t>& keys, Cut cut, Zero&& zero) {
  for (size_t n = 0; n < keys.size(); ++n) {
    const bool tie = keys[n] == cut.key && cut.ties > 0;
    if (tie) --cut.ties;
    if (keys[n] <= cut.key && !tie) zero(static_cast<int64_t>(n));
  }
}

template <class T>
void expect_same_bits(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t n = 0; n < got.size(); ++n) {
    ASSERT_EQ(bits_of(got[n]), bits_of(want[n])) << what << ", entry " << n;
  }
}

// A workspace's device memory, filled with garbage as from an allocator.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : memory_(bytes / 16 + 1) {
    std::memset(static_cast<void*>(memory_.data()), 0xA5, memory_.size() * 16);
  }
  void* data() { return memory_.data(); }

 private:
  struct alignas(16) Block {
    char bytes[16];
  };
  std::vector<Block> memory_;
};

// The mask that launch(mask) writes: 1 where `kept`, else 0; the sample's weight must stay as it is.
template <class T, class Launch>
void expect_mask(Sample<T>& sample, const std::vector<uint8_t>& kept, const std::string& what, Launch&& launch) {
  const std::vector<T> before = sample.buffer();
  Workspace mask(kept.size());
  ASSERT_EQ(launch(static_cast<bool*>(mask.data())), cudaSuccess) << what;
  const uint8_t* bytes = static_cast<const uint8_t*>(mask.data());
  expect_same_bits(std::vector<uint8_t>(bytes, bytes + kept.size()), kept, what + ": mask");
  expect_same_bits(sample.buffer(), before, what + ": masked weight");
}

// The thread orders of a test.
inline std::vector<unsigned> orders() { return {0, 1, 7, 11}; }

inline int take_flag() {
  int* flag = nullptr;
  EXPECT_EQ(not_finite_flag(&flag), cudaSuccess);
  const int code = *flag;
  *flag = 0;
  return code;
}

constexpr Formula kAllFormulas[] = {Formula::magnitude, Formula::scaled,     Formula::ria,
                                    Formula::cosp,      Formula::cosp_exact, Formula::given};

#ifdef ACE_WITHOUT_HALF  // as in with_dtype
using Dtypes = ::testing::Types<float, BFloat16>;
#else
using Dtypes = ::testing::Types<float, Half, BFloat16>;
#endif

}  // namespace ace::cuda
