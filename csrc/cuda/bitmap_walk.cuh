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
  // Of a row: 32 columns each.
  ACE_DEVICE const uint32_t* row_words(int64_t row) const {
    return reinterpret_cast<const uint32_t*>(bitmap) + 2 * row * words;
  }
};

// 32 columns of a row.
struct alignas(8) PackedWord {
  uint32_t bits;
  int first;  // place of the first survivor in PackedStage::value
};

// One warp's shared memory. Codes are read eight at a time, which may be beyond the last one; what is there is ignored.
template <class T>
struct alignas(16) PackedStage {
  static constexpr int kBeyond = sizeof(T) == 1 ? 16 : 0;
  T value[kChunkColumns + Quad<T>::kSize + kBeyond];
  PackedWord word[kWarpSize];
};

// Copies values place to place + count to stage.value, starting at *shift, with zeros where there are none; loads whole
// quads where the buffer has them.
template <class T>
ACE_DEVICE int stage_values(const PackedRows<T>& of, uint64_t place, int count, PackedStage<T>& stage) {
  constexpr int kQuad = Quad<T>::kSize;
  constexpr int64_t kMost = kChunkColumns + 2 * kQuad;  // that are read
  const int shift = of.aligned ? static_cast<int>(place % kQuad) : 0;
  const int64_t from = static_cast<int64_t>(place) - shift, left = of.survivors - from;
  const int there = static_cast<int>(left < 0 ? 0 : left > kMost ? kMost : left);
  for (int at = lane_id() * kQuad; at < shift + count; at += kWarpSize * kQuad) {
    uint32_t words[4] = {};
    if (of.aligned && at + kQuad <= there) {
      load_line(of.values + from + at, words);
    } else {
      ACE_UNROLL
      for (int e = 0; e < kQuad; ++e) {
        if (at + e >= there) continue;
        uint32_t bits = 0;
        std::memcpy(&bits, of.values + from + at + e, sizeof(T));
        words[e * sizeof(T) / 4] |= bits << (e * sizeof(T) % 4 * 8);
      }
    }
    store_shared_line(&stage.value[at], words);
  }
  return shift;
}

// Calls action(chunk), together in all lanes of the warp, for each 1024 columns from `chunk` on, with their words and
// survivors in `stage`. kInValue survivors share a T, the first one in its lowest bits; then a row starts with a whole
// T, and places are counted in survivors.
template <int kInValue, class T, class Action>
ACE_DEVICE void for_each_chunk(const PackedRows<T>& of, int64_t row, PackedStage<T>& stage, Action&& action) {
  auto place = static_cast<uint64_t>(of.start(row)) * kInValue;
  const uint32_t* words = of.row_words(row) + lane_id();
  int64_t left = 2 * of.words - lane_id();  // words of the row from this lane's on
  for (int64_t chunk = 0; chunk < of.cols; chunk += kChunkColumns, words += kWarpSize, left -= kWarpSize) {
    const uint32_t word = left > 0 ? *words : 0;
    int inclusive = __popc(word);
    const int own = inclusive;
    ACE_UNROLL
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int before = __shfl_up_sync(kFullWarp, inclusive, static_cast<unsigned>(distance));
      if (lane_id() >= distance) inclusive += before;
    }
    const int count = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
    const int inside = static_cast<int>(place % kInValue);  // of the first T
    const int values = static_cast<int>(static_cast<unsigned>(inside + count + kInValue - 1) / kInValue);
    const int shift = stage_values(of, place / kInValue, values, stage) * kInValue + inside;
    stage.word[lane_id()] = {word, shift + inclusive - own};
    __syncwarp();
    action(chunk);
    __syncwarp();  // the next chunk overwrites values that other lanes may still read
    place += static_cast<unsigned>(count);
  }
}

}  // namespace ace::cuda
