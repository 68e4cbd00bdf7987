// Which instruction set the kernels run on: found once at run time, forcible through REALUID_FAST_CPU_ISA.
#pragma once

#include "arch.h"

namespace realuid_fast {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The level in use. Throws std::runtime_error with one sentence if the variable asks for a level that this processor lacks.
Isa active_isa();

// Whether this processor (and its operating system) can run the level.
bool supports(Isa isa);

const char* isa_name(Isa isa);

// The variant in use of a thing that was compiled once for each instruction set. Arrays and functions are given as addresses.
template <class T>
T pick(T baseline, T avx2, T avx512) {
  switch (active_isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

// Declares something in the namespace of every instruction set, and picks it from the one in use. Processors other than
// x86-64 have the baseline alone, so the others' are declared there and never defined.
#define REALUID_EACH_ISA(...) \
  namespace avx512 {          \
  __VA_ARGS__                 \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__                 \
  }                           \
  namespace baseline {        \
  __VA_ARGS__                 \
  }
#if REALUID_X86
#define REALUID_PICK(name) pick(baseline::name, avx2::name, avx512::name)
#else
#define REALUID_PICK(name) pick(baseline::name, baseline::name, baseline::name)
#endif

}  // namespace realuid_fast
