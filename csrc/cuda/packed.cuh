// packed_linear for up to 16 tokens, and unpack_bitmap: one warp for each row of the packed matrix (ops/packed.h).
//
// Contract
//   sums       of products in float32: lane l of the warp adds columns l, l + 32, ... in ascending order, then lanes
//              are added by halves, then the bias; rounded once.
//   any bits   A bitmap or row_start that disagrees with the survivors gives wrong results; nothing outside the buffers
//              is read or written.
//
// Method: 1024 columns at a time. Each lane loads 32 bits of the bitmap, 128 contiguous bytes for each warp; a warp
// scan of their bit counts gives the first value of each word. The values of all 1024 columns are contiguous and are
// copied to shared memory, 16 bytes for each lane at a time. Then the warp goes through the words: a lane takes the bit
// of its own column, counts the bits below it, and reads its value; neighbouring lanes read neighbouring values of
// shared memory and neighbouring inputs. Bytes read for a bfloat16 weight at 50 %: 1/8 of bitmap and 1 of values, once;
// besides these only x, which stays in the caches.
//
// Compiled and run on the host only: not run on a GPU.
#pragma once

#include "cuda/block.cuh"
#include "cuda/packed.h"
#include "cuda/vector.cuh"

namespace ace::cuda {

constexpr int kPackedWarps = 4;     // rows of a block at a time
constexpr int kPackedColumns = 32;  // of a word
constexpr int kChunkColumns = kWarpSize * kPackedColumns;

template <class T>
struct PackedRows {
  const uint8_t* bitmap;
  const T* values;
  const int64_t* row_start;
  int64_t rows, cols, words, survivors, keep;
  bool aligned;  // values is 16-byte aligned

  ACE_DEVICE int64_t start(int64_t row) const {
    const int64_t place = row_start != nullptr ? row_start[row] : row * keep;
    return place < 0 ? 0 : place > survivors ? survivors : place;
  }
  // 32 columns of a row from `column` on, 0 beyond its words.
  ACE_DEVICE uint32_t word(int64_t row, int64_t column) const {
    if (column >= words * 64) return 0;
    return reinterpret_cast<const uint32_t*>(bitmap + row * words * 8)[column / kPackedColumns];
  }
};

// One warp's shared memory.
template <class T>
struct alignas(16) PackedStage {
  T value[kChunkColumns + Quad<T>::kSize];
  uint32_t word[kWarpSize];
  int first[kWarpSize];  // place in `value` of a word's first value
};

// Copies values place to place + count to stage.value, starting at *shift, with zeros where there are none; loads whole
// quads where the buffer has them.
template <class T>
ACE_DEVICE int stage_values(const PackedRows<T>& of, int64_t place, int count, PackedStage<T>& stage) {
  constexpr int kQuad = Quad<T>::kSize;
  const int shift = of.aligned ? static_cast<int>(place % kQuad) : 0;
  const int64_t from = place - shift;
  for (int q = lane_id(); q * kQuad < shift + count; q += kWarpSize) {
    const int64_t at = from + q * kQuad;
    Quad<T> quad;
    if (of.aligned && at + kQuad <= of.survivors) {
      quad = *reinterpret_cast<const Quad<T>*>(of.values + at);
    } else {
      ACE_UNROLL
      for (int e = 0; e < kQuad; ++e) quad.value[e] = at + e < of.survivors ? of.values[at + e] : T{};
    }
    *reinterpret_cast<Quad<T>*>(&stage.value[q * kQuad]) = quad;
  }
  return shift;
}

// Calls action(column, stored, value) for this lane's columns, 32 of a chunk at a time, together in all lanes of the
// warp. `value` is T{} where nothing is stored.
template <class T, class Action>
ACE_DEVICE void for_each_column(const PackedRows<T>& of, int64_t row, PackedStage<T>& stage, Action&& action) {
  int64_t place = of.start(row);
  const uint32_t below = (1u << lane_id()) - 1u;
  for (int64_t chunk = 0; chunk < of.cols; chunk += kChunkColumns) {
    const uint32_t word = of.word(row, chunk + lane_id() * kPackedColumns);
    int inclusive = __popc(word);
    const int own = inclusive;
    ACE_UNROLL
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int before = __shfl_up_sync(kFullWarp, inclusive, static_cast<unsigned>(distance));
      if (lane_id() >= distance) inclusive += before;
    }
    const int count = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
    const int shift = stage_values(of, place, count, stage);
    stage.word[lane_id()] = word;
    stage.first[lane_id()] = shift + inclusive - own;
    __syncwarp();
    for (int w = 0; w < kWarpSize && chunk + w * kPackedColumns < of.cols; ++w) {
      const int64_t column = chunk + w * kPackedColumns + lane_id();
      const uint32_t bits = stage.word[w];
      const bool stored = (bits >> lane_id() & 1u) != 0 && column < of.cols;
      const T value = stored ? stage.value[stage.first[w] + __popc(bits & below)] : T{};
      action(column, stored, value);
    }
    __syncwarp();  // the next chunk overwrites values that other lanes may still read
    place += count;
  }
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kPackedWarps* kWarpSize)
    packed_linear_kernel(PackedRows<T> of, const T* x, int64_t stride, const T* bias, T* out) {
  __shared__ PackedStage<T> stages[kPackedWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackedWarps + warp_id();
  for (int64_t row = first; row < of.rows; row += static_cast<int64_t>(gridDim.x) * kPackedWarps) {
    float sums[kTokens];
    ACE_UNROLL
    for (int t = 0; t < kTokens; ++t) sums[t] = 0.0f;
    for_each_column(of, row, stages[warp_id()], [&](int64_t column, bool stored, T value) {
      if (!stored) return;
      const float weight = to_float(value);
      ACE_UNROLL
      for (int t = 0; t < kTokens; ++t) sums[t] += weight * to_float(x[t * stride + column]);
    });
    ACE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const float sum = warp_sum(sums[t]);
      if (lane_id() == 0) round_to(bias == nullptr ? sum : sum + to_float(bias[row]), &out[t * of.rows + row]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kPackedWarps* kWarpSize) unpack_bitmap_kernel(PackedRows<T> of, T* out) {
  __shared__ PackedStage<T> stages[kPackedWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackedWarps + warp_id();
  for (int64_t row = first; row < of.rows; row += static_cast<int64_t>(gridDim.x) * kPackedWarps) {
    for_each_column(of, row, stages[warp_id()], [&](int64_t column, bool, T value) {
      if (column < of.cols) out[row * of.cols + column] = value;
    });
  }
}

}  // namespace ace::cuda
