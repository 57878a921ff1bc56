// Counts the instructions of the memory-bound kernels on nvcc's PTX. Prints one tab-separated line for each case: op,
// columns, elements, warp instructions. benchmarks/predict.py runs this. The environment variable ACE_PTX names the
// folder of .ptx files.
#include <cstdio>

#include "cuda/moments.h"
#include "cuda/packed.h"
#include "cuda/prune.h"
#include "cuda/quantized.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) simt::die("a launch failed");
}

void print_counts(const char* op, int64_t rows, int64_t cols) {
  uint64_t instructions = 0;
  for (const simt::ptx::Count& count : simt::ptx::take_counts()) instructions += count.instructions;
  std::printf("%s\t%lld\t%lld\t%llu\n", op, static_cast<long long>(cols), static_cast<long long>(rows * cols),
              static_cast<unsigned long long>(instructions));
}

// Bfloat16 weights of many sizes with a column factor, half of them kept.
template <class Launch>
void count_selection(const char* op, int64_t rows, int64_t cols, Launch&& launch) {
  Sample<BFloat16> sample({rows, cols}, Formula::scaled, Values::spread);
  Workspace work(prune_matrix_bytes(sample.arguments()));
  std::vector<float> threshold(static_cast<size_t>(rows));
  simt::ptx::take_counts();
  check(launch(sample.arguments(), threshold.data(), work.data()));
  print_counts(op, rows, cols);
}

void count_moments(int64_t tokens, int64_t cols, bool weighted) {
  Sample<BFloat16> sample({tokens, cols}, Formula::magnitude, Values::spread);
  const Activations x{&sample.weight(0, 0), tokens, cols, cols, Dtype::bfloat16};
  const std::vector<float> token_weight(static_cast<size_t>(tokens), 0.5f);
  size_t bytes = 0;
  check(update_moments_bytes(x, &bytes));
  Workspace work(bytes);
  std::vector<double> mean(static_cast<size_t>(cols)), m2(static_cast<size_t>(cols));
  double weight = 0.0;
  simt::ptx::take_counts();
  check(launch_update_moments(x, weighted ? token_weight.data() : nullptr, true, &weight, mean.data(), m2.data(),
                              work.data(), 1, nullptr));
  print_counts(weighted ? "moments, weighted" : "moments", tokens, cols);
  if (weighted) return;
  std::vector<float> r(static_cast<size_t>(tokens));
  check(launch_inverse_square_norm(x, r.data(), 1, nullptr));
  print_counts("inverse_square_norm", tokens, cols);
}

// One token and a bfloat16 matrix, of which half is stored: as values, or as codes with a scale for each 128 columns.
void count_products(int64_t rows, int64_t cols) {
  std::mt19937 random(1);
  const int64_t words = cols / 64;
  std::vector<uint8_t> bitmap;
  std::vector<int64_t> starts{0}, starts4{0};
  for (int64_t i = 0; i < rows; ++i) {
    int64_t stored = 0;
    for (int64_t byte = 0; byte < cols / 8; ++byte) {
      bitmap.push_back(static_cast<uint8_t>(random()));
      stored += __builtin_popcount(bitmap.back());
    }
    starts.push_back(starts.back() + stored);
    starts4.push_back(starts4.back() + (stored + 1) / 2);
  }
  const std::vector<BFloat16> values(static_cast<size_t>(starts.back())), x(static_cast<size_t>(cols)),
      scales(static_cast<size_t>(rows * cols / 128));
  const std::vector<uint8_t> codes(static_cast<size_t>(starts.back()));
  std::vector<BFloat16> out(static_cast<size_t>(rows));
  const Activations token{x.data(), 1, cols, cols, Dtype::bfloat16};
  simt::ptx::take_counts();
  check(launch_packed_linear(
      {bitmap.data(), values.data(), starts.data(), rows, cols, words, starts.back(), 0, Dtype::bfloat16}, token,
      nullptr, out.data(), nullptr));
  print_counts("packed_linear", rows, cols);
  for (const int bits : {8, 4}) {
    const std::vector<int64_t>& start = bits == 8 ? starts : starts4;
    check(launch_quantized_linear({bitmap.data(), codes.data(), start.data(), scales.data(), rows, cols, words,
                                   start.back(), 0, 128, bits, Dtype::bfloat16},
                                  token, nullptr, out.data(), nullptr));
    print_counts(bits == 8 ? "quantized_linear, 8 bits" : "quantized_linear, 4 bits", rows, cols);
  }
}

void count_all() {
  simt::settings.processors = 1;  // four rows for each block, as on a large device
  for (const int64_t cols : {4096, 11008, 28672}) {
    count_selection("row top-k", 32, cols, [&](const ScoredArguments& m, float* threshold, void*) {
      return launch_prune_rows(m, cols / 2, threshold, nullptr, 1, nullptr);
    });
  }
  count_selection("2:4", 8, 4096, [](const ScoredArguments& m, float*, void*) {
    return launch_prune_nm(m, 2, 4, nullptr, 1, nullptr);
  });
  simt::settings.processors = 4;  // as many weights for each block as on a large device
  count_selection("matrix top-k", 256, 4096, [](const ScoredArguments& m, float* threshold, void* work) {
    return launch_prune_matrix(m, m.rows * m.cols / 2, threshold, work, nullptr, 1, nullptr);
  });
  // Enough tokens for chunks as long as on a large device.
  count_moments(2048, 1024, false);
  count_moments(2048, 1024, true);
  count_products(32, 4096);
}

}  // namespace
}  // namespace ace::cuda

int main() {
  if (std::getenv("ACE_PTX") == nullptr) simt::die("ACE_PTX names no folder of .ptx files");
  ace::cuda::count_all();
  return 0;
}
