#include "tercet/snapshot.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <type_traits>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace tercet {

static_assert(std::endian::native == std::endian::little, "snapshots are little-endian");

namespace {

constexpr char kMagic[8] = {'t', 'e', 'r', 'c', 'e', 't', 'F', '\n'};
constexpr std::size_t kHeader = 32;

void stir(std::uint64_t& sum, std::uint64_t word) {
  sum = (sum ^ word) * 0xff51afd7ed558ccdu;
  sum ^= sum >> 32;
}

// Of blocks of four 64-bit words, each word of which goes to a sum of its own, so that the
// processor need not wait; what is missing from the last block counts as zeros.
std::uint64_t checksum(std::span<const std::uint8_t> bytes) {
  std::uint64_t sums[4] = {1, 2, 3, 4};
  for (std::size_t i = 0; i < bytes.size(); i += 32) {
    std::uint64_t words[4] = {};
    std::memcpy(words, bytes.data() + i, std::min<std::size_t>(32, bytes.size() - i));
    for (int lane = 0; lane < 4; ++lane) stir(sums[lane], words[lane]);
  }
  std::uint64_t sum = bytes.size();
  for (const std::uint64_t lane : sums) stir(sum, lane);
  return sum;
}

[[noreturn]] void refuse(const std::string& why) { throw SnapshotError("Forest: snapshot " + why); }

void require(bool holds, const char* what) {
  if (!holds) refuse(std::string("is damaged: ") + what);
}

// Writer and Reader have the same calls, so that one function describes both directions.
class Writer {
 public:
  template <typename T>
  void all(const T* values, std::size_t n) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (n == 0) return;
    const std::size_t at = bytes.size();
    bytes.resize(at + n * sizeof(T));
    std::memcpy(bytes.data() + at, values, n * sizeof(T));
  }
  template <typename T>
  void one(const T& value) {
    static_assert(std::is_arithmetic_v<T>);
    all(&value, 1);
  }
  template <typename T>
  void size(const T& value) {
    one(std::uint64_t{value});
  }
  template <typename Enum>
  void choice(const Enum& value, Enum) {
    one(static_cast<std::uint8_t>(value));
  }
  template <typename List>
  void list(const List& values) {
    size(values.size());
    for (const auto& value : values) one(value);
  }

  Bytes bytes;
};

class Reader {
 public:
  explicit Reader(std::span<const std::uint8_t> bytes) : left_(bytes) {}
  template <typename T>
  void all(T* values, std::size_t n) {
    require(n <= left_.size() / sizeof(T), "it ends too early");
    if (n > 0) std::memcpy(static_cast<void*>(values), left_.data(), n * sizeof(T));
    left_ = left_.subspan(n * sizeof(T));
  }
  void one(bool& value) { value = get<std::uint8_t>() != 0; }
  template <typename T>
  void one(T& value) {
    all(&value, 1);
  }
  template <typename T>
  void size(T& value) {
    value = static_cast<T>(get<std::uint64_t>());
  }
  template <typename Enum>
  void choice(Enum& value, Enum last) {
    const auto number = get<std::uint8_t>();
    require(number <= static_cast<std::uint8_t>(last), "a choice is not one of its names");
    value = static_cast<Enum>(number);
  }
  template <typename T>
  void list(std::vector<T>& values) {
    values.resize(length(sizeof(T)));
    all(values.data(), values.size());
  }
  // Of a list whose elements take up at least so many bytes.
  std::size_t length(std::size_t least) {
    const auto n = get<std::uint64_t>();
    require(n <= left_.size() / least, "a list is too long");
    return n;
  }
  template <typename T>
  T get() {
    T value;
    all(&value, 1);
    return value;
  }
  [[nodiscard]] bool done() const { return left_.empty(); }

 private:
  std::span<const std::uint8_t> left_;
};

template <typename Io, typename Select>
void select_fields(Io& io, Select& c) {
  io.choice(c.rule, Rule::kGumbel);
  io.one(c.c_uct);
  io.one(c.c_base);
  io.one(c.c_init);
  io.choice(c.first_play, FirstPlay::kPrior);
  io.one(c.first_play_value);
  io.choice(c.min_max, MinMax::kTree);
  io.choice(c.unfinished, Unfinished::kVirtualLoss);
  io.one(c.virtual_loss);
  io.one(c.gumbel_considered);
  io.one(c.gumbel_value_scale);
  io.one(c.gumbel_maxvisit_init);
  io.one(c.dirichlet_alpha);
  io.one(c.dirichlet_fraction);
}

