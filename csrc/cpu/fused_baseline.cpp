// The fused calls, compiled for every processor of the architecture.
#include "target_baseline.h"

#include "fused_impl.h"
