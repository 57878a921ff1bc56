// The PTX interpreter: each kind of instruction against its definition, and a GPU's rules, whose violations must be
// detected.
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

#include "simt/ptx/kernel.h"

namespace simt::ptx {
namespace {

// A kernel k(u64 out, u32 a, u32 b) with the body.
Kernel kernel_of(const std::string& body) {
  const std::string text =
      ".version 9.0\n.extern .shared .align 16 .b8 dynamic[];\n"
      ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u32 k_param_1,\n\t.param .u32 k_param_2\n)\n"
      ".maxntid 64, 1, 1\n{\n\t.reg .pred %p<9>;\n\t.reg .b16 %rs<9>;\n\t.reg .b32 %r<19>;\n\t.reg .f32 %f<9>;\n"
      "\t.reg .b64 %rd<9>;\n\t.reg .f64 %fd<9>;\n\tld.param.u64 %rd1, [k_param_0];\n"
      "\tld.param.u32 %r1, [k_param_1];\n\tld.param.u32 %r2, [k_param_2];\n" +
      body + "\tret;\n}\n";
  return parse(text, "k", "test");
}

void run_kernel(const Kernel& kernel, void* out, uint32_t a, uint32_t b, unsigned threads = 1, size_t dynamic = 0) {
  const void* parameters[] = {&out, &a, &b};
  run({1}, {threads}, kernel.dynamic_at + dynamic, [&] { kernel.run(parameters); });
}

// %r3 after the body.
uint32_t result_of(const std::string& body, uint32_t a, uint32_t b) {
  uint32_t out = 0;
  run_kernel(kernel_of(body + "\tst.global.u32 [%rd1], %r3;\n"), &out, a, b);
  return out;
}

uint32_t of(float value) { return static_cast<uint32_t>(to_bits(value)); }

TEST(Ptx, Integers) {
  EXPECT_EQ(result_of("add.s32 %r3, %r1, %r2;\n", 0x7fffffffu, 1), 0x80000000u);
  EXPECT_EQ(result_of("sub.u32 %r3, %r1, 2;\n", 1, 0), 0xffffffffu);
  EXPECT_EQ(result_of("mul.lo.s32 %r3, %r1, -3;\n", 5, 0), static_cast<uint32_t>(-15));
  EXPECT_EQ(result_of("mul.wide.s32 %rd2, %r1, %r2;\nshr.s64 %rd3, %rd2, 32;\ncvt.u32.u64 %r3, %rd3;\n", ~0u, 1), ~0u);
  EXPECT_EQ(result_of("mul.hi.u32 %r3, %r1, %r2;\n", 0x80000000u, 6), 3u);
  EXPECT_EQ(result_of("mad.lo.s32 %r3, %r1, %r2, 7;\n", 5, 6), 37u);
  EXPECT_EQ(result_of("div.s32 %r3, %r1, %r2;\n", static_cast<uint32_t>(-7), 2), static_cast<uint32_t>(-3));
  EXPECT_EQ(result_of("rem.s32 %r3, %r1, %r2;\n", static_cast<uint32_t>(-7), 2), static_cast<uint32_t>(-1));
  EXPECT_EQ(result_of("min.s32 %r3, %r1, %r2;\n", static_cast<uint32_t>(-7), 2), static_cast<uint32_t>(-7));
  EXPECT_EQ(result_of("max.u32 %r3, %r1, %r2;\n", static_cast<uint32_t>(-7), 2), static_cast<uint32_t>(-7));
}

TEST(Ptx, Bits) {
  EXPECT_EQ(result_of("shl.b32 %r3, %r1, %r2;\n", 1, 32), 0u);
  EXPECT_EQ(result_of("shr.s32 %r3, %r1, %r2;\n", 0x80000000u, 40), ~0u);
  EXPECT_EQ(result_of("shr.u32 %r3, %r1, %r2;\n", 0x80000000u, 31), 1u);
  EXPECT_EQ(result_of("bfi.b32 %r3, %r1, %r2, 8, 4;\n", 0xff, 0x10000), 0x10f00u);
  EXPECT_EQ(result_of("prmt.b32 %r3, %r1, %r2, 29712;\n", 0x33221100u, 0x77665544u), 0x77441100u);  // 0x7410
  EXPECT_EQ(result_of("prmt.b32 %r3, %r1, %r2, 65467;\n", 0x80000000u, 0x7fffffffu), 0x0000ffffu);  // 0xffbb
  EXPECT_EQ(result_of("lop3.b32 %r3, %r1, %r2, 255, 128;\n", 0x1f0, 0x10f0), 0xf0u);                // all three
  EXPECT_EQ(result_of("lop3.b32 %r3, %r1, %r2, 3, 150;\n", 5, 8), 14u);                             // an odd number
  EXPECT_EQ(result_of("popc.b32 %r3, %r1;\n", 0xf0f0, 0), 8u);
  EXPECT_EQ(result_of("not.b32 %r3, %r1;\n", 0xf0f0, 0), 0xffff0f0fu);
  EXPECT_EQ(result_of("mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r3, {%rs2, %rs1};\n", 0x12345678u, 0), 0x56781234u);
}

TEST(Ptx, NarrowValuesAreExtendedByTheirSign) {
  EXPECT_EQ(result_of("cvt.u16.u32 %rs1, %r1;\ncvt.s32.s16 %r3, %rs1;\n", 0x18000u, 0), 0xffff8000u);
  EXPECT_EQ(result_of("cvt.u16.u32 %rs1, %r1;\ncvt.u32.u16 %r3, %rs1;\n", 0x18000u, 0), 0x8000u);
  EXPECT_EQ(result_of("ld.param.s8 %rs1, [k_param_1];\nsetp.lt.s16 %p1, %rs1, 0;\nselp.u32 %r3, 1, 0, %p1;\n", 0x80, 0),
            1u);
  EXPECT_EQ(result_of("ld.param.u8 %rs1, [k_param_1+1];\ncvt.u32.u16 %r3, %rs1;\n", 0x1280, 0), 0x12u);
}

TEST(Ptx, FloatsRoundOnceAndNaNHasOneForm) {
  const std::string in = "mov.b32 %f1, %r1;\nmov.b32 %f2, %r2;\n", out = "mov.b32 %r3, %f3;\n";
  const uint32_t nan = 0x7fffffffu;
  EXPECT_EQ(result_of(in + "mul.rn.f32 %f3, %f1, %f2;\n" + out, of(3.0f), of(0.1f)), of(3.0f * 0.1f));
  EXPECT_EQ(result_of(in + "fma.rn.f32 %f3, %f1, %f1, %f2;\n" + out, of(1.1f), of(-1.21f)),
            of(std::fma(1.1f, 1.1f, -1.21f)));
  EXPECT_EQ(result_of(in + "add.rn.f32 %f3, %f1, %f2;\n" + out, 0xffc01234u, of(1.0f)), nan);
  EXPECT_EQ(result_of(in + "sqrt.rn.f32 %f3, %f1;\n" + out, of(-1.0f), 0), nan);
  EXPECT_EQ(result_of(in + "div.rn.f32 %f3, %f1, %f2;\n" + out, 0, 0), nan);
  EXPECT_EQ(result_of(in + "max.f32 %f3, %f1, %f2;\n" + out, 0xffc01234u, of(1.0f)), of(1.0f));
  EXPECT_EQ(result_of(in + "setp.neu.f32 %p1, %f1, %f2;\nselp.b32 %r3, 1, 0, %p1;\n", nan, nan), 1u);
  EXPECT_EQ(result_of(in + "setp.ne.f32 %p1, %f1, %f2;\nselp.b32 %r3, 1, 0, %p1;\n", nan, nan), 0u);
  EXPECT_EQ(result_of(in + "setp.geu.f32 %p1, %f1, %f2;\nselp.b32 %r3, 1, 0, %p1;\n", nan, 0), 1u);
}

TEST(Ptx, SixteenBitFloats) {
  EXPECT_EQ(result_of("{ .reg .b16 h;\ncvt.u16.u32 h, %r1;\ncvt.f32.f16 %f1, h;}\nmov.b32 %r3, %f1;\n", 0x3c01, 0),
            of(1.0f + 1.0f / 1024));
  const std::string narrow = "mov.b32 %f1, %r1;\n{  cvt.rn.bf16.f32 %rs1, %f1;}\ncvt.u32.u16 %r3, %rs1;\n";
  EXPECT_EQ(result_of(narrow, 0x3f808001u, 0), 0x3f81u);
  EXPECT_EQ(result_of(narrow, 0xffc00000u, 0), 0x7fffu);
}

TEST(Ptx, GuardsAndJumps) {
  const std::string loop =
      "mov.u32 %r3, 0;\n$L__BB0_1:\nadd.s32 %r3, %r3, %r2;\nsub.s32 %r1, %r1, 1;\n"
      "setp.ne.s32 %p1, %r1, 0;\n@%p1 bra $L__BB0_1;\n@!%p1 add.s32 %r3, %r3, 100;\n@%p1 add.s32 %r3, %r3, 1000;\n";
  EXPECT_EQ(result_of(loop, 5, 3), 115u);
}

// 64 threads add their numbers by shuffles, a shared word and a barrier.
TEST(Ptx, ThreadsOfABlockTogether) {
  const Kernel kernel = kernel_of(
      "\t.shared .align 4 .u32 total;\n"
      "mov.u32 %r3, %tid.x;\nsetp.eq.s32 %p1, %r3, 0;\n@%p1 st.shared.u32 [total], 0;\nbar.sync 0;\n"
      "mov.u32 %r4, %r3;\n"
      "shfl.sync.bfly.b32 %r5|%p2, %r4, 16, 31, -1;\nadd.u32 %r4, %r4, %r5;\n"
      "shfl.sync.bfly.b32 %r5|%p2, %r4, 8, 31, -1;\nadd.u32 %r4, %r4, %r5;\n"
      "shfl.sync.bfly.b32 %r5|%p2, %r4, 4, 31, -1;\nadd.u32 %r4, %r4, %r5;\n"
      "shfl.sync.bfly.b32 %r5|%p2, %r4, 2, 31, -1;\nadd.u32 %r4, %r4, %r5;\n"
      "shfl.sync.bfly.b32 %r5|%p2, %r4, 1, 31, -1;\nadd.u32 %r4, %r4, %r5;\n"
      "rem.u32 %r6, %r3, 32;\nsetp.eq.s32 %p3, %r6, 31;\n@%p3 red.shared.add.u32 [total], %r4;\n"
      "bar.sync 0;\nld.shared.u32 %r7, [total];\n"
      "shfl.sync.up.b32 %r8|%p4, %r3, 1, 0, -1;\n@!%p4 mov.u32 %r8, 1000;\n"
      "vote.sync.ballot.b32 %r9, %p3, -1;\n"
      "mad.wide.u32 %rd2, %r3, 16, %rd1;\nst.global.v4.u32 [%rd2], {%r7, %r8, %r9, %r4};\n");
  alignas(16) uint32_t out[64][4];
  run_kernel(kernel, out, 0, 0, 64);
  for (uint32_t t = 0; t < 64; ++t) {
    EXPECT_EQ(out[t][0], 64u * 63 / 2) << t;
    EXPECT_EQ(out[t][1], t % 32 == 0 ? 1000 : t - 1) << t;
    EXPECT_EQ(out[t][2], 0x80000000u) << t;
    EXPECT_EQ(out[t][3], t < 32 ? 496u : 1520u) << t;
  }
}

TEST(Ptx, SharedMemoryOfALaunchComesBehindTheKernels) {
  const Kernel kernel = kernel_of(
      "\t.shared .align 4 .b8 own[20];\n"
      "mov.u32 %r3, dynamic;\nmov.u32 %r4, own;\nsub.u32 %r5, %r3, %r4;\nst.shared.u32 [%r3+12], %r5;\n"
      "ld.shared.u32 %r6, [%r4+44];\nst.global.u32 [%rd1], %r6;\n");
  EXPECT_EQ(kernel.shared_bytes, 20u);
  EXPECT_EQ(kernel.max_threads, 64u);
  uint32_t out = 0;
  run_kernel(kernel, &out, 0, 0, 1, 16);
  EXPECT_EQ(out, 32u);
}

TEST(Ptx, WhatIsNotKnownIsAnError) {
  EXPECT_THROW(kernel_of("dp4a.u32.u32 %r3, %r1, %r2, %r1;\n"), std::runtime_error);
  EXPECT_THROW(kernel_of("mov.u32 %r3, %clock;\n"), std::runtime_error);
  EXPECT_THROW(kernel_of("bra $L_nowhere;\n"), std::runtime_error);
  EXPECT_THROW(parse(".entry other(){ret;}", "k", "test"), std::runtime_error);
}

TEST(PtxDeathTest, WhatAGpuRefusesEndsTheRun) {
  alignas(16) uint32_t out[4];
  const auto dies = [&](const std::string& body, const char* why) {
    const Kernel kernel = kernel_of(body);
    EXPECT_DEATH(run_kernel(kernel, out, 0, 0, 32, 16), why) << body;
  };
  dies("st.global.v2.u32 [%rd1+4], {%r1, %r2};\n", "test:.*not a multiple of the 8 bytes");
  dies("mov.u32 %r3, dynamic;\nst.shared.u32 [%r3+16], %r1;\n", "outside the block's shared memory, byte 16");
  dies("ld.shared.u32 %r3, [%r1];\n", "outside the block's shared memory");
  dies("ld.param.u64 %rd2, [k_param_1];\n", "beyond a parameter");
  dies("div.u32 %r3, %r1, %r2;\n", "divides an integer by zero");
  dies("bar.sync 1;\n", "another barrier");
  dies("mov.u32 %r3, %tid.x;\nsetp.eq.s32 %p1, %r3, 3;\n@%p1 bar.warp.sync -1;\n", "a lane that has exited");
}

TEST(Ptx, CountsInstructionsOfWarps) {
  take_counts();
  uint32_t out = 0;
  // Three loads of parameters, then 3 instructions, 1 that half of the lanes jump over, and the return; a register copy
  // does not count.
  const Kernel kernel = kernel_of(
      "mov.u32 %r3, %tid.x;\nmov.b32 %f1, %r3;\nsetp.lt.u32 %p1, %r3, 16;\n@%p1 bra $L_end;\nadd.s32 %r3, %r3, 1;\n"
      "$L_end:\n");
  run_kernel(kernel, &out, 0, 0, 64);
  const std::vector<Count> counts = take_counts();
  ASSERT_EQ(counts.size(), 1u);
  EXPECT_EQ(counts[0].kernel, "k");
  EXPECT_EQ(counts[0].instructions, 2u * 8);
}

}  // namespace
}  // namespace simt::ptx
