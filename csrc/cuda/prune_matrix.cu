// prune_topk_ and topk_mask, group "matrix", score_histogram and prune_at_.
#include "cuda/across.h"
#include "cuda/dispatch.cuh"
#include "cuda/mask.h"
#include "cuda/prune.h"
#include "cuda/prune_matrix.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 8;

struct Workspace {
  MatrixState* state;
  int64_t* counts;     // [kRadixBins]
  int64_t* tile_ties;  // [tiles]
};

constexpr size_t kStateBytes = 64;
static_assert(sizeof(MatrixState) <= kStateBytes);

Workspace workspace_at(void* base) {
  int64_t* counts = reinterpret_cast<int64_t*>(static_cast<char*>(base) + kStateBytes);
  return {static_cast<MatrixState*>(base), counts, counts + kRadixBins};
}

// The kernels of one selection over one matrix, in call order.
template <class F, class T>
class Selection {
 public:
  Selection(const Scored<T>& matrix, void* workspace, const NotFinite& report, cudaStream_t stream)
      : matrix_(matrix), tiles_(tile_count(matrix)), work_(workspace_at(workspace)), report_(report), stream_(stream) {}

  cudaError_t begin(Cut cut) {
    ACE_RETURN_IF_ERROR(blocks_for(tiles_, kWaves, &blocks_));
    ACE_RETURN_IF_ERROR(cudaMemsetAsync(work_.counts, 0, kRadixBins * sizeof(int64_t), stream_));
    return launch(begin_kernel, one(kWarpSize), work_.state, cut);
  }

  cudaError_t count(int pass, int64_t* counts) {
    return launch(histogram_kernel<F, T>, many(), matrix_, tall_tiles(matrix_.rows, matrix_.cols), work_.state, pass,
                  counts, report_);
  }

  cudaError_t count(int pass) { return count(pass, work_.counts); }

  cudaError_t find(int pass) {
    return launch(find_digit_kernel, one(kMaxScanThreads), work_.state, work_.counts, pass);
  }

  template <class Out>
  cudaError_t settle(Out out) {
    return launch(settle_kernel<F, T, Out>, many(), matrix_, tiles_, constant_state(), work_.tile_ties, work_.counts,
                  out);
  }

  // Applies the cut to the open tiles, or to all.
  template <class Out>
  cudaError_t apply(Out out, bool all) {
    ACE_RETURN_IF_ERROR(
        launch(count_ties_kernel<F, T>, many(), matrix_, tiles_, work_.state, work_.tile_ties, all, report_));
    ACE_RETURN_IF_ERROR(launch(scan_ties_kernel, one(kMaxScanThreads), constant_state(), tiles_, work_.tile_ties));
    return launch(apply_kernel<F, T, Out>, many(), matrix_, tiles_, constant_state(),
                  static_cast<const int64_t*>(work_.tile_ties), all, out);
  }

  cudaError_t write_threshold(float* threshold) {
    return launch(threshold_kernel, one(kWarpSize), constant_state(), threshold);
  }

 private:
  Launch one(int threads) const { return {1, threads, 0, stream_}; }
  Launch many() const { return {blocks_, kTileThreads, 0, stream_}; }
  const MatrixState* constant_state() const { return work_.state; }

  Scored<T> matrix_;
  int64_t tiles_, blocks_ = 0;
  Workspace work_;
  NotFinite report_;
  cudaStream_t stream_;
};

template <class F, class T, class Out>
cudaError_t select_matrix(Selection<F, T>& selection, int64_t keep_k, Out out) {
  if (keep_k == 0) {
    ACE_RETURN_IF_ERROR(selection.begin(kKeepNone));
    return selection.apply(out, true);
  }
  ACE_RETURN_IF_ERROR(selection.begin({0u, keep_k}));
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    ACE_RETURN_IF_ERROR(pass < kRadixPasses - 1 ? selection.count(pass) : selection.settle(out));
    ACE_RETURN_IF_ERROR(selection.find(pass));
  }
  return selection.apply(out, false);
}

// Calls action(Selection) for the formula and dtype.
template <class Action>
cudaError_t with_selection(const ScoredArguments& m, void* workspace, void* sums, int code, cudaStream_t stream,
                           Action&& action) {
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  return with_scored(m, sums, stream, [&](auto formula, auto matrix) {
    using T = std::remove_pointer_t<decltype(matrix.weight)>;
    return action(Selection<decltype(formula), T>(matrix, workspace, report, stream));
  });
}

}  // namespace

size_t prune_matrix_bytes(const ScoredArguments& m) {
  return kStateBytes + sizeof(int64_t) * static_cast<size_t>(kRadixBins + m.rows * tiles_per_row(m.cols));
}

cudaError_t launch_prune_matrix(const ScoredArguments& m, int64_t keep_k, float* threshold, void* workspace, void* sums,
                                int code, cudaStream_t stream) {
  return with_selection(m, workspace, sums, code, stream, [&](auto selection) {
    ACE_RETURN_IF_ERROR(select_matrix(selection, keep_k, PruneOutcome{nullptr}));
    return selection.write_threshold(threshold);
  });
}

cudaError_t launch_mask_matrix(const ScoredArguments& m, int64_t keep_k, bool* mask, void* workspace, void* sums,
                               int code, cudaStream_t stream) {
  return with_selection(m, workspace, sums, code, stream,
                        [&](auto selection) { return select_matrix(selection, keep_k, mask_outcome(mask, m.cols)); });
}

cudaError_t launch_prune_at(const ScoredArguments& m, Cut cut, void* workspace, void* sums, int code,
                            cudaStream_t stream) {
  return with_selection(m, workspace, sums, code, stream, [&](auto selection) {
    ACE_RETURN_IF_ERROR(selection.begin(cut));
    return selection.apply(PruneOutcome{nullptr}, true);
  });
}

cudaError_t launch_score_histogram(const ScoredArguments& m, uint32_t prefix, int level, int64_t* counts,
                                   void* workspace, void* sums, int code, cudaStream_t stream) {
  return with_selection(m, workspace, sums, code, stream, [&](auto selection) {
    ACE_RETURN_IF_ERROR(selection.begin({prefix, 0}));
    return selection.count(level, counts);
  });
}

}  // namespace ace::cuda
