// One build for every x86: a function marked ACE_MULTIVERSION is compiled for AVX-512, for AVX2 and for the base
// instruction set, and the loader picks one. Functions that it calls must be inlined (ACE_HD), or they are compiled for
// the base set only. Results are the same in all versions: setup.py builds with -ffp-contract=off, so no multiply and
// add is fused.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define ACE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ACE_MULTIVERSION
#endif

// Marks a pointer whose memory no other pointer reaches, so that the compiler need not guard a vector loop against
// aliasing.
#define ACE_RESTRICT __restrict__

// Fully unrolls the following loop, which has a small constant trip count, so that the outer loop vectorises.
#if defined(__clang__)
#define ACE_UNROLL _Pragma("unroll")
#else
#define ACE_UNROLL _Pragma("GCC unroll 16")
#endif
