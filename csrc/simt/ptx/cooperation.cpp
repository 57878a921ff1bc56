// Barriers, warp collectives and jumps.
#include "simt/ptx/registers.h"

namespace simt::ptx {
namespace {

void jump(Lane& lane, const Instruction& i) { lane.next = static_cast<size_t>(i.offset); }

void leave(Lane& lane, const Instruction&) { lane.next = lane.kernel.code.size(); }

void first_barrier(const Lane& lane, const Instruction& i) {
  if (get<uint32_t>(lane, i.from[0]) != 0) fault(lane, i, "uses another barrier than the first");
}

void wait_for_block(Lane& lane, const Instruction& i) {
  first_barrier(lane, i);
  sync_threads(i.line);
}

void any_of_block(Lane& lane, const Instruction& i) {
  first_barrier(lane, i);
  put(lane, i.to[0], barrier(get<bool>(lane, i.from[1]), i.line) != 0);
}

void wait_for_warp(Lane& lane, const Instruction& i) {
  collective(Op::sync, get<uint32_t>(lane, i.from[0]), {}, i.line);
}

void ballot(Lane& lane, const Instruction& i) {
  const Offer offer{get<bool>(lane, i.from[0]), 0};
  put(lane, i.to[0], static_cast<uint32_t>(collective(Op::ballot, get<uint32_t>(lane, i.from[1]), offer, i.line)));
}

enum class Shuffle { up, down, bfly, idx };

// The source lane by the rules of PTX: the lower five bits of c are the segment's last lane, and its upper bits are the
// lane bits that must not change. Outside the segment a lane gets its own value.
template <Shuffle kind>
void shuffle(Lane& lane, const Instruction& i) {
  const auto me = static_cast<int>(self().lane);
  const auto by = static_cast<int>(get<uint32_t>(lane, i.from[1]) & 31u);
  const uint32_t c = get<uint32_t>(lane, i.from[2]);
  const auto segment = static_cast<int>(c >> 8 & 31u), clamp = static_cast<int>(c & 31u);
  const int least = me & segment, most = least | (clamp & ~segment);
  int source = me;
  switch (kind) {
    case Shuffle::up: source = me - by; break;
    case Shuffle::down: source = me + by; break;
    case Shuffle::bfly: source = me ^ by; break;
    case Shuffle::idx: source = least | (by & ~segment); break;
  }
  const bool inside = kind == Shuffle::up ? source >= most : source <= most;
  const Offer offer{get<uint32_t>(lane, i.from[0]), static_cast<unsigned>(inside ? source : me)};
  const uint32_t mask = get<uint32_t>(lane, i.from[3]);
  put(lane, i.to[0], static_cast<uint32_t>(collective(Op::shuffle, mask, offer, i.line)));
  put(lane, i.to[1], inside);
}

}  // namespace

void add_cooperation(Table& table) {
  table["bra"] = table["bra.uni"] = jump;
  table["ret"] = table["exit"] = leave;
  table["bar.sync"] = table["barrier.sync"] = wait_for_block;
  table["bar.red.or.pred"] = table["barrier.red.or.pred"] = any_of_block;
  table["bar.warp.sync"] = wait_for_warp;
  table["vote.sync.ballot.b32"] = ballot;
  table["shfl.sync.up.b32"] = shuffle<Shuffle::up>;
  table["shfl.sync.down.b32"] = shuffle<Shuffle::down>;
  table["shfl.sync.bfly.b32"] = shuffle<Shuffle::bfly>;
  table["shfl.sync.idx.b32"] = shuffle<Shuffle::idx>;
}

}  // namespace simt::ptx
