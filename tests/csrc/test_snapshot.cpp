#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "tercet/snapshot.hpp"

using tercet::Forest;
using tercet::Leaves;
using tercet::Snapshot;
using tercet::SnapshotError;

namespace {

constexpr std::size_t kHeader = 32;

void tell(Forest& forest, std::span<const tercet::Ticket> tickets) {
  const std::size_t n = tickets.size();
  std::vector<double> values(n);
  std::vector<std::uint32_t> counts(n);
  std::vector<std::int64_t> handles;
  for (std::size_t i = 0; i < n; ++i) {
    values[i] = static_cast<double>(tickets[i] % 13);
    counts[i] = static_cast<std::uint32_t>(tickets[i] % 5);
    handles.resize(handles.size() + counts[i], static_cast<std::int64_t>(tickets[i]));
  }
  forest.tell({tickets, values, counts, handles});
}

// Three trees, one of them removed; some tickets are out, some failed and some told too early.
Forest half_grown() {
  tercet::ForestConfig config;
  config.max_in_flight = 6;
  config.visits_per_flight = 1;
  Forest forest(config);
  for (int tree = 0; tree < 3; ++tree) forest.add_tree(tree, 90);
  for (int round = 0; round < 25; ++round) {
    const Leaves leaves = forest.ask(9);
    const std::span tickets(leaves.ticket);
    if (tickets.size() < 4) {
      tell(forest, tickets);
      continue;
    }
    forest.fail(tickets.subspan(2, 1));
    tell(forest, tickets.subspan(3));
    if (round % 2 == 0) tell(forest, tickets.first(2));
  }
  forest.remove_tree(1);
  return forest;
}

std::uint64_t checksum(std::span<const std::uint8_t> bytes) {
  const auto stir = [](std::uint64_t sum, std::uint64_t word) {
    sum = (sum ^ word) * 0xff51afd7ed558ccdu;
    return sum ^ sum >> 32;
  };
  std::uint64_t sums[4] = {1, 2, 3, 4};
  for (std::size_t i = 0; i < (bytes.size() + 31) / 32 * 4; ++i) {
    std::uint64_t word = 0;
    for (std::size_t b = 0; b < 8 && 8 * i + b < bytes.size(); ++b) {
      word |= std::uint64_t{bytes[8 * i + b]} << 8 * b;
    }
    sums[i % 4] = stir(sums[i % 4], word);
  }
  std::uint64_t sum = bytes.size();
  for (const std::uint64_t lane : sums) sum = stir(sum, lane);
  return sum;
}

void reseal(tercet::Bytes& bytes) {
  const std::uint64_t sizes[] = {bytes.size() - kHeader,
                                 checksum(std::span(bytes).subspan(kHeader))};
  std::memcpy(bytes.data() + 16, sizes, sizeof(sizes));
}

void a_restored_forest_is_the_same() {
  Forest forest = half_grown();
  const tercet::Bytes bytes = Snapshot::of(forest);
  Forest again = Snapshot::restore(bytes);
  CHECK(Snapshot::of(again) == bytes);
  CHECK(again.counters().in_flight == forest.counters().in_flight);
  CHECK(again.counters().waiting == forest.counters().waiting && again.counters().waiting > 0);
  CHECK(again.counters().nodes == forest.counters().nodes && again.counters().trees == 2);
  for (int round = 0; round < 20; ++round) {
    for (Forest* one : {&forest, &again}) {
      const Leaves leaves = one->ask(5);
      tell(*one, std::span(leaves.ticket).subspan(leaves.size() / 3));
    }
    CHECK(Snapshot::of(forest) == Snapshot::of(again));
  }
}

void every_shorter_file_is_refused() {
  tercet::Bytes bytes = Snapshot::of(half_grown());
  for (std::size_t size = 0; size < bytes.size(); size += 23) {
    tercet::Bytes cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK_THROWS(Snapshot::restore(cut), SnapshotError);
    if (size < kHeader) continue;
    reseal(cut);
    CHECK_THROWS(Snapshot::restore(cut), SnapshotError);
  }
}

// Tree 0: a root with children 4 to 8, of which 4 is an end; tickets at 5 (out), 6 (failed) and 7
// (told).  Tree 1 is new, and tree 2 removed.
tercet::Bytes small() {
  tercet::ForestConfig config;
  config.max_in_flight = 3;
  config.visits_per_flight = 1;
  Forest forest(config);
  forest.add_tree(7, 20);
  const std::vector<std::int64_t> handles{10, 11, 12, 13, 14};
  const auto tell_one = [&](tercet::Ticket ticket, std::uint32_t children) {
    const double value = 0.5;
    forest.tell({{&ticket, 1}, {&value, 1}, {&children, 1}, std::span(handles).first(children)});
  };
  const auto ask = [&](std::size_t n) { CHECK(forest.ask(n).size() == n); };
  ask(1);
  tell_one(0, 5);
  ask(2);
  tell_one(1, 0);
  ask(2);
  const tercet::Ticket failed = 3;
  forest.fail({&failed, 1});
  tell_one(4, 2);
  for (int tree = 1; tree < 3; ++tree) forest.add_tree(8, 20);
  forest.remove_tree(2);
  return Snapshot::of(forest);
}

// Where things lie in it.
namespace at {
constexpr std::size_t kConfig = kHeader, kMaxAttempts = kConfig + 16, kTrees = kConfig + 68;
constexpr std::size_t kTree = kTrees + 8, kSimulations = kTree + 1, kBegun = kTree + 5;
constexpr std::size_t kCommitted = kTree + 9, kOldest = kTree + 13, kBlocked = kTree + 17;
constexpr std::size_t kNumEnds = kTree + 18, kEnds = kNumEnds + 8, kNumSlabs = kEnds + 8;
constexpr std::size_t kUsed = kNumSlabs + 4, kHot = kUsed + 4, kParents = kHot + 12 * (16 + 8);
constexpr std::size_t kNumPending = kParents + 12, kPending = kNumPending + 8;
constexpr std::size_t kTicket = 25;  // size of one without children: leaf, handles, value, ...
constexpr std::size_t kTold = kPending + 2 * kTicket;
constexpr std::size_t kNextTree = kTold + kTicket + 16;
constexpr std::size_t kFailed = 16, kReady = 28;  // before the end

constexpr std::size_t total(std::size_t node) { return kHot + 16 * node; }
constexpr std::size_t counts(std::size_t node) { return total(node) + 8; }
constexpr std::size_t link(std::size_t node) { return total(node) + 12; }
}  // namespace at

template <typename T>
T read(const tercet::Bytes& bytes, std::size_t where) {
  T value;
  std::memcpy(&value, bytes.data() + where, sizeof(T));
  return value;
}

struct Change {
  template <typename T>
  Change(std::size_t at, T value) : where(at), bytes(sizeof(T)) {
    std::memcpy(bytes.data(), &value, sizeof(T));
  }
  std::size_t where;
  std::vector<std::uint8_t> bytes;
};

// Whether the altered snapshot is refused for this reason.
bool refused(tercet::Bytes bytes, const std::vector<Change>& changes, const std::string& why) {
  for (const Change& change : changes) {
    CHECK(change.where + change.bytes.size() <= bytes.size());
    std::copy(change.bytes.begin(), change.bytes.end(),
              bytes.begin() + static_cast<std::ptrdiff_t>(change.where));
  }
  reseal(bytes);
  try {
    (void)Snapshot::restore(bytes);
  } catch (const SnapshotError& e) {
    if (std::string(e.what()).find(why) != std::string::npos) return true;
    std::fprintf(stderr, "%s, not %s\n", e.what(), why.c_str());
    return false;
  }
  std::fprintf(stderr, "accepted, not %s\n", why.c_str());
  return false;
}

void contradictions_are_refused() {
  using u8 = std::uint8_t;
  using u32 = std::uint32_t;
  using u64 = std::uint64_t;
  const tercet::Bytes bytes = small();
  const std::size_t size = bytes.size();
  CHECK(read<u64>(bytes, at::kTrees) == 3 && read<u32>(bytes, at::kUsed) == 12);
  CHECK(read<u64>(bytes, at::kNumPending) == 3 && read<u32>(bytes, at::kTold) == 7);
  CHECK(read<u64>(bytes, size - at::kFailed) == 1 && read<u64>(bytes, size - at::kReady) == 1);
  const u32 last = 1, pending = 2, end = 1u << 31, visit = 1u << 8;
  const double nan = std::nan("");
  const double great = 1.1 * tercet::kMaxValue;
  const auto refuses = [&](const std::vector<Change>& changes, const std::string& why) {
    CHECK(refused(bytes, changes, why));
  };

  refuses({{at::kConfig, -1.0}}, "a setting");
  refuses({{at::kTrees, u64{1} << 40}}, "too many trees");
  refuses({{at::kNumEnds, u64{1} << 61}}, "a list is too long");
  refuses({{at::kEnds, great}}, "a value is out of its range");
  refuses({{at::kEnds, nan}}, "a value is out of its range");
  const std::string counts = "the counts of a tree";
  refuses({{at::kSimulations, u32{0}},
           {at::kBegun, u32{0}},
           {at::kCommitted, u32{0}},
           {at::kOldest, u32{0}}},
          counts);
  refuses({{at::kSimulations, tercet::kMaxVisits + 1}}, counts);
  refuses({{at::kSimulations, u32{4}}}, counts);
  refuses({{at::kBegun, u32{1}}}, counts);
  refuses({{at::kOldest, u32{3}}}, counts);

  refuses({{at::kNumSlabs, u32{0}}}, "outside its tree");
  for (const u32 used : {0u, 10u, 68u}) refuses({{at::kUsed, used}}, "the size of a slab");
  refuses({{at::total(5), 1.01 * tercet::kMaxValue * tercet::kMaxVisits}}, "out of its range");
  refuses({{at::total(5), nan}}, "out of its range");
  refuses({{at::link(8), u32{0}}}, "has no end");
  refuses({{at::link(0), 68u << 1 | last}}, "outside its tree");
  refuses({{at::link(0), 16u << 1 | last}}, "outside its tree");
  refuses({{at::link(4), end | 1u << 3}}, "an end has no value");
  refuses({{at::counts(4), u32{0}}}, "the counts of a leaf");
  refuses({{at::counts(8), visit | 0u}}, "the counts of a leaf");
  refuses({{at::counts(8), 1u}}, "the counts of a leaf");
  refuses({{at::link(8), pending | last}}, "the counts of a leaf");
  refuses({{at::link(9), last}}, "a node of no block");
  refuses({{at::link(10), pending}}, "a node of no block");
  refuses({{at::counts(11), 1u}}, "a node of no block");
  refuses({{at::kParents + 8, u32{4}}}, "siblings have two parents");
  refuses({{at::kParents + 4, u32{64}}}, "outside its tree");
  refuses({{at::kParents, u32{4}}}, "the counts of a root");
  refuses({{at::link(0), 8u << 1}, {at::link(1), last}}, "the counts of a root");
  refuses({{at::kCommitted, u32{3}}, {at::kBegun, u32{6}}}, "the counts of a root");
  refuses({{at::kBegun, u32{6}}}, "the counts of a root");
  const std::string child = "not its parent's child";
  refuses({{at::kParents + 4, u32{4}}, {at::kParents + 8, u32{4}}}, child);  // of itself
  refuses({{at::link(0), 12u << 1 | last}}, child);
  refuses({{at::kParents + 4, u32{1}}, {at::kParents + 8, u32{1}}}, child);
  refuses({{at::counts(0), 3 * visit | 3}, {at::kCommitted, u32{3}}, {at::kBegun, u32{6}}},
          "the counts of children");
  refuses({{at::counts(0), 2 * visit | 4}, {at::kBegun, u32{6}}}, "the counts of children");
  refuses({{at::link(8), 8u << 1 | last}}, "children are missing");

  refuses({{at::kNumPending, u64{2}}}, "the number of tickets");
  refuses({{at::kConfig + 8, u32{2}}}, "the number of tickets");
  refuses({{at::kPending, u32{8}}}, "a ticket's leaf does not wait");
  refuses({{at::kPending, u32{64}}}, "outside its tree");
  refuses({{at::kPending, u32{6}}}, "two tickets have one leaf");
  refuses({{at::kTold + 12 + 16, great}}, "what was told");
  refuses({{at::kTold + 12 + 16, nan}}, "what was told");
  refuses({{at::kPending + 20, u32{0}}}, "what was told");
  refuses({{at::kPending + 20, read<u32>(bytes, at::kMaxAttempts) + 1}}, "what was told");
  for (const u8 state : {1, 4}) refuses({{at::kPending + 24, state}}, "the state of a ticket");
  refuses({{at::kPending + 24, u8{3}}}, "waits for what was told");
  refuses({{at::kBlocked, u8{1}}, {at::kConfig + 8, u32{4}}, {at::kPending + 24, u8{3}}},
          "waits for what was told");
  refuses({{at::kNextTree + 17, u8{1}}}, "a tree waits for nothing");

  const std::size_t ready = size - at::kFailed - 4, failed = size - 8;
  for (const u32 id : {0u, 2u, 3u}) {
    refuses({{ready, id}}, id == 0 ? "a tree is forgotten" : "a queue names no tree");
  }
  refuses({{failed, u64{3} << 32}}, "a queue names no tree");
  refuses({{failed, u64{2} << 32}}, "a queue names no tree");
  refuses({{failed, u64{0}}}, "names no ticket");
  refuses({{failed, u64{2}}}, "names no ticket");
  for (u64 ticket = 5; ticket < 12; ++ticket) refuses({{failed, ticket}}, "names no ticket");
  refuses({{at::kPending + 24, u8{2}}}, "a failed ticket is forgotten");
}

// A root, its child and a child of that, where the last two have changed places.
void children_before_their_parents_are_refused() {
  Forest forest({});
  forest.add_tree(7, 20);
  const std::int64_t handle = 1;
  const double value = 0.5;
  const std::uint32_t one = 1;
  for (int round = 0; round < 2; ++round) {
    const Leaves leaves = forest.ask(1);
    forest.tell({leaves.ticket, {&value, 1}, {&one, 1}, {&handle, 1}});
  }
  const tercet::Bytes bytes = Snapshot::of(forest);
  const std::size_t hot = at::kHot - 8, parents = at::kParents - 8;  // there are no ends
  CHECK(read<std::uint32_t>(bytes, hot + 12) == (8u << 1 | 1));
  CHECK(read<std::uint32_t>(bytes, hot + 4 * 16 + 12) == (12u << 1 | 1));
  CHECK(refused(bytes,
                {{hot + 12, 12u << 1 | 1},
                 {hot + 4 * 16, 0.0},
                 {hot + 4 * 16 + 8, 0u},
                 {hot + 4 * 16 + 12, 1u},
                 {hot + 8 * 16, 0.5},
                 {hot + 8 * 16 + 8, 1u << 8},
                 {hot + 8 * 16 + 12, 8u << 1 | 1},
                 {parents + 4, 8u},
                 {parents + 8, 0u}},
                "not its parent's child"));
}

void lists_of_the_wrong_length_are_refused() {
  const auto longer = [](std::size_t count, auto value) {
    tercet::Bytes bytes = small();
    const std::size_t where = bytes.size() - count;
    const std::uint64_t two = 2;
    std::memcpy(bytes.data() + where, &two, sizeof(two));
    const auto* raw = reinterpret_cast<const std::uint8_t*>(&value);
    bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(where + 8), raw, raw + sizeof(value));
    return bytes;
  };
  CHECK(refused(longer(at::kReady, std::uint32_t{1}), {}, "or one twice"));
  CHECK(refused(longer(at::kFailed, std::uint64_t{3}), {}, "or a ticket twice"));
  tercet::Bytes bytes = small();
  bytes.push_back(0);
  CHECK(refused(bytes, {}, "something follows its end"));
  bytes = small();
  const std::uint64_t many = 65;
  std::memcpy(bytes.data() + at::kTold + 4, &many, sizeof(many));
  const auto handles = bytes.begin() + static_cast<std::ptrdiff_t>(at::kTold + 12);
  bytes.insert(handles, 63 * 8, 0);
  CHECK(refused(bytes, {}, "what was told"));
}

