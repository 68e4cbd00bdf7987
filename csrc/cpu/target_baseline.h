// The target that every processor of the architecture runs: SSE2 on x86-64, the compiler's own vectors elsewhere.
#pragma once

#include "arch.h"

#if REALUID_X86
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#define REALUID_LEVEL 0
#define REALUID_ISA on_baseline
#define REALUID_TABLE baseline