template <typename Io, typename C>
void reward_fields(Io& io, C& c) {
  io.choice(c.form, RewardForm::kReleased);
  io.one(c.outcome_weight);
  io.one(c.step_decay);
  io.one(c.truncated_outcome);
  io.one(c.add_start_verdict);
}

template <typename Io, typename B>
void budget_fields(Io& io, B& b) {
  io.one(b.evaluations);
  io.one(b.nodes);
  io.one(b.model_calls);
  io.one(b.tokens);
  io.one(b.tool_calls);
  io.one(b.seconds);
}

template <typename Io, typename C>
void cost_fields(Io& io, C& c) {
  io.one(c.model_calls);
  io.one(c.tokens);
  io.one(c.tool_calls);
  io.one(c.seconds);
}

template <typename Io, typename C>
void channel_fields(Io& io, C& c) {
  io.choice(c.source, Source::kTotal);
  io.choice(c.channel.how, Aggregation::kLast);
  io.one(c.channel.gamma);
}

template <typename Io, typename C>
void config_fields(Io& io, C& c) {
  select_fields(io, c.select);
  io.choice(c.backup.how, Backup::kChildren);
  io.one(c.backup.gamma);
  reward_fields(io, c.reward);
  io.one(c.stop.positives);
  io.one(c.stop.negatives);
  io.one(c.stop.correct);
  io.one(c.stop.converged);
  budget_fields(io, c.budget);
  io.one(c.dual_target);
  io.one(c.widening);
  io.one(c.widening_alpha);
  io.one(c.max_children);
  io.one(c.solver);
  io.one(c.merge_duplicates);
  io.one(c.record);
  io.choice(c.tickets, TicketMode::kLazy);
  io.one(c.max_in_flight);
  io.one(c.visits_per_flight);
  io.one(c.max_unverified);
  io.one(c.max_attempts);
  io.one(c.failed_value);
  io.size(c.max_bytes);
}

template <typename Io, typename C>
void counter_fields(Io& io, C& c) {
  for (const auto counter : {&Counters::simulations, &Counters::evaluations, &Counters::expansions,
                             &Counters::failures, &Counters::given_up, &Counters::cancelled,
                             &Counters::merged, &Counters::positives, &Counters::negatives}) {
    io.one(c.*counter);
  }
  cost_fields(io, c.spent);
}

}  // namespace

// What has access to the insides of a forest.
struct Snapshot::Access {
  using Tree = Forest::Tree;
  using Pending = Forest::Pending;
  using Details = Forest::Details;
  using State = Forest::State;
  using Queue = Forest::Queue;

  template <typename Io, typename T>
  static void tree_fields(Io& io, T& tree) {
    io.one(tree.simulations);
    io.one(tree.begun);
    io.one(tree.committed);
    io.choice(tree.stopped, StopReason::kScript);
    io.one(tree.blocked);
    io.one(tree.pending.oldest);
    io.one(tree.expanding.oldest);
    io.one(tree.seed);
    budget_fields(io, tree.budget);
    cost_fields(io, tree.spent);
    io.one(tree.evaluations);
    io.one(tree.positives);
    io.one(tree.negatives);
    io.one(tree.bounds.low);
    io.one(tree.bounds.high);
    io.list(tree.landings);
    io.list(tree.script);
    io.one(tree.followed);
  }

  template <typename Io, typename D>
  static void detail_fields(Io& io, D& details) {
    io.list(details.priors);
    io.list(details.terminal);
    io.list(details.channels);
    io.list(details.verdicts);
    io.one(details.outcome);
    cost_fields(io, details.cost);
  }

