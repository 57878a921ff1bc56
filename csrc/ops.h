// The contract of every op: the page to read first. Schemas and Meta kernels: library.cpp. Checks: check.h.
//
// Common to all
//   weight      [rows, cols] float32, float16 or bfloat16; rows = output channels, cols = input channels. Contiguous
//               columns (stride(1) == 1 where cols > 1), any row stride >= cols, so a column slice of a matrix works.
//   metric      a name of kMetrics (core/score.h), or "score": the caller's own score, passed as `moment`.
//   column      [cols] float32, contiguous; needed by all metrics but magnitude and score, refused where not needed.
//   moment      [rows, cols] float32, contiguous; needed by cosp, cosp+varp, cosp-exact and score; else refused.
//   order       Higher score = keep; among equal scores the lower column first (group "matrix": the lower row, then
//               column). The number kept is exact on every device, whatever the ties; -0.0 equals +0.0.
//   pruned      becomes +0.0, whatever its sign was. A kept weight keeps its bits.
//   not finite  NaN or infinity in weight, column, moment or in a score (by overflow) raises ValueError that names op,
//               argument and first bad index, and leaves the weight unchanged. On CUDA the check is deferred: see
//               cuda/ops_cuda.cpp.
//   empty       rows == 0 or cols == 0 is legal and changes nothing.
//   devices     all tensors on one device. CPU results do not depend on the number of threads.
//   errors      ValueError "op: argument must be ... (got ...)", raised before anything is written.
//
// Statistics
//   update_moments_(x, token_weight?, weight_sum!, mean!, m2!)
//       x [T, d] float32/float16/bfloat16, contiguous columns; token_weight [T] float32, finite and >= 0, or None
//       for 1. State: weight_sum [] , mean [d], m2 [d], contiguous, all float32 or all float64. Accumulates: merges
//       these T tokens into the state (Chan's rule), so calls may be split anywhere up to rounding. T == 0 changes
//       nothing. On the CPU at most 64 tokens are summed in float32 before they are merged in float64; on CUDA partial
//       states of up to 2048 tokens are float32, merged by Chan's rule. A token of weight 0 is not read. NaN or
//       infinity in x makes the state so: the op that is handed a column factor made of it refuses that.
//   inverse_square_norm(a) -> r
//       a [T, d] as x above -> r [T] float32, r_t = 1 / sum_i a_ti^2 (sum in float32 or wider); a row of zeros gives 0.
//       Below ||a_t||^2 = 3e-39 r is infinite, which update_moments_ refuses as token_weight.
//   update_cosine_moment_(x, a, moment!)
//       x [T, d_in], a [T, d_out] as above (one dtype), moment [d_out, d_in] float32 contiguous.
//       moment += sum_t r_t^2 a_ti^2 x_tj^2, r as above, float32 sums. Products: on the CPU as precise as torch's
//       float32 matmul setting asks (full float32 by default); on CUDA of squares rounded to bfloat16, on tensor cores.
//       All terms are >= 0, so two squares rounded to 8 bits each move the moment by at most 2^-7 of itself.
//
// Scores and masks
//   score(weight, metric, column?, moment?) -> [rows, cols] float32, contiguous. For users and tests: the pruning ops
//       recompute scores on the fly and never store them.
//   prune_topk_(weight!, metric, column?, moment?, keep_k, group) -> threshold
//       group "row": keeps keep_k in [0, cols] of each row; threshold [rows] float32.
//       group "matrix": keeps keep_k in [0, rows * cols] of the matrix; threshold [1] float32.
//       threshold: the smallest kept score (+0.0 for both zeros); +inf where nothing is kept.
//   prune_nm_(weight!, metric, column?, moment?, keep_n, group_m)
//       keeps keep_n of each group_m consecutive columns; 0 <= keep_n <= group_m <= 32, group_m divides cols.
//   prune_by_score_(weight!, score, keep_k, group) -> threshold
//   prune_nm_by_score_(weight!, score, keep_n, group_m)
//       the same for a score [rows, cols] float32, float16 or bfloat16.
//
// A group over several matrices (the whole model), without storing a score: three rounds of score_histogram, summed
// over the matrices, give the key of the cut; then prune_at_ applies it to each.
//   score_histogram(weight, metric, column?, moment?, prefix, level) -> counts [2048, 2048, 1024][level] int64
//       how many keys (core/order_key.h) whose digits above this level's equal those of `prefix` have each digit.
//   prune_at_(weight!, metric, column?, moment?, key, ties)
//       keeps every key above `key` and the first `ties` (row-major) of those equal to it; the rest become +0.0.
//
// Solvers: both find masks and weights from second-order statistics. Column slices of a matrix work for every tensor
// but gram. Float operations are done in one order everywhere, so that CUDA gives the CPU's bits (seen where the C++
// tests run the kernels on the host; not run on a GPU).
//   refine_swaps_(mask!, weight, gram, keep_n, group_m, max_swaps) -> swaps
//       mask [rows, cols] bool, true where kept; gram [cols, cols] float32, contiguous, symmetric and positive
//       semidefinite (the caller's promise); swaps [rows] int64. Row by row a removed and a kept weight change places
//       while the loss e^T G e of the row's removed weights e falls (core/swap.h): the removed weight whose return
//       lowers it most goes back, then the kept one that costs least given that goes; the lower column first among
//       equals. keep_n = group_m = 0: any two of the row. Else mask keeps keep_n of each group_m columns (refused
//       otherwise) and the best pair within any group changes places. Ends where no swap lowers the loss by more than
//       float64 rounding may have added, or after max_swaps a row.
//   obs_block_(weight!, error!, mask!, factor, keep_n, group_m)
//       SparseGPT's recursion inside one block of columns (core/obs.h). weight, error [rows, width] float32, mask
//       [rows, width] bool, factor U [width, width] float32 with a positive diagonal; what is below it is not read.
//       For c = 0..width-1: where mask is false d = w_c / U_cc, w_k -= d U_ck for k > c, w_c = +0.0; else d = 0 and w_c
//       stays; error_c = d. keep_n = group_m = 0: mask is read. Else it is written: at the first column of each group
//       of group_m the keep_n largest |w_j| / U_jj are kept, the lower column first among equals. A recursion that
//       overflows is not refused: its results are not finite, which the next op refuses.
#pragma once
