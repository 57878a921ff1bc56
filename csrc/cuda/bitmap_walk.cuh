// The walk over a row of a packed matrix (ops/packed.h, ops/quantized.h) by one warp: which columns are stored, and
// their survivors in shared memory.
//
// Method: 1024 columns at a time. Each lane loads 32 bits of the bitmap, 128 contiguous bytes for each warp; a warp
// scan of their bit counts gives the first survivor of each word. The survivors of all 1024 columns are contiguous and
// are copied to shared memory, 16 bytes for each lane at a time.
//
// Any bits: a bitmap or row_start that disagrees with the survivors gives wrong results; nothing outside the buffers
// is read or written.
#pragma once

#include "cuda/block.cuh"
#include "cuda/vector.cuh"

namespace ace::cuda {

constexpr int kPackedWarps = 4;     // rows of a block at a time
constexpr int kPackedColumns = 32;  // of a word
constexpr int kChunkColumns = kWarpSize * kPackedColumns;

// `values` holds the survivors: numbers, or bytes with codes of them.
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

// One warp's shared memory. Codes are read eight at a time, which may be beyond the last one; what is there is ignored.
template <class T>
struct alignas(16) PackedStage {
  static constexpr int kBeyond = sizeof(T) == 1 ? 16 : 0;
  T value[kChunkColumns + Quad<T>::kSize + kBeyond];
  uint32_t word[kWarpSize];
  int first[kWarpSize];  // place of a word's first survivor from `value` on
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

// Calls action(chunk), together in all lanes of the warp, for each 1024 columns from `chunk` on, with their words and
// survivors in `stage`. kInValue survivors share a T, the first one in its lowest bits; then a row starts with a whole
// T, and places are counted in survivors.
template <int kInValue, class T, class Action>
ACE_DEVICE void for_each_chunk(const PackedRows<T>& of, int64_t row, PackedStage<T>& stage, Action&& action) {
  int64_t place = of.start(row) * kInValue;
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
    const int inside = static_cast<int>(place % kInValue);  // of the first T
    const int values = (inside + count + kInValue - 1) / kInValue;
    const int shift = stage_values(of, place / kInValue, values, stage) * kInValue + inside;
    stage.word[lane_id()] = word;
    stage.first[lane_id()] = shift + inclusive - own;
    __syncwarp();
    action(chunk);
    __syncwarp();  // the next chunk overwrites values that other lanes may still read
    place += count;
  }
}

}  // namespace ace::cuda
