// The vectorised normals, compiled for AVX-512.
#include "arch.h"
#include "noise.h"

#if REALUID_X86
#include "target_avx512.h"

#include "noise_impl.h"

#include "target_end.h"
#endif
