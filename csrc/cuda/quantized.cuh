// quantized_linear for up to 16 tokens, and unpack_quantized: one warp for each row of the matrix (ops/quantized.h).
//
// Contract
//   sums       in float32: a lane of the warp sums the products of code and input of eight neighbouring columns, in
//              ascending order by fused multiply-adds, multiplies the sum by the scale of their group and adds it; its
//              next columns are 256 further. Then lanes are added by halves, then the bias; rounded once.
//   any bits   A bitmap or row_start that disagrees with the codes gives wrong results; nothing outside the buffers is
//              read or written.
//
// Method: the walk of bitmap_walk.cuh, 256 columns at a time, eight for each lane: one byte of the bitmap, one 16-byte
// load of 16-bit inputs, and at most eight codes, which are contiguous in shared memory. Byte permutations by selectors
// that are computed from the bitmap's bits put each code at its column; a code becomes a float as the lowest byte of
// 2^23 + code. Bytes read for a weight at 50 %: 1/8 of bitmap and 1/2 of codes of 8 bits, 1/4 of 4 bits, once.
//
// Compiled and run on the host only: not run on a GPU.
#pragma once

#include "cuda/bitmap_walk.cuh"
#include "cuda/quantized.h"

namespace ace::cuda {

constexpr int kUnitColumns = 64;                 // a group has a whole number of units
constexpr int kStepColumns = kWarpSize * kPack;  // of a warp at a time
constexpr int kStepUnits = kStepColumns / kUnitColumns;
constexpr int kUnitLanes = kUnitColumns / kPack;
constexpr uint32_t kTwoTo23 = 0x4b000000u;  // a float whose lowest bit is worth 1

// Blocks of a multiprocessor at a time, for which its registers must suffice: 80 for each thread, or 64. Left to
// itself, ptxas takes 64 for 16 tokens, and spills.
template <int kTokens>
constexpr int kPackedBlocks = kTokens > 2 ? 6 : 8;

using CodeStage = PackedStage<uint8_t>;

// Units and groups of a row are counted in 32 bits: it has at most kMostWords of 64 columns (2^37 columns).
constexpr int64_t kMostWords = 0x7fffffff;

template <class T>
struct QuantizedRows {
  PackedRows<uint8_t> codes;
  const T* scales;  // [rows, groups]
  int groups;
  int group_units;
  int step_groups, step_units;  // a step's units in whole groups, and the remainder
};

// The scale of this lane's columns, which advance by whole steps.
template <class T>
struct ScaleWalk {
  ACE_DEVICE ScaleWalk(const QuantizedRows<T>& of, int64_t row)
      : scale(of.scales + row * of.groups + lane_id() / kUnitLanes / of.group_units),
        unit(lane_id() / kUnitLanes % of.group_units) {}
  ACE_DEVICE void advance(const QuantizedRows<T>& of) {
    const int ahead = unit + of.step_units;
    const bool next = ahead >= of.group_units;
    unit = next ? ahead - of.group_units : ahead;
    scale += of.step_groups + next;
  }
  const T* scale;
  int unit;  // in the group
};

// The lower half of two words, shifted right by at most 32 bits.
ACE_DEVICE uint32_t shifted(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> by);
}

// Eight codes from `place` on in the bytes of two words; those of 4 bits without their sign.
template <int kBits>
ACE_DEVICE void load_codes(const CodeStage& stage, int place, uint32_t* code) {
  constexpr uint32_t kInWord = 32 / kBits;
  const auto from = static_cast<uint32_t>(place);
  const uint8_t* const word = stage.value + from / kInWord * 4;
  const uint32_t by = from % kInWord * kBits;
  const uint32_t first = load_word(word), second = load_word(word + 4);
  if constexpr (kBits == 8) {
    code[0] = shifted(first, second, by);
    code[1] = shifted(second, load_word(word + 8), by);
  } else {
    const uint32_t eight = shifted(first, second, by);
    const uint32_t even = eight & 0x0f0f0f0fu, odd = eight >> 4 & 0x0f0f0f0fu;
    code[0] = bytes_of<0x5140>(even, odd);
    code[1] = bytes_of<0x7362>(even, odd);
  }
}

// Bit e of eight in the lowest bit of nibble e.
ACE_DEVICE uint32_t to_nibbles(uint32_t bits) {
  const uint32_t halves = (bits | bits << 12) & 0x000f000fu;
  const uint32_t pairs = (halves | halves << 6) & 0x03030303u;
  return (pairs | pairs << 3) & 0x11111111u;
}

// The codes at their columns: byte e of eight is the next code where bit e is set, else 0. A nibble of a selector is
// the number of set bits below it. Where its own bit is not set, it selects a zero instead: of codes of 4 bits, which
// are not negative as bytes, the sign (plus 8); of codes of 8 bits a byte of the second operand (plus 4), so that each
// half starts at its own first code.
template <int kBits>
ACE_DEVICE void place_codes(uint32_t bits, const uint32_t* code, uint32_t* placed) {
  const uint32_t set = to_nibbles(bits), unset = set ^ 0x11111111u;
  if constexpr (kBits == 4) {
    const uint32_t selector = set * 0x11111110u + (unset << 3);
    placed[0] = select_bytes(code[0], code[1], selector);
    placed[1] = select_bytes(code[0], code[1], selector >> 16);
  } else {
    const uint32_t later = shifted(code[0], code[1], 8u * static_cast<uint32_t>(__popc(bits & 15u)));
    placed[0] = select_bytes(code[0], 0, set * 0x1110u + (unset << 2));
    placed[1] = select_bytes(later, 0, (set >> 16) * 0x1110u + (unset >> 16 << 2));
  }
}

