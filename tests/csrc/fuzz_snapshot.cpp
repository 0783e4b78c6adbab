// Bytes as changes to a snapshot, or as all of one: what is not refused is a forest that can be
// used to its end, and whose own snapshot is accepted.

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "fuzz.hpp"

using fuzz::Answers;
using fuzz::Choices;
using tercet::Bytes;
using tercet::Forest;
using tercet::ForestConfig;
using tercet::Kind;
using tercet::Leaves;
using tercet::Snapshot;
using tercet::SnapshotError;

namespace {

constexpr std::size_t kHeader = 32;
constexpr int kRounds = 40;

std::uint64_t checksum(std::span<const std::uint8_t> bytes) {
  const auto stir = [](std::uint64_t sum, std::uint64_t word) {
    sum = (sum ^ word) * 0xff51afd7ed558ccdu;
    return sum ^ sum >> 32;
  };
  std::uint64_t sums[4] = {1, 2, 3, 4};
  for (std::size_t i = 0; i < bytes.size(); i += 32) {
    std::uint64_t words[4] = {};
    std::memcpy(words, bytes.data() + i, std::min<std::size_t>(32, bytes.size() - i));
    for (int lane = 0; lane < 4; ++lane) sums[lane] = stir(sums[lane], words[lane]);
  }
  std::uint64_t sum = bytes.size();
  for (const std::uint64_t lane : sums) sum = stir(sum, lane);
  return sum;
}

void reseal(Bytes& bytes) {
  const std::uint64_t sizes[] = {tercet::kSnapshotVersion, bytes.size() - kHeader,
                                 checksum(std::span(bytes).subspan(kHeader))};
  std::memcpy(bytes.data(), "tercetF\n", 8);
  std::memcpy(bytes.data() + 8, sizes, sizeof(sizes));
}

// Two trees in the midst of their search: tickets are out, failed, told too early and cancelled.
Bytes grown(Choices& choices) {
  const ForestConfig config = fuzz::config_of(choices);
  Forest forest(config);
  for (std::uint32_t tree = 0; tree < 2; ++tree) forest.add_tree(tree, 12 + 8 * tree, tree);
  for (std::uint32_t round = choices.below(12); round > 0; --round) {
    const Leaves leaves = forest.ask(5);
    for (std::size_t i = leaves.size(); i-- > 0;) {
      const tercet::Ticket ticket = leaves.ticket[i];
      const auto kind = static_cast<Kind>(leaves.kind[i]);
      const std::uint32_t fate = choices.below(8);
      if (fate == 0) forest.fail({&ticket, 1});
      if (fate == 1) forest.cancel({&ticket, 1});
      if (fate == 2 && kind == Kind::kVerify) {
        const std::uint32_t step = 1;
        const double verdict = 0.5;
        forest.tell_verdicts({{&ticket, 1}, {&step, 1}, {&verdict, 1}});
      }
      if (fate < 4) continue;
      Answers answers;
      answers.add(ticket, kind, config, choices);
      try {
        fuzz::tell(forest, kind, answers.results());
      } catch (const std::invalid_argument&) {  // more children than there is room for
      }
    }
  }
  return Snapshot::of(forest);
}

// Bytes, small numbers, and numbers at the bounds of what can be.
void change(Bytes& bytes, Choices& choices) {
  const std::size_t room = bytes.size() - kHeader;
  if (room < 8) return;
  const std::size_t where = (choices.byte() * 256u + choices.byte()) % (room - 7) + kHeader;
  const double doubles[] = {0.0, -0.0, -1.0, 1.0, 1e300, -1e301, HUGE_VAL, std::nan("")};
  const std::uint32_t words[] = {0, 1, 2, 255, 256, 1u << 24, 1u << 31, 0xffffffffu};
  switch (choices.below(5)) {
    case 0:
      bytes[where] = choices.byte();
      return;
    case 1:
      bytes[where] = static_cast<std::uint8_t>(bytes[where] ^ 1u << choices.below(8));
      return;
    case 2:
      std::memcpy(bytes.data() + where, &words[choices.below(8)], 4);
      return;
    case 3:
      std::memcpy(bytes.data() + where, &doubles[choices.below(8)], 8);
      return;
    default:  // one more, or one less
      bytes[where] = static_cast<std::uint8_t>(bytes[where] + (choices.below(2) == 0 ? 1 : 255));
  }
}

// Trees of millions of simulations are none that can be run to their end here.
bool is_small(const Forest& forest, std::uint32_t trees) {
  for (tercet::TreeId tree = 0; tree < trees; ++tree) {
    try {
      if (forest.status(tree).simulations > 1000) return false;
    } catch (const std::out_of_range&) {  // removed
    }
  }
  return true;
}

void use(Forest& forest, Choices& choices) {
  CHECK(Snapshot::of(Snapshot::restore(Snapshot::of(forest))) == Snapshot::of(forest));
  if (!is_small(forest, 2)) return;
  forest.recall();
  for (int round = 0; round < kRounds; ++round) {
    const Leaves leaves = forest.ask(40);
    const tercet::Counters counters = forest.counters();
    const bool may_ask = forest.config().budget.is_none();
    CHECK(leaves.size() > 0 || counters.finished == counters.trees || !may_ask);
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      const auto kind = static_cast<Kind>(leaves.kind[i]);
      Answers answers;
      answers.add(leaves.ticket[i], kind, forest.config(), choices);
      try {
        fuzz::tell(forest, kind, answers.results());
      } catch (const tercet::BadTicket&) {
        CHECK(!"what is handed out can be told");
      } catch (const std::invalid_argument&) {  // more children than there is room for
        const tercet::Ticket ticket = leaves.ticket[i];
        forest.cancel({&ticket, 1});
      }
    }
  }
  for (const tercet::TreeId tree : {0u, 1u}) {
    try {
      fuzz::check_tree(forest, tree);
    } catch (const std::out_of_range&) {  // removed
    }
  }
  CHECK(Snapshot::of(Snapshot::restore(Snapshot::of(forest))) == Snapshot::of(forest));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Choices choices({data, size});
  Bytes bytes;
  if (choices.rarely(16)) {
    bytes.assign(kHeader, 0);
    bytes.insert(bytes.end(), choices.rest().begin(), choices.rest().end());
  } else {
    bytes = grown(choices);
    for (std::uint32_t changes = choices.below(4); changes > 0; --changes) change(bytes, choices);
  }
  reseal(bytes);
  std::optional<Forest> forest;
  try {
    forest.emplace(Snapshot::restore(bytes));
  } catch (const SnapshotError&) {
    return 0;
  } catch (const std::length_error&) {  // max_bytes
    return 0;
  }
  use(*forest, choices);
  return 0;
}
