// Many searches at once, behind ask and tell.
//
// ask() fills a batch with leaves of all trees that want one looked at, each with a ticket; tell()
// brings their values and children back, in any order and at any time.  A tree has several tickets
// out, more of them the larger it is, and counts them as visits on their way (select.hpp).
//
// The result of a tree depends on the values told and on nothing else.  Each tree repeats:
//   - issue a ticket, if it may: simulations left, fewer tickets out than its cap, and the leaf
//     that selection leads to is not one of them;
//   - else commit the oldest ticket out: give the leaf its children and back its value up.
// So trees do not depend on each other, on the size of batches or on the order of results, and a
// pending leaf is never handed out twice.  A leaf that was told without children is an end: it is
// visited again, with its value, but asked about no more.
//
// Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <stdexcept>
#include <vector>

#include "tercet/nodes.hpp"
#include "tercet/select.hpp"

namespace tercet {

using TreeId = std::uint32_t;
using Ticket = std::uint64_t;  // tree << 32 | how many the tree issued before

constexpr Ticket ticket_of(TreeId tree, std::uint32_t ordinal) {
  return Ticket{tree} << 32 | ordinal;
}
constexpr TreeId tree_of(Ticket ticket) { return static_cast<TreeId>(ticket >> 32); }
constexpr std::uint32_t ordinal_of(Ticket ticket) { return static_cast<std::uint32_t>(ticket); }

inline constexpr double kMaxValue = 1e300;  // of size: kMaxVisits of them have a finite sum

struct ForestConfig {
  double c_uct{1.41421356237309514547};         // >= 0
  std::uint32_t max_in_flight{1};               // tickets of a tree, 1 to kMaxInFlight
  std::uint32_t visits_per_flight{16};          // a tree of n visits may have 1 + n / this many out
  std::uint32_t max_attempts{3};                // at a leaf whose evaluation fails
  double failed_value{0.0};                     // of a leaf that failed as often, to kMaxValue
  std::size_t max_bytes{std::size_t{8} << 30};  // of nodes
};

// Throws std::invalid_argument for a setting outside its range.
void check_config(const ForestConfig& config);

// A ticket that cannot be told: never issued, told before, or of a tree that was removed.
enum class TicketFault : std::uint8_t { kUnknown, kRepeated, kLate };

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
  std::vector<std::uint32_t> depth;    // of the root: 0
  std::vector<std::int64_t> handle;    // as its parent's children were told
  std::vector<std::uint32_t> attempt;  // 1 and up

  [[nodiscard]] std::size_t size() const { return ticket.size(); }
  void reserve(std::size_t n);
};

// What was found out about n leaves; the children of leaf i are the next num_children[i] handles.
struct Results {
  std::span<const Ticket> tickets;
  std::span<const double> values;
  std::span<const std::uint32_t> num_children;  // 0: an end
  std::span<const std::int64_t> handles;
};

struct Counters {
  std::uint64_t trees{0};
  std::uint64_t finished{0};     // trees whose simulations are used up
  std::uint64_t simulations{0};  // values backed up
  std::uint64_t evaluations{0};  // of them by a ticket; the others visited an end again
  std::uint64_t in_flight{0};    // tickets that were handed out and are not told
  std::uint64_t waiting{0};      // results that were told and wait for older ones of their tree
  std::uint64_t failures{0};     // told by fail()
  std::uint64_t given_up{0};     // leaves that failed max_attempts times
  std::uint64_t nodes{0};
  std::uint64_t bytes{0};  // of nodes, with what lies free in chunks
};

// A tree as columns, in the order of creation; the root is first.
struct TreeColumns {
  std::vector<std::uint32_t> node;   // its name in Leaves
  std::vector<std::int64_t> parent;  // its position here; -1 for the root
  std::vector<std::uint32_t> depth;
  std::vector<std::uint32_t> visits;
  std::vector<std::uint32_t> in_flight;
  std::vector<double> total;
  std::vector<std::int64_t> handle;
  std::vector<std::uint8_t> terminal;
};

// Where memory runs out in the middle of a change, nothing of the forest can be relied on: that
// call throws std::bad_alloc, and each later one std::runtime_error.
class Forest {
 public:
  friend class Snapshot;

  explicit Forest(const ForestConfig& config);
  Forest(Forest&&) = default;
  Forest& operator=(Forest&&) = default;

