// The formulas of obs_block_, by hand; the kernels' tests use them as they are.
#include <gtest/gtest.h>

#include "core/obs_block.h"

namespace ace {
namespace {

TEST(ObsBlock, HandComputed) {
  EXPECT_EQ(obs_error(-6.0f, 4.0f), -1.5f);
  EXPECT_EQ(obs_correct(5.0f, 2.0f, 3.0f), -1.0f);
  EXPECT_EQ(obs_key(-6.0f, 4.0f), order_key(1.5f));
}

}  // namespace
}  // namespace ace
