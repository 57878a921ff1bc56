// Interprets a kernel's PTX from nvcc, instruction by instruction, on the engine that also runs the source. The code is
// what ptxas gets, with a GPU's NaN, alignment and shared memory. An unknown instruction is an error when the kernel is
// read.
//
// A register has 64 bits; an instruction of a narrower type reads the lower bits and writes them extended. Registers
// start with garbage, so that use before a write is noticed.
#pragma once

#include <string>
#include <vector>

#include "simt/fiber_engine.h"

namespace simt::ptx {

struct Lane;
struct Instruction;
using Handler = void (*)(Lane&, const Instruction&);

constexpr int kMostOperands = 5;
constexpr uint32_t kSharedWindow = 1024;  // where shared memory begins: address 0 is never valid

struct Instruction {
  Handler run = nullptr;
  int guard = -1;                                        // register of a predicate
  bool unless = false;                                   // runs if the predicate is false
  bool copies = false;                                   // copies one register to another
  int to[kMostOperands] = {}, from[kMostOperands] = {};  // registers; of a parameter its number
  int64_t offset = 0;                                    // from an address; or the jump target
  int line = 0;
};

// Registers of every kernel: the coordinates, and one for discarded results.
enum Special { kThreadX, kBlockX, kBlockDimX, kGridDimX, kLaneId, kNowhere, kSpecials };

struct Kernel {
  std::string name, file;
  std::vector<Instruction> code;
  std::vector<uint64_t> registers;  // initial values: specials, garbage, constants
  std::vector<size_t> parameter_bytes;
  size_t shared_bytes = 0;   // its own
  size_t dynamic_at = 0;     // where the launch's dynamic part begins
  unsigned max_threads = 0;  // of a block; 0: unlimited

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

// Reads the kernel of this (mangled) name from PTX text. Throws std::runtime_error if it cannot be parsed.
Kernel parse(const std::string& text, const std::string& name, const std::string& file);

// The function that runs an instruction, by its opcode with all modifiers; null if unknown.
Handler handler_of(const std::string& opcode);

// --- launching ---

// The PTX of the kernel at this address, from the files of the folder that the environment variable ACE_PTX names. Null
// if it is not set. If it is set and the kernel is missing, the process ends.
const Kernel* kernel_at(const void* address);

// --- counting ---

// Warp instructions since the last call, by kernel. For each warp and instruction the largest count of a lane, so both
// sides of a divergent branch count. Register copies are excluded: PTX needs one wherever a float is used as an
// integer, while machine registers have no types and need none. Nothing is counted before the first call.
struct Count {
  std::string kernel;
  uint64_t instructions;
};
std::vector<Count> take_counts();

}  // namespace simt::ptx
