// prune_topk_ and topk_mask, group "row": one block for each row, which is read from memory once and written once.
//
// Contract
//   weight     [rows, cols], pruned in place: exactly keep_k of each row keep their bits, the others become +0.0. Or it
//              is only read, and mask [rows, cols] is written instead.
//   threshold  [rows]: the smallest kept score, +inf if keep_k == 0, NaN if the row was left unchanged.
//   ties       among equal scores the lower column first.
//   not finite a row with a score that is not finite is left unchanged (mask: all True); the flag is raised.
//
// Method: the upper 16 bits of every key stay on chip, 2 bytes for each column of any dtype, so the selection reads the
// weight and the column factors once. (Keeping 16-bit weights and recomputing keys takes the same space but reads the
// float32 column factors, twice the weight's bytes, again in every pass.) The first digit of 11 bits is counted while
// keys are computed. The columns with that digit, a few per cent of the row, are listed: the other 21 bits are found
// among them alone, and the outcome overwrites their upper halves, so that the writing pass compares each half with one
// number. If the list is too short, as for a row of few distinct scores, or the row does not fit on chip, all passes go
// over the whole row. Histograms are 32-bit shared counters: an increment by one compiles to ATOMS.POPC.INC, in which
// the hardware adds up the lanes of a warp that hit the same counter.
#pragma once

#include "cuda/row_list.cuh"

namespace ace::cuda {

constexpr int kMaxRowThreads = 512;
constexpr int kRowBlocks = 2;  // for each multiprocessor: one reads its row while the other selects
constexpr int kRowPasses = 4;

// `listed`: the capacity of the list, in columns.
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
    // No barrier: a thread still reads only its own packs of this row, which no other thread overwrites.
  }
}

}  // namespace ace::cuda
