// Stacks, and switching between them: with a few instructions on x86-64, elsewhere with the C library.
#pragma once

#include <sys/mman.h>

#include "simt/engine.h"
#include "simt/sanitizers.h"

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 256 * 1024;

// A stack that is running or suspended: a fibre's, or the OS thread's.
struct Stack {
  char* bottom = nullptr;  // of a fibre's
  Watch watch;
#if defined(SIMT_UCONTEXT)
  ucontext_t context;
#else
  void* pointer = nullptr;
#endif
  bool exists() const { return bottom != nullptr; }
};

inline void* map_stack() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) die("no memory for a fibre's stack");
  return stack;
}

#if defined(SIMT_UCONTEXT)

inline void start(Stack& stack, void (*entry)()) {
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.bottom;
  stack.context.uc_stack.ss_size = kStackBytes;
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, entry, 0);
}
inline void leave(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }

#else

inline void start(Stack& stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack.bottom + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack.pointer = top;
}

// Saves the registers that a call preserves, then continues on the other stack.
__attribute__((naked, noinline)) inline void switch_pointer(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp,(%rdi)\n movq "
      "%rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void leave(Stack& from, Stack& to) { switch_pointer(&from.pointer, to.pointer); }

#endif

// Gives a fibre a stack, on which `entry` starts at the first switch to it. `entry` never returns.
inline void make_stack(Stack& stack, void (*entry)()) {
  stack.bottom = static_cast<char*>(map_stack());
  watch_stack(stack.watch, stack.bottom, kStackBytes);
  start(stack, entry);
}

// An entry calls this first: the switch came from `from`.
inline void arrive(Stack& from, Stack& to) { after_switch(from.watch, to.watch); }

// Switches to another stack, and returns when that one switches back.
inline void switch_stack(Stack& from, Stack& to) {
  before_switch(from.watch, to.watch);
  leave(from, to);
  arrive(to, from);
}

}  // namespace simt
