// Picks the instruction set's table of the normalisation.
#include "norm.h"

#include "arch.h"
#include "isa.h"

namespace realuid_fast {

const NormKernels& norm_kernels(Dtype dtype) {
  switch (active_isa()) {
#if REALUID_X86
    case Isa::avx512:
      return avx512::norm_table[int(dtype)];
    case Isa::avx2:
      return avx2::norm_table[int(dtype)];
#endif
    default:
      return baseline::norm_table[int(dtype)];
  }
}

}  // namespace realuid_fast