  // Nodes by their local names, slab by slab.
  static void put_nodes(Writer& out, const Nodes& nodes, const Tree& tree) {
    out.one(tree.slabs.count);
    std::uint32_t slab = tree.slabs.first;
    for (std::uint32_t i = 0; i < tree.slabs.count; ++i, slab = nodes.next_[slab]) {
      const std::uint32_t used = slab == tree.slabs.last ? tree.slabs.used : nodes.used_[slab];
      out.one(used);
      const NodeIndex first = slab * Nodes::kSlab;
      HotNode hot[Nodes::kSlab];
      std::copy_n(&nodes.hot(first), used, hot);
      for (HotNode& node : std::span(hot, used)) {
        if (node.has_children()) node.set_first_child(nodes.local(node.first_child()));
      }
      NodeIndex parents[Nodes::kSlab / 4];
      for (std::uint32_t group = 0; group < used / 4; ++group) {
        parents[group] = nodes.local(nodes.parent(first + 4 * group));
      }
      out.all(hot, used);
      out.all(parents, used / 4);
      columns(out, nodes, first, used);
    }
  }

  // What is not read as links.
  template <typename Io, typename N>
  static void columns(Io& io, N& nodes, NodeIndex first, std::uint32_t used) {
    const Nodes::Chunk& chunk = nodes.chunks_[first / Nodes::kChunk];
    const std::size_t at = first % Nodes::kChunk;
    const std::size_t channels = nodes.layout_.channels;
    io.all(chunk.handle + at, used);
    io.all(chunk.channels + at * channels, used * channels);
    if (nodes.layout_.priors) io.all(chunk.prior + at, used);
    if (!nodes.layout_.cold) return;
    for (std::uint32_t i = 0; i < used; ++i) {
      auto& cold = nodes.cold(first + i);
      io.one(cold.own);
      io.one(cold.verdict);
      io.one(cold.is_full);
      io.one(cold.misses);
    }
  }

  // The slabs of a tree, as its local names count them.
  using SlabNames = std::vector<std::uint32_t>;

  static NodeIndex global(const Nodes& nodes, const SlabNames& slabs, std::uint32_t local) {
    require(local / Nodes::kSlab < slabs.size(), "a node lies outside its tree");
    const std::uint32_t slab = slabs[local / Nodes::kSlab];
    require(local % Nodes::kSlab < nodes.used_[slab], "a node lies outside its tree");
    return slab * Nodes::kSlab + local % Nodes::kSlab;
  }

  static SlabNames get_nodes(Reader& in, Nodes& nodes, Tree& tree) {
    const auto count = in.get<std::uint32_t>();
    SlabNames slabs;
    for (std::uint32_t i = 0; i < count; ++i) {
      const auto used = in.get<std::uint32_t>();
      require(used >= 4 && used <= Nodes::kSlab && used % 4 == 0, "the size of a slab");
      slabs.push_back(nodes.open_slab(tree.slabs));
      tree.slabs.used = used;
      nodes.used_[slabs.back()] = static_cast<std::uint8_t>(used);
      const NodeIndex first = slabs.back() * Nodes::kSlab;
      const Nodes::Chunk& chunk = nodes.chunks_[first / Nodes::kChunk];
      in.all(&nodes.hot(first), used);
      in.all(&chunk.parent[first % Nodes::kChunk / 4], used / 4);
      columns(in, nodes, first, used);
    }
    tree.root = global(nodes, slabs, 0);
    return slabs;
  }

  // Blocks fill the slabs, each the children of a node before it, whose visits theirs explain.
  // Local names become indices.
  static void check_nodes(const Forest& forest, Nodes& nodes, Tree& tree, const SlabNames& slabs) {
    std::size_t blocks = 0;
    std::size_t grown = 0;
    std::uint32_t count = 0;
    for (const std::uint32_t slab : slabs) {
      const NodeIndex end = slab * Nodes::kSlab + nodes.used_[slab];
      for (NodeIndex at = slab * Nodes::kSlab; at < end; ++blocks) {
        NodeIndex after = at;
        std::uint32_t visits = 0;
        for (bool last = false; !last; ++after) {
          require(after < end, "a block of children has no end");
          HotNode& node = nodes.hot(after);
          grown += check_node(forest, nodes, tree, slabs, after);
          visits += node.visits();
          last = node.is_last();
        }
        count += after - at;
        require(after - at <= (at == tree.root ? 1 : forest.config_.max_children),
                "a node has too many children");
        const NodeIndex next = at + nodes.room_of(after - at);
        require(next <= end, "a block of children has no end");
        for (; after < next; ++after) require(is_empty(nodes, after), "a node of no block");
        const NodeIndex parent = check_parent(nodes, slabs, at, next);
        if (at == tree.root) {
          require(parent == at && visits == tree.committed, "the counts of a root");
        } else {
          const HotNode& above = nodes.hot(parent);
          require(nodes.local(parent) < nodes.local(at) && above.has_children() &&
                      above.first_child() == at,
                  "a node is not its parent's child");
          require(visits <= above.visits() && above.visits() - visits <= 1,
                  "the counts of children");
        }
        at = next;
      }
    }
    require(blocks == grown + 1, "children are missing");
    tree.nodes = count;
  }

