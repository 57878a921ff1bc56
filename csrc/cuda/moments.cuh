// update_moments_: weighted Welford states of the columns of X in one pass.
//
// Contract
//   x [tokens, cols], token_weight [tokens] or null for 1. Merges the tokens into weight_sum [], mean [cols], m2
//   [cols]. Two stages without float atomics, so two runs give the same bits: blocks write partial states (float32),
//   which the second stage merges in order, in float64, by Chan's rule. not finite  a token weight that is negative,
//   NaN or infinite and a state that is not finite raise the flag; the state
//               is then of no use.
#pragma once

#include "core/moments.h"
#include "cuda/block.cuh"
#include "cuda/scored.cuh"

namespace ace::cuda {

constexpr int kMomentThreads = 256;
constexpr int kMomentWarps = kMomentThreads / kWarpSize;
constexpr int64_t kMomentColumns = kWarpSize * kPack;  // of a block: a warp's width
constexpr int kRowsInFlight = 4;                       // rows that a thread loads before it uses the first
constexpr int64_t kRowsOfBlock = kMomentWarps * kRowsInFlight;

template <class T>
struct Tokens {
  const T* data;              // [tokens, cols], rows `stride` apart
  const float* token_weight;  // [tokens] or null
  int64_t tokens, cols, stride;
  bool aligned;
};

// How the tokens are cut into chunks, one a block of the first stage.
struct Chunks {
  int64_t strips, chunks, tokens_each;  // tokens_each is a multiple of kRowsOfBlock
};

struct Partials {
  float* weight;  // [chunks]
  float* mean;    // [chunks, cols]
  float* m2;      // [chunks, cols]
};

// A thread's state of eight columns; they share the weight.
struct ColumnStates {
  float weight = 0.0f;
  float mean[kPack] = {};
  float m2[kPack] = {};
};

// Merges some rows at once: their mean and squared deviations are taken from registers in two passes.
template <class T>
ACE_DEVICE void merge_rows(ColumnStates& state, const Pack<T>* row, const float* row_weight) {
  float weight = 0.0f, share[kRowsInFlight];
  ACE_UNROLL
  for (int r = 0; r < kRowsInFlight; ++r) weight += row_weight[r];
  ACE_UNROLL
  for (int r = 0; r < kRowsInFlight; ++r) share[r] = weight > 0.0f ? row_weight[r] / weight : 0.0f;
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) {
    float mean = 0.0f, m2 = 0.0f;
    ACE_UNROLL
    for (int r = 0; r < kRowsInFlight; ++r) mean += share[r] * to_float(row[r].value[e]);
    ACE_UNROLL
    for (int r = 0; r < kRowsInFlight; ++r) {
      const float deviation = to_float(row[r].value[e]) - mean;
      m2 += row_weight[r] * deviation * deviation;
    }
    merge_moments(state.weight, state.mean[e], state.m2[e], weight, mean, m2);
  }
  state.weight += weight;
}

// One warp's rows of a chunk. False where a token weight is not a weight.
template <class T>
ACE_DEVICE bool read_chunk(const Tokens<T>& x, int64_t begin, int64_t end, int64_t j, int count, ColumnStates& state) {
  bool valid = true;
  for (int64_t first = begin + warp_id() * kRowsInFlight; first < end; first += kRowsOfBlock) {
    Pack<T> row[kRowsInFlight];
    float weight[kRowsInFlight];
    ACE_UNROLL
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int64_t t = first + r;
      row[r] = load_pack(x.data + t * x.stride + j, t < end ? count : 0, x.aligned);
      weight[r] = t >= end ? 0.0f : x.token_weight != nullptr ? x.token_weight[t] : 1.0f;
      valid = valid && weight[r] >= 0.0f && is_finite(weight[r]);
      if (weight[r] == 0.0f) row[r] = Pack<T>{};  // padding may hold anything
    }
    merge_rows(state, row, weight);
  }
  return valid;
}

// First stage.
template <class T>
__global__ void __launch_bounds__(kMomentThreads)
    partial_moments_kernel(Tokens<T> x, Chunks cut, Partials out, NotFinite report) {
  __shared__ float weights[kMomentWarps];
  __shared__ float means[kMomentWarps][kMomentColumns];
  __shared__ float m2s[kMomentWarps][kMomentColumns];
  for (int64_t unit = blockIdx.x; unit < cut.strips * cut.chunks; unit += gridDim.x) {
    const int64_t chunk = unit / cut.strips, strip = (unit - chunk * cut.strips) * kMomentColumns;
    const int64_t begin = chunk * cut.tokens_each;
    const int64_t end = begin + cut.tokens_each < x.tokens ? begin + cut.tokens_each : x.tokens;
    const int64_t j = strip + lane_id() * kPack;
    ColumnStates state;
    if (!read_chunk(x, begin, end, j, pack_count(x.cols, j), state)) {
      raise_flag(report);
    }
    if (lane_id() == 0) weights[warp_id()] = state.weight;
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      means[warp_id()][lane_id() * kPack + e] = state.mean[e];
      m2s[warp_id()][lane_id() * kPack + e] = state.m2[e];
    }
    __syncthreads();
    Welford<float> column;
    for (int w = 0; w < kMomentWarps; ++w) column.merge({weights[w], means[w][threadIdx.x], m2s[w][threadIdx.x]});
    if (strip + threadIdx.x < x.cols) {
      out.mean[chunk * x.cols + strip + threadIdx.x] = column.mean;
      out.m2[chunk * x.cols + strip + threadIdx.x] = column.m2;
    }
    if (strip == 0 && threadIdx.x == 0) out.weight[chunk] = column.weight;
    __syncthreads();
  }
}

// Second stage: a thread a column merges the chunks from the first to the last.
template <class Real>
__global__ void __launch_bounds__(kMomentThreads)
    merge_partials_kernel(Partials partials, int64_t chunks, int64_t cols, const Real* weight_sum, Real* mean, Real* m2,
                          NotFinite report) {
  bool finite = true;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kMomentThreads + threadIdx.x; j < cols;
       j += static_cast<int64_t>(gridDim.x) * kMomentThreads) {
    Welford<double> state{static_cast<double>(*weight_sum), static_cast<double>(mean[j]), static_cast<double>(m2[j])};
    for (int64_t c = 0; c < chunks; ++c) {
      state.merge({partials.weight[c], partials.mean[c * cols + j], partials.m2[c * cols + j]});
    }
    mean[j] = static_cast<Real>(state.mean);
    m2[j] = static_cast<Real>(state.m2);
    finite &= is_finite(static_cast<float>(state.mean)) && is_finite(static_cast<float>(state.m2));
  }
  if (!finite) raise_flag(report);
}

// Third: the weight itself, once no column needs the old one any more. One thread.
template <class Real>
__global__ void __launch_bounds__(kWarpSize) add_weight_kernel(Partials partials, int64_t chunks, Real* weight_sum) {
  if (threadIdx.x != 0) return;
  double total = static_cast<double>(*weight_sum);
  for (int64_t c = 0; c < chunks; ++c) total += static_cast<double>(partials.weight[c]);
  *weight_sum = static_cast<Real>(total);
}

}  // namespace ace::cuda