// Four codes as floats. A bias of half the range makes them numbers without a sign.
template <int kBits>
ACE_DEVICE void widen_codes(uint32_t four, float* code) {
  constexpr uint32_t kBias = 1u << (kBits - 1);
  const uint32_t biased = four ^ kBias * 0x01010101u;
  const float wide[4] = {bits_float(bytes_of<0x7440>(biased, kTwoTo23)), bits_float(bytes_of<0x7441>(biased, kTwoTo23)),
                         bits_float(bytes_of<0x7442>(biased, kTwoTo23)),
                         bits_float(bytes_of<0x7443>(biased, kTwoTo23))};
  ACE_UNROLL
  for (int e = 0; e < 4; ++e) code[e] = wide[e] - bits_float(kTwoTo23 + kBias);
}

// Eight neighbouring columns of a row.
struct EightColumns {
  int count;          // of them within the row
  uint32_t stored;    // bit e: a code is stored
  float code[kPack];  // 0 where none is stored
  float scale;
};

// Calls action(EightColumns) for each eight columns of this lane: those from 8 lane_id() on, then 256 further.
template <int kBits, class T, class Action>
ACE_DEVICE void for_each_eight(const QuantizedRows<T>& of, int64_t row, CodeStage& stage, Action&& action) {
  const int byte = lane_id() % 4 * 8;
  const uint32_t below = (1u << byte) - 1u;
  ScaleWalk<T> at(of, row);
  for_each_chunk<8 / kBits>(of.codes, row, stage, [&](int64_t chunk) {
    const int64_t rest = of.codes.cols - chunk;
    int left = static_cast<int>(rest < kChunkColumns ? rest : kChunkColumns) - lane_id() * kPack;
    const PackedWord* next = stage.word + lane_id() / 4;
    for (; left > 0; left -= kStepColumns, next += kStepColumns / kPackedColumns) {
      const PackedWord word = *next;
      EightColumns eight;
      eight.count = left < kPack ? left : kPack;
      eight.stored = word.bits >> byte & 255u;
      eight.scale = to_float(*at.scale);
      at.advance(of);
      uint32_t code[2], placed[2];
      load_codes<kBits>(stage, word.first + __popc(word.bits & below), code);
      place_codes<kBits>(eight.stored, code, placed);
      widen_codes<kBits>(placed[0], eight.code);
      widen_codes<kBits>(placed[1], eight.code + 4);
      action(eight);
    }
  });
}

// Codes times the scale, rounded to T; +0 where none is stored, and for a code of 0.
template <class T>
ACE_DEVICE Words<T> rounded_words(const EightColumns& eight) {
  Words<T> words{};
  uint32_t stored[kPack];  // as the sign
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) {
    T value;
    round_to(eight.code[e] * eight.scale + 0.0f, &value);
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    words.word[e / Words<T>::kInWord] |= bits << (e % Words<T>::kInWord * 16);
    stored[e] = eight.stored << (31 - e);
  }
  zero_rest(words, stored);
  return words;
}

template <class T, int kBits, int kTokens>
__global__ void __launch_bounds__(kPackedWarps* kWarpSize, kPackedBlocks<kTokens>)
    quantized_linear_kernel(QuantizedRows<T> of, const T* x, int64_t stride, bool aligned, const T* bias, T* out) {
  __shared__ CodeStage stages[kPackedWarps];
  const int64_t rows = of.codes.rows, first = static_cast<int64_t>(blockIdx.x) * kPackedWarps + warp_id();
  for (int64_t row = first; row < rows; row += static_cast<int64_t>(gridDim.x) * kPackedWarps) {
    float sums[kTokens];
    ACE_UNROLL
    for (int t = 0; t < kTokens; ++t) sums[t] = 0.0f;
    const T* input = x + lane_id() * kPack;
    for_each_eight<kBits>(of, row, stages[warp_id()], [&](const EightColumns& eight) {
      const bool whole = aligned && eight.count == kPack;
      const T* token = input;
      ACE_UNROLL
      for (int t = 0; t < kTokens; ++t, token += stride) {
        const Words<T> words = load_words(token, eight.count, whole);
        float sum = eight.code[0] * words.at(0);
        ACE_UNROLL
        for (int e = 1; e < kPack; ++e) sum = fmaf(eight.code[e], words.at(e), sum);
        sums[t] = fmaf(eight.scale, sum, sums[t]);
      }
      input += kStepColumns;
    });
    ACE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const float sum = warp_sum(sums[t]);
      if (lane_id() == 0) round_to(bias == nullptr ? sum : sum + to_float(bias[row]), &out[t * rows + row]);
    }
  }
}

template <class T, int kBits>
__global__ void __launch_bounds__(kPackedWarps* kWarpSize)
    unpack_quantized_kernel(QuantizedRows<T> of, bool aligned, T* out) {
  __shared__ CodeStage stages[kPackedWarps];
  const int64_t rows = of.codes.rows, cols = of.codes.cols;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackedWarps + warp_id();
  for (int64_t row = first; row < rows; row += static_cast<int64_t>(gridDim.x) * kPackedWarps) {
    T* weight = out + row * cols + lane_id() * kPack;
    for_each_eight<kBits>(of, row, stages[warp_id()], [&](const EightColumns& eight) {
      store_words(weight, rounded_words<T>(eight), eight.count, aligned && eight.count == kPack);
      weight += kStepColumns;
    });
  }
}

}  // namespace ace::cuda
