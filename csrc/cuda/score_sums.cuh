// Sums of |W| by row and by column, by which the ria score divides.
//
// Contract
//   row_sum [rows], column_sum [cols]: float64 sums rounded once to float32. Two stages without float atomics, so the
//   bits are the same in every run, and the CPU's if the float64 sums are exact, as for 16-bit weights of one scale.
#pragma once

#include "cuda/block.cuh"
#include "cuda/vector.cuh"

namespace ace::cuda {

constexpr int kSumThreads = 256;
constexpr int kSumWarps = kSumThreads / kWarpSize;
constexpr int64_t kStripColumns = kWarpSize * kPack;  // a warp's width
constexpr int64_t kChunkRows = 1024;                  // keeps the partial sums below half a per cent of a 16-bit weight

template <class T>
struct Matrix {
  const T* data;  // [rows, cols], rows `stride` apart
  int64_t rows, cols, stride;
  bool aligned;
};

// One warp for each row.
template <class T>
__global__ void __launch_bounds__(kSumThreads) row_sums_kernel(Matrix<T> matrix, float* row_sum) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSumWarps + warp_id(); i < matrix.rows;
       i += static_cast<int64_t>(gridDim.x) * kSumWarps) {
    double sum = 0.0;
    for (int64_t j = static_cast<int64_t>(lane_id()) * kPack; j < matrix.cols; j += kStripColumns) {
      const int count = pack_count(matrix.cols, j);
      const Words<T> words = load_words(matrix.data + i * matrix.stride + j, count, matrix.aligned && count >= kPack);
      ACE_UNROLL
      for (int e = 0; e < kPack; ++e) sum += static_cast<double>(absolute(words.at(e)));
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) row_sum[i] = static_cast<float>(sum);
  }
}

// First stage: partial[chunk][cols], one block for a chunk of rows and a strip of columns; its warps alternate over the
// rows.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    column_partials_kernel(Matrix<T> matrix, int64_t units, double* partial) {
  __shared__ double sums[kSumWarps][kStripColumns];
  const int64_t strips = (matrix.cols + kStripColumns - 1) / kStripColumns;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t chunk = unit / strips, strip = (unit - chunk * strips) * kStripColumns;
    const int64_t begin = chunk * kChunkRows, end = begin + kChunkRows < matrix.rows ? begin + kChunkRows : matrix.rows;
    const int64_t j = strip + lane_id() * kPack;
    const int count = pack_count(matrix.cols, j);
    double sum[kPack] = {};
    for (int64_t i = begin + warp_id(); i < end; i += kSumWarps) {
      const Words<T> words = load_words(matrix.data + i * matrix.stride + j, count, matrix.aligned && count >= kPack);
      ACE_UNROLL
      for (int e = 0; e < kPack; ++e) sum[e] += static_cast<double>(absolute(words.at(e)));
    }
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) sums[warp_id()][lane_id() * kPack + e] = sum[e];
    __syncthreads();
    const int64_t column = strip + threadIdx.x;
    if (column < matrix.cols) {
      double total = 0.0;
      for (int w = 0; w < kSumWarps; ++w) total += sums[w][threadIdx.x];
      partial[chunk * matrix.cols + column] = total;
    }
    __syncthreads();
  }
}

// Second stage: adds the chunks from the first to the last.
__global__ void __launch_bounds__(kSumThreads)
    column_sums_kernel(const double* partial, int64_t chunks, int64_t cols, float* column_sum) {
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; j < cols;
       j += static_cast<int64_t>(gridDim.x) * kSumThreads) {
    double total = 0.0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[c * cols + j];
    column_sum[j] = static_cast<float>(total);
  }
}

}  // namespace ace::cuda
