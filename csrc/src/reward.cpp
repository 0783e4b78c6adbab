#include "tercet/reward.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>

namespace tercet {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string text(double value) {
  std::array<char, 32> shortest{};
  const auto end = std::to_chars(shortest.data(), shortest.data() + shortest.size(), value).ptr;
  return {shortest.data(), end};
}

std::string item(const char* name, std::size_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

[[noreturn]] void refuse(const char* function, const std::string& what, const std::string& got) {
  throw std::invalid_argument(std::string(function) + ": " + what + ", got " + got);
}

bool is_score(double value) { return value >= -1.0 && value <= 1.0; }

bool is_share(double value) { return value >= 0.0 && value <= 1.0; }

void check_scores(const char* function, const char* name, std::span<const double> scores) {
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (!is_score(scores[i])) {
      refuse(function, item(name, i) + " must be in [-1, 1]", text(scores[i]));
    }
  }
}

void check_finite(const char* function, const std::string& name, double value) {
  if (!std::isfinite(value)) refuse(function, name + " must be finite", text(value));
}

void check_lengths(const char* function, const char* names, std::size_t a, std::size_t b) {
  if (a != b) {
    refuse(function, std::string(names) + " must have equal lengths",
           std::to_string(a) + " and " + std::to_string(b));
  }
}

// The steps whose verdicts count: without the terminal one.
std::span<const double> judged(const Rollout& rollout, RewardForm form) {
  const bool drops_last = rollout.outcome.has_value() || form == RewardForm::kReleased;
  const std::size_t steps = rollout.verdicts.size();
  return rollout.verdicts.first(drops_last && steps > 0 ? steps - 1 : steps);
}

double paper_step(std::span<const double> verdicts, double step_decay) {
  double sum = 0.0;
  double weight = 1.0;
  for (const double verdict : verdicts) {
    sum += weight * verdict;
    weight *= step_decay;
  }
  return verdicts.empty() ? 0.0 : sum / static_cast<double>(verdicts.size());
}

// In the order of the released code's operations.
double released_step(std::span<const double> verdicts) {
  const auto n = static_cast<double>(verdicts.size());
  double sum = 0.0;
  for (std::size_t i = 0; i < verdicts.size(); ++i) {
    sum += 1.0 / n * verdicts[i] * (n - static_cast<double>(i)) / n;
  }
  return sum;
}

RolloutReward reward_of(const Rollout& rollout, const RewardConfig& config) {
  const std::span<const double> steps = judged(rollout, config.form);
  const double outcome = rollout.outcome.value_or(config.truncated_outcome);
  RolloutReward reward;
  if (config.form == RewardForm::kReleased) {
    const std::size_t n = std::max<std::size_t>(steps.size(), 1);
    reward.step = released_step(steps);
    reward.outcome = 1.0 / static_cast<double>(n) * outcome;
  } else {
    reward.step = paper_step(steps, config.step_decay);
    reward.outcome = config.outcome_weight * outcome;
  }
  reward.start = config.add_start_verdict ? rollout.start_verdict : 0.0;
  reward.total = reward.step + reward.outcome + reward.start;
  return reward;
}

void check_offsets(std::span<const std::int64_t> offsets, std::size_t total) {
  const auto end = static_cast<std::int64_t>(total);
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != end) {
    refuse("rollout_rewards", "offsets must run from 0 to " + std::to_string(total),
           offsets.empty()
               ? "none"
               : std::to_string(offsets.front()) + " to " + std::to_string(offsets.back()));
  }
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] < offsets[i - 1]) {
      refuse("rollout_rewards", item("offsets", i) + " must be >= the one before",
             std::to_string(offsets[i]) + " after " + std::to_string(offsets[i - 1]));
    }
  }
}

void check_batch(const RolloutBatch& batch, std::size_t n) {
  const char* function = "rollout_rewards";
  check_offsets(batch.offsets, batch.verdicts.size());
  check_lengths(function, "outcomes and rollouts", batch.outcomes.size(), batch.offsets.size() - 1);
  check_lengths(function, "rewards and rollouts", n, batch.outcomes.size());
  if (!batch.start_verdicts.empty()) {
    check_lengths(function, "start_verdicts and rollouts", batch.start_verdicts.size(), n);
  }
  check_scores(function, "verdicts", batch.verdicts);
  check_scores(function, "start_verdicts", batch.start_verdicts);
  for (std::size_t i = 0; i < n; ++i) {
    const double outcome = batch.outcomes[i];
    if (!is_score(outcome) && !std::isnan(outcome)) {
      refuse(function, item("outcomes", i) + " must be in [-1, 1] or NaN", text(outcome));
    }
  }
}

Rollout rollout_at(const RolloutBatch& batch, std::size_t i) {
  const auto first = static_cast<std::size_t>(batch.offsets[i]);
  const auto end = static_cast<std::size_t>(batch.offsets[i + 1]);
  Rollout rollout{batch.verdicts.subspan(first, end - first)};
  if (!std::isnan(batch.outcomes[i])) rollout.outcome = batch.outcomes[i];
  if (!batch.start_verdicts.empty()) rollout.start_verdict = batch.start_verdicts[i];
  return rollout;
}

