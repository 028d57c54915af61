// How fast this machine reads memory, and its threads pass a barrier: what a pass can't beat.
#pragma once

#include <cstddef>

namespace river {

// Bytes a second that the threads read together, the median of some passes over memory of that size.
double read_bandwidth(size_t bytes, int threads);

// Seconds of a barrier of so many threads, the mean of many.
double barrier_seconds(int threads);

}  // namespace river
