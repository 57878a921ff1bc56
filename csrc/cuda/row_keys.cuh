// A row's scores as the upper 16-bit halves of their keys, on chip, and the passes over the whole row: one read, a
// count for each digit, one write. Used by prune_rows.cuh.
#pragma once

#include "core/radix_select.h"
#include "cuda/block.cuh"
#include "cuda/outcome.cuh"

namespace ace::cuda {

constexpr int kUpperShift = 16;

// Digits of the row selection: the first is that of core, and the 16-bit half on chip ends after the second.
ACE_HD constexpr RadixDigit row_digit(int pass) {
  return pass == 0   ? radix_digit(0)
         : pass == 1 ? RadixDigit{kUpperShift, 5}
         : pass == 2 ? RadixDigit{5, 11}
                     : RadixDigit{0, 5};
}

constexpr uint32_t kFirstBit = 1u << (row_digit(0).shift - kUpperShift);  // the lowest bit of the first digit in a half

// Bytes of shared memory for a row, in whole packs.
ACE_HD size_t row_half_bytes(int64_t cols) {
  return static_cast<size_t>((cols + kPack - 1) / kPack * kPack) * sizeof(uint16_t);
}

// The upper halves of eight keys.
struct Upper {
  uint32_t word[kPack / 2];
  ACE_DEVICE uint32_t at(int e) const { return e % 2 == 0 ? word[e / 2] & 0xffffu : word[e / 2] >> 16; }
};

ACE_DEVICE Upper upper_of(const Pack<uint32_t>& key) {
  Upper upper;
  ACE_UNROLL
  for (int w = 0; w < kPack / 2; ++w) upper.word[w] = bytes_of<0x7632>(key.value[2 * w], key.value[2 * w + 1]);
  return upper;
}

// The upper halves of the row's keys, from shared memory, or recomputed if the row does not fit.
template <class F, class T, bool kHeld>
struct RowKeys {
  ScoredRow<T> row;
  uint16_t* held;

  ACE_DEVICE Upper upper(int64_t j) const {
    if constexpr (kHeld) {
      Upper upper;
      load_line(held + j, upper.word);
      return upper;
    } else {
      Pack<uint32_t> key;
      const int count = pack_count(row.cols, j);
      pack_keys<F>(row, j, count, load_weights(row, j, count), &key);
      return upper_of(key);
    }
  }

  ACE_DEVICE uint32_t key(int64_t j) const { return order_key(score_at<F>(row, j)); }
};

// Visits this thread's packs of the row: body(first column).
template <class Body>
ACE_DEVICE void for_packs(int64_t cols, Body&& body) {
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * kPack; j < cols; j += static_cast<int64_t>(blockDim.x) * kPack) {
    body(j);
  }
}

// As above, with the row and the number of columns: body(row, first column, count). If all inputs of the formula are
// aligned, one comparison serves all whole packs.
template <class F, class T, class Body>
ACE_DEVICE void for_row_packs(const ScoredRow<T>& row, Body&& body) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * kPack;
  int64_t j = static_cast<int64_t>(threadIdx.x) * kPack;
  if (is_whole<F>(row, kPack)) {
    for (; j + kPack <= row.cols; j += step) body(as_whole(row), j, kPack);
  }
  for (; j < row.cols; j += step) body(row, j, pack_count(row.cols, j));
}

// The only read of the row: stores the upper halves and counts the first digit. False if a score is not finite.
template <class F, class T, bool kHeld>
ACE_DEVICE bool read_row(const RowKeys<F, T, kHeld>& keys, uint32_t* counts) {
  clear_bins(counts, kRadixBins);
  bool finite = true;
  for_row_packs<F>(keys.row, [&](const ScoredRow<T>& row, int64_t j, int count) {
    Pack<uint32_t> key;
    finite &= pack_keys<F>(row, j, count, load_weights(row, j, count), &key);
    if constexpr (kHeld) store_shared_line(keys.held + j, upper_of(key).word);
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      if (e < count) atomicAdd(&counts[key.value[e] >> row_digit(0).shift], 1u);
    }
  });
  return __syncthreads_or(!finite) == 0;
}

// Counts this pass's digit of the keys that agree with the digits found so far.
template <class F, class T, bool kHeld>
ACE_DEVICE void count_digit(const RowKeys<F, T, kHeld>& keys, int pass, uint32_t prefix, uint32_t* counts) {
  const RadixDigit digit = row_digit(pass);
  const int upper_known = pass == 1 ? row_digit(0).shift - kUpperShift : 0;  // the half's low bits that are unknown
  const uint32_t upper_prefix = prefix >> kUpperShift >> upper_known;
  clear_bins(counts, 1 << digit.bits);
  for_packs(keys.row.cols, [&](int64_t j) {
    const Upper upper = keys.upper(j);
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      // The 0 beyond the row's end agrees with no prefix: no finite score's upper half is below 0x0080.
      if (upper.at(e) >> upper_known != upper_prefix) continue;
      const uint32_t key = pass == 1 ? upper.at(e) << kUpperShift : keys.key(j + e);
      if ((key ^ prefix) >> (digit.shift + digit.bits) != 0) continue;
      atomicAdd(&counts[key >> digit.shift & ((1u << digit.bits) - 1u)], 1u);
    }
  });
  __syncthreads();
}

// The column after the last kept tie. Ties are in index order; each thread has one stretch of columns.
template <class F, class T, bool kHeld>
ACE_DEVICE int64_t end_of_ties(const RowKeys<F, T, kHeld>& keys, Cut cut, BlockScratch& scratch, int64_t* end) {
  const int64_t threads = static_cast<int64_t>(blockDim.x), thread = static_cast<int64_t>(threadIdx.x);
  const int64_t each = (keys.row.cols + threads * kPack - 1) / (threads * kPack) * kPack;
  const int64_t begin = thread * each, stop = begin + each < keys.row.cols ? begin + each : keys.row.cols;
  const auto visit = [&](auto&& equal) {
    for (int64_t j = begin; j < stop; j += kPack) {
      const Upper upper = keys.upper(j);
      ACE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        if (upper.at(e) == cut.key >> kUpperShift && keys.key(j + e) == cut.key) equal(j + e);
      }
    }
  };
  int64_t mine = 0, all = 0;
  visit([&](int64_t) { ++mine; });
  int64_t rank = exclusive_scan(mine, scratch, &all);
  if (rank < cut.ties && cut.ties <= rank + mine) {
    visit([&](int64_t j) {
      if (++rank == cut.ties) *end = j + 1;
    });
  }
  __syncthreads();
  return *end;
}

// The only write.
template <class F, class T, bool kHeld, class Out>
ACE_DEVICE void write_row(const RowKeys<F, T, kHeld>& keys, const Out& out, int64_t i, Cut cut, int64_t ties_end) {
  const uint32_t cut_upper = cut.key >> kUpperShift;
  for_packs(keys.row.cols, [&](int64_t j) {
    const int count = pack_count(keys.row.cols, j);
    const Upper upper = keys.upper(j);
    uint32_t kept[kPack];
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      bool keep = upper.at(e) > cut_upper;
      if (upper.at(e) == cut_upper) {
        const uint32_t key = keys.key(j + e);
        keep = key > cut.key || (key == cut.key && j + e < ties_end);
      }
      kept[e] = keep ? kSign : 0u;
    }
    out.write(keys.row, i, j, count, kept, [&] { return load_weights(keys.row, j, count); });
  });
}

}  // namespace ace::cuda
