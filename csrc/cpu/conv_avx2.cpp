// Convolutions, compiled for AVX2.
#include <type_traits>

#include "arch.h"
#include "conv.h"

#if REALUID_X86
#include "target_avx2.h"

#include "conv_impl.h"

#include "target_end.h"
#endif