void headers_that_do_not_fit_are_refused() {
  const tercet::Bytes bytes = small();
  const auto why = [&](std::size_t where, std::uint8_t flip) {
    tercet::Bytes altered = bytes;
    altered[where] ^= flip;
    try {
      (void)Snapshot::restore(altered);
    } catch (const SnapshotError& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(why(7, 1).find("does not begin as one") != std::string::npos);
  CHECK(why(8, 1).find("has version 3; this build reads version 2") != std::string::npos);
  CHECK(why(12, 1).find("has version") != std::string::npos);
  const auto low = static_cast<std::uint8_t>(bytes.size() - kHeader);
  for (const int size : {low - 1, low + 1}) {
    const auto flip = static_cast<std::uint8_t>(low ^ size);
    CHECK(why(16, flip).find("is cut off or too long") != std::string::npos);
  }
  CHECK(why(24, 1).find("its checksum differs") != std::string::npos);
  CHECK(why(bytes.size() - 1, 1).find("its checksum differs") != std::string::npos);
}

void too_little_room_is_said() {
  tercet::Bytes bytes = small();
  const std::uint64_t max_bytes = 100;
  std::memcpy(bytes.data() + at::kConfig + 28, &max_bytes, sizeof(max_bytes));
  reseal(bytes);
  CHECK_THROWS(Snapshot::restore(bytes), std::length_error);
}

void a_finished_tree_stays_finished() {
  Forest forest({});
  forest.add_tree(1, 1);
  tell(forest, forest.ask(1).ticket);
  CHECK(Snapshot::restore(Snapshot::of(forest)).counters().finished == 1);
}

// A waiting block of children keeps its slab free after a restart, too.
void room_for_what_waits_is_kept() {
  constexpr std::size_t kSlabs = tercet::Nodes::kChunk / tercet::Nodes::kSlab;
  tercet::ForestConfig config;
  config.max_in_flight = 2;
  config.visits_per_flight = 1;
  config.max_bytes = tercet::Nodes::kChunk * tercet::Nodes::kBytesPerNode;
  Forest forest(config);
  forest.add_tree(1, 20);
  const std::vector<std::int64_t> handles(64);
  const auto tell_one = [&](Forest& into, tercet::Ticket ticket, std::uint32_t children) {
    const double value = 0.5;
    into.tell({{&ticket, 1}, {&value, 1}, {&children, 1}, std::span(handles).first(children)});
  };
  CHECK(forest.ask(9).size() == 1);
  tell_one(forest, 0, 2);
  CHECK(forest.ask(9).size() == 2);
  tell_one(forest, 2, 64);
  for (std::size_t tree = 2; tree < kSlabs; ++tree) forest.add_tree(1, 5);
  Forest again = Snapshot::restore(Snapshot::of(forest));
  CHECK_THROWS(again.add_tree(1, 5), std::length_error);
  tell_one(again, 1, 0);
  CHECK(again.ask(1).size() == 1 && again.counters().waiting == 1);
  config.max_bytes *= 2;
  tercet::Bytes bytes = Snapshot::of(forest);
  std::memcpy(bytes.data() + at::kConfig + 28, &config.max_bytes, sizeof(config.max_bytes));
  reseal(bytes);
  forest = Snapshot::restore(bytes);
  forest.add_tree(1, 5);
  config.max_bytes /= 2;  // now without room for what waits
  bytes = Snapshot::of(forest);
  std::memcpy(bytes.data() + at::kConfig + 28, &config.max_bytes, sizeof(config.max_bytes));
  reseal(bytes);
  CHECK_THROWS(Snapshot::restore(bytes), std::length_error);
}

void files_are_whole() {
  const std::filesystem::path folder = std::filesystem::temp_directory_path() / "tercet_snapshot";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directory(folder);
  const std::filesystem::path path = folder / "forest";
  const Forest forest = half_grown();
  Snapshot::save(forest, path);
  CHECK(Snapshot::of(Snapshot::load(path)) == Snapshot::of(forest));
  CHECK(!std::filesystem::exists(folder / "forest.tmp"));
  using std::filesystem::filesystem_error;
  CHECK_THROWS(Snapshot::load(folder / "none"), filesystem_error);
  CHECK_THROWS(Snapshot::load(folder), filesystem_error);
  CHECK_THROWS(Snapshot::save(forest, folder), filesystem_error);
  CHECK(!std::filesystem::exists(std::filesystem::temp_directory_path() / "tercet_snapshot.tmp"));
  std::filesystem::create_directory(folder / "other.tmp");  // another's, which stays
  CHECK_THROWS(Snapshot::save(forest, folder / "other"), filesystem_error);
  CHECK(std::filesystem::exists(folder / "other.tmp"));
  std::filesystem::remove_all(folder);
}

// Whatever a byte becomes: refused, or a forest that can be used; the sanitizers watch.
void altered_bytes_do_no_harm() {
  const tercet::Bytes bytes = Snapshot::of(half_grown());
  std::mt19937 random(0);
  int refused = 0, ran = 0;
  for (int i = 0; i < 400; ++i) {
    tercet::Bytes altered = bytes;
    for (unsigned n = 0; n <= random() % 3; ++n) {
      altered[kHeader + random() % (altered.size() - kHeader)] =
          static_cast<std::uint8_t>(random());
    }
    reseal(altered);
    try {
      Forest forest = Snapshot::restore(altered);
      for (int round = 0; round < 4; ++round) tell(forest, forest.ask(40).ticket);
      (void)Snapshot::of(forest);
      ran += 1;
    } catch (const SnapshotError&) {
      refused += 1;
    } catch (const std::length_error&) {  // max_bytes
      refused += 1;
    }
  }
  CHECK(refused > 100 && ran > 50);
}

}  // namespace

int main() {
  a_restored_forest_is_the_same();
  every_shorter_file_is_refused();
  contradictions_are_refused();
  children_before_their_parents_are_refused();
  lists_of_the_wrong_length_are_refused();
  headers_that_do_not_fit_are_refused();
  too_little_room_is_said();
  a_finished_tree_stays_finished();
  room_for_what_waits_is_kept();
  files_are_whole();
  altered_bytes_do_no_harm();
}
