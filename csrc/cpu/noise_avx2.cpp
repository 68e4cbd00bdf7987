// The vectorised normals, compiled for AVX2.
#include "arch.h"
#include "noise.h"

#if REALUID_X86
#include "target_avx2.h"

#include "noise_impl.h"

#include "target_end.h"
#endif
