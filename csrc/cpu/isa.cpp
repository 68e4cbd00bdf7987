// Processor detection and the environment variable that overrides it.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "arch.h"

namespace realuid_fast {

bool supports(Isa isa) {
#if REALUID_X86
  // libgcc's tables also ask the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA has F16C, whose name older compilers do not know here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx2:
      return avx2;
    case Isa::baseline:
      return true;
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

static Isa choose() {
  const char* wanted = std::getenv("REALUID_FAST_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (Isa isa : {Isa::avx512, Isa::avx2})
      if (supports(isa)) return isa;
    return Isa::baseline;
  }
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    if (supports(isa)) return isa;
    throw std::runtime_error("REALUID_FAST_CPU_ISA=" + std::string(wanted) +
                             " asks for instructions that this processor does not have");
  }
  throw std::runtime_error("REALUID_FAST_CPU_ISA must be avx512, avx2 or baseline, got " + std::string(wanted));
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace realuid_fast
