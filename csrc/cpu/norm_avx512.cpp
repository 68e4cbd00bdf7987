// Group normalisation and SiLU, compiled for AVX-512.
#include "arch.h"
#include "norm.h"

#if REALUID_X86
#include "target_avx512.h"

#include "norm_impl.h"

#include "target_end.h"
#endif
