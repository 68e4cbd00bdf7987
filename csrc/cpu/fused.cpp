// Picks the instruction set's table of fused kernels.
#include "fused.h"

#include "arch.h"
#include "isa.h"

namespace realuid_fast {

const Kernels& kernels(Dtype dtype) {
  const int i = static_cast<int>(dtype);
  switch (active_isa()) {
#if REALUID_X86
    case Isa::avx512:
      return avx512::table[i];
    case Isa::avx2:
      return avx2::table[i];
#endif
    default:
      return baseline::table[i];
  }
}

}  // namespace realuid_fast
