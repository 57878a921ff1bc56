// prune_topk_ and topk_mask, group "matrix", score_histogram and prune_at_: selections whose group is larger than a
// row.
//
// Contract
//   weight     [rows, cols], pruned in place: kept weights keep their bits, the rest becomes +0.0. Or it is only read,
//              and mask [rows, cols] is written instead.
//   ties       among equal scores the lower row, then the lower column first, independent of the order of blocks.
//   not finite the whole matrix is left unchanged (mask: all True), and the flag is raised.
//
// Method: a histogram pass finds each of the first two digits (11 bits each). The third pass decides and writes the
// tiles in which no key has those 22 bits, and counts the last digit in the others, the open tiles. Only open tiles are
// read again, for the cut's last digit and its ties: a few per cent of the tiles if scores are distinct, all of them if
// few distinct scores repeat. No step waits for the host.
#pragma once

#include "core/radix_select.h"
#include "cuda/block.cuh"
#include "cuda/outcome.cuh"

namespace ace::cuda {

constexpr int64_t kTileSettled = -1;
constexpr int kMaxScanThreads = 1024;

// The state on the device between the kernels of one selection.
struct MatrixState {
  Cut cut;        // digits found so far, and how many of the keys with these digits are still to be kept
  int64_t equal;  // how many keys have these digits; -1: not known
  int bad;        // a score is not finite: nothing may be written
};

__global__ void __launch_bounds__(kWarpSize) begin_kernel(MatrixState* state, Cut cut) {
  if (threadIdx.x == 0) *state = {cut, -1, 0};
}

// Adds a block's counts to the device's. They are integers, so the order of blocks does not matter.
ACE_DEVICE void flush_counts(const RadixCounts& local, int64_t* counts, int bins) {
  __syncthreads();
  for (int b = 4 * static_cast<int>(threadIdx.x); b < bins; b += 4 * static_cast<int>(blockDim.x)) {
    uint32_t four[4];
    load_line(local.bin + b, four);
    if ((four[0] | four[1] | four[2] | four[3]) == 0) continue;
    ACE_UNROLL
    for (int n = 0; n < 4; ++n) {
      if (four[n] == 0) continue;
      atomicAdd(reinterpret_cast<unsigned long long*>(counts + b + n), static_cast<unsigned long long>(four[n]));
    }
  }
}

// This thread's pack of a tile.
template <class F, class T>
struct TilePack {
  ScoredRow<T> row;
  int64_t i, first;  // row and first column
  int count;         // at most 0 beyond the row's end
  Words<T> weight;
  Pack<float> score;
  Pack<uint32_t> key;  // 0 beyond the row's end
  bool finite;
};

template <class F, class T>
ACE_DEVICE TilePack<F, T> load_tile(const Scored<T>& matrix, const TileWalk& walk) {
  TilePack<F, T> pack;
  pack.row = row_of<F>(matrix, walk.row());
  pack.i = walk.row();
  pack.first = walk.column();
  pack.count = pack_count(matrix.cols, pack.first);
  const auto load = [&](const ScoredRow<T>& row, int count) {
    pack.weight = load_weights(row, pack.first, count);
    pack.finite =
        pack_scores(row, column_terms<F>(row, pack.first, count), pack.first, count, pack.weight, &pack.score);
    pack.key = keys_of(pack.score, count);
  };
  if (is_whole<F>(pack.row, pack.count)) {
    load(as_whole(pack.row), kPack);
  } else {
    load(pack.row, pack.count);
  }
  return pack;
}

template <class F, class T, class Out>
ACE_DEVICE void write_tile(const TilePack<F, T>& pack, const Out& out, const uint32_t* kept) {
  if (pack.count > 0) out.write(pack.row, pack.i, pack.first, pack.count, kept, [&] { return pack.weight; });
}

ACE_DEVICE void report_bad(MatrixState* state, const NotFinite& report) {
  atomicMax(&state->bad, 1);
  raise_flag(report);
}

// counts[d] += keys that agree with the cut above this pass's digit and have the digit d.
template <class F, class T>
__global__ void __launch_bounds__(kTileThreads)
    histogram_kernel(Scored<T> matrix, int64_t tiles, MatrixState* state, int pass, int64_t* counts, NotFinite report) {
  __shared__ RadixCounts local;  // 32 bits: a block sees fewer than 2^32 weights
  clear_bins(local.bin, kRadixBins);
  const uint32_t prefix = state->cut.key, mask = static_cast<uint32_t>(radix_bins(pass)) - 1u;
  const RadixDigit digit = radix_digit(pass);
  bool finite = true;
  const auto count_all = [&](auto&& counted) {
    for_scored_packs<F>(matrix, tiles,
                        [&](const ScoredRow<T>& row, const ColumnTerms<F>& columns, int64_t, int64_t j, int count,
                            const Words<T>& weight) {
                          Pack<uint32_t> key;
                          finite &= pack_keys(row, columns, j, count, weight, &key);
                          ACE_UNROLL
                          for (int e = 0; e < kPack; ++e) {
                            if (e < count) counted(key.value[e]);
                          }
                        });
  };
  if (pass == 0) {
    count_all([&](uint32_t key) { atomicAdd(&local.bin[radix_bin(key, 0)], 1u); });
  } else {
    const uint32_t others = 1u << (digit.shift + digit.bits);  // below it: the key has the prefix
    count_all([&](uint32_t key) {
      if ((key ^ prefix) < others) atomicAdd(&local.bin[key >> digit.shift & mask], 1u);
    });
  }
  if (!finite) report_bad(state, report);
  flush_counts(local, counts, radix_bins(pass));
}

// One block: finds the digit from the counts, and clears them for the next pass.
__global__ void __launch_bounds__(kMaxScanThreads) find_digit_kernel(MatrixState* state, int64_t* counts, int pass) {
  __shared__ BlockScratch scratch;
  const Cut before = state->cut;
  const RadixBin found = find_bin_block(counts, radix_bins(pass), before.ties, scratch);
  for (int b = static_cast<int>(threadIdx.x); b < kRadixBins; b += static_cast<int>(blockDim.x)) counts[b] = 0;
  if (threadIdx.x != 0) return;
  state->cut = {before.key | (found.bin << radix_digit(pass).shift), before.ties - found.above};
  state->equal = found.count;
}

// The smallest kept score; NaN if the matrix was left unchanged.
__global__ void __launch_bounds__(kWarpSize) threshold_kernel(const MatrixState* state, float* threshold) {
  if (threadIdx.x == 0) *threshold = state->bad != 0 ? bits_float(0x7fc00000u) : cut_threshold(state->cut);
}

// The last pass: writes the tiles that the digits found so far decide, and counts the last digit in the others.
template <class F, class T, class Out>
__global__ void __launch_bounds__(kTileThreads) settle_kernel(Scored<T> matrix, int64_t tiles, const MatrixState* state,
                                                              int64_t* tile_ties, int64_t* counts, Out out) {
  constexpr int kLast = kRadixPasses - 1;
  __shared__ RadixCounts local;
  if (state->bad != 0) return;
  clear_bins(local.bin, kRadixBins);
  const uint32_t prefix = state->cut.key;
  const float least = key_score(prefix);
  for (TileWalk walk(tiles, matrix.cols); walk.more(); walk.next()) {
    const TilePack<F, T> pack = load_tile<F>(matrix, walk);
    uint32_t kept[kPack], nearest = ~0u;
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      const uint32_t apart = pack.key.value[e] ^ prefix;
      kept[e] = less(least, pack.score.value[e]);  // if no key is undecided, the upper 22 bits decide
      nearest = apart < nearest ? apart : nearest;
    }
    const bool open = nearest < static_cast<uint32_t>(radix_bins(kLast));
    if (open) {
      ACE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        const uint32_t key = pack.key.value[e];
        if (e < pack.count && radix_matches(key, prefix, kLast)) atomicAdd(&local.bin[radix_bin(key, kLast)], 1u);
      }
    }
    const bool settled = __syncthreads_or(static_cast<int>(open)) == 0;
    if (settled) write_tile(pack, out, kept);
    if (threadIdx.x == 0) tile_ties[walk.index()] = settled ? kTileSettled : 0;
  }
  flush_counts(local, counts, radix_bins(kLast));
}

