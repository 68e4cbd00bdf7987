// The device as the null GPU describes it to whoever asks: an H200.
#pragma once

#include <cstddef>

namespace nullgpu::h200 {

constexpr char NAME[] = "NVIDIA H200";
constexpr int CAPABILITY_MAJOR = 9;
constexpr int CAPABILITY_MINOR = 0;
constexpr int MULTIPROCESSORS = 132;
constexpr int WARP = 32;
constexpr int BLOCK_THREADS = 1024;
constexpr int BLOCK_Z = 64;
constexpr int MULTIPROCESSOR_THREADS = 2048;
constexpr int MULTIPROCESSOR_BLOCKS = 32;
constexpr int MULTIPROCESSOR_SHARED = 233472;
constexpr int BLOCK_SHARED = 49152;
constexpr int BLOCK_SHARED_OPTIN = 232448;
constexpr int REGISTERS = 65536;
constexpr int GRID_X = 2147483647;
constexpr int GRID_YZ = 65535;
constexpr int L2_BYTES = 60 << 20;
constexpr int BUS_BITS = 6144;
constexpr int CLOCK_KHZ = 1980000;
constexpr int MEMORY_CLOCK_KHZ = 3201000;
constexpr size_t BYTES = 141ull << 30;
constexpr int CUDA_VERSION_ = 13000;

}  // namespace nullgpu::h200
