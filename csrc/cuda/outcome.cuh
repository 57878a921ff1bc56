// What a selection does with its decisions: prune the weight in place, or write a mask and only read the weight. The
// selection kernels are written once for both. The sign bit of kept[e] means that column j + e of row i is kept.
//   write(row, i, j, count, kept, load)  decides `count` columns; load() gives their weights.
//   write_one(row, i, j, kept)           decides one column.
//   leave(i, j, count)                   leaves these columns unchanged, because a score is not finite: kept.
//   set_threshold(group, value)          the group's smallest kept score.
#pragma once

#include "cuda/scored.cuh"

namespace ace::cuda {

struct PruneOutcome {
  float* threshold;  // [groups]; null for N:M groups and for a given cut

  template <class T, class Load>
  ACE_DEVICE void write(const ScoredRow<T>& row, int64_t, int64_t j, int count, const uint32_t* kept,
                        Load&& load) const {
    Words<T> weight = load();
    zero_rest(weight, kept);
    store_words(row.weight + j, weight, count, row.weight_aligned && count >= kPack);
  }

  template <class T>
  ACE_DEVICE void write_one(const ScoredRow<T>& row, int64_t, int64_t j, bool kept) const {
    if (!kept) row.weight[j] = T{};
  }

  ACE_DEVICE void leave(int64_t, int64_t, int) const {}

  ACE_DEVICE void set_threshold(int64_t group, float value) const { threshold[group] = value; }
};

struct MaskOutcome {
  bool* mask;  // [rows, cols]
  int64_t cols;
  bool aligned;  // every row is 8-byte aligned

  template <class T, class Load>
  ACE_DEVICE void write(const ScoredRow<T>&, int64_t i, int64_t j, int count, const uint32_t* kept, Load&&) const {
    put(i, j, count, kept);
  }

  template <class T>
  ACE_DEVICE void write_one(const ScoredRow<T>&, int64_t i, int64_t j, bool kept) const {
    mask[i * cols + j] = kept;
  }

  ACE_DEVICE void leave(int64_t i, int64_t j, int count) const {
    constexpr uint32_t kAll[kPack] = {kSign, kSign, kSign, kSign, kSign, kSign, kSign, kSign};
    put(i, j, count, kAll);
  }

  ACE_DEVICE void set_threshold(int64_t, float) const {}

 private:
  ACE_DEVICE void put(int64_t i, int64_t j, int count, const uint32_t* kept) const {
    bool* out = mask + i * cols + j;
    if (aligned && count >= kPack) {  // one store of eight bytes
      const uint64_t bytes = static_cast<uint64_t>(four(kept + 4)) << 32 | four(kept);
      std::memcpy(__builtin_assume_aligned(out, sizeof bytes), &bytes, sizeof bytes);
    } else {
      ACE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        if (e < count) out[e] = (kept[e] & kSign) != 0;
      }
    }
  }

  static ACE_DEVICE uint32_t four(const uint32_t* kept) {
    const uint32_t signs = bytes_of<0x5410>(bytes_of<0x0073>(kept[0], kept[1]), bytes_of<0x0073>(kept[2], kept[3]));
    return signs >> 7 & 0x01010101u;
  }
};

inline MaskOutcome mask_outcome(bool* mask, int64_t cols) {
  return {mask, cols, reinterpret_cast<uintptr_t>(mask) % 8 == 0 && cols % 8 == 0};
}

}  // namespace ace::cuda