  // Whether it has children.
  static bool check_node(const Forest& forest, Nodes& nodes, const Tree& tree,
                         const SlabNames& slabs, NodeIndex at) {
    HotNode& node = nodes.hot(at);
    require(std::abs(node.total) <= kMaxValue * kMaxVisits, "a value is out of its range");
    for (const double value : nodes.channels(at)) {
      require(std::abs(value) <= kMaxValue * kMaxVisits, "a value is out of its range");
    }
    if (nodes.layout().priors) {
      require(std::isfinite(*nodes.priors(at)) && *nodes.priors(at) >= 0.0f, "a prior");
    }
    if (nodes.layout().cold) {
      const Cold& cold = nodes.cold(at);
      require(std::isnan(cold.own) || std::abs(cold.own) <= kMaxValue,
              "a value is out of its range");
      require(!cold.is_full || (forest.config_.widening > 0.0 && node.has_children()),
              "a node that gets no more children");
    }
    if (node.has_children()) {
      node.set_first_child(global(nodes, slabs, node.first_child()));
      return true;
    }
    if (node.is_terminal()) {
      require(node.end() < tree.ends.size(), "an end has no value");
      require(node.visits() == 0 || !std::isnan(tree.ends[node.end()].value),
              "an end has no value");
    } else {
      const bool may_be_seen = forest.config_.tickets != TicketMode::kTogether;
      require(node.visits() <= (may_be_seen ? 1 : 0), "the counts of a leaf");
    }
    return false;
  }

  // As it was made: a child may come to lie there.
  static bool is_empty(const Nodes& nodes, NodeIndex at) {
    const HotNode& node = nodes.hot(at);
    if (nodes.layout().cold) {
      const Cold& cold = nodes.cold(at);
      if (!std::isnan(cold.own) || !std::isnan(cold.verdict)) return false;
      if (cold.is_full || cold.misses != 0) return false;
    }
    return node.is_leaf() && !node.is_asked() && !node.is_closed() && !node.is_last() &&
           node.expected_visits() == 0 && node.total == 0.0 &&
           std::ranges::all_of(nodes.channels(at), [](double held) { return held == 0.0; });
  }

  // The one parent of a block.
  static NodeIndex check_parent(Nodes& nodes, const SlabNames& slabs, NodeIndex at,
                                NodeIndex after) {
    const Nodes::Chunk& chunk = nodes.chunks_[at / Nodes::kChunk];
    const std::span<NodeIndex> parents(chunk.parent + at % Nodes::kChunk / 4, (after - at) / 4);
    const NodeIndex parent = global(nodes, slabs, parents[0]);
    for (NodeIndex& of_group : parents) {
      require(global(nodes, slabs, of_group) == parent, "siblings have two parents");
      of_group = parent;
    }
    return parent;
  }

  static void put_tree(Writer& out, const Nodes& nodes, const Tree& tree) {
    out.one(tree.alive);
    if (!tree.alive) return;
    tree_fields(out, tree);
    out.size(tree.ends.size());
    for (const Forest::End& end : tree.ends) {
      out.one(end.value);
      out.list(end.channels);
    }
    put_nodes(out, nodes, tree);
    for (const Queue* queue : {&tree.pending, &tree.expanding}) {
      out.size(queue->size());
      for (std::size_t i = 0; i < queue->size(); ++i) put_pending(out, nodes, (*queue)[i]);
    }
  }

  static void put_pending(Writer& out, const Nodes& nodes, const Pending& pending) {
    const bool told = pending.state == State::kTold;
    out.one(nodes.local(pending.path.back()));
    out.list(told ? pending.handles : std::vector<std::int64_t>{});
    out.one(told ? pending.value : 0.0);
    out.one(pending.attempts);
    out.choice(pending.state, State::kCancelled);
    const Details* details = pending.details.get();
    out.one(details != nullptr);
    if (details == nullptr) return;
    detail_fields(out, *details);
    out.one(details->num_steps.has_value());
    if (details->num_steps) out.one(*details->num_steps);
    out.one(details->start_verdict.has_value());
    if (details->start_verdict) out.one(*details->start_verdict);
  }

