// Group normalisation and SiLU, compiled for every processor of the architecture.
#include "target_baseline.h"

#include "norm_impl.h"
