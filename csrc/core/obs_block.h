// The steps of SparseGPT's recursion inside a block (Frantar and Alistarh, arXiv 2301.00774). U is the upper Cholesky
// factor of the inverse Hessian: removing weight c leaves the error d = w_c / U_cc, which the columns k > c compensate
// by w_k -= d U_ck. Float32, each operation rounded once and in this order, so that all back ends give the same bits.
#pragma once

#include "core/order_key.h"

namespace ace {

ACE_HD float obs_error(float weight, float diagonal) { return weight / diagonal; }

ACE_HD float obs_correct(float weight, float error, float factor) { return weight - error * factor; }

// Key of the loss w^2 / U_jj^2 of removing a weight. It orders by |w| / U_jj, which is equivalent and overflows later.
ACE_HD uint32_t obs_key(float weight, float diagonal) { return order_key(absolute(weight) / diagonal); }

}  // namespace ace
