// Which child a search looks at next.
//
// Source: UCT, Kocsis & Szepesvari 2006, with the unobserved visits of WU-UCT, Liu et al. 2020
// (arXiv:1810.11755):
//   score(c) = W_c / N_c + c_uct * sqrt(ln (N + O) / (N_c + O_c)),
// N finished and O unfinished visits of the parent, N_c and O_c of the child; a child with visits
// on their way only has mean 0.  Children that nobody visits come first; ties go to the first.
// Every operation is rounded on its own, so that the result is the oracle's, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

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

}  // namespace tercet
