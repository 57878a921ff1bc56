// update_moments_: weighted Welford states of the columns of X in one pass.
//
// Contract
//   x [tokens, cols], token_weight [tokens] or null for 1. Merges the tokens into weight_sum [], mean [cols], m2
//   [cols]. Two stages without float atomics, so results are reproducible: blocks write partial states (float32), which
//   the second stage merges in order, in float64, by Chan's rule.
//   not finite  a token weight that is negative, NaN or infinite, or a state that is not finite, raises the flag; the
//               state is then invalid.
#pragma once

#include "core/moments.h"
#include "cuda/block.cuh"
#include "cuda/scored.cuh"

namespace ace::cuda {

constexpr int kMomentThreads = 256;
constexpr int kMomentWarps = kMomentThreads / kWarpSize;
constexpr int64_t kMomentColumns = kWarpSize * kPack;  // of a block: a warp's width
constexpr int kRowsInFlight = 8;                       // rows that a thread loads before it uses the first
constexpr int64_t kRowsOfBlock = kMomentWarps * kRowsInFlight;

template <class T>
struct Tokens {
  const T* data;              // [tokens, cols], rows `stride` apart
  const float* token_weight;  // [tokens] or null
  int64_t tokens, cols, stride;
  bool aligned;
};

// How the tokens are divided into chunks, one for each block of the first stage.
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

// Merges several rows at once. With S the sum of the rows' deviations from the current mean, Q the sum of their
// squares, and W the weight including these rows, Chan's rule is mean += S / W, M2 += Q - S^2 / W: one division for all
// rows and columns. A state of weight 0 may have any mean; it takes the first row's, which avoids cancellation.
template <class T>
ACE_DEVICE void merge_rows(ColumnStates& state, const Words<T>* row, const float* row_weight) {
  if (state.weight == 0.0f) {
    ACE_UNROLL
    for (int r = kRowsInFlight - 1; r >= 0; --r) {
      if (row_weight[r] > 0.0f) {
        ACE_UNROLL
        for (int e = 0; e < kPack; ++e) state.mean[e] = row[r].at(e);
      }
    }
  }
  ACE_UNROLL
  for (int r = 0; r < kRowsInFlight; ++r) state.weight += row_weight[r];
  const float minus_share = state.weight > 0.0f ? -1.0f / state.weight : 0.0f;
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) {
    float sum = 0.0f, squares = 0.0f;
    ACE_UNROLL
    for (int r = 0; r < kRowsInFlight; ++r) {
      const float deviation = row[r].at(e) - state.mean[e], weighted = row_weight[r] * deviation;
      sum = r == 0 ? weighted : sum + weighted;
      squares = r == 0 ? weighted * deviation : fmaf(weighted, deviation, squares);
    }
    const float minus_shift = sum * minus_share;
    state.m2[e] += fmaf(sum, minus_shift, squares);
    state.mean[e] -= minus_shift;
  }
}

// Sets rows of weight 0 to 0, because padding may hold anything. False if a token weight is invalid.
template <class T>
ACE_DEVICE bool check_weights(Words<T>* row, const float* weight) {
  uint32_t least = ~0u, largest = 0;  // as bits: negative, infinite and NaN weights have larger ones than valid weights
  ACE_UNROLL
  for (int r = 0; r < kRowsInFlight; ++r) {
    const uint32_t bits = float_bits(weight[r] + 0.0f);  // -0 is a weight
    least = bits < least ? bits : least;
    largest = bits > largest ? bits : largest;
  }
  if (least == 0) {
    ACE_UNROLL
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (weight[r] == 0.0f) row[r] = Words<T>{};
    }
  }
  return largest < 0x7f800000u;
}

