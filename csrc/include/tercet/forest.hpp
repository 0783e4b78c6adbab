// Many searches at once, behind ask and tell.
//
// ask() fills a batch with leaves of all trees that want one looked at, each with a ticket; tell()
// brings their values and children back, in any order and at any time.  A tree has several tickets
// out, more of them the larger it is, and counts them as visits on their way (select.hpp).
//
// Where values come later than children, a look has two tickets (TicketMode): one to expand, told
// children, and one to verify, told a value.  A tree has a queue of each kind, oldest first.
//
// The result of a tree depends on what is told and on nothing else.  Each tree repeats:
//   - go down once, if it may: it is not stopped, has simulations left and fewer tickets out than
//     its caps, and selection does not lead to a leaf that is asked about;
//   - else commit the oldest ticket to expand: give the leaf its children;
//   - else commit the oldest of the others: back its value up.
// So trees do not depend on each other, on the size of batches or on the order of results, and a
// pending leaf is never handed out twice.  A leaf that was told without children is an end: it is
// visited again, with its value, but asked about no more.
//
// Not thread-safe.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "tercet/backup.hpp"
#include "tercet/budget.hpp"
#include "tercet/nodes.hpp"
#include "tercet/random.hpp"
#include "tercet/reward.hpp"
#include "tercet/select.hpp"

namespace tercet {

using TreeId = std::uint32_t;
// tree << 32 | how many of its kind the tree issued before << 1 | 1 if it is to expand
using Ticket = std::uint64_t;

enum class Kind : std::uint8_t { kEvaluate, kExpand, kVerify };

constexpr Ticket ticket_of(TreeId tree, std::uint32_t ordinal, bool expands) {
  return Ticket{tree} << 32 | ordinal << 1 | std::uint32_t{expands};
}
constexpr TreeId tree_of(Ticket ticket) { return static_cast<TreeId>(ticket >> 32); }
constexpr std::uint32_t ordinal_of(Ticket ticket) {
  return static_cast<std::uint32_t>(ticket) >> 1;
}
constexpr bool expands(Ticket ticket) { return (ticket & 1) != 0; }

inline constexpr double kMaxValue = 1e300;  // of size: kMaxVisits of them have a finite sum
inline constexpr float kMaxPrior = 1e30f;
inline constexpr std::uint32_t kMaxSteps = 4096;  // of a rollout whose verdicts come one by one

// What a leaf is asked for.
enum class TicketMode : std::uint8_t {
  kTogether,  // value and children, by one ticket
  kApart,     // both at the first visit, by two tickets
  kLazy,      // a value at the first visit, children at the second; the root: children at once
};

struct ForestConfig {
  SelectConfig select{};
  BackupConfig backup{};
  RewardConfig reward{};  // of rollouts that are told by verdicts and outcome
  StopRules stop{};
  Budget budget{};  // of all trees together: ask() hands out nothing once it is reached

  // Low values are looked for once there are `stop.positives` positive outcomes (at least 1), as
  // the released code of GroundedPRM does.
  bool dual_target{false};
  // A node of n visits may have widening * n^widening_alpha children, told a few at a time; 0: all
  // children are told at once.  Source: progressive widening, Coulom 2007.
  double widening{0.0};
  double widening_alpha{0.5};                // in [0, 1]
  std::uint32_t max_children{kMaxChildren};  // of a node, 1 to kMaxChildren
  // Ends are not visited again, nor nodes all of whose children are known to the end; a tree that
  // is known whole is stopped.
  bool solver{false};
  bool merge_duplicates{false};  // children with one handle are one child, their priors added

  bool record{false};  // where each descent lands, for landings()

  TicketMode tickets{TicketMode::kTogether};
  std::uint32_t max_in_flight{1};               // tickets that bring children; 1 to kMaxInFlight
  std::uint32_t visits_per_flight{16};          // a tree of n visits may have 1 + n / this many out
  std::uint32_t max_unverified{16};             // tickets to verify, where they are apart
  std::uint32_t max_attempts{3};                // at a leaf whose evaluation fails
  double failed_value{0.0};                     // of a leaf that failed as often, to kMaxValue
  std::size_t max_bytes{std::size_t{8} << 30};  // of nodes
};

// Throws std::invalid_argument for a setting outside its range, or at odds with another.
void check_config(const ForestConfig& config);

// A ticket that cannot be told: never issued, told before, of a tree that was removed, or of
// another kind.
enum class TicketFault : std::uint8_t { kUnknown, kRepeated, kLate, kKind };

class BadTicket : public std::invalid_argument {
 public:
  BadTicket(TicketFault fault, Ticket ticket);
  TicketFault fault;
  Ticket ticket;
};

// Leaves to look at, column by column.
struct Leaves {
  std::vector<Ticket> ticket;
  std::vector<TreeId> tree;
  std::vector<std::uint32_t> node;     // inside its tree
  std::vector<std::uint8_t> kind;      // Kind
  std::vector<std::uint32_t> depth;    // of the root: 0
  std::vector<std::int64_t> handle;    // as its parent's children were told
  std::vector<std::uint32_t> attempt;  // 1 and up

