#include "simt/ptx/kernel.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "simt/ptx/registers.h"

namespace simt::ptx {
namespace {

// --- counting: a lane's counts are merged into its warp's when it ends ---

struct Visits {
  bool wanted = false;
  std::mutex mutex;
  std::map<std::string, uint64_t> instructions;        // of finished warps
  std::map<unsigned, std::vector<uint32_t>> of_warps;  // of the current block
  unsigned ended = 0;                                  // its finished threads
};

Visits visits;

void fold(const Kernel& kernel, const std::vector<uint32_t>& lane) {
  const std::lock_guard<std::mutex> lock(visits.mutex);
  std::vector<uint32_t>& warp = visits.of_warps[self().warp];
  warp.resize(lane.size());
  for (size_t n = 0; n < lane.size(); ++n) warp[n] = std::max(warp[n], lane[n]);
  if (++visits.ended < block_dim().x) return;
  for (const auto& [index, counts] : visits.of_warps) {
    for (const uint32_t count : counts) visits.instructions[kernel.name] += count;
  }
  visits.of_warps.clear();
  visits.ended = 0;
}

// --- the files of a folder ---

struct Text {
  std::string file, text;
};

std::vector<Text> read_folder(const std::string& folder) {
  std::vector<Text> texts;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".ptx") continue;
    std::ostringstream text;
    text << std::ifstream(entry.path()).rdbuf();
    texts.push_back({entry.path().string(), text.str()});
  }
  if (texts.empty()) die("no .ptx file in the folder that ACE_PTX names");
  return texts;
}

Kernel read_kernel(const void* address, const std::string& folder) {
  static const std::vector<Text> texts = read_folder(folder);
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_sname == nullptr) die("a kernel has no name: link with -rdynamic");
  const std::string name = info.dli_sname;
  for (const Text& text : texts) {
    if (text.text.find(".entry " + name + "(") == std::string::npos) continue;
    try {
      return parse(text.text, name, text.file);
    } catch (const std::exception& error) {
      die(error.what());
    }
  }
  die(("no PTX of the kernel " + name).c_str());
}

}  // namespace

void fault(const Lane& lane, const Instruction& at, const std::string& why) {
  const std::string where = lane.kernel.file + ":" + std::to_string(at.line) + ", block " +
                            std::to_string(block_index().x) + ", thread " + std::to_string(self().index.x);
  die((where + ": " + why).c_str());
}

void Kernel::run(const void* const* parameters) const {
  Lane lane{*this, parameters, registers};
  lane.registers[kThreadX] = self().index.x;
  lane.registers[kBlockX] = block_index().x;
  lane.registers[kBlockDimX] = block_dim().x;
  lane.registers[kGridDimX] = grid_dim().x;
  lane.registers[kLaneId] = self().lane;
  std::vector<uint32_t> counts(visits.wanted ? code.size() : 0);
  while (lane.next < code.size()) {
    if (!counts.empty() && !code[lane.next].copies) ++counts[lane.next];
    const Instruction& i = code[lane.next++];
    if (i.guard >= 0 && get<bool>(lane, i.guard) == i.unless) continue;
    i.run(lane, i);
  }
  if (!counts.empty()) fold(*this, counts);
}

Handler handler_of(const std::string& opcode) {
  static const Table table = [] {
    Table all;
    add_arithmetic(all);
    add_conversions(all);
    add_memory(all);
    add_cooperation(all);
    return all;
  }();
  const auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

const Kernel* kernel_at(const void* address) {
  static const char* folder = std::getenv("ACE_PTX");
  if (folder == nullptr) return nullptr;
  static std::map<const void*, Kernel> kernels;
  const auto found = kernels.find(address);
  return found != kernels.end() ? &found->second
                                : &kernels.emplace(address, read_kernel(address, folder)).first->second;
}

std::vector<Count> take_counts() {
  std::vector<Count> counts;
  for (const auto& [kernel, instructions] : visits.instructions) counts.push_back({kernel, instructions});
  visits.instructions.clear();
  visits.wanted = true;
  return counts;
}

}  // namespace simt::ptx
