// Ends what target_avx512.h or target_avx2.h began: Clang wants its attribute popped; GCC keeps its pragma to the end, since
// templates are instantiated there.
#if defined(__clang__) && REALUID_LEVEL > 0
#pragma clang attribute pop
#endif