// Reads a warp's rows of a chunk, in one thread's columns. False if a token weight is invalid.
template <class T>
ACE_DEVICE bool read_chunk(const Tokens<T>& x, int64_t begin, int64_t end, int64_t j, int count, ColumnStates& state) {
  const bool whole = x.aligned && count >= kPack, weighted = x.token_weight != nullptr;
  bool valid = true;
  int64_t first = begin + warp_id() * kRowsInFlight;
  const T* at = x.data + first * x.stride + j;
  const auto merge = [&](auto load, auto weight_of) {
    Words<T> row[kRowsInFlight];
    float weight[kRowsInFlight];
    ACE_UNROLL
    for (int r = 0; r < kRowsInFlight; ++r) row[r] = load(r), weight[r] = weight_of(r);
    valid &= check_weights(row, weight);
    merge_rows(state, row, weight);
    at += kRowsOfBlock * x.stride;
    first += kRowsOfBlock;
  };
  const auto load_whole = [&](int r) { return load_words(at + r * x.stride); };
  if (whole && !weighted) {
    while (first + kRowsInFlight <= end) merge(load_whole, [](int) { return 1.0f; });
  } else if (whole) {
    while (first + kRowsInFlight <= end) merge(load_whole, [&](int r) { return x.token_weight[first + r]; });
  }
  while (first < end) {  // the last rows, or all rows if whole-pack loads are not possible
    merge([&](int r) { return load_words(at + r * x.stride, first + r < end ? count : 0, whole && first + r < end); },
          [&](int r) { return first + r >= end ? 0.0f
                              : weighted       ? x.token_weight[first + r]
                                               : 1.0f; });
  }
  return valid;
}

// The warps' states in shared memory; each thread merges one column.
struct WarpStates {
  float weight[kMomentWarps];
  float mean[kMomentWarps][kMomentColumns];
  float m2[kMomentWarps][kMomentColumns];

  ACE_DEVICE void put(const ColumnStates& state) {
    if (lane_id() == 0) weight[warp_id()] = state.weight;
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {  // lanes are contiguous, which avoids bank conflicts
      mean[warp_id()][e * kWarpSize + lane_id()] = state.mean[e];
      m2[warp_id()][e * kWarpSize + lane_id()] = state.m2[e];
    }
  }

  // The column of the strip that this thread merges, by the layout of put().
  static ACE_DEVICE int64_t column() { return lane_id() * kPack + warp_id(); }

  // Merges all warps at once: first the mean, as an offset to the first warp's, then the squares about it.
  ACE_DEVICE Welford<float> merged() const {
    Welford<float> all;
    float sum = 0.0f;
    ACE_UNROLL
    for (int w = 0; w < kMomentWarps; ++w) {
      all.weight += weight[w];
      sum += weight[w] * (mean[w][threadIdx.x] - mean[0][threadIdx.x]);
    }
    all.mean = mean[0][threadIdx.x] + (all.weight > 0.0f ? sum / all.weight : 0.0f);
    ACE_UNROLL
    for (int w = 0; w < kMomentWarps; ++w) {
      const float delta = mean[w][threadIdx.x] - all.mean;
      all.m2 += fmaf(weight[w] * delta, delta, m2[w][threadIdx.x]);
    }
    return all;
  }
};
static_assert(kMomentWarps == kPack, "a thread a column");

// First stage.
template <class T>
__global__ void __launch_bounds__(kMomentThreads)
    partial_moments_kernel(Tokens<T> x, Chunks cut, Partials out, NotFinite report) {
  __shared__ WarpStates warps;
  for (int64_t unit = blockIdx.x; unit < cut.strips * cut.chunks; unit += gridDim.x) {
    const int64_t chunk = unit / cut.strips, strip = (unit - chunk * cut.strips) * kMomentColumns;
    const int64_t begin = chunk * cut.tokens_each;
    const int64_t end = begin + cut.tokens_each < x.tokens ? begin + cut.tokens_each : x.tokens;
    const int64_t j = strip + lane_id() * kPack;
    ColumnStates state;
    if (!read_chunk(x, begin, end, j, pack_count(x.cols, j), state)) raise_flag(report);
    warps.put(state);
    __syncthreads();
    const Welford<float> column = warps.merged();
    const int64_t mine = strip + WarpStates::column();
    if (mine < x.cols) {
      out.mean[chunk * x.cols + mine] = column.mean;
      out.m2[chunk * x.cols + mine] = column.m2;
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

// Third stage: adds the weight itself, after all columns have used the old one. One thread.
template <class Real>
__global__ void __launch_bounds__(kWarpSize) add_weight_kernel(Partials partials, int64_t chunks, Real* weight_sum) {
  if (threadIdx.x != 0) return;
  double total = static_cast<double>(*weight_sum);
  for (int64_t c = 0; c < chunks; ++c) total += static_cast<double>(partials.weight[c]);
  *weight_sum = static_cast<Real>(total);
}

}  // namespace ace::cuda
