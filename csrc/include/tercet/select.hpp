// Which child a search looks at next, and which one it takes in the end.
//
// Four rules, of which a search has one.  P is a child's prior, q its value, v and o its finished
// and unfinished visits, e = v + o; N is the e of the parent without the present descent:
//   UCT       q + c_uct * sqrt(ln N / e)                      Kocsis & Szepesvari 2006
//   released  q + c_uct * sqrt(ln (N + 1) / (e + 1))          the code released with GroundedPRM
//   PUCT      q + rate * P * sqrt(max(N, 1)) / (1 + e),       Silver et al. 2018 (AlphaZero)
//             rate = ln ((N + c_base + 1) / c_base) + c_init
//   Gumbel    sequential halving with Gumbel noise at the root, below it the child that lags most
//             behind the improved policy                      Danihelka et al. 2022, as in mctx
// Unfinished visits are counted without a value (WU-UCT, Liu et al. 2020, arXiv:1810.11755) or as
// losses.  A child without a finished visit has the value of FirstPlay (lc0 and KataGo call it
// first-play urgency); MinMax maps values to [0, 1] as MuZero does (Schrittwieser et al. 2020).
//
// Ties go to the first, closed children are never chosen, and every operation is rounded on its
// own in the order of the formulas, so that the result is the oracle's, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "tercet/nodes.hpp"

namespace tercet {

// std::log of whole numbers, those below 2^16 from a table that all forests share.
class Logarithms {
 public:
  Logarithms();
  [[nodiscard]] double operator()(std::uint32_t n) const {
    return n < kTable ? table_[n] : std::log(static_cast<double>(n));
  }

 private:
  static constexpr std::uint32_t kTable = 1u << 16;

  const double* table_;
};

// Of a child with `visits` finished visits, and `expected` with those on their way (at least one).
inline double uct_score(double total, std::uint32_t visits, std::uint32_t expected,
                        double log_parent, double c_uct) {
  const double mean = visits == 0 ? 0.0 : total / visits;
  return mean + c_uct * std::sqrt(log_parent / expected);
}

// Position of the chosen child in a block, given log(N + O) of its parent.
inline std::uint32_t best_child(const HotNode* block, double log_parent, double c_uct) {
  std::uint32_t best = 0;
  double best_score = -std::numeric_limits<double>::infinity();
  for (std::uint32_t i = 0;; ++i) {
    const HotNode& child = block[i];
    const std::uint32_t expected = child.expected_visits();
    if (expected == 0) return i;
    const double score = uct_score(child.total, child.visits(), expected, log_parent, c_uct);
    if (score > best_score) {
      best = i;
      best_score = score;
    }
    if (child.is_last()) return best;
  }
}

enum class Rule : std::uint8_t { kUct, kReleased, kPuct, kGumbel };

// The value of a child without finished visits; kGumbel completes values in a way of its own.
enum class FirstPlay : std::uint8_t {
  kFirst,   // 0, and the first child with no visits at all is chosen before any score
  kValue,   // first_play_value
  kParent,  // the parent's, less first_play_value * sqrt(priors of the children that have visits)
  kPrior    // its prior
};

enum class MinMax : std::uint8_t {
  kNone,
  kSiblings,  // the bounds are those of the parent and its children
  kTree
};

enum class Unfinished : std::uint8_t {
  kUnobserved,
  kVirtualLoss  // each counts as a finished visit whose value is -virtual_loss
};

struct SelectConfig {
  Rule rule{Rule::kUct};
  double c_uct{1.41421356237309514547};     // of the first two rules, >= 0
  double c_base{19652.0};                   // of PUCT, > 0
  double c_init{1.25};                      // of PUCT, >= 0
  FirstPlay first_play{FirstPlay::kFirst};  // kUct knows no other
  double first_play_value{0.0};             // a value, or its reduction
  MinMax min_max{MinMax::kNone};
  Unfinished unfinished{Unfinished::kUnobserved};
  double virtual_loss{1.0};             // >= 0
  std::uint32_t gumbel_considered{16};  // children of the root that are tried, at most; >= 1
  double gumbel_value_scale{0.1};       // >= 0
  double gumbel_maxvisit_init{50.0};    // >= 0
  double dirichlet_alpha{0.0};          // of noise on the root's priors, >= 0; 0: none
  double dirichlet_fraction{0.25};      // its share in them, in [0, 1]
};

// Throws std::invalid_argument for a setting outside its range.
void check_config(const SelectConfig& config);

// Whether choices depend on priors.
[[nodiscard]] bool reads_priors(const SelectConfig& config);

// Of the values seen; empty before the first.
struct Bounds {
  double low{std::numeric_limits<double>::infinity()};
  double high{-std::numeric_limits<double>::infinity()};

  void take(double value) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
};

// Of a node with finished visits.
inline double value_of(const HotNode& node, bool is_mean) {
  return is_mean ? node.total / node.visits() : node.total;
}

// A parent and its children, at most kMaxChildren, as a choice reads them.
struct Family {
  const HotNode* parent;         // the descent has departed from it
  const HotNode* children;       // up to the last
  const float* priors{nullptr};  // of the children, where reads_priors
  Bounds tree{};                 // of the values of the tree, under MinMax::kTree
  double sign{1.0};              // -1: low values are looked for
  double own{std::numeric_limits<double>::quiet_NaN()};  // told for the parent itself
  bool is_mean{true};                         // a node's value is total / visits, else its total
  std::span<const double> noise{};            // Gumbel: of the root's children, else empty
  std::span<const std::uint32_t> schedule{};  // Gumbel: of the root, see halving_schedule
};

inline constexpr std::uint32_t kNoChild = std::numeric_limits<std::uint32_t>::max();

// Position of the child that a descent goes on to; kNoChild where all are closed.
[[nodiscard]] std::uint32_t choose_child(const Family& family, const SelectConfig& config,
                                         const Logarithms& log);

// Position of the child to take after the search: the one with most visits, then the highest
// value; under Gumbel among those with most visits the one with the highest score of the root.
// Closed children count like others.
[[nodiscard]] std::uint32_t choose_action(const Family& family, const SelectConfig& config);

// Sequential halving: how many visits a child of the root must have to be chosen, for each
// simulation.  Source: mctx, get_sequence_of_considered_visits.
[[nodiscard]] std::vector<std::uint32_t> halving_schedule(std::uint32_t considered,
                                                          std::uint32_t simulations);

}  // namespace tercet