// tile_ties[tile] = the number of its keys that equal the cut's. `all`: every tile is open, and none was checked
// before.
template <class F, class T>
__global__ void __launch_bounds__(kTileThreads) count_ties_kernel(Scored<T> matrix, int64_t tiles, MatrixState* state,
                                                                  int64_t* tile_ties, bool all, NotFinite report) {
  __shared__ BlockScratch scratch;
  if (!all && (state->bad != 0 || state->equal == state->cut.ties)) return;
  const uint32_t cut = state->cut.key;
  bool finite = true;
  for (TileWalk walk(tiles, matrix.cols); walk.more(); walk.next()) {
    const int64_t tile = walk.index();
    if (!all && tile_ties[tile] == kTileSettled) continue;
    const TilePack<F, T> pack = load_tile<F>(matrix, walk);
    finite &= pack.finite;
    int64_t mine = 0, total = 0;
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) mine += e < pack.count && pack.key.value[e] == cut;
    exclusive_scan(mine, scratch, &total);
    __syncthreads();
    if (threadIdx.x == 0) tile_ties[tile] = total;
  }
  if (!finite) report_bad(state, report);
}

// One block: tile_ties becomes the number of ties in the open tiles before this one.
__global__ void __launch_bounds__(kMaxScanThreads)
    scan_ties_kernel(const MatrixState* state, int64_t tiles, int64_t* tile_ties) {
  __shared__ BlockScratch scratch;
  if (state->bad != 0 || state->equal == state->cut.ties) return;
  const int64_t each = (tiles + blockDim.x - 1) / blockDim.x;
  const int64_t begin = threadIdx.x * each, end = begin + each < tiles ? begin + each : tiles;
  int64_t mine = 0, total = 0;
  for (int64_t t = begin; t < end; ++t) mine += tile_ties[t] == kTileSettled ? 0 : tile_ties[t];
  int64_t before = exclusive_scan(mine, scratch, &total);
  for (int64_t t = begin; t < end; ++t) {
    if (tile_ties[t] == kTileSettled) continue;
    const int64_t here = tile_ties[t];
    tile_ties[t] = before;
    before += here;
  }
}