  [[nodiscard]] std::size_t size() const { return ticket.size(); }
  void reserve(std::size_t n);
};

// What was found out about n leaves; the children of leaf i are the next num_children[i] handles.
// What is optional is empty or has its full length.
struct Results {
  std::span<const Ticket> tickets;
  std::span<const double> values;               // [n]; none where only children are told
  std::span<const std::uint32_t> num_children;  // [n], 0: an end; none where only values are told
  std::span<const std::int64_t> handles;
  std::span<const float> priors{};           // of the children; optional: uniform
  std::span<const std::uint8_t> terminal{};  // of the children: which are ends; optional: none
  std::span<const double> outcomes{};        // [n], NaN: none; optional
  std::span<const double> channels{};        // [n, channels] of the settings
  std::span<const double> costs{};           // [n, 4] as Cost; optional
};

// Verdicts of steps of rollouts, in any order and any portions.
struct Verdicts {
  std::span<const Ticket> tickets;       // [m], one may come more than once
  std::span<const std::uint32_t> steps;  // [m], from 0
  std::span<const double> verdicts;      // [m], in [-1, 1]
};

// How n rollouts ended.
struct Outcomes {
  std::span<const Ticket> tickets;
  std::span<const std::uint32_t> num_steps;  // [n], to kMaxSteps
  std::span<const double> outcomes;          // [n], in [-1, 1]; NaN: cut off before an answer
  std::span<const double> start_verdicts{};  // [n], in [-1, 1]; optional: 0
  std::span<const double> costs{};           // as in Results
};

struct Counters {
  std::uint64_t trees{0};
  std::uint64_t finished{0};     // trees that have nothing left to do
  std::uint64_t simulations{0};  // values backed up
  std::uint64_t evaluations{0};  // of them by a ticket; the others visited an end again
  std::uint64_t expansions{0};   // tickets that brought children alone
  std::uint64_t in_flight{0};    // tickets that were handed out and are not told
  std::uint64_t waiting{0};      // results that were told and wait for older ones of their tree
  std::uint64_t failures{0};     // told by fail()
  std::uint64_t given_up{0};     // leaves that failed max_attempts times
  std::uint64_t cancelled{0};    // tickets
  std::uint64_t merged{0};       // children that were there already
  std::uint64_t positives{0};    // outcomes above 0
  std::uint64_t negatives{0};    // below
  std::uint64_t nodes{0};
  std::uint64_t bytes{0};  // of nodes, with what lies free in chunks
  Cost spent{};
};

// A tree as columns, in the order of creation but for children that came late; the root is first.
struct TreeColumns {
  std::vector<std::uint32_t> node;   // its name in Leaves
  std::vector<std::int64_t> parent;  // its position here; -1 for the root
  std::vector<std::uint32_t> depth;
  std::vector<std::uint32_t> visits;
  std::vector<std::uint32_t> in_flight;
  std::vector<double> total;
  std::vector<double> value;  // what total stands for; NaN without visits
  std::vector<std::int64_t> handle;
  std::vector<std::uint8_t> terminal;
  std::vector<std::uint8_t> closed;
  std::vector<float> prior;      // NaN where none is kept
  std::vector<float> verdict;    // NaN where none was told
  std::vector<double> channels;  // [nodes, channels]
};

struct TreeStatus {
  std::uint32_t simulations{0};  // allowed
  std::uint32_t committed{0};
  std::uint32_t in_flight{0};  // tickets that are not committed
  std::uint32_t positives{0};
  std::uint32_t negatives{0};
  std::uint64_t evaluations{0};
  std::uint64_t nodes{0};
  Cost spent{};
  StopReason reason{StopReason::kRunning};
};

// Where memory runs out in the middle of a change, nothing of the forest can be relied on: that
// call throws std::bad_alloc, and each later one std::runtime_error.
class Forest {
 public:
  friend class Snapshot;