  static void get_tree(Reader& in, Forest& forest, Tree& tree) {
    in.one(tree.alive);
    if (!tree.alive) return;
    tree_fields(in, tree);
    check_tree(tree);
    tree.has_budget = !tree.budget.is_none();
    tree.ends.resize(in.length(sizeof(double) + sizeof(std::uint64_t)));
    for (Forest::End& end : tree.ends) {
      in.one(end.value);
      in.list(end.channels);
      const double most = forest.config_.backup.how == Backup::kProduct ? 1.0 : kMaxValue;
      require(std::isnan(end.value) || std::abs(end.value) <= most, "a value is out of its range");
      check_channels(forest, end.channels, !std::isnan(end.value));
    }
    const SlabNames slabs = get_nodes(in, forest.nodes_, tree);
    check_nodes(forest, forest.nodes_, tree, slabs);
    check_closed(forest, tree);
    std::vector<std::uint32_t> flights(slabs.size() * Nodes::kSlab);
    std::set<NodeIndex> asked;
    for (Queue* queue : {&tree.pending, &tree.expanding}) {
      get_queue(in, forest, tree, *queue, slabs);
      count_flights(forest, tree, *queue, flights, asked);
    }
    for (const NodeIndex node : forest.nodes_.all(tree.slabs)) {
      const HotNode& hot = forest.nodes_.hot(node);
      require(hot.in_flight() == flights[forest.nodes_.local(node)],
              "the counts of visits on their way");
      require(hot.is_asked() == asked.contains(node), "a leaf waits for no ticket");
      flights[forest.nodes_.local(node)] = 0;
    }
    require(std::ranges::all_of(flights, [](std::uint32_t n) { return n == 0; }),
            "a ticket's leaf is a node of no block");
    check_waiting(forest, tree);
    forest.start_root(tree, false);
    forest.settle(tree);
  }

  static void check_tree(const Tree& tree) {
    try {
      check_budget(tree.budget);
    } catch (const std::invalid_argument&) {
      require(false, "a setting is out of its range");
    }
    const bool stopped = tree.stopped != StopReason::kRunning;  // it may have given all away
    require((tree.simulations >= 1 || stopped) && tree.simulations <= kMaxVisits &&
                tree.begun <= tree.simulations && tree.committed <= tree.begun,
            "the counts of a tree contradict each other");
    require(tree.followed <= tree.script.size(), "the counts of a tree contradict each other");
    constexpr std::uint32_t kMostIssued = (1u << 31) - 1 - kMaxVisits;  // a ticket holds 31 bits
    require(tree.pending.oldest <= kMostIssued && tree.expanding.oldest <= kMostIssued,
            "the number of tickets");
    require(is_cost(tree.spent), "the cost of a tree");
    require(!std::isnan(tree.bounds.low) && !std::isnan(tree.bounds.high), "the bounds of a tree");
  }

  static void check_channels(const Forest& forest, const std::vector<double>& channels, bool are) {
    require(channels.size() == (are ? forest.config_.backup.channels.size() : 0),
            "the channels of a value");
    for (std::size_t i = 0; i < channels.size(); ++i) {
      const Aggregation how = forest.config_.backup.channels[i].channel.how;
      const double most = how == Aggregation::kProduct ? 1.0 : kMaxValue;
      require(std::abs(channels[i]) <= most, "a value is out of its range");
    }
  }

  static void check_closed(const Forest& forest, const Tree& tree) {
    for (const NodeIndex node : forest.nodes_.all(tree.slabs)) {
      require(forest.nodes_.hot(node).is_closed() ==
                  (forest.config_.solver && forest.is_known(tree, node)),
              "what is known of a node");
    }
  }