// Applies the cut to the open tiles.
template <class F, class T, class Out>
__global__ void __launch_bounds__(kTileThreads) apply_kernel(Scored<T> matrix, int64_t tiles, const MatrixState* state,
                                                             const int64_t* tile_ties, bool all, Out out) {
  __shared__ BlockScratch scratch;
  if (state->bad != 0) {
    for_tile_packs(tiles, matrix.cols, [&](int64_t i, int64_t j, int count) { out.leave(i, j, count); });
    return;
  }
  const Cut cut = state->cut;
  const bool ranked = state->equal != cut.ties;  // else all keys that equal the cut's are kept
  for (TileWalk walk(tiles, matrix.cols); walk.more(); walk.next()) {
    const int64_t tile = walk.index();
    if (!all && tile_ties[tile] == kTileSettled) continue;
    const TilePack<F, T> pack = load_tile<F>(matrix, walk);
    uint32_t kept[kPack], equal = 0;
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) {
      const uint32_t key = pack.key.value[e];
      kept[e] = key > cut.key || (key == cut.key && !ranked) ? kSign : 0u;
      equal |= static_cast<uint32_t>(e < pack.count && key == cut.key) << e;
    }
    if (ranked) {
      int64_t total = 0;
      int64_t rank = tile_ties[tile] + exclusive_scan(int64_t{__popc(equal)}, scratch, &total);
      ACE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        const uint32_t tie = equal >> e & 1u;
        if (tie != 0 && rank < cut.ties) kept[e] = kSign;
        rank += tie;
      }
      __syncthreads();  // the next tile's scan overwrites data that this one reads
    }
    write_tile(pack, out, kept);
  }
}

}  // namespace ace::cuda
