// score, the sums of the ria score, and the flag for values that are not finite.
#include "cuda/dispatch.cuh"
#include "cuda/score.cuh"
#include "cuda/score.h"
#include "cuda/score_sums.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 8;  // blocks a multiprocessor, in tiles

int64_t chunks_of(const ScoredArguments& m) { return (m.rows + kChunkRows - 1) / kChunkRows; }

// [partial sums][row sums][column sums], each from a multiple of 16 bytes.
struct SumsLayout {
  size_t row, column, bytes;
};

size_t round_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

SumsLayout sums_layout(const ScoredArguments& m) {
  const size_t row = round_up(static_cast<size_t>(chunks_of(m) * m.cols) * sizeof(double));
  const size_t column = row + round_up(static_cast<size_t>(m.rows) * sizeof(float));
  return {row, column, column + round_up(static_cast<size_t>(m.cols) * sizeof(float))};
}

#if defined(__CUDACC__)
__device__ int not_finite_code;  // zero when the module is loaded; one for each device
#else
int not_finite_code;
#endif

}  // namespace

cudaError_t not_finite_flag(int** flag) {
#if defined(__CUDACC__)
  void* address = nullptr;
  ACE_RETURN_IF_ERROR(cudaGetSymbolAddress(&address, not_finite_code));
  *flag = static_cast<int*>(address);
#else
  *flag = &not_finite_code;
#endif
  return cudaSuccess;
}

size_t score_sums_bytes(const ScoredArguments& m) { return m.formula == Formula::ria ? sums_layout(m).bytes : 0; }

cudaError_t launch_score_sums(const ScoredArguments& m, void* workspace, ScoreSums* sums, cudaStream_t stream) {
  const SumsLayout layout = sums_layout(m);
  char* base = static_cast<char*>(workspace);
  double* partial = static_cast<double*>(workspace);
  *sums = {reinterpret_cast<float*>(base + layout.row), reinterpret_cast<float*>(base + layout.column)};
  const int64_t chunks = chunks_of(m), units = chunks * ((m.cols + kStripColumns - 1) / kStripColumns);
  return with_dtype(m.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const T* data = static_cast<const T*>(m.weight);
    const Matrix<T> matrix{data, m.rows, m.cols, m.stride, rows_aligned(data, m.stride)};
    int64_t blocks = 0;
    ACE_RETURN_IF_ERROR(blocks_for((m.rows + kSumWarps - 1) / kSumWarps, kWaves, &blocks));
    ACE_RETURN_IF_ERROR(launch(row_sums_kernel<T>, {blocks, kSumThreads, 0, stream}, matrix, sums->row));
    ACE_RETURN_IF_ERROR(blocks_for(units, kWaves, &blocks));
    ACE_RETURN_IF_ERROR(launch(column_partials_kernel<T>, {blocks, kSumThreads, 0, stream}, matrix, units, partial));
    ACE_RETURN_IF_ERROR(blocks_for((m.cols + kSumThreads - 1) / kSumThreads, kWaves, &blocks));
    return launch(column_sums_kernel, {blocks, kSumThreads, 0, stream}, static_cast<const double*>(partial), chunks,
                  m.cols, sums->column);
  });
}

cudaError_t launch_score(const ScoredArguments& m, float* out, void* sums, int code, cudaStream_t stream) {
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  return with_scored(m, sums, stream, [&](auto formula, auto matrix) {
    using F = decltype(formula);
    const int64_t tiles = tall_tiles(m.rows, m.cols);
    int64_t blocks = 0;
    ACE_RETURN_IF_ERROR(blocks_for(tiles, kWaves, &blocks));
    return launch(score_kernel<F, std::remove_pointer_t<decltype(matrix.weight)>>, {blocks, kTileThreads, 0, stream},
                  matrix, tiles, out, rows_aligned(out, m.cols), report);
  });
}

}  // namespace ace::cuda