  explicit Forest(const ForestConfig& config);
  Forest(Forest&&) = default;
  Forest& operator=(Forest&&) = default;

  // A tree whose root has this handle, to be visited `simulations` times.  `seed` and the handle
  // decide its random numbers.  Throws std::invalid_argument for 0 or more than kMaxVisits or a
  // budget that is not positive, std::length_error as Nodes::add_root.
  TreeId add_tree(std::int64_t root_handle, std::uint32_t simulations, std::uint64_t seed = 0,
                  const Budget& budget = {});

  // A tree whose descents land where those of another with as many simulations did, as landings()
  // gave it: the same leaves are asked about in the same order whatever their values, which can so
  // be told anew.  It ends with them, or stops where one does not fit.  Throws
  // std::invalid_argument for none, else as above.
  TreeId add_tree_along(std::int64_t root_handle, std::uint32_t simulations,
                        std::span<const std::uint32_t> landings, std::uint64_t seed = 0);

  // Frees its nodes; its tickets become late ones.  Throws std::out_of_range for an unknown tree.
  void remove_tree(TreeId tree);

  // Allows more simulations.  Throws as add_tree, for their sum.
  void extend(TreeId tree, std::uint32_t simulations);

  // Goes on from `node` as the root, with as many simulations more; the rest of the tree is freed
  // and nodes get new names.  Throws std::logic_error while tickets are not committed,
  // std::out_of_range for an unknown node, else as add_tree.
  void reroot(TreeId tree, std::uint32_t node, std::uint32_t simulations);

  // Gives the simulations that trees left unused when they stopped to those that used theirs up, in
  // equal shares.  Returns how many.  Throws std::logic_error while trees are not finished.
  std::uint64_t reallocate();

  // At most max_leaves.  None: everything waits for tell(), or is done.
  [[nodiscard]] Leaves ask(std::size_t max_leaves);

  // Values and children together; values alone; children alone.  Each throws before anything
  // changes: std::invalid_argument for unequal lengths, a value beyond kMaxValue, a prior outside
  // [0, kMaxPrior], or more than max_children children, BadTicket for a ticket,
  // std::length_error where there may not be room for all the children.
  void tell(const Results& results);
  void tell_values(const Results& results);
  void tell_children(const Results& results);

  // A value by its parts: verdicts of steps as they come, and at any time how the rollout ended.
  // When all are there, the reward is the value.  Each throws before anything changes:
  // std::invalid_argument for a step that has a verdict or lies beyond the end, BadTicket.
  void tell_verdicts(const Verdicts& verdicts);
  void tell_outcome(const Outcomes& outcomes);

  // The evaluation failed: the leaf is handed out again, or, after max_attempts, gets failed_value
  // and no children.  Throws BadTicket before anything changes.
  void fail(std::span<const Ticket> tickets, std::span<const double> costs = {});

  // As if they had not been issued: their leaves may be asked about again.  Throws as fail().
  void cancel(std::span<const Ticket> tickets, std::span<const double> costs = {});

  // Whoever had the tickets that are out is gone: the next calls of ask() hand them out again, with
  // the same attempt.  Returns how many there are.
  std::size_t recall();

  [[nodiscard]] bool is_finished(TreeId tree) const;
  [[nodiscard]] TreeStatus status(TreeId tree) const;
  [[nodiscard]] TreeColumns columns(TreeId tree) const;
  // Where the descents of a tree landed so far, node << 1 | 1 if to ask for more children; empty
  // unless the settings say `record`.
  [[nodiscard]] std::vector<std::uint32_t> landings(TreeId tree) const;
  // The child of the root to take (select.hpp), by its name in Leaves; none while it has none.
  [[nodiscard]] std::optional<std::uint32_t> choice(TreeId tree) const;
  [[nodiscard]] Counters counters() const;
  [[nodiscard]] const ForestConfig& config() const { return config_; }
  [[nodiscard]] bool is_whole() const { return !torn_; }  // memory has not run out in a change

 private:
  enum class State : std::uint8_t { kOut, kClaimed, kAgain, kTold, kCancelled };

