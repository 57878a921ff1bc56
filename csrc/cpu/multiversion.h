// One build that serves every x86: a function marked ACE_MULTIVERSION is compiled for AVX-512, for AVX2 and for the
// base instruction set, and the loader picks. What it calls must be inlined (ACE_HD), or it would not be compiled
// along. Results are the same in all versions: setup.py builds with -ffp-contract=off, so no multiply and add is fused.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define ACE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ACE_MULTIVERSION
#endif

// What a pointer so marked points to is reached through no other: the compiler need not guard a vector loop against it.
#define ACE_RESTRICT __restrict__

// The loop that follows, of a few fixed turns, becomes straight code: what is around it can then be made vector code.
#if defined(__clang__)
#define ACE_UNROLL _Pragma("unroll")
#else
#define ACE_UNROLL _Pragma("GCC unroll 16")
#endif
