// A kernel as nvcc's PTX, run instruction by instruction on the engine that also runs the source: what ptxas gets, with
// a GPU's NaN, alignment and shared memory. An instruction that is not known is an error when the kernel is read.
//
// A register holds 64 bits; an instruction of a narrower type reads the lower ones and writes them extended. A thread
// starts with rubbish in its registers, so that a value used before it is written shows.
#pragma once

#include <string>
#include <vector>

#include "simt/fiber_engine.h"

namespace simt::ptx {

struct Lane;
struct Instruction;
using Handler = void (*)(Lane&, const Instruction&);

constexpr int kMostOperands = 5;
constexpr uint32_t kSharedWindow = 1024;  // where shared memory begins: address 0 is nobody's

struct Instruction {
  Handler run = nullptr;
  int guard = -1;                                        // register of a predicate
  bool unless = false;                                   // runs where the predicate is false
  bool copies = false;                                   // a register to another
  int to[kMostOperands] = {}, from[kMostOperands] = {};  // registers; of a parameter its number
  int64_t offset = 0;                                    // from an address; or the place to which it jumps
  int line = 0;
};

// Registers that every kernel has: the coordinates, and one for results that nobody wants.
enum Special { kThreadX, kBlockX, kBlockDimX, kGridDimX, kLaneId, kNowhere, kSpecials };

struct Kernel {
  std::string name, file;
  std::vector<Instruction> code;
  std::vector<uint64_t> registers;  // as a thread starts: specials, rubbish, constants
  std::vector<size_t> parameter_bytes;
  size_t shared_bytes = 0;   // its own
  size_t dynamic_at = 0;     // where the launch's begin
  unsigned max_threads = 0;  // of a block; 0: no limit

  void run(const void* const* parameters) const;  // as the current thread
};

// A thread in a kernel.
struct Lane {
  const Kernel& kernel;
  const void* const* parameters;
  std::vector<uint64_t> registers;
  size_t next = 0;  // instruction
};

[[noreturn]] void fault(const Lane& lane, const Instruction& at, const std::string& why);

// --- reading ---

// The kernel of that (mangled) name in a text of PTX. Throws std::runtime_error where it is not understood.
Kernel parse(const std::string& text, const std::string& name, const std::string& file);

// What runs an instruction, by its opcode with all modifiers; null if it is not known.
Handler handler_of(const std::string& opcode);

// --- launching ---

// The PTX of the kernel at this address: read from the files of the folder that the environment's ACE_PTX names. Null
// where that is not set; the process ends where it is set and the kernel is not there.
const Kernel* kernel_at(const void* address);

// --- counting ---

// Instructions of warps since the last call, by kernel: of each warp and instruction the most visits of a lane, so both
// sides of a branch count where lanes part. Copies of a register are left out: PTX needs one wherever a float is taken
// as an integer, and machine code, whose registers have no types, has none of them. Nothing is counted before the first
// call.
struct Count {
  std::string kernel;
  uint64_t instructions;
};
std::vector<Count> take_counts();

}  // namespace simt::ptx
