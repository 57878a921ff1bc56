// prune_topk_ and topk_mask, group "row": one block a row, the row read from memory once and written once.
//
// Contract
//   weight     [rows, cols], pruned in place: exactly keep_k of each row keep their bits, the others become +0.0; or
//              only read, and mask [rows, cols] says the same.
//   threshold  [rows]: the smallest kept score, +inf where keep_k == 0, NaN where the row was left alone.
//   ties       among equal scores the lower column first.
//   not finite a row that holds a score that is not finite is left as it was (mask: all True); the flag is raised.
//
// How: the upper 16 bits of every key stay on chip, 2 bytes a column for every dtype, so the weight and the column
// factors are read once. (Keeping 16-bit weights and recomputing keys takes the same room but reads the float32 column
// factors, twice the weight's bytes, again in every pass.) The radix selection takes the two digits of that half from
// the chip, 11 and 5 bits; by then few columns agree with all digits found, and only those are recomputed for the lower
// half's two digits and for the cut. Histograms are 32-bit shared counters: an increment by one compiles to
// ATOMS.POPC.INC, in which the hardware adds up the lanes of a warp that hit the same counter.
#pragma once

#include "core/radix_select.h"
#include "cuda/block.cuh"
#include "cuda/outcome.cuh"

namespace ace::cuda {

constexpr int kMaxRowThreads = 512;
constexpr int kRowBlocks = 2;  // on a multiprocessor: one reads its row while the other selects
constexpr int kUpperShift = 16;
constexpr int kRowPasses = 4;

// Digits of the row selection: the first is core's, the 16-bit half on chip ends after the second.
ACE_HD constexpr RadixDigit row_digit(int pass) {
  return pass == 0   ? radix_digit(0)
         : pass == 1 ? RadixDigit{kUpperShift, 5}
         : pass == 2 ? RadixDigit{5, 11}
                     : RadixDigit{0, 5};
}

constexpr int kRowBins = 2048;  // of the widest digit

// Bytes of dynamic shared memory that hold a row: whole packs.
ACE_HD size_t row_held_bytes(int64_t cols) {
  return static_cast<size_t>((cols + kPack - 1) / kPack * kPack) * sizeof(uint16_t);
}

// The row as its upper half keys, from the chip, or recomputed where it is too long to be held.
template <class F, class T, bool kHeld>
struct RowKeys {
  ScoredRow<T> row;
  uint16_t* held;

  ACE_DEVICE Pack<uint16_t> upper(int64_t j) const {
    if constexpr (kHeld) {
      return load_pack(held + j, kPack, true);
    } else {
      Pack<uint32_t> key;
      const int count = pack_count(row.cols, j);
      pack_keys<F>(row, j, count, load_weights(row, j, count), &key);
      return upper_of(key);
    }
  }

  ACE_DEVICE uint32_t key(int64_t j) const { return order_key(score_at<F>(row, j)); }

  static ACE_DEVICE Pack<uint16_t> upper_of(const Pack<uint32_t>& key) {
    Pack<uint16_t> half;
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) half.value[e] = static_cast<uint16_t>(key.value[e] >> kUpperShift);
    return half;
  }
};

// Visits this thread's packs of the row: body(first column).
template <class Body>
ACE_DEVICE void for_packs(int64_t cols, Body&& body) {
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * kPack; j < cols; j += static_cast<int64_t>(blockDim.x) * kPack) {
    body(j);
  }
}

ACE_DEVICE void clear_counts(uint32_t* counts, int bins) {
  for (int b = static_cast<int>(threadIdx.x); b < bins; b += static_cast<int>(blockDim.x)) counts[b] = 0;
  __syncthreads();
}

// The one read of the row: holds the upper halves, counts the first digit. False where a score is not finite.
template <class F, class T, bool kHeld>
ACE_DEVICE bool read_row(const RowKeys<F, T, kHeld>& keys, uint32_t* counts) {
  clear_counts(counts, kRowBins);
  bool finite = true;
  const auto read = [&](const ScoredRow<T>& row, int64_t j, int count) {
    Pack<uint32_t> key;
    finite &= pack_keys<F>(row, j, count, load_weights(row, j, count), &key);
    if constexpr (kHeld) store_pack(keys.held + j, keys.upper_of(key), kPack, true);
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      if (e < count) atomicAdd(&counts[key.value[e] >> row_digit(0).shift], 1u);
    }
  };
  for_packs(keys.row.cols, [&](int64_t j) {
    const int count = pack_count(keys.row.cols, j);
    if (is_whole<F>(keys.row, count)) {
      read(as_whole(keys.row), j, kPack);
    } else {
      read(keys.row, j, count);
    }
  });
  return __syncthreads_or(!finite) == 0;
}

