// What the CUDA ops met that is not finite. They cannot raise without waiting for the device, so they raise a flag
// there, and whoever drives them asks for it from time to time.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace ace {

// Waits for the current stream of the device, returns the name of an op that has met a NaN, an infinity or a score that
// overflowed since the last call ("" if none; of several ops one), and clears the flag. Work on other streams is not
// waited for. Must not be called while a CUDA graph is captured. Each weight that such an op was given is unchanged as
// far as the kernels' contracts say: the whole matrix, the row, or the group of an N:M pattern that holds the score.
std::string read_and_clear_not_finite(c10::Device device);

}  // namespace ace
