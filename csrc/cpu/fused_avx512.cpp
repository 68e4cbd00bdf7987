// The fused calls, compiled for AVX-512.
#include "arch.h"
#include "fused.h"

#if REALUID_X86
#include "target_avx512.h"

#include "fused_impl.h"

#include "target_end.h"
#endif
