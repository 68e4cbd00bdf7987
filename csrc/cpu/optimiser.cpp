// Picks the instruction set's table of the optimiser's kernels.
#include "optimiser.h"

#include "arch.h"
#include "isa.h"

namespace realuid_fast {

const OptimiserKernels& optimiser_kernels(bool wide) {
  switch (active_isa()) {
#if REALUID_X86
    case Isa::avx512:
      return avx512::optimiser_table[wide];
    case Isa::avx2:
      return avx2::optimiser_table[wide];
#endif
    default:
      return baseline::optimiser_table[wide];
  }
}

}  // namespace realuid_fast
