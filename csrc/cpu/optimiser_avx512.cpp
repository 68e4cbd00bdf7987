// The optimiser step, compiled for AVX-512.
#include "arch.h"
#include "optimiser.h"

#if REALUID_X86
#include "target_avx512.h"

#include "optimiser_impl.h"

#include "target_end.h"
#endif
