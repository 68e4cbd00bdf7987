// Measures the bandwidth of this machine's memory, against which the kernels are compared.
#pragma once

#include <cstddef>

namespace realuid_fast {

// Bytes moved per second, in GB/s (10^9): reads plus writes of a copy between two buffers of `bytes`, or writes alone.
// The best of `repeats` runs, on `threads` threads with one slice each.
struct Bandwidth {
  double copy, fill;
};
Bandwidth measure_bandwidth(size_t bytes, int repeats, int threads);

}  // namespace realuid_fast