double combined(double accumulated, double value, Aggregation how) {
  switch (how) {
    case Aggregation::kSum:
    case Aggregation::kMean:
      return accumulated + value;
    case Aggregation::kMax:
      return std::max(accumulated, value);
    case Aggregation::kMin:
      return std::min(accumulated, value);
    case Aggregation::kProduct:
      return accumulated * value;
    case Aggregation::kLast:
      break;
  }
  return value;
}

double finished(double accumulated, std::size_t count, Aggregation how) {
  return how == Aggregation::kMean ? accumulated / static_cast<double>(count) : accumulated;
}

}  // namespace

RewardConfig published(RewardForm form) {
  RewardConfig config;
  if (form == RewardForm::kReleased) config = {form, 1.0, 1.0, -1.0, false};
  return config;
}

void check_config(const RewardConfig& config) {
  const char* name = "RewardConfig";
  const double beta = config.outcome_weight;
  if (!std::isfinite(beta) || beta < 0.0) {
    refuse(name, "outcome_weight must be finite and >= 0", text(beta));
  }
  if (!is_share(config.step_decay)) {
    refuse(name, "step_decay must be in [0, 1]", text(config.step_decay));
  }
  if (!is_score(config.truncated_outcome)) {
    refuse(name, "truncated_outcome must be in [-1, 1]", text(config.truncated_outcome));
  }
  if (config.form == RewardForm::kReleased && (beta != 1.0 || config.step_decay != 1.0)) {
    refuse(name,
           "the released form has weights of its own: outcome_weight and step_decay must be 1",
           text(beta) + " and " + text(config.step_decay));
  }
}

RolloutReward rollout_reward(const Rollout& rollout, const RewardConfig& config) {
  const char* function = "rollout_reward";
  check_config(config);
  check_scores(function, "verdicts", rollout.verdicts);
  if (rollout.outcome && !is_score(*rollout.outcome)) {
    refuse(function, "outcome must be in [-1, 1]", text(*rollout.outcome));
  }
  if (!is_score(rollout.start_verdict)) {
    refuse(function, "start_verdict must be in [-1, 1]", text(rollout.start_verdict));
  }
  return reward_of(rollout, config);
}

void rollout_rewards(const RolloutBatch& batch, const RewardConfig& config,
                     std::span<RolloutReward> rewards) {
  check_config(config);
  check_batch(batch, rewards.size());
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    rewards[i] = reward_of(rollout_at(batch, i), config);
  }
}

double identity(Aggregation how) {
  switch (how) {
    case Aggregation::kMax:
      return -kInfinity;
    case Aggregation::kMin:
      return kInfinity;
    case Aggregation::kProduct:
      return 1.0;
    default:
      return 0.0;
  }
}

double absorbed(double accumulated, double value, Aggregation how) {
  check_finite("absorbed", "value", value);
  return combined(accumulated, value, how);
}

double value_of(double accumulated, std::uint32_t returns, Aggregation how) {
  if (returns == 0 && how != Aggregation::kSum) refuse("value_of", "returns must be >= 1", "0");
  return finished(accumulated, returns, how);
}

double path_return(std::span<const double> scores, Aggregation how) {
  if (scores.empty()) refuse("path_return", "scores must hold at least one", "none");
  double accumulated = identity(how);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    check_finite("path_return", item("scores", i), scores[i]);
    accumulated = combined(accumulated, scores[i], how);
  }
  return finished(accumulated, scores.size(), how);
}

double decayed(double value, double gamma, std::uint32_t distance) {
  check_finite("decayed", "value", value);
  if (!is_share(gamma)) refuse("decayed", "gamma must be in [0, 1]", text(gamma));
  for (std::uint32_t i = 0; i < distance; ++i) value *= gamma;
  return value;
}

void backup_node(std::span<double> accumulated, std::span<double> values,
                 std::span<const Channel> channels) {
  const char* function = "backup_node";
  check_lengths(function, "accumulated and channels", accumulated.size(), channels.size());
  check_lengths(function, "values and channels", values.size(), channels.size());
  for (std::size_t i = 0; i < channels.size(); ++i) {
    check_finite(function, item("values", i), values[i]);
    if (!is_share(channels[i].gamma)) {
      refuse(function, item("gamma", i) + " must be in [0, 1]", text(channels[i].gamma));
    }
  }
  for (std::size_t i = 0; i < channels.size(); ++i) {
    accumulated[i] = combined(accumulated[i], values[i], channels[i].how);
    values[i] *= channels[i].gamma;
  }
}

double mixed(double value, double simulated, double alpha) {
  check_finite("mixed", "value", value);
  check_finite("mixed", "simulated", simulated);
  if (!is_share(alpha)) refuse("mixed", "alpha must be in [0, 1]", text(alpha));
  return value * (1.0 - alpha) + simulated * alpha;
}

double visit_weighted_mean(std::span<const double> values, std::span<const std::uint32_t> visits,
                           double own) {
  check_lengths("visit_weighted_mean", "values and visits", values.size(), visits.size());
  double sum = 0.0;
  double total = 0.0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    check_finite("visit_weighted_mean", item("values", i), values[i]);
    const double n = visits[i];
    sum += values[i] * n;
    total += n;
  }
  return total > 0.0 ? sum / total : own;
}

}  // namespace tercet