  static void get_queue(Reader& in, Forest& forest, Tree& tree, Queue& queue,
                        const SlabNames& slabs) {
    const ForestConfig& config = forest.config_;
    const bool is_pending = &queue == &tree.pending;
    const bool verifies = is_pending && config.tickets != TicketMode::kTogether;
    const auto size = in.get<std::uint64_t>();
    require(size <= (verifies ? config.max_unverified : config.max_in_flight) &&
                (!is_pending || size == tree.begun - tree.committed),
            "the number of tickets");
    std::set<NodeIndex> leaves;
    for (std::uint64_t i = 0; i < size; ++i) {
      const Pending& pending = get_pending(in, forest, tree, queue, slabs);
      require(leaves.insert(pending.path.back()).second, "two tickets have one leaf");
    }
  }

  static const Pending& get_pending(Reader& in, Forest& forest, Tree& tree, Queue& queue,
                                    const SlabNames& slabs) {
    Pending& pending = queue.push();
    const Nodes& nodes = forest.nodes_;
    std::uint32_t leaf = 0;
    in.one(leaf);
    pending.path = {global(nodes, slabs, leaf)};
    while (pending.path.back() != tree.root) {
      pending.path.push_back(nodes.parent(pending.path.back()));
    }
    std::reverse(pending.path.begin(), pending.path.end());
    in.list(pending.handles);
    in.one(pending.value);
    in.one(pending.attempts);
    in.choice(pending.state, State::kCancelled);
    if (in.get<std::uint8_t>() != 0) get_details(in, pending.detailed());
    check_pending(forest, tree, queue, pending);
    forest.counters_.in_flight += pending.state == State::kOut;
    if (pending.state == State::kTold) {
      forest.counters_.waiting += 1;
      forest.waiting_blocks_ += !pending.handles.empty();
    }
    return pending;
  }

  static void get_details(Reader& in, Details& details) {
    detail_fields(in, details);
    if (in.get<std::uint8_t>() != 0) details.num_steps = in.get<std::uint32_t>();
    if (in.get<std::uint8_t>() != 0) details.start_verdict = in.get<double>();
  }

  static void check_pending(const Forest& forest, const Tree& tree, const Queue& queue,
                            const Pending& pending) {
    const ForestConfig& config = forest.config_;
    const NodeIndex index = pending.path.back();
    const HotNode& leaf = forest.nodes_.hot(index);
    const bool expands = &queue == &tree.expanding;
    const bool told = pending.state == State::kTold;
    require(pending.state != State::kClaimed, "the state of a ticket");
    require(!leaf.is_terminal() || std::isnan(tree.ends[leaf.end()].value),
            "a ticket's leaf does not wait");
    if (expands || config.tickets == TicketMode::kTogether) {
      require(leaf.is_asked() && !(expands && leaf.is_terminal()) &&
                  (!leaf.has_children() || (expands && config.widening > 0.0)),
              "a ticket's leaf does not wait");
    }
    const std::uint32_t there = leaf.has_children() ? forest.nodes_.num_children(index) : 0;
    require(std::abs(pending.value) <= kMaxValue && pending.attempts >= 1 &&
                pending.attempts <= config.max_attempts &&
                pending.handles.size() + (expands ? there : 0) <= config.max_children &&
                (pending.handles.empty() || (!leaf.is_terminal() && (expands || there == 0))),
            "what was told of a ticket");
    if (pending.details) check_details(forest, pending, expands, told);
    if (told && !expands) {
      require(config.backup.how != Backup::kProduct || std::abs(pending.value) <= 1.0,
              "what was told of a ticket");
      require(config.backup.channels.empty() || pending.details, "the channels of a value");
    }
  }

  static void check_details(const Forest& forest, const Pending& pending, bool expands, bool told) {
    const Details& details = *pending.details;
    const std::size_t children = pending.handles.size();
    const auto is_unit = [](double x) { return std::abs(x) <= 1.0; };
    const auto is_unit_or_none = [&](double x) { return is_unit(x) || std::isnan(x); };
    const auto is_prior = [](float x) { return x >= 0.0f && x <= kMaxPrior; };
    require((details.priors.empty() ||
             (forest.nodes_.layout().priors && details.priors.size() == children)) &&
                (details.terminal.empty() || details.terminal.size() == children) &&
                std::ranges::all_of(details.priors, is_prior),
            "the children that a ticket was told");
    check_channels(forest, details.channels, told && !expands);
    const bool may_have_steps = !expands && forest.config_.tickets != TicketMode::kTogether;
    require((may_have_steps || (details.verdicts.empty() && !details.num_steps)) &&
                details.verdicts.size() <= kMaxSteps &&
                (!details.num_steps || details.verdicts.size() == *details.num_steps) &&
                std::ranges::all_of(details.verdicts, is_unit_or_none) &&
                is_unit_or_none(details.outcome) && is_unit(details.start_verdict.value_or(0.0)) &&
                is_cost(details.cost),
            "the parts of a value");
    const auto is_known = [](double x) { return !std::isnan(x); };
    require(told || !details.num_steps || !std::ranges::all_of(details.verdicts, is_known),
            "a value that is complete");
  }

