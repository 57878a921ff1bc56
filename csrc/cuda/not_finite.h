// What the CUDA ops met that is not finite. They cannot raise without waiting for the device, so they raise a flag
// there, and whoever drives them asks for it from time to time. Until then:
//
//   - A row, a matrix or an N:M group with a score that is not finite stays as it was (a mask is True there), and the
//     threshold of such a row or matrix is NaN.
//   - The solvers leave such a row alone, or all rows where gram or factor is at fault (a mask without its pattern and
//   a
//     diagonal that is not positive count as well); the swaps of such a row are -1.
#pragma once

#include <c10/core/Device.h>

#include <string>
#include <string_view>

namespace ace::cuda {

// The code with which an op raises the flag: given out when the op first asks.
int op_code(std::string_view op);

// Waits for the current stream of the device, returns the name of an op that has met a NaN, an infinity or a score that
// overflowed since the last call ("" if none; of several ops one), and clears the flag. Work on other streams is not
// waited for. Must not be called while a CUDA graph is captured.
std::string read_and_clear_not_finite(c10::Device device);

}  // namespace ace::cuda
