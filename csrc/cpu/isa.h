// Which instruction set the kernels run on: found once at run time, forcible through REALUID_FAST_CPU_ISA.
#pragma once

namespace realuid_fast {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The level in use. Throws std::runtime_error with one sentence if the variable asks for a level that this processor lacks.
Isa active_isa();

// Whether this processor (and its operating system) can run the level.
bool supports(Isa isa);

const char* isa_name(Isa isa);

}  // namespace realuid_fast
