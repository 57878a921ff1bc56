// Reports values that are not finite on CUDA. Ops cannot raise without waiting for the device, so they set a flag on
// the device, which the driver reads from time to time. Until then:
//
//   - A row, a matrix or an N:M group with a score that is not finite is left unchanged (its mask is True), and the
//     threshold of such a row or matrix is NaN.
//   - The solvers leave such a row unchanged, or all rows if gram or factor has such a value. A mask that violates its
//     pattern and a diagonal that is not positive count as well. The swaps of such a row are -1.
#pragma once

#include <c10/core/Device.h>

#include <string>
#include <string_view>

namespace ace::cuda {

// The code that an op writes to the flag, assigned at the op's first call.
int op_code(std::string_view op);

// Waits for the device's current stream, returns the name of one op that met NaN, infinity or an overflowed score since
// the last call ("" if none did), and clears the flag. Does not wait for other streams. Must not be called while a CUDA
// graph is captured.
std::string read_and_clear_not_finite(c10::Device device);

}  // namespace ace::cuda
