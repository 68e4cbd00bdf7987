// Picks the instruction set's table of the convolutions.
#include "conv.h"

#include "arch.h"
#include "isa.h"

namespace realuid_fast {

const ConvKernels& conv_kernels(Dtype dtype) {
  switch (active_isa()) {
#if REALUID_X86
    case Isa::avx512:
      return avx512::conv_table[int(dtype)];
    case Isa::avx2:
      return avx2::conv_table[int(dtype)];
#endif
    default:
      return baseline::conv_table[int(dtype)];
  }
}

}  // namespace realuid_fast
