// The optimiser step, compiled for every processor of the architecture.
#include "target_baseline.h"

#include "optimiser_impl.h"
