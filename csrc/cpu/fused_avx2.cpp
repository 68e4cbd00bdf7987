// The fused calls, compiled for AVX2.
#include "arch.h"
#include "fused.h"

#if REALUID_X86
#include "target_avx2.h"

#include "fused_impl.h"

#include "target_end.h"
#endif
