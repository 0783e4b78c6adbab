// What a rollout is worth, and how the worth of rollouts meets at the nodes of a tree.
//
// Source: GroundedPRM, arXiv:2510.14942, and the code released with it.  A rollout of L steps has a
// verdict v_j in [-1, 1] for each step (0: none) and an outcome F; v_L of a finished rollout is
// replaced by F, so that N = L - 1 verdicts count.  Sums run over j = 1 .. N:
//
//   paper      u = 1/N * sum_j d_j * v_j  +  beta * F,     d_j = step_decay^(j-1)
//   released   u = 1/N * sum_j (N-j+1)/N * v_j  +  1/N * F,     and u = F for N = 0
//
// A mean over no steps is 0.  The node at distance m above the start of the rollout then takes in
//   gamma^m * (u + v_start)    (paper)        gamma^m * u    (released, gamma = 0.9).
//
// Verdicts are read, never written: a node's verdict and its value are kept in different places.
// Powers are repeated products and sums run in the order given, so that every result is bit-equal
// to the plain one in tests/bindings/oracle.py.  What the paper leaves open: docs/search_core.md.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace tercet {

enum class RewardForm : std::uint8_t { kPaper, kReleased };

struct RewardConfig {
  RewardForm form{RewardForm::kPaper};
  double outcome_weight{1.0};     // beta, >= 0; 1 in the released form, which has its own
  double step_decay{1.0};         // in [0, 1]; 1 (all steps weigh the same) in the released form
  double truncated_outcome{0.0};  // F of a rollout that was cut off, in [-1, 1]
  bool add_start_verdict{true};   // the start node's own verdict is backed up, too
};

// The form as published: a cut-off rollout is wrong (F = -1) in the released code, which does not
// judge the start node either.
[[nodiscard]] RewardConfig published(RewardForm form);

// Throws std::invalid_argument for a setting outside the range given above.
void check_config(const RewardConfig& config);

struct Rollout {
  std::span<const double> verdicts;  // of its steps, in order
  std::optional<double> outcome{};   // none: cut off before an answer
  double start_verdict{0.0};         // of the node it starts from
};

// Parts that can be backed up as channels of their own, and their sum.
struct RolloutReward {
  double step{0.0};
  double outcome{0.0};
  double start{0.0};
  double total{0.0};  // (step + outcome) + start
};

// Throws std::invalid_argument unless verdicts and outcome lie in [-1, 1].  A rollout without an
// outcome has no terminal step: the paper form counts all its verdicts, the released one drops the
// last as its code does.
[[nodiscard]] RolloutReward rollout_reward(const Rollout& rollout, const RewardConfig& config);

// n rollouts end to end; the steps of rollout i are verdicts[offsets[i], offsets[i + 1]).
struct RolloutBatch {
  std::span<const double> verdicts;        // [total]
  std::span<const std::int64_t> offsets;   // [n + 1], from 0 to total
  std::span<const double> outcomes;        // [n]; NaN: cut off
  std::span<const double> start_verdicts;  // [n], or empty: none
};

// Writes rewards[n]; throws as rollout_reward does, before anything is written.
void rollout_rewards(const RolloutBatch& batch, const RewardConfig& config,
                     std::span<RolloutReward> rewards);

// How several numbers become one: step scores of a path its return, returns of a node its value.
enum class Aggregation : std::uint8_t { kSum, kMean, kMax, kMin, kProduct, kLast };

// What a node holds before its first return.
[[nodiscard]] double identity(Aggregation how);

// What it holds after one more.  Throws std::invalid_argument unless value is finite.
[[nodiscard]] double absorbed(double accumulated, double value, Aggregation how);

// Its value after `returns` of them.  Throws std::invalid_argument if there were none, except for
// a sum.
[[nodiscard]] double value_of(double accumulated, std::uint32_t returns, Aggregation how);

// The scores of a path as one number.  Throws std::invalid_argument if empty or not finite.
[[nodiscard]] double path_return(std::span<const double> scores, Aggregation how);

// value * gamma^distance.  Throws std::invalid_argument unless value is finite and gamma in [0, 1].
[[nodiscard]] double decayed(double value, double gamma, std::uint32_t distance);

// One of several values that a node keeps at once, e.g. a mean of totals and a maximum of outcomes.
struct Channel {
  Aggregation how{Aggregation::kMean};
  double gamma{1.0};  // decay from a node to its parent, in [0, 1]
};

// One step of a backup: each channel of a node takes in its value, which is then decayed for the
// parent.  All spans are [channels].  Throws std::invalid_argument, before anything is written, for
// unequal lengths, a value that is not finite or a gamma outside [0, 1].
void backup_node(std::span<double> accumulated, std::span<double> values,
                 std::span<const Channel> channels);

// (1 - alpha) * value + alpha * simulated.  Throws std::invalid_argument unless both are finite and
// alpha is in [0, 1].
// Source: ReST-MCTS*, arXiv:2406.03816: a new node's value by its value model, mixed with the best
// value of a short simulation from it.
[[nodiscard]] double mixed(double value, double simulated, double alpha);

// sum(visits * values) / sum(visits) over the children, or `own` while none was visited.  Throws
// std::invalid_argument for unequal lengths or a value that is not finite.  Source: ReST-MCTS*, the
// backup of an expanded node.
[[nodiscard]] double visit_weighted_mean(std::span<const double> values,
                                         std::span<const std::uint32_t> visits, double own);

}  // namespace tercet