  // What was told of a ticket beside a value and handles.
  struct Details {
    std::vector<float> priors{};
    std::vector<std::uint8_t> terminal{};
    std::vector<double> channels{};
    std::vector<double> verdicts{};  // NaN: not told
    std::optional<std::uint32_t> num_steps{};
    double outcome{std::numeric_limits<double>::quiet_NaN()};
    std::optional<double> start_verdict{};
    Cost cost{};
  };

  // A ticket that is not committed.  Its children wait outside the tree, whose nodes are numbered
  // in the order of commits.
  struct Pending {
    std::vector<NodeIndex> path{};  // from the root to the leaf
    std::vector<std::int64_t> handles{};
    double value{0.0};
    std::uint32_t attempts{1};
    State state{State::kOut};
    std::unique_ptr<Details> details{};

    Details& detailed();
  };

  // Oldest first.  What leaves stays as memory for the next.
  class Queue {
   public:
    [[nodiscard]] std::size_t size() const { return size_; }
    [[nodiscard]] bool empty() const { return size_ == 0; }
    [[nodiscard]] Pending& operator[](std::size_t i) { return slots_[(head_ + i) % slots_.size()]; }
    [[nodiscard]] const Pending& operator[](std::size_t i) const {
      return slots_[(head_ + i) % slots_.size()];
    }
    Pending& push();
    void drop_oldest();
    void drop_newest() { size_ -= 1; }

    std::uint32_t oldest{0};  // ordinal of the first

   private:
    std::vector<Pending> slots_;
    std::size_t head_{0};
    std::size_t size_{0};
  };

  // Of terminal nodes.
  struct End {
    double value;  // NaN: not known yet
    std::vector<double> channels{};
  };

  // What each look reads is first.
  struct Tree {
    Queue pending;    // simulations: tickets that bring values
    Queue expanding;  // tickets that bring children alone
    NodeIndex root{0};
    Slabs slabs;
    std::uint32_t simulations{0};  // allowed
    std::uint32_t begun{0};        // of them
    std::uint32_t committed{0};
    std::uint32_t evaluations{0};
    std::uint32_t nodes{1};
    StopReason stopped{StopReason::kRunning};  // before its simulations were used up
    bool blocked{false};                       // selection leads to a leaf that is asked about
    bool queued{false};                        // among ready_
    bool finished{false};
    bool alive{true};
    bool has_budget{false};
    std::vector<End> ends;

    std::uint64_t seed{0};
    Budget budget{};
    Cost spent{};
    std::uint32_t positives{0};
    std::uint32_t negatives{0};
    Bounds bounds{};
    std::vector<double> noise;            // Gumbel's, of the root's children
    std::vector<std::uint32_t> schedule;  // sequential halving
    std::vector<std::uint32_t> landings;  // so far, where they are recorded
    std::vector<std::uint32_t> script;    // landings to follow; empty: by selection
    std::uint32_t followed{0};            // of them
  };

  // What a commit brings.
  struct Finding {
    double value{0.0};
    std::span<const std::int64_t> handles{};
    std::span<const float> priors{};
    std::span<const std::uint8_t> terminal{};
    std::span<const double> channels{};
    double outcome{std::numeric_limits<double>::quiet_NaN()};
    float verdict{std::numeric_limits<float>::quiet_NaN()};
    Cost cost{};
  };

  // Children without those that were there already.
  struct Fresh {
    std::vector<std::int64_t> handles;
    std::vector<float> priors;
    std::vector<std::uint8_t> terminal;
  };

  struct Lane {
    TreeId tree;
    Pending* pending;
    HotNode* node;  // that the descent has reached
    bool widens;    // stops at a node that has children, to ask for more
  };

  void check_whole() const;
  [[nodiscard]] Tree& checked(TreeId tree);
  [[nodiscard]] const Tree& checked(TreeId tree) const;
  [[nodiscard]] bool may_go_down(const Tree& tree) const;
  [[nodiscard]] Kind kind_of(Ticket ticket) const;
  [[nodiscard]] Queue& queue_of(Tree& tree, Ticket ticket);
  [[nodiscard]] Pending& pending_of(Ticket ticket);                      // of those not committed
  [[nodiscard]] Pending& find(Ticket ticket);                            // of those out
  [[nodiscard]] Pending& find(Ticket ticket, std::optional<Kind> kind);  // and of that kind
  void check_values(const Results& results, const char* op) const;
  void check_children(const Results& results, const char* op);
  void check_leaves(const Results& results, const char* op);
  void check_factors() const;
  void check_outcomes(const Outcomes& told);
  void check_costs(std::span<const double> costs, std::size_t n, const char* op) const;
  void claim(std::span<const Ticket> tickets, std::optional<Kind> kind);
  void answer(const Results& results, Kind kind);
  void keep(Pending& pending, const Finding& finding);
  void prefetch(Ticket ticket);
  void complete(Ticket ticket);

