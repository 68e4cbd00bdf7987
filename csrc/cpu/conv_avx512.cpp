// Convolutions, compiled for AVX-512.
#include <type_traits>

#include "arch.h"
#include "conv.h"

#if REALUID_X86
#include "target_avx512.h"

#include "conv_impl.h"

#include "target_end.h"
#endif
