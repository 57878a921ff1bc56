// A block on the engine that was chosen.
#pragma once

#if defined(ACE_SIMT_THREADS)
#include "simt/thread_engine.h"
#else
#include "simt/fiber_engine.h"
#endif

namespace simt {

// __syncthreads(), or nothing where a test leaves it out.
inline void sync_threads(int line) {
  if (++self().barriers != settings.dropped_barrier) barrier(0, line);
}

}  // namespace simt
