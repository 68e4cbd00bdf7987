// Convolutions, compiled for every processor of the architecture.
#include <type_traits>

#include "target_baseline.h"

#include "conv_impl.h"
