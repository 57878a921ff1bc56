// Informs the sanitizers about fibres. AddressSanitizer: which stack is in use. ThreadSanitizer: each fibre is a
// separate thread, so it reports two fibres that access the same word without a barrier between them, in whatever order
// they ran. Switching fibres orders nothing, and the engine's own data are not checked. Without sanitizers all
// functions are empty.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
// Fibres leave and re-enter frames all the time: checks of use after return would take 20 times as long.
extern "C" __attribute__((used)) inline const char* __asan_default_options() {
  return "detect_stack_use_after_return=0";
}
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace simt {

#if defined(__SANITIZE_ADDRESS__)

// A stack for AddressSanitizer. The OS thread's is not known until it is left for the first time.
struct Watch {
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
};
inline void watch_stack(Watch& own, const void* bottom, size_t size) {
  own.bottom = bottom;
  own.size = size;
}
inline void before_switch(Watch& from, Watch& to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
}
inline void after_switch(Watch& from, Watch& to) {
  __sanitizer_finish_switch_fiber(to.fake_stack, &from.bottom, &from.size);
}

#elif defined(__SANITIZE_THREAD__)

struct Watch {
  void* thread = __tsan_get_current_fiber();  // the OS thread's; watch_stack() replaces a fibre's
};
inline void watch_stack(Watch& own, const void*, size_t) { own.thread = __tsan_create_fiber(0); }
inline void before_switch(Watch&, Watch& to) { __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync); }
inline void after_switch(Watch&, Watch&) {}

#else

struct Watch {};
inline void watch_stack(Watch&, const void*, size_t) {}
inline void before_switch(Watch&, Watch&) {}
inline void after_switch(Watch&, Watch&) {}

#endif

#if defined(__SANITIZE_THREAD__)

// Accesses before release() of a place are visible to threads that acquire() it later.
inline void release(void* place) { __tsan_release(place); }
inline void acquire(void* place) { __tsan_acquire(place); }

// While one exists, ThreadSanitizer ignores this fibre's reads and writes.
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

#else

inline void release(void*) {}
inline void acquire(void*) {}
struct Unwatched {
  Unwatched() {}  // so that an unused one gives no warning
};

#endif

}  // namespace simt
