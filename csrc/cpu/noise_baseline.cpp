// The vectorised normals, compiled for every processor of the architecture.
#include "target_baseline.h"

#include "noise_impl.h"
