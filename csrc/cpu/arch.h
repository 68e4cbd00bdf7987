// Macros for the compiler's target, in one place.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define REALUID_X86 1
#else
#define REALUID_X86 0
#endif

#if !defined(__GNUC__)
#error "the C++ extension needs GCC or Clang: it uses their vector types"
#endif

#define REALUID_INLINED __attribute__((always_inline))  // behind a lambda's parameters
#define REALUID_INLINE inline REALUID_INLINED