  // A tree whose root has this handle, to be visited `simulations` times.  Throws
  // std::invalid_argument for 0 or more than kMaxVisits, std::length_error as Nodes::add_root.
  TreeId add_tree(std::int64_t root_handle, std::uint32_t simulations);

  // Frees its nodes; its tickets become late ones.  Throws std::out_of_range for an unknown tree.
  void remove_tree(TreeId tree);

  // At most max_leaves.  None: everything waits for tell(), or is done.
  [[nodiscard]] Leaves ask(std::size_t max_leaves);

  // Throws before anything changes: std::invalid_argument for unequal lengths, a value beyond
  // kMaxValue or more than kMaxChildren children, BadTicket for a ticket, std::length_error where
  // there may not be room for all the children.
  void tell(const Results& results);

  // The evaluation failed: the leaf is handed out again, or, after max_attempts, is an end with
  // failed_value.  Throws BadTicket before anything changes.
  void fail(std::span<const Ticket> tickets);

  // Whoever had the tickets that are out is gone: the next calls of ask() hand them out again, with
  // the same attempt.  Returns how many there are.
  std::size_t recall();

  [[nodiscard]] bool is_finished(TreeId tree) const;
  [[nodiscard]] TreeColumns columns(TreeId tree) const;
  [[nodiscard]] Counters counters() const;
  [[nodiscard]] const ForestConfig& config() const { return config_; }

 private:
  enum class State : std::uint8_t { kOut, kClaimed, kFailed, kTold };

  // A ticket that is not committed.  Its children wait outside the tree, whose nodes are numbered
  // in the order of commits.
  struct Pending {
    std::vector<NodeIndex> path{};  // from the root to the leaf
    std::vector<std::int64_t> handles{};
    double value{0.0};
    std::uint32_t attempts{1};
    State state{State::kOut};
  };

  // Oldest first.  What leaves stays as memory for the next.
  class Queue {
   public:
    [[nodiscard]] std::size_t size() const { return size_; }
    [[nodiscard]] Pending& operator[](std::size_t i) { return slots_[(head_ + i) % slots_.size()]; }
    [[nodiscard]] const Pending& operator[](std::size_t i) const {
      return slots_[(head_ + i) % slots_.size()];
    }
    Pending& push();
    void drop_oldest();
    void drop_newest() { size_ -= 1; }

   private:
    std::vector<Pending> slots_;
    std::size_t head_{0};
    std::size_t size_{0};
  };

  struct Tree {
    NodeIndex root{0};
    Slabs slabs;
    std::uint32_t simulations{0};  // allowed
    std::uint32_t begun{0};        // of them
    std::uint32_t committed{0};
    std::uint32_t oldest{0};  // ordinal of the first ticket that is not committed
    bool blocked{false};      // selection leads to a leaf that is pending
    bool queued{false};       // among ready_
    bool alive{true};
    Queue pending;             // at most config.max_in_flight
    std::vector<double> ends;  // values of terminal nodes
  };

  struct Lane {
    TreeId tree;
    Pending* pending;
    HotNode* node;  // that the descent has reached
  };

  void check_whole() const;
  [[nodiscard]] Tree& checked(TreeId tree);
  [[nodiscard]] const Tree& checked(TreeId tree) const;
  [[nodiscard]] bool may_issue(const Tree& tree) const;
  [[nodiscard]] Pending& pending_of(Ticket ticket);  // of those not committed
  [[nodiscard]] Pending& find(Ticket ticket);        // of those out
  void check(const Results& results);
  void claim(std::span<const Ticket> tickets);
  void prefetch(Ticket ticket);

  void set_out(TreeId id);
  void descend();
  void land(const Lane& lane, Leaves& leaves);
  void hand_out(Ticket ticket, Leaves& leaves);
  void queue_again(Ticket ticket);
  void forget_waiting(const Pending& pending);
  void count_simulation(Tree& tree);
  void commit(Tree& tree, double value, std::span<const std::int64_t> handles);
  void advance(TreeId id);
  void hand_out_failed(std::size_t max_leaves, Leaves& leaves);

  ForestConfig config_;
  Nodes nodes_;
  Logarithms log_;
  std::vector<Tree> trees_;
  std::deque<TreeId> ready_;       // may issue
  std::deque<Ticket> failed_;      // to be handed out again
  std::vector<Lane> lanes_;        // workspace of ask()
  std::size_t waiting_blocks_{0};  // children told and not committed
  Counters counters_;
  bool torn_{false};  // while a change is not complete
};

}  // namespace tercet
