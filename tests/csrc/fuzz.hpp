// Bytes as choices, and what fuzz targets share: settings, answers and invariants of a forest.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <span>
#include <vector>

#include "check.hpp"
#include "tercet/forest.hpp"
#include "tercet/snapshot.hpp"

namespace fuzz {

using tercet::Forest;
using tercet::ForestConfig;
using tercet::Kind;
using tercet::Leaves;
using tercet::Snapshot;
using tercet::Ticket;

// Zeros after the last byte, so that any input is a whole program.
class Choices {
 public:
  explicit Choices(std::span<const std::uint8_t> bytes) : left_(bytes) {}
  [[nodiscard]] bool empty() const { return left_.empty(); }
  std::uint8_t byte() {
    if (left_.empty()) return 0;
    const std::uint8_t first = left_.front();
    left_ = left_.subspan(1);
    return first;
  }
  std::uint32_t below(std::uint32_t n) { return byte() % n; }
  // One in `n`; never after the last byte.
  bool rarely(std::uint32_t n) { return !empty() && below(n) == n - 1; }
  template <typename Enum>
  Enum one_of(Enum last) {
    return static_cast<Enum>(below(static_cast<std::uint32_t>(last) + 1));
  }
  double unit() { return byte() / 127.5 - 1.0; }
  std::span<const std::uint8_t> rest() const { return left_; }

 private:
  std::span<const std::uint8_t> left_;
};

inline void set_selection(tercet::SelectConfig& select, Choices& choices) {
  using tercet::FirstPlay;
  select.rule = choices.one_of(tercet::Rule::kGumbel);
  if (select.rule != tercet::Rule::kUct) select.first_play = choices.one_of(FirstPlay::kPrior);
  select.first_play_value = choices.unit();
  select.min_max = choices.one_of(tercet::MinMax::kTree);
  select.gumbel_considered = 1 + choices.below(8);
  if (tercet::reads_priors(select) && choices.rarely(2)) select.dirichlet_alpha = 0.3;
}

// Settings that a forest accepts.
inline ForestConfig config_of(Choices& choices) {
  ForestConfig config;
  set_selection(config.select, choices);
  config.backup.how = choices.one_of(tercet::Backup::kChildren);
  if (config.backup.how != tercet::Backup::kChildren && choices.rarely(3)) {
    config.backup.gamma = 0.5;
  }
  if (config.backup.how == tercet::Backup::kMean && choices.rarely(3)) {
    config.select.unfinished = tercet::Unfinished::kVirtualLoss;
  }
  config.backup.channels.resize(choices.below(3));
  for (tercet::ChannelConfig& channel : config.backup.channels) {
    channel.source = choices.one_of(tercet::Source::kTotal);
    channel.channel.how = choices.one_of(tercet::Aggregation::kLast);
  }
  config.tickets = choices.one_of(tercet::TicketMode::kLazy);
  if (choices.rarely(3)) config.widening = 1.5;
  config.max_children = 1 + choices.below(6);
  config.solver = choices.rarely(2);
  config.merge_duplicates = choices.rarely(2);
  config.dual_target = choices.rarely(4);
  config.stop.positives = choices.rarely(4) ? 2 : 0;
  config.stop.negatives = choices.rarely(4) ? 2 : 0;
  config.stop.correct = choices.rarely(8);
  config.stop.converged = choices.rarely(4);
  config.record = choices.rarely(2);
  config.max_in_flight = 1 + choices.below(5);
  config.visits_per_flight = 1 + choices.below(3);
  config.max_unverified = 1 + choices.below(5);
  config.max_attempts = 1 + choices.below(3);
  bool multiplies = config.backup.how == tercet::Backup::kProduct;
  for (const tercet::ChannelConfig& channel : config.backup.channels) {
    multiplies |= channel.channel.how == tercet::Aggregation::kProduct;
  }
  config.failed_value = choices.unit() * (multiplies ? 1.0 : 4.0);
  config.reward.add_start_verdict = choices.rarely(2);
  if (choices.rarely(4)) config.reward.outcome_weight = 4.0;
  return config;
}

// What is told of leaves of one kind, with room for all columns.
struct Answers {
  std::vector<Ticket> tickets{};
  std::vector<double> values{};
  std::vector<std::uint32_t> num_children{};
  std::vector<std::int64_t> handles{};
  std::vector<float> priors{};
  std::vector<std::uint8_t> terminal{};
  std::vector<double> outcomes{};
  std::vector<double> channels{};
  std::vector<double> costs{};

  void add(Ticket ticket, Kind kind, const ForestConfig& config, Choices& choices) {
    tickets.push_back(ticket);
    if (kind != Kind::kExpand) {
      values.push_back(choices.unit());
      outcomes.push_back(choices.rarely(2) ? choices.unit() : std::nan(""));
      for (std::size_t i = 0; i < config.backup.channels.size(); ++i) {
        channels.push_back(choices.unit());
      }
    }
    if (kind == Kind::kVerify) return;
    num_children.push_back(choices.below(config.max_children + 1));
    for (std::uint32_t i = 0; i < num_children.back(); ++i) {
      handles.push_back(choices.below(8));
      if (tercet::reads_priors(config.select)) {
        priors.push_back(static_cast<float>(choices.byte()) / 256.0f);
      }
      terminal.push_back(choices.rarely(8));
    }
  }
  [[nodiscard]] tercet::Results results() const {
    return {tickets, values, num_children, handles, priors, terminal, outcomes, channels, costs};
  }
};

inline Kind kind_of(Ticket ticket, const ForestConfig& config) {
  if (tercet::expands(ticket)) return Kind::kExpand;
  return config.tickets == tercet::TicketMode::kTogether ? Kind::kEvaluate : Kind::kVerify;
}

inline void tell(Forest& forest, Kind kind, const tercet::Results& results) {
  if (kind == Kind::kEvaluate) forest.tell(results);
  if (kind == Kind::kExpand) forest.tell_children(results);
  if (kind == Kind::kVerify) forest.tell_values(results);
}

// As many visits as those of the children and at most one of its own, on their way, too.
inline void check_tree(const Forest& forest, tercet::TreeId tree) {
  const tercet::TreeColumns columns = forest.columns(tree);
  const tercet::TreeStatus status = forest.status(tree);
  const std::size_t n = columns.node.size();
  CHECK(status.nodes == n && columns.visits[0] == status.committed);
  CHECK(columns.in_flight[0] == status.in_flight);
  CHECK(status.committed <= status.simulations);
  std::vector<std::uint32_t> visits(n), in_flight(n), children(n);
  for (std::size_t i = 1; i < n; ++i) {
    const auto parent = static_cast<std::size_t>(columns.parent[i]);
    CHECK(parent < n && columns.depth[i] == columns.depth[parent] + 1);
    visits[parent] += columns.visits[i];
    in_flight[parent] += columns.in_flight[i];
    children[parent] += 1;
  }
  for (std::size_t i = 0; i < n; ++i) {
    CHECK(std::isfinite(columns.total[i]));
    CHECK(std::isnan(columns.value[i]) == (columns.visits[i] == 0));
    CHECK(in_flight[i] <= columns.in_flight[i] && children[i] <= forest.config().max_children);
    if (columns.terminal[i] != 0) {
      CHECK(children[i] == 0);
    } else {
      CHECK(visits[i] <= columns.visits[i] && columns.visits[i] - visits[i] <= 1);
    }
  }
}

}  // namespace fuzz