  static void count_flights(const Forest& forest, const Tree& tree, const Queue& queue,
                            std::vector<std::uint32_t>& flights, std::set<NodeIndex>& asked) {
    const bool asks = &queue == &tree.expanding || forest.config_.tickets == TicketMode::kTogether;
    for (std::size_t i = 0; i < queue.size(); ++i) {
      const std::vector<NodeIndex>& path = queue[i].path;
      for (const NodeIndex node : path) flights[forest.nodes_.local(node)] += 1;
      if (asks) require(asked.insert(path.back()).second, "two tickets have one leaf");
    }
  }

  static void check_waiting(const Forest& forest, const Tree& tree) {
    const Queue& next = tree.expanding.empty() ? tree.pending : tree.expanding;
    require(!tree.blocked || !next.empty(), "a tree waits for nothing");
    require(forest.may_go_down(tree) || next.empty() ||
                (next[0].state != State::kTold && next[0].state != State::kCancelled),
            "a tree waits for what was told");
    const bool is_closed = forest.nodes_.hot(tree.root).is_closed();
    require(!is_closed || tree.stopped != StopReason::kRunning, "a tree that is known goes on");
  }

  static Bytes write(const Forest& forest) {
    Writer out;
    out.bytes.reserve(kHeader + 1024 +
                      forest.counters_.nodes * (forest.nodes_.bytes_per_node() + 3));
    out.bytes.resize(kHeader);
    config_fields(out, forest.config_);
    out.size(forest.config_.backup.channels.size());
    for (const ChannelConfig& channel : forest.config_.backup.channels) {
      channel_fields(out, channel);
    }
    counter_fields(out, forest.counters_);
    out.size(forest.trees_.size());
    for (const Tree& tree : forest.trees_) put_tree(out, forest.nodes_, tree);
    std::vector<TreeId> ready;  // without those that need not be there any more
    for (const TreeId id : forest.ready_) {
      if (forest.trees_[id].alive && forest.may_go_down(forest.trees_[id])) ready.push_back(id);
    }
    out.list(ready);
    out.list(forest.again_);
    return std::move(out.bytes);
  }

  static ForestConfig get_config(Reader& in) {
    ForestConfig config;
    config_fields(in, config);
    config.backup.channels.resize(in.length(2 + sizeof(double)));
    for (ChannelConfig& channel : config.backup.channels) channel_fields(in, channel);
    try {
      check_config(config);
    } catch (const std::invalid_argument&) {
      require(false, "a setting is out of its range");
    }
    return config;
  }

  static Forest read(Reader& in) {
    Forest forest(get_config(in));
    counter_fields(in, forest.counters_);
    require(is_cost(forest.counters_.spent), "the cost of a forest");
    const std::size_t trees = in.length(1);
    for (std::size_t i = 0; i < trees; ++i) {
      Tree& tree = forest.trees_.emplace_back();
      get_tree(in, forest, tree);
      if (!tree.alive) continue;
      forest.counters_.trees += 1;
      forest.counters_.nodes += tree.nodes;
    }
    forest.knows_terminal_ = true;  // there may be such
    forest.nodes_.reserve(forest.waiting_blocks_);
    get_ready(in, forest);
    get_again(in, forest);
    require(in.done(), "something follows its end");
    return forest;
  }

  static void get_ready(Reader& in, Forest& forest) {
    std::vector<TreeId> ready;
    in.list(ready);
    for (const TreeId id : ready) {
      require(id < forest.trees_.size() && forest.trees_[id].alive && !forest.trees_[id].queued,
              "a queue names no tree, or one twice");
      forest.ready_.push_back(id);
      forest.trees_[id].queued = true;
    }
    for (const Tree& tree : forest.trees_) {
      require(!tree.alive || tree.queued == forest.may_go_down(tree), "a tree is forgotten");
    }
  }