  void set_out(TreeId id);
  bool follow(TreeId id, Pending& pending);
  void descend();
  template <bool plain>
  bool step_down(Lane& lane);
  [[nodiscard]] bool may_grow(NodeIndex node) const;
  [[nodiscard]] bool may_ask_for_more(NodeIndex node) const;
  [[nodiscard]] bool may_widen(const HotNode& node, NodeIndex index) const;
  [[nodiscard]] Family family_of(const Tree& tree, NodeIndex parent, bool at_root) const;
  void land(const Lane& lane, Leaves& leaves, std::size_t max_leaves);
  void land_on_end(const Lane& lane, Leaves& leaves, std::size_t max_leaves);
  void issue(TreeId id, Queue& queue, Leaves& leaves, std::size_t max_leaves);
  void turn_back(Lane lane, bool blocks);
  void hand_out(Ticket ticket, Leaves& leaves);
  void queue_again(Ticket ticket);
  void forget_waiting(const Pending& pending);

  [[nodiscard]] Finding finding_of(const Pending& pending) const;
  void commit_simulation(TreeId id, const Finding& finding);
  void commit_expansion(TreeId id, const Finding& finding);
  void withdraw(Tree& tree, Queue& queue);
  void grow(Tree& tree, NodeIndex leaf, const Finding& finding);
  void widen(Tree& tree, NodeIndex node, const Finding& finding);
  Fresh merged(const Finding& finding, NodeIndex first, std::uint32_t there);
  void furnish(Tree& tree, NodeIndex first, std::size_t n, std::uint32_t all,
               const Finding& finding);
  void start_root(Tree& tree, bool mixes_noise);
  void add_end(Tree& tree, NodeIndex node, double value, std::span<const double> channels);
  void take_in(Tree& tree, std::span<const NodeIndex> path, double value,
               std::span<const double> channels);
  void account(Tree& tree, const Finding& finding);
  void apply_stop_rules(Tree& tree);
  void close(Tree& tree, NodeIndex node);
  [[nodiscard]] bool is_known(const Tree& tree, NodeIndex node) const;
  [[nodiscard]] bool is_converged(const Tree& tree) const;
  void advance(TreeId id);
  void settle(Tree& tree);
  void hand_out_again(std::size_t max_leaves, Leaves& leaves);
  [[nodiscard]] std::size_t allowance() const;  // tickets that the budget leaves

  ForestConfig config_;
  bool plain_;                           // selection is that of best_child()
  bool plain_mean_;                      // a backup adds values to totals, and no more
  bool stops_;                           // there are rules by which trees stop early
  std::vector<double> failed_channels_;  // what a leaf that was given up gets
  bool knows_terminal_{false};           // some child was told to be terminal
  Nodes nodes_;
  Logarithms log_;
  std::vector<Tree> trees_;
  std::deque<TreeId> ready_;       // may go down
  std::deque<Ticket> again_;       // to be handed out (again)
  std::vector<Lane> lanes_;        // workspace of ask()
  std::size_t waiting_blocks_{0};  // children told and not committed
  Counters counters_;
  bool torn_{false};  // while a change is not complete
};

// What is short and called for every leaf.

inline bool Forest::may_go_down(const Tree& tree) const {
  if (tree.blocked || tree.begun >= tree.simulations || tree.stopped != StopReason::kRunning) {
    return false;
  }
  const bool together = config_.tickets == TicketMode::kTogether;
  if (!together && tree.pending.size() >= config_.max_unverified) return false;
  const std::size_t out =
      std::max(tree.expanding.size(), together ? tree.pending.size() : std::size_t{0});
  if (out == 0) return true;  // without a division
  return out < config_.max_in_flight && out <= tree.committed / config_.visits_per_flight;
}

inline Forest::Queue& Forest::queue_of(Tree& tree, Ticket ticket) {
  return expands(ticket) ? tree.expanding : tree.pending;
}

inline Forest::Pending& Forest::pending_of(Ticket ticket) {
  Queue& queue = queue_of(trees_[tree_of(ticket)], ticket);
  return queue[ordinal_of(ticket) - queue.oldest];
}

}  // namespace tercet
