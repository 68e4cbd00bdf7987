// Compiles the rest of the translation unit for AVX-512 (F, BW, DQ, VL). Shared headers come before it: their inline
// functions are shared with the rest of the program and must stay baseline code.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
// GCC 12 takes the undefined merge operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define REALUID_LEVEL 2
#define REALUID_ISA on_avx512
#define REALUID_TABLE avx512