  static void get_again(Reader& in, Forest& forest) {
    std::size_t wanted = 0;
    for (const Tree& tree : forest.trees_) {
      for (const Queue* queue : {&tree.pending, &tree.expanding}) {
        for (std::size_t i = 0; i < queue->size(); ++i)
          wanted += (*queue)[i].state == State::kAgain;
      }
    }
    std::vector<Ticket> again;
    in.list(again);
    std::set<Ticket> seen;
    for (const Ticket ticket : again) {
      const TreeId id = tree_of(ticket);
      require(id < forest.trees_.size() && forest.trees_[id].alive && seen.insert(ticket).second,
              "a queue names no tree, or a ticket twice");
      const Queue& queue = forest.queue_of(forest.trees_[id], ticket);
      const std::uint32_t position = ordinal_of(ticket) - queue.oldest;
      require(position < queue.size() && queue[position].state == State::kAgain,
              "a queue names no ticket");
      forest.again_.push_back(ticket);
    }
    require(seen.size() == wanted, "a ticket that is to be handed out again is forgotten");
  }
};

Bytes Snapshot::of(const Forest& forest) {
  forest.check_whole();
  Bytes bytes = Access::write(forest);
  const std::span<const std::uint8_t> payload = std::span(bytes).subspan(kHeader);
  const std::uint64_t sizes[] = {kSnapshotVersion, payload.size(), checksum(payload)};
  std::memcpy(bytes.data(), kMagic, sizeof(kMagic));
  std::memcpy(bytes.data() + sizeof(kMagic), sizes, sizeof(sizes));
  return bytes;
}

Forest Snapshot::restore(std::span<const std::uint8_t> bytes) {
  if (bytes.size() < kHeader || std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) != 0) {
    refuse("does not begin as one: " + std::to_string(bytes.size()) + " bytes of something else");
  }
  std::uint64_t sizes[3];
  std::memcpy(sizes, bytes.data() + sizeof(kMagic), sizeof(sizes));
  const auto [version, size, sum] = sizes;
  if (version != kSnapshotVersion) {
    refuse("has version " + std::to_string(version) + "; this build reads version " +
           std::to_string(kSnapshotVersion));
  }
  const std::span<const std::uint8_t> payload = bytes.subspan(kHeader);
  if (payload.size() != size) {
    refuse("is cut off or too long: " + std::to_string(payload.size()) + " bytes of " +
           std::to_string(size));
  }
  if (checksum(payload) != sum) refuse("is damaged: its checksum differs");
  Reader in(payload);
  return Access::read(in);
}

namespace {

struct Closed {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Closed>;

[[noreturn]] void fail(const std::filesystem::path& path) {
  throw std::filesystem::filesystem_error("Forest", path, {errno, std::generic_category()});
}

File opened(const std::filesystem::path& path, const char* mode) {
  File file(std::fopen(path.c_str(), mode));
  if (!file) fail(path);
  return file;
}

// Until the bytes are on the disk.
void write_through(File file, const std::filesystem::path& path,
                   std::span<const std::uint8_t> bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), file.get()) != bytes.size()) fail(path);
  if (std::fflush(file.get()) != 0) fail(path);
#if defined(__unix__) || defined(__APPLE__)
  if (fsync(fileno(file.get())) != 0) fail(path);
#endif
  if (std::fclose(file.release()) != 0) fail(path);
}

}  // namespace

void Snapshot::save(const Forest& forest, const std::filesystem::path& path) {
  const Bytes bytes = of(forest);
  std::filesystem::path part = path;
  part += ".tmp";
  File file = opened(part, "wb");  // what is removed below is ours
  try {
    write_through(std::move(file), part, bytes);
    if (std::rename(part.c_str(), path.c_str()) != 0) fail(path);
  } catch (const std::filesystem::filesystem_error&) {
    std::remove(part.c_str());
    throw;
  }
}

Forest Snapshot::load(const std::filesystem::path& path) {
  const File file = opened(path, "rb");
  Bytes bytes;
  std::uint8_t part[1 << 16];
  for (std::size_t n; (n = std::fread(part, 1, sizeof(part), file.get())) > 0;) {
    bytes.insert(bytes.end(), part, part + n);
  }
  if (std::ferror(file.get()) != 0) fail(path);
  return restore(bytes);
}

}  // namespace tercet
