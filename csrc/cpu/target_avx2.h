// Compiles the rest of the translation unit for AVX2, FMA and F16C; see target_avx512.h for the order of includes.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define REALUID_LEVEL 1
#define REALUID_ISA on_avx2
#define REALUID_TABLE avx2
