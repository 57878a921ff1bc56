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
// factors are read once to choose. (Keeping 16-bit weights and recomputing keys takes the same room but reads the
// float32 column factors, twice the weight's bytes, again in every pass.) The first digit of 11 bits is counted as keys
// are made. Columns that agree with it, some per cent of the row, are listed: the other 21 bits are found among them
// alone, and their upper halves are overwritten by the outcome, so that the pass that writes compares each half with
// one number. Where the list is too short, as with a row of few different scores, or the row is too long to be held,
// all passes go over the whole row. Histograms are 32-bit shared counters: an increment by one compiles to
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

constexpr uint32_t kFirstBit = 1u << (row_digit(0).shift - kUpperShift);  // the first digit's lowest bit, in a half

// A listed column and the lower half of its key, a word each.
constexpr int64_t kMaxListedCols = 1 << 16;

// How long the list is: an eighth of the row, about twice what scores around the median of a bell curve need.
ACE_HD int listed_columns(int64_t cols) {
  return cols > kMaxListedCols ? 0 : cols < 4096 ? 512 : static_cast<int>(cols / 8);
}

// Bytes of dynamic shared memory that hold a row: whole packs, then the list.
ACE_HD size_t row_half_bytes(int64_t cols) {
  return static_cast<size_t>((cols + kPack - 1) / kPack * kPack) * sizeof(uint16_t);
}
ACE_HD size_t row_held_bytes(int64_t cols) {
  return row_half_bytes(cols) + static_cast<size_t>(listed_columns(cols)) * sizeof(uint32_t);
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

// The row as its upper half keys, from the chip, or recomputed where it is too long to be held.
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

// The same with the row and the number of columns: body(row, first column, count). Where all that a formula reads is
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

// The one read of the row: holds the upper halves, counts the first digit. False where a score is not finite.
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
  const int upper_known = pass == 1 ? row_digit(0).shift - kUpperShift : 0;  // unknown bits at the half's lower end
  const uint32_t upper_prefix = prefix >> kUpperShift >> upper_known;
  clear_bins(counts, 1 << digit.bits);
  for_packs(keys.row.cols, [&](int64_t j) {
    const Upper upper = keys.upper(j);
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      // The 0 that stands beyond the row's end agrees with no prefix: no finite score's upper half is below 0x0080.
      if (upper.at(e) >> upper_known != upper_prefix) continue;
      const uint32_t key = pass == 1 ? upper.at(e) << kUpperShift : keys.key(j + e);
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

// The one write.
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

// --- among the columns that have the first digit ---

constexpr RadixDigit kListDigit{12, 9};  // the next, counted among the listed
constexpr int kMostRivals = kWarpSize;   // keys that have both, of which each is compared with all

// What the selection among the listed columns shares.
struct ListScratch {
  uint32_t listed;  // columns so far
  uint32_t rivals;
  uint32_t key[kMostRivals];  // theirs
  Cut cut;
  int64_t equal;  // how many keys equal the cut's
};

// Lists the columns whose key has the first digit of `prefix`, in no order.
template <class F, class T>
ACE_DEVICE void list_columns(const RowKeys<F, T, true>& keys, uint32_t prefix, uint32_t* list, ListScratch& shared) {
  const uint32_t both = bytes_of<0x7676>(0u, prefix), digit = (0x10000u - kFirstBit) * 0x10001u;
  constexpr uint32_t kTops = 0x80008000u;
  for_packs(keys.row.cols, [&](int64_t j) {
    const Upper upper = keys.upper(j);
    uint32_t hits = 0;  // bit 15 - w: the lower half of word w, bit 31 - w: the upper half
    ACE_UNROLL
    for (int w = 0; w < kPack / 2; ++w) {
      const uint32_t other = bitwise<(kBitA ^ kBitB) & kBitC>(upper.word[w], both, digit);
      // Below a half that is not 0 nothing is borrowed from its top bit, as the lowest bits of each are 0.
      const uint32_t zero = bitwise<kBitA & ~kBitB & kBitC>(other - 0x00010001u, other, kTops);
      hits |= zero >> w;
    }
    while (hits != 0) {
      const auto first = static_cast<uint32_t>(__clz(static_cast<int>(hits)));
      hits ^= kSign >> first;
      list[atomicAdd(&shared.listed, 1u)] = static_cast<uint32_t>(j) + 1u + 2u * (first & 3u) - (first >> 4);
    }
  });
}

// Visits this thread's share of the list: body(entry).
template <class Body>
ACE_DEVICE void for_listed(uint32_t* list, int count, Body&& body) {
  for (int n = static_cast<int>(threadIdx.x); n < count; n += static_cast<int>(blockDim.x)) body(list[n]);
}

// The key of a listed column: its upper half is held, the lower one is in the entry.
template <class F, class T>
ACE_DEVICE uint32_t listed_key(const RowKeys<F, T, true>& keys, uint32_t entry) {
  return static_cast<uint32_t>(keys.held[entry & 0xffffu]) << kUpperShift | entry >> 16;
}

// The whole cut, of which the first digit is known, in shared.cut. False where too many keys have the second digit,
// too.
template <class F, class T>
ACE_DEVICE bool cut_of_list(const RowKeys<F, T, true>& keys, uint32_t* list, int count, Cut cut, uint32_t* counts,
                            BlockScratch& scratch, ListScratch& shared) {
  clear_bins(counts, 1 << kListDigit.bits);
  for_listed(list, count, [&](uint32_t& entry) {
    const uint32_t key = keys.key(entry);
    entry |= key << 16;
    atomicAdd(&counts[key >> kListDigit.shift & ((1u << kListDigit.bits) - 1u)], 1u);
  });
  __syncthreads();
  const RadixBin found = find_bin_block(counts, 1 << kListDigit.bits, cut.ties, scratch);
  if (found.count > kMostRivals) return false;
  cut.key |= found.bin << kListDigit.shift;
  for_listed(list, count, [&](uint32_t& entry) {
    const uint32_t key = listed_key(keys, entry);
    if ((key ^ cut.key) < 1u << kListDigit.shift) shared.key[atomicAdd(&shared.rivals, 1u)] = key;
  });
  __syncthreads();
  if (static_cast<int64_t>(threadIdx.x) < found.count) {
    const uint32_t mine = shared.key[threadIdx.x];
    int above = 0, equal = 0, before = 0;
    for (int n = 0; n < static_cast<int>(found.count); ++n) {
      const bool same = shared.key[n] == mine;
      above += shared.key[n] > mine;
      equal += same;
      before += same && n < static_cast<int>(threadIdx.x);
    }
    const int64_t ties = cut.ties - found.above - above;
    if (before + 1 == ties) {  // one thread, also where keys are equal
      shared.cut = {mine, ties};
      shared.equal = equal;
    }
  }
  __syncthreads();
  return true;
}

// The one write, once the listed columns' halves are above or below all others with the first digit of the cut.
template <class F, class T, class Out>
ACE_DEVICE void write_settled(const RowKeys<F, T, true>& keys, const Out& out, int64_t i, Cut cut) {
  const uint32_t least = (cut.key >> row_digit(0).shift) * kFirstBit + kFirstBit;  // of a half that stays
  const uint32_t low_bits = (least & 0x7fffu) * 0x10001u, low = (least & 0x8000u) == 0 ? ~0u : 0u;
  // Of the row only the weight is read.
  for_row_packs<MagnitudeScore>(keys.row, [&](const ScoredRow<T>& row, int64_t j, int count) {
    const Upper upper = keys.upper(j);
    uint32_t kept[kPack];
    ACE_UNROLL
    for (int w = 0; w < kPack / 2; ++w) {
      // The top bit of each half of `above`: whether the half's other bits are not less than those of `least`.
      const uint32_t above = (upper.word[w] | 0x80008000u) - low_bits;
      kept[2 * w + 1] = bitwise<(kBitA & kBitB) | (kBitA & kBitC) | (kBitB & kBitC)>(upper.word[w], above, low);
      kept[2 * w] = kept[2 * w + 1] << 16;
    }
    out.write(row, i, j, count, kept, [&] { return load_weights(row, j, count); });
  });
}

// All of it; false, with nothing changed, where the list is no help.
template <class F, class T, class Out>
ACE_DEVICE bool select_listed(const RowKeys<F, T, true>& keys, const Out& out, int64_t i, int count, Cut* cut,
                              uint32_t* counts, BlockScratch& scratch, ListScratch& shared, int64_t* shared_end) {
  uint32_t* list = reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(keys.held) + row_half_bytes(keys.row.cols));
  list_columns(keys, cut->key, list, shared);
  if (!cut_of_list(keys, list, count, *cut, counts, scratch, shared)) return false;
  *cut = shared.cut;
  const int64_t end = shared.equal == cut->ties ? keys.row.cols : end_of_ties(keys, *cut, scratch, shared_end);
  for_listed(list, count, [&](uint32_t& entry) {
    const uint32_t key = listed_key(keys, entry), column = entry & 0xffffu;
    const bool keep = key > cut->key || (key == cut->key && static_cast<int64_t>(column) < end);
    keys.held[column] = keep ? 0xffffu : 0u;
  });
  __syncthreads();
  write_settled(keys, out, i, *cut);
  return true;
}

// `listed`: how many columns the list holds.
template <class F, class T, bool kHeld, class Out>
__global__ void __launch_bounds__(kMaxRowThreads, kHeld ? kRowBlocks : 1)
    prune_rows_kernel(Scored<T> matrix, int64_t keep_k, int listed, Out out, NotFinite report) {
  ACE_DYNAMIC_SHARED(uint16_t, held);
  __shared__ RadixCounts all_counts;
  __shared__ BlockScratch scratch;
  __shared__ ListScratch shared;
  __shared__ int64_t shared_end;
  uint32_t* const counts = all_counts.bin;
  for (int64_t i = blockIdx.x; i < matrix.rows; i += gridDim.x) {
    const RowKeys<F, T, kHeld> keys{row_of<F>(matrix, i), held};
    if (threadIdx.x == 0) shared.listed = shared.rivals = 0;
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
    bool written = false;
    if (keep_k > 0) {
      const RadixBin first = find_bin_block(counts, kRadixBins, keep_k, scratch);
      cut = {first.bin << row_digit(0).shift, keep_k - first.above};
      if constexpr (kHeld) {
        written = first.count <= listed && select_listed(keys, out, i, static_cast<int>(first.count), &cut, counts,
                                                         scratch, shared, &shared_end);
      }
      if (!written) {
        int64_t equal = 0;
        for (int pass = 1; pass < kRowPasses; ++pass) {
          const RadixDigit digit = row_digit(pass);
          count_digit(keys, pass, cut.key, counts);
          const RadixBin found = find_bin_block(counts, 1 << digit.bits, cut.ties, scratch);
          cut.key |= found.bin << digit.shift;
          cut.ties -= found.above;
          equal = found.count;
        }
        ties_end = equal == cut.ties ? matrix.cols : end_of_ties(keys, cut, scratch, &shared_end);
      }
    }
    if (!written) write_row(keys, out, i, cut, ties_end);
    if (threadIdx.x == 0) out.set_threshold(i, cut_threshold(cut));
    // No barrier: what a thread still reads of this row are packs of its own, which no other thread overwrites.
  }
}

}  // namespace ace::cuda