// Counts this pass's digit of the keys that agree with the digits found so far.
template <class F, class T, bool kHeld>
ACE_DEVICE void count_digit(const RowKeys<F, T, kHeld>& keys, int pass, uint32_t prefix, uint32_t* counts) {
  const RadixDigit digit = row_digit(pass);
  const int upper_known = pass == 1 ? row_digit(0).shift - kUpperShift : 0;  // unknown bits at the half's lower end
  const uint32_t upper_prefix = prefix >> kUpperShift >> upper_known;
  clear_counts(counts, 1 << digit.bits);
  for_packs(keys.row.cols, [&](int64_t j) {
    const Pack<uint16_t> upper = keys.upper(j);
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      // The 0 that stands beyond the row's end agrees with no prefix: no finite score's upper half is below 0x0080.
      if (static_cast<uint32_t>(upper.value[e]) >> upper_known != upper_prefix) continue;
      const uint32_t key = pass == 1 ? static_cast<uint32_t>(upper.value[e]) << kUpperShift : keys.key(j + e);
      if ((key ^ prefix) >> (digit.shift + digit.bits) != 0) continue;
      atomicAdd(&counts[key >> digit.shift & ((1u << digit.bits) - 1u)], 1u);
    }
  });
  __syncthreads();
}

// Column behind the last tie that is kept: ties lie in index order, a stretch of columns a thread.
template <class F, class T, bool kHeld>
ACE_DEVICE int64_t end_of_ties(const RowKeys<F, T, kHeld>& keys, Cut cut, BlockScratch& scratch, int64_t* end) {
  const int64_t threads = static_cast<int64_t>(blockDim.x), thread = static_cast<int64_t>(threadIdx.x);
  const int64_t each = (keys.row.cols + threads * kPack - 1) / (threads * kPack) * kPack;
  const int64_t begin = thread * each, stop = begin + each < keys.row.cols ? begin + each : keys.row.cols;
  const auto visit = [&](auto&& equal) {
    for (int64_t j = begin; j < stop; j += kPack) {
      const Pack<uint16_t> upper = keys.upper(j);
      ACE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        if (upper.value[e] == cut.key >> kUpperShift && keys.key(j + e) == cut.key) equal(j + e);
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

// The one write.
template <class F, class T, bool kHeld, class Out>
ACE_DEVICE void write_row(const RowKeys<F, T, kHeld>& keys, const Out& out, int64_t i, Cut cut, int64_t ties_end) {
  const uint32_t cut_upper = cut.key >> kUpperShift;
  for_packs(keys.row.cols, [&](int64_t j) {
    const int count = pack_count(keys.row.cols, j);
    const Pack<uint16_t> upper = keys.upper(j);
    uint32_t kept = 0;
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      bool keep = upper.value[e] > cut_upper;
      if (upper.value[e] == cut_upper) {
        const uint32_t key = keys.key(j + e);
        keep = key > cut.key || (key == cut.key && j + e < ties_end);
      }
      kept |= static_cast<uint32_t>(keep) << e;
    }
    out.write(keys.row, i, j, count, kept, [&] { return load_weights(keys.row, j, count); });
  });
}

template <class F, class T, bool kHeld, class Out>
__global__ void __launch_bounds__(kMaxRowThreads, kHeld ? kRowBlocks : 1)
    prune_rows_kernel(Scored<T> matrix, int64_t keep_k, Out out, NotFinite report) {
  ACE_DYNAMIC_SHARED(uint16_t, held);
  __shared__ uint32_t counts[kRowBins];
  __shared__ BlockScratch scratch;
  __shared__ int64_t shared_end;
  for (int64_t i = blockIdx.x; i < matrix.rows; i += gridDim.x) {
    const RowKeys<F, T, kHeld> keys{row_of<F>(matrix, i), held};
    if (!read_row(keys, counts)) {
      for_packs(matrix.cols, [&](int64_t j) { out.leave(i, j, pack_count(matrix.cols, j)); });
      if (threadIdx.x == 0) {
        out.set_threshold(i, bits_float(0x7fc00000u));
        raise_flag(report);
      }
      continue;
    }
    Cut cut = kKeepNone;
    int64_t ties_end = 0;
    if (keep_k > 0) {
      cut = {0u, keep_k};
      int64_t equal = 0;
      for (int pass = 0; pass < kRowPasses; ++pass) {
        const RadixDigit digit = row_digit(pass);
        if (pass > 0) count_digit(keys, pass, cut.key, counts);
        const RadixBin found = find_bin_block(counts, 1 << digit.bits, cut.ties, scratch);
        cut.key |= found.bin << digit.shift;
        cut.ties -= found.above;
        equal = found.count;
      }
      ties_end = equal == cut.ties ? matrix.cols : end_of_ties(keys, cut, scratch, &shared_end);
    }
    write_row(keys, out, i, cut, ties_end);
    if (threadIdx.x == 0) out.set_threshold(i, cut_threshold(cut));
    // No barrier: what a thread still reads of this row are packs of its own, which no other thread overwrites.
  }
}

}  // namespace ace::cuda
