// Finds the rest of the cut in a list of the columns with its first digit. Used by prune_rows.cuh.
#pragma once

#include "cuda/row_keys.cuh"

namespace ace::cuda {

// A listed column and the lower half of its key, one word each.
constexpr int64_t kMaxListedCols = 1 << 16;

// The list's capacity: an eighth of the row, about twice what a cut at the median of a normal distribution needs.
ACE_HD int listed_columns(int64_t cols) {
  return cols > kMaxListedCols ? 0 : cols < 4096 ? 512 : static_cast<int>(cols / 8);
}

// Bytes of dynamic shared memory for a row and its list.
ACE_HD size_t row_held_bytes(int64_t cols) {
  return row_half_bytes(cols) + static_cast<size_t>(listed_columns(cols)) * sizeof(uint32_t);
}

constexpr RadixDigit kListDigit{12, 9};  // the next digit, counted among the listed columns
constexpr int kMostRivals = kWarpSize;   // keys with both digits; each is compared with all others

// Shared memory of the selection among the listed columns.
struct ListScratch {
  uint32_t listed;  // columns so far
  uint32_t rivals;
  uint32_t key[kMostRivals];  // theirs
  Cut cut;
  int64_t equal;  // how many keys equal the cut's
};

// Lists the columns whose key has the first digit of `prefix`, in no particular order.
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
      // A half that is not 0 borrows nothing from its top bit, because the lowest bits of each half are 0.
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

// The key of a listed column: its upper half is in shared memory, the lower half in the entry.
template <class F, class T>
ACE_DEVICE uint32_t listed_key(const RowKeys<F, T, true>& keys, uint32_t entry) {
  return static_cast<uint32_t>(keys.held[entry & 0xffffu]) << kUpperShift | entry >> 16;
}

// Completes the cut, whose first digit is known, in shared.cut. False if too many keys also have the second digit.
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
    if (before + 1 == ties) {  // one thread, even if keys are equal
      shared.cut = {mine, ties};
      shared.equal = equal;
    }
  }
  __syncthreads();
  return true;
}

// The only write. The listed columns' halves have been set above or below all halves with the cut's first digit.
template <class F, class T, class Out>
ACE_DEVICE void write_settled(const RowKeys<F, T, true>& keys, const Out& out, int64_t i, Cut cut) {
  const uint32_t least = (cut.key >> row_digit(0).shift) * kFirstBit + kFirstBit;  // of a kept half
  const uint32_t low_bits = (least & 0x7fffu) * 0x10001u, low = (least & 0x8000u) == 0 ? ~0u : 0u;
  // Reads only the weight of the row.
  for_row_packs<MagnitudeScore>(keys.row, [&](const ScoredRow<T>& row, int64_t j, int count) {
    const Upper upper = keys.upper(j);
    uint32_t kept[kPack];
    ACE_UNROLL
    for (int w = 0; w < kPack / 2; ++w) {
      // The top bit of each half of `above`: whether the half's other bits are at least those of `least`.
      const uint32_t above = (upper.word[w] | 0x80008000u) - low_bits;
      kept[2 * w + 1] = bitwise<(kBitA & kBitB) | (kBitA & kBitC) | (kBitB & kBitC)>(upper.word[w], above, low);
      kept[2 * w] = kept[2 * w + 1] << 16;
    }
    out.write(row, i, j, count, kept, [&] { return load_weights(row, j, count); });
  });
}

// The whole selection by the list. Returns false, and changes nothing, if the list does not help.
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

}  // namespace ace::cuda
