#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "tercet/snapshot.hpp"

using tercet::Forest;
using tercet::Leaves;
using tercet::Snapshot;
using tercet::SnapshotError;
using tercet::ticket_of;

namespace {

constexpr std::size_t kHeader = 32;

void tell(Forest& forest, std::span<const tercet::Ticket> tickets) {
  const std::size_t n = tickets.size();
  std::vector<double> values(n);
  std::vector<std::uint32_t> counts(n);
  std::vector<std::int64_t> handles;
  for (std::size_t i = 0; i < n; ++i) {
    values[i] = static_cast<double>(tickets[i] / 2 % 13);
    counts[i] = static_cast<std::uint32_t>(tickets[i] / 2 % 5);
    handles.resize(handles.size() + counts[i], static_cast<std::int64_t>(tickets[i] / 2));
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
  const auto tell_one = [&](std::uint32_t n, std::uint32_t children) {
    const tercet::Ticket ticket = ticket_of(0, n, false);
    const double value = 0.5;
    forest.tell({{&ticket, 1}, {&value, 1}, {&children, 1}, std::span(handles).first(children)});
  };
  const auto ask = [&](std::size_t n) { CHECK(forest.ask(n).size() == n); };
  ask(1);
  tell_one(0, 5);
  ask(2);
  tell_one(1, 0);
  ask(2);
  const tercet::Ticket failed = ticket_of(0, 3, false);
  forest.fail({&failed, 1});
  tell_one(4, 2);
  for (int tree = 1; tree < 3; ++tree) forest.add_tree(8, 20);
  forest.remove_tree(2);
  return Snapshot::of(forest);
}

// Where everything lies in a snapshot, by names as "0.simulations", "0.total.5" (of node 5 of tree
// 0) and "0.pending.2.value": the format of the search core's snapshots, written a second time.
class Map {
 public:
  explicit Map(const tercet::Bytes& bytes) : bytes_(bytes) {
    config();
    const auto trees = count("trees");
    for (std::uint64_t tree = 0; tree < trees; ++tree) this->tree(std::to_string(tree) + ".");
    list("ready", 4);
    list("again", 8);
    CHECK(at_ == bytes.size());
  }

  std::size_t operator[](const std::string& name) const {
    if (!places_.contains(name)) std::fprintf(stderr, "no %s\n", name.c_str());
    return places_.at(name);
  }

 private:
  template <typename T>
  T one(const std::string& name) {
    T value;
    CHECK(at_ + sizeof(T) <= bytes_.size());
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    skip(name, sizeof(T));
    return value;
  }
  std::uint64_t count(const std::string& name) { return one<std::uint64_t>(name); }
  void skip(const std::string& name, std::size_t size) {
    places_[name] = at_;
    at_ += size;
  }
  std::uint64_t list(const std::string& name, std::size_t size) {
    const auto n = count(name);
    for (std::uint64_t i = 0; i < n; ++i) skip(name + "." + std::to_string(i), size);
    return n;
  }
  void doubles(const std::string& prefix, std::initializer_list<const char*> names) {
    for (const char* name : names) skip(prefix + name, 8);
  }

  void config() {
    const auto how = [&](const char* name) { return one<std::uint8_t>(name); };
    skip("rule", 1);
    doubles("", {"c_uct", "c_base", "c_init"});
    skip("first_play", 1);
    doubles("", {"first_play_value"});
    skip("min_max", 1);
    skip("unfinished", 1);
    doubles("", {"virtual_loss"});
    skip("gumbel_considered", 4);
    doubles("", {"gumbel_value_scale", "gumbel_maxvisit_init", "dirichlet_alpha", "fraction"});
    has_priors_ = bytes_[places_["rule"]] >= 2 || bytes_[places_["first_play"]] >= 2;
    skip("backup", 1);
    doubles("", {"gamma"});
    skip("form", 1);
    doubles("", {"outcome_weight", "step_decay", "truncated_outcome"});
    skip("add_start_verdict", 1);
    skip("stop_positives", 4);
    skip("stop_negatives", 4);
    skip("stop_correct", 1);
    skip("stop_converged", 1);
    budget("budget.");
    skip("dual_target", 1);
    const bool widens = one<double>("widening") > 0.0;
    doubles("", {"widening_alpha"});
    for (const char* name : {"max_children"}) skip(name, 4);
    skip("solver", 1);
    skip("merge_duplicates", 1);
    skip("record", 1);
    const bool apart = how("tickets") > 0;
    has_cold_ = apart || widens || bytes_[places_["rule"]] == 3;
    for (const char* name :
         {"max_in_flight", "visits_per_flight", "max_unverified", "max_attempts"}) {
      skip(name, 4);
    }
    doubles("", {"failed_value", "max_bytes"});
    channels_ = list("channels", 10);
    for (int counter = 0; counter < 9; ++counter) skip("counter." + std::to_string(counter), 8);
    cost("spent.");
  }
  void budget(const std::string& of) {
    doubles(of, {"evaluations", "nodes"});
    cost(of);
  }
  void cost(const std::string& of) {
    doubles(of, {"model_calls", "tokens", "tool_calls", "seconds"});
  }

  void tree(const std::string& of) {
    if (one<std::uint8_t>(of + "alive") == 0) return;
    for (const char* name : {"simulations", "begun", "committed"}) skip(of + name, 4);
    skip(of + "stopped", 1);
    skip(of + "blocked", 1);
    for (const char* name : {"oldest", "oldest_expand"}) skip(of + name, 4);
    skip(of + "seed", 8);
    budget(of + "budget.");
    cost(of + "spent.");
    for (const char* name : {"evaluations", "positives", "negatives"}) skip(of + name, 4);
    doubles(of, {"low", "high"});
    list(of + "landings", 4);
    list(of + "script", 4);
    skip(of + "followed", 4);
    const auto ends = count(of + "ends");
    for (std::uint64_t i = 0; i < ends; ++i) {
      const std::string end = of + "end." + std::to_string(i);
      skip(end, 8);
      list(end + ".channels", 8);
    }
    const auto slabs = one<std::uint32_t>(of + "slabs");
    for (std::uint32_t slab = 0; slab < slabs; ++slab) this->slab(of, 64 * slab);
    for (const char* queue : {"pending", "expanding"}) {
      const auto size = count(of + queue);
      for (std::uint64_t i = 0; i < size; ++i) pending(of + queue + "." + std::to_string(i) + ".");
    }
  }

  void slab(const std::string& of, std::uint32_t first) {
    const auto used = one<std::uint32_t>(of + "used." + std::to_string(first / 64));
    const auto column = [&](const char* name, std::size_t size, std::uint32_t step = 1) {
      for (std::uint32_t i = 0; i < used; i += step) {
        skip(of + name + "." + std::to_string(first + i), size);
      }
    };
    for (std::uint32_t i = first; i < first + used; ++i) {
      skip(of + "total." + std::to_string(i), 8);
      skip(of + "counts." + std::to_string(i), 4);
      skip(of + "link." + std::to_string(i), 4);
    }
    column("parent", 4, 4);
    column("handle", 8);
    column("channels", 8 * channels_);
    if (has_priors_) column("prior", 4);
    if (!has_cold_) return;
    for (std::uint32_t i = first; i < first + used; ++i) {
      skip(of + "own." + std::to_string(i), 8);
      skip(of + "verdict." + std::to_string(i), 4);
      skip(of + "full." + std::to_string(i), 1);
      skip(of + "misses." + std::to_string(i), 1);
    }
  }

  void pending(const std::string& of) {
    skip(of + "leaf", 4);
    list(of + "handles", 8);
    skip(of + "value", 8);
    skip(of + "attempts", 4);
    skip(of + "state", 1);
    if (one<std::uint8_t>(of + "details") == 0) return;
    list(of + "priors", 4);
    list(of + "terminal", 1);
    list(of + "channels", 8);
    list(of + "verdicts", 8);
    skip(of + "outcome", 8);
    cost(of + "cost.");
    if (one<std::uint8_t>(of + "has_steps") != 0) skip(of + "steps", 4);
    if (one<std::uint8_t>(of + "has_start") != 0) skip(of + "start", 8);
  }

  const tercet::Bytes& bytes_;
  std::size_t at_{kHeader};
  std::uint64_t channels_{0};
  bool has_priors_{false};
  bool has_cold_{false};
  std::map<std::string, std::size_t> places_;
};

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

// Changes at places by name; what they refuse.
class Case {
 public:
  explicit Case(tercet::Bytes bytes) : bytes_(std::move(bytes)), map_(bytes_) {}

  template <typename T>
  [[nodiscard]] T get(const std::string& name) const {
    return read<T>(bytes_, map_[name]);
  }
  template <typename T>
  [[nodiscard]] Change set(const std::string& name, T value) const {
    return {map_[name], value};
  }
  void refuses(const std::vector<Change>& changes, const std::string& why) const {
    CHECK(refused(bytes_, changes, why));
  }
  template <typename T>
  void refuses(const std::string& name, T value, const std::string& why) const {
    CHECK(refused(bytes_, {set(name, value)}, why));
  }
  // One more element, at the head of a list.
  template <typename T>
  void refuses_more(const std::string& list, T value, const std::string& why) const {
    tercet::Bytes longer = bytes_;
    const std::uint64_t more = get<std::uint64_t>(list) + 1;
    std::memcpy(longer.data() + map_[list], &more, sizeof(more));
    const auto* raw = reinterpret_cast<const std::uint8_t*>(&value);
    const auto head = longer.begin() + static_cast<std::ptrdiff_t>(map_[list] + 8);
    longer.insert(head, raw, raw + sizeof(value));
    CHECK(refused(longer, {}, why));
  }

 private:
  tercet::Bytes bytes_;
  Map map_;
};

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr u32 kLast = 1, kAsked = 2, kClosed = 4, kEnd = 1u << 31, kVisit = 1u << 8;
constexpr double kGreat = 1.1 * tercet::kMaxValue;
const double kNan = std::nan("");

constexpr u32 link_to(u32 first_child) { return (first_child + 4) << 1; }

void contradictions_are_refused() {
  const Case c(small());
  CHECK(c.get<u64>("trees") == 3 && c.get<u32>("0.used.0") == 12);
  CHECK(c.get<u64>("0.pending") == 3 && c.get<u32>("0.pending.2.leaf") == 7);
  CHECK(c.get<u64>("again") == 1 && c.get<u64>("ready") == 1);
  CHECK(c.get<u32>("0.link.0") == (link_to(4) | kLast));

  for (const double bad : {-1.0, kNan}) c.refuses("c_uct", bad, "a setting");
  c.refuses("rule", u8{4}, "a choice is not one of its names");
  c.refuses("tickets", u8{3}, "a choice is not one of its names");
  c.refuses("0.stopped", u8{8}, "a choice is not one of its names");
  c.refuses("trees", u64{1} << 40, "a list is too long");
  c.refuses("channels", u64{1} << 40, "a list is too long");
  c.refuses("0.ends", u64{1} << 61, "a list is too long");
  c.refuses("0.end.0", kGreat, "a value is out of its range");
  c.refuses("0.end.0", kNan, "an end has no value");
  c.refuses_more("0.end.0.channels", 0.5, "the channels of a value");
  const std::string counts = "the counts of a tree";
  c.refuses({c.set("1.simulations", u32{0})}, counts);
  c.refuses("0.simulations", tercet::kMaxVisits + 1, counts);
  c.refuses("0.simulations", u32{4}, counts);
  c.refuses("0.begun", u32{1}, counts);
  c.refuses("0.followed", u32{1}, counts);
  c.refuses("0.budget.tokens", 0.0, "a setting");
  c.refuses("budget.tokens", -1.0, "a setting");
  for (const double bad : {-1.0, kNan}) c.refuses("0.spent.tool_calls", bad, "the cost of a tree");
  for (const double bad : {-1.0, kNan}) c.refuses("spent.seconds", bad, "the cost of a forest");
  for (const char* bound : {"0.low", "0.high"}) c.refuses(bound, kNan, "the bounds of a tree");

  c.refuses("0.slabs", u32{0}, "outside its tree");
  for (const u32 used : {0u, 10u, 68u}) c.refuses("0.used.0", used, "the size of a slab");
  c.refuses("0.total.5", 1.01 * tercet::kMaxValue * tercet::kMaxVisits, "out of its range");
  c.refuses("0.total.5", kNan, "out of its range");
  c.refuses("0.link.8", u32{0}, "has no end");
  c.refuses("0.link.0", link_to(68) | kLast, "outside its tree");
  for (const u32 first : {12u, 16u})
    c.refuses("0.link.0", link_to(first) | kLast, "outside its tree");
  c.refuses("0.link.4", kEnd | 1u << 3, "an end has no value");
  c.refuses("0.link.4", u32{0}, "the counts of a leaf");
  c.refuses("0.counts.8", kVisit, "the counts of a leaf");
  c.refuses("0.link.9", kLast, "a node of no block");
  c.refuses("0.link.10", kAsked, "a node of no block");
  c.refuses("0.link.10", kClosed, "a node of no block");
  c.refuses("0.link.10", link_to(4), "a node of no block");
  for (const u32 one : {1u, kVisit}) c.refuses("0.counts.11", one, "a node of no block");
  c.refuses("0.total.11", 0.5, "a node of no block");
  c.refuses("0.parent.8", u32{4}, "siblings have two parents");
  c.refuses("0.parent.4", u32{64}, "outside its tree");
  c.refuses("0.parent.0", u32{4}, "the counts of a root");
  c.refuses({c.set("0.link.0", link_to(4)), c.set("0.link.1", kLast)}, "too many children");
  c.refuses("max_children", u32{4}, "too many children");
  c.refuses({c.set("0.committed", u32{3}), c.set("0.begun", u32{6})}, "the counts of a root");
  const std::string child = "not its parent's child";
  c.refuses({c.set("0.parent.4", u32{4}), c.set("0.parent.8", u32{4})}, child);  // of itself
  c.refuses("0.link.0", link_to(8) | kLast, child);
  c.refuses({c.set("0.parent.4", u32{1}), c.set("0.parent.8", u32{1})}, child);
  c.refuses(
      {c.set("0.counts.0", 3 * kVisit | 3), c.set("0.committed", u32{3}), c.set("0.begun", u32{6})},
      "the counts of children");
  c.refuses({c.set("0.counts.0", u32{3}), c.set("0.committed", u32{0}), c.set("0.begun", u32{3})},
            "the counts of children");
  c.refuses("0.link.8", link_to(4) | kLast, "children are missing");

  const std::string flights = "the counts of visits on their way";
  c.refuses("0.counts.8", 1u, flights);
  c.refuses("0.counts.5", 0u, flights);
  c.refuses("0.counts.0", 2 * kVisit | 4, flights);
  c.refuses("0.link.8", kAsked | kLast, "a leaf waits for no ticket");
  c.refuses("0.link.0", link_to(4) | kAsked | kLast, "a leaf waits for no ticket");
  for (const char* node : {"0.link.5", "0.link.4"}) {  // an open one, and an end
    c.refuses(node, c.get<u32>(node) | kClosed, "what is known of a node");
  }

  c.refuses("0.begun", u32{6}, "the number of tickets");
  for (const char* oldest : {"0.oldest", "0.oldest_expand"}) {  // more than a ticket can say
    c.refuses(oldest, u32{1} << 31, "the number of tickets");
    c.refuses(oldest, ~u32{0}, "the number of tickets");
  }
  c.refuses("0.pending", u64{2}, "the number of tickets");
  c.refuses("max_in_flight", u32{2}, "the number of tickets");
  c.refuses("0.pending.0.leaf", u32{8}, "a ticket's leaf does not wait");
  c.refuses("0.pending.0.leaf", u32{4}, "a ticket's leaf does not wait");  // an end
  c.refuses("0.pending.0.leaf", u32{64}, "outside its tree");
  c.refuses("0.pending.0.leaf", u32{6}, "two tickets have one leaf");
  for (const double bad : {kGreat, kNan}) c.refuses("0.pending.2.value", bad, "what was told");
  c.refuses("0.pending.0.attempts", u32{0}, "what was told");
  c.refuses("0.pending.0.attempts", c.get<u32>("max_attempts") + 1, "what was told");
  c.refuses("0.pending.0.state", u8{1}, "the state of a ticket");
  c.refuses("0.pending.0.state", u8{5}, "a choice is not one of its names");
  const std::string waits = "waits for what was told";
  for (const u8 state : {u8{3}, u8{4}}) {  // told, cancelled
    c.refuses("0.pending.0.state", state, waits);
    c.refuses({c.set("0.blocked", u8{1}), c.set("max_in_flight", u32{4}),
               c.set("0.pending.0.state", state)},
              waits);
  }
  c.refuses("1.blocked", u8{1}, "a tree waits for nothing");

  for (const u32 id : {0u, 2u, 3u}) {
    c.refuses("ready.0", id, id == 0 ? "a tree is forgotten" : "a queue names no tree");
  }
  c.refuses("again.0", ticket_of(3, 0, false), "a queue names no tree");
  c.refuses("again.0", ticket_of(2, 0, false), "a queue names no tree");
  for (u64 ticket = 0; ticket < 24; ++ticket) {
    if (ticket != ticket_of(0, 3, false)) c.refuses("again.0", ticket, "names no ticket");
  }
  c.refuses("0.pending.0.state", u8{2}, "again is forgotten");
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
  const Case c(Snapshot::of(forest));
  CHECK(c.get<u32>("0.link.0") == (link_to(4) | kLast));
  CHECK(c.get<u32>("0.link.4") == (link_to(8) | kLast));
  c.refuses(
      {c.set("0.link.0", link_to(8) | kLast), c.set("0.total.4", 0.0), c.set("0.counts.4", 0u),
       c.set("0.link.4", kLast), c.set("0.total.8", 0.5), c.set("0.counts.8", kVisit),
       c.set("0.link.8", link_to(4) | kLast), c.set("0.parent.4", 8u), c.set("0.parent.8", 0u)},
      "not its parent's child");
}

constexpr tercet::Ticket verify(u32 n) { return ticket_of(0, n, false); }
constexpr tercet::Ticket expand(u32 n) { return ticket_of(0, n, true); }

// A root with children 4 to 7.  Tickets for values are out at 6, an end, of whose three steps one
// has a verdict, and told at 7; of those to expand, one is out at 4 and one told at 5.
tercet::Bytes lazy() {
  tercet::ForestConfig config;
  config.select.rule = tercet::Rule::kPuct;
  config.tickets = tercet::TicketMode::kLazy;
  config.backup.channels = {{tercet::Source::kStep, {}}, {tercet::Source::kTotal, {}}};
  config.max_in_flight = 2;
  config.visits_per_flight = 1;
  config.max_unverified = 3;
  Forest forest(config);
  forest.add_tree(7, 20);
  const auto tell_children = [&](tercet::Ticket ticket, std::vector<std::int64_t> handles,
                                 std::vector<float> priors, std::vector<u8> terminal) {
    const auto n = static_cast<u32>(handles.size());
    forest.tell_children({{&ticket, 1}, {}, {&n, 1}, handles, priors, terminal});
  };
  const auto tell_value = [&](tercet::Ticket ticket) {
    const double value = 0.5, channels[] = {0.25, 0.75};
    forest.tell_values({{&ticket, 1}, {&value, 1}, {}, {}, {}, {}, {}, channels});
  };
  const auto ask = [&](std::size_t n) { CHECK(forest.ask(9).size() == n); };
  ask(1);
  tell_children(expand(0), {10, 11, 12, 13}, {0.25f, 0.25f, 0.25f, 0.25f}, {0, 0, 1, 0});
  ask(3);
  tell_value(verify(0));
  ask(1);
  tell_value(verify(1));
  ask(2);
  const tercet::Ticket ticket = verify(2);
  const u32 step = 1, steps = 3;
  const double verdict = 0.5, outcome = 1.0, start = 0.25;
  forest.tell_verdicts({{&ticket, 1}, {&step, 1}, {&verdict, 1}});
  forest.tell_outcome({{&ticket, 1}, {&steps, 1}, {&outcome, 1}, {&start, 1}});
  tell_value(verify(3));
  tell_children(expand(2), {20, 21}, {0.5f, 0.5f}, {0, 1});
  return Snapshot::of(forest);
}

void parts_of_answers_are_checked() {
  const Case c(lazy());
  CHECK(c.get<u64>("0.pending") == 2 && c.get<u64>("0.expanding") == 2);
  CHECK(c.get<u32>("0.pending.0.leaf") == 6 && c.get<u32>("0.expanding.1.leaf") == 5);
  c.refuses_more("0.end.0.channels", 0.5, "the channels of a value");
  c.refuses("0.end.0", 0.5, "the channels of a value");
  for (const float bad : {-1.0f, std::nanf("")}) c.refuses("0.prior.4", bad, "a prior");
  c.refuses("0.own.4", kGreat, "a value is out of its range");
  const double too_great = 2 * tercet::kMaxValue * tercet::kMaxVisits;
  for (const double bad : {kNan, too_great, -too_great}) {
    c.refuses("0.channels.4", bad, "a value is out of its range");
  }
  c.refuses("0.full.4", u8{1}, "gets no more children");
  c.refuses("0.full.0", u8{1}, "gets no more children");  // nothing widens
  const std::string no_block = "a node of no block";
  for (const char* column : {"0.total.1", "0.channels.1", "0.own.2"}) {
    c.refuses(column, 0.5, no_block);
  }
  c.refuses("0.verdict.3", 0.5f, no_block);
  for (const char* column : {"0.full.3", "0.misses.3"}) c.refuses(column, u8{1}, no_block);
  c.refuses({c.set("0.pending.0.leaf", u32{1}), c.set("0.counts.6", u32{0})}, no_block);
  c.refuses("0.counts.6", kVisit | 1u, "an end has no value");
  c.refuses("0.counts.4", 2 * kVisit | 1u, "the counts of a leaf");
  c.refuses("0.expanding.0.leaf", u32{6}, "a ticket's leaf does not wait");  // an end
  c.refuses("0.expanding.0.leaf", u32{7}, "a ticket's leaf does not wait");
  c.refuses("0.expanding.0.leaf", u32{0}, "a ticket's leaf does not wait");  // has children
  c.refuses("0.expanding.0.leaf", u32{5}, "two tickets have one leaf");
  c.refuses("max_unverified", u32{1}, "the number of tickets");
  c.refuses("max_in_flight", u32{1}, "the number of tickets");

  c.refuses_more("0.pending.1.channels", 0.5, "the channels of a value");
  c.refuses("0.pending.1.channels.0", kGreat, "a value is out of its range");
  c.refuses_more("0.pending.0.channels", 0.5, "the channels of a value");  // not told yet
  c.refuses_more("0.expanding.1.channels", 0.5, "the channels of a value");
  c.refuses("0.pending.1.state", u8{0}, "the channels of a value");
  const std::string parts = "the parts of a value";
  c.refuses("0.pending.0.verdicts.1", 1.5, parts);
  c.refuses("0.pending.0.outcome", -1.5, parts);
  for (const double bad : {1.5, kNan}) c.refuses("0.pending.0.start", bad, parts);
  c.refuses("0.pending.0.cost.tokens", -1.0, parts);
  c.refuses("0.pending.0.steps", u32{4}, parts);
  c.refuses_more("0.pending.0.verdicts", 0.5, parts);
  c.refuses_more("0.expanding.1.verdicts", 0.5, parts);
  c.refuses({c.set("0.pending.0.verdicts.0", 0.5), c.set("0.pending.0.verdicts.2", -0.5)},
            "a value that is complete");
  const std::string children = "the children that a ticket was told";
  c.refuses_more("0.expanding.1.priors", 0.5f, children);
  c.refuses_more("0.expanding.1.terminal", u8{0}, children);
  c.refuses("0.expanding.1.priors.1", -0.5f, children);
  c.refuses("0.expanding.1.priors.1", std::nanf(""), children);
  c.refuses_more("0.pending.0.handles", std::int64_t{1}, "what was told of a ticket");
  c.refuses("max_children", u32{1}, "too many children");
  c.refuses("0.expanding.0.state", u8{3}, "waits for what was told");
}

void a_known_tree_has_ended() {
  tercet::ForestConfig config;
  config.solver = true;
  Forest forest(config);
  forest.add_tree(7, 20);
  const double value = 0.5;
  const u32 none = 0;
  forest.tell({forest.ask(1).ticket, {&value, 1}, {&none, 1}, {}});
  const Case c(Snapshot::of(forest));
  CHECK(c.get<u8>("0.stopped") == static_cast<u8>(tercet::StopReason::kClosed));
  c.refuses("0.stopped", u8{0}, "a tree that is known goes on");
  c.refuses("0.link.0", c.get<u32>("0.link.0") & ~kClosed, "what is known of a node");
  c.refuses("solver", u8{0}, "what is known of a node");
}

void lists_of_the_wrong_length_are_refused() {
  const Case c(small());
  c.refuses_more("ready", u32{1}, "or one twice");
  c.refuses_more("again", ticket_of(0, 3, false), "or a ticket twice");
  tercet::Bytes bytes = small();
  bytes.push_back(0);
  CHECK(refused(bytes, {}, "something follows its end"));
  bytes = small();
  const Map map(bytes);
  const std::uint64_t many = 65;
  std::memcpy(bytes.data() + map["0.pending.2.handles"], &many, sizeof(many));
  const auto handles = static_cast<std::ptrdiff_t>(map["0.pending.2.handles"] + 8);
  bytes.insert(bytes.begin() + handles, 63 * 8, 0);
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
  std::memcpy(bytes.data() + Map(bytes)["max_bytes"], &max_bytes, sizeof(max_bytes));
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
  tell_one(forest, ticket_of(0, 0, false), 2);
  CHECK(forest.ask(9).size() == 2);
  tell_one(forest, ticket_of(0, 2, false), 64);
  for (std::size_t tree = 2; tree < kSlabs; ++tree) forest.add_tree(1, 5);
  Forest again = Snapshot::restore(Snapshot::of(forest));
  CHECK_THROWS(again.add_tree(1, 5), std::length_error);
  tell_one(again, ticket_of(0, 1, false), 0);
  CHECK(again.ask(1).size() == 1 && again.counters().waiting == 1);
  config.max_bytes *= 2;
  tercet::Bytes bytes = Snapshot::of(forest);
  std::memcpy(bytes.data() + Map(bytes)["max_bytes"], &config.max_bytes, sizeof(config.max_bytes));
  reseal(bytes);
  forest = Snapshot::restore(bytes);
  forest.add_tree(1, 5);
  config.max_bytes /= 2;  // now without room for what waits
  bytes = Snapshot::of(forest);
  std::memcpy(bytes.data() + Map(bytes)["max_bytes"], &config.max_bytes, sizeof(config.max_bytes));
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
  parts_of_answers_are_checked();
  a_known_tree_has_ended();
  lists_of_the_wrong_length_are_refused();
  headers_that_do_not_fit_are_refused();
  too_little_room_is_said();
  a_finished_tree_stays_finished();
  room_for_what_waits_is_kept();
  files_are_whole();
  altered_bytes_do_no_harm();
}
