#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "tercet/reward.hpp"

using tercet::Aggregation;
using tercet::Channel;
using tercet::RewardConfig;
using tercet::RewardForm;
using tercet::Rollout;
using tercet::RolloutBatch;
using tercet::RolloutReward;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr std::array kAll = {Aggregation::kSum, Aggregation::kMean,    Aggregation::kMax,
                             Aggregation::kMin, Aggregation::kProduct, Aggregation::kLast};

const RewardConfig kPaper = tercet::published(RewardForm::kPaper);
const RewardConfig kReleased = tercet::published(RewardForm::kReleased);

bool near(double a, double b) { return std::abs(a - b) < 1e-15; }

RolloutReward reward(const RewardConfig& config, std::vector<double> verdicts,
                     std::optional<double> outcome, double start_verdict = 0.0) {
  return tercet::rollout_reward({verdicts, outcome, start_verdict}, config);
}

void worked_values_of_the_released_form() {
  CHECK(reward(kReleased, {}, -1.0).total == -1.0);
  CHECK(reward(kReleased, {1.0}, -1.0).total == -1.0);
  CHECK(reward(kReleased, {1.0, 1.0}, -1.0).total == 0.0);
  CHECK(reward(kReleased, {1.0, -1.0, -1.0}, 1.0).total == 0.75);
  CHECK(near(reward(kReleased, {1.0, 1.0, -1.0, -1.0}, -1.0).total, 1.0 / 9.0));
  CHECK(near(reward(kReleased, {1.0, 1.0, 1.0, 1.0}, 1.0).total, 1.0));
}

// At most (N + 3) / (2 N), and F has 2 / (N + 3) of it.
void long_rollouts_speak_more_quietly_in_the_released_form() {
  for (const int n : {1, 2, 3, 8, 100}) {
    const RolloutReward best =
        reward(kReleased, std::vector<double>(static_cast<std::size_t>(n) + 1, 1.0), 1.0);
    CHECK(std::abs(best.total - (n + 3) / (2.0 * n)) < 1e-12);
    CHECK(std::abs(best.outcome / best.total - 2.0 / (n + 3)) < 1e-12);
  }
}

void paper_form_by_hand() {
  const RewardConfig config{RewardForm::kPaper, 0.5, 0.25, 0.0, true};
  const RolloutReward by_hand = reward(config, {1.0, -1.0, 1.0, -0.5}, 1.0, -0.75);
  CHECK(by_hand.step == (1.0 - 0.25 + 0.0625) / 3.0);
  CHECK(by_hand.outcome == 0.5);
  CHECK(by_hand.start == -0.75);
  CHECK(by_hand.total == by_hand.step + 0.5 - 0.75);
  CHECK(reward(kPaper, {1.0, -1.0, 1.0, 1.0}, -1.0).total == 1.0 / 3.0 - 1.0);
  CHECK(reward(config, {1.0}, -1.0).total == -0.5);
  CHECK(reward(config, {}, -1.0).total == -0.5);
}

void start_verdict_is_a_part_only_where_the_config_adds_it() {
  CHECK(reward(kPaper, {1.0, 1.0}, 1.0, -1.0).total == 1.0);
  CHECK(reward(kReleased, {1.0, 1.0}, 1.0, -1.0).start == 0.0);
  CHECK(reward(kReleased, {1.0, 1.0}, 1.0, -1.0).total == 2.0);
}

// Its last step is no terminal one: the paper form counts it, the released code drops it.
void truncated_rollouts() {
  CHECK(reward(kPaper, {1.0, -1.0, -1.0}, {}).total == -1.0 / 3.0);
  CHECK(reward(kPaper, {-1.0}, {}).total == -1.0);
  CHECK(reward(kPaper, {}, {}).total == 0.0);
  CHECK(reward({RewardForm::kPaper, 2.0, 1.0, -0.5, true}, {1.0}, {}).total == 0.0);
  CHECK(reward(kReleased, {1.0, -1.0, -1.0}, {}).total == -0.25);
  CHECK(reward(kReleased, {1.0}, {}).total == -1.0);
}

void a_config_outside_its_ranges_is_refused() {
  const auto refused = [](RewardForm form, double weight, double decay, double truncated) {
    CHECK_THROWS(reward({form, weight, decay, truncated, true}, {}, 1.0), std::invalid_argument);
  };
  for (const double bad : {kNan, kInfinity, -0.1}) refused(RewardForm::kPaper, bad, 1.0, 0.0);
  for (const double bad : {kNan, 1.1, -0.1}) refused(RewardForm::kPaper, 1.0, bad, 0.0);
  for (const double bad : {kNan, 1.1, -1.1}) refused(RewardForm::kPaper, 1.0, 1.0, bad);
  refused(RewardForm::kReleased, 0.5, 1.0, 0.0);
  refused(RewardForm::kReleased, 1.0, 0.5, 0.0);
  for (const double edge : {0.0, 1.0}) tercet::check_config({RewardForm::kPaper, edge, edge, edge});
}

void scores_outside_their_range_are_refused() {
  for (const double bad : {kNan, kInfinity, 1.5, -1.5}) {
    CHECK_THROWS(reward(kPaper, {0.0, bad}, 1.0), std::invalid_argument);
    CHECK_THROWS(reward(kPaper, {0.0}, bad), std::invalid_argument);
    CHECK_THROWS(reward(kPaper, {0.0}, 1.0, bad), std::invalid_argument);
  }
}

struct Batch {
  std::vector<double> verdicts{1.0, -1.0, 0.5, 0.75};
  std::vector<std::int64_t> offsets{0, 3, 3, 4};
  std::vector<double> outcomes{-1.0, 1.0, kNan};
  std::vector<double> start_verdicts{0.25, -1.0, 1.0};

  std::vector<RolloutReward> rewards(std::size_t n = 3, const RewardConfig& config = kPaper) const {
    std::vector<RolloutReward> out(n);
    tercet::rollout_rewards({verdicts, offsets, outcomes, start_verdicts}, config, out);
    return out;
  }
};

void a_batch_is_its_rollouts() {
  const std::vector<RolloutReward> rewards = Batch().rewards();
  CHECK(rewards[0].total == reward(kPaper, {1.0, -1.0, 0.5}, -1.0, 0.25).total);
  CHECK(rewards[0].start == 0.25);
  CHECK(rewards[1].total == 0.0);
  CHECK(rewards[2].step == 0.75);
  CHECK(rewards[2].total == 1.75);
  Batch silent;
  silent.start_verdicts = {};
  CHECK(silent.rewards()[1].total == 1.0);
}

template <typename Edit>
void refuses_batch(Edit edit, std::size_t n = 3) {
  Batch batch;
  edit(batch);
  CHECK_THROWS(batch.rewards(n), std::invalid_argument);
}

void a_batch_that_does_not_fit_together_is_refused() {
  refuses_batch([](Batch& b) { b.start_verdicts = {}; }, 2);
  refuses_batch([](Batch& b) { b.offsets = {}; });
  refuses_batch([](Batch& b) { b.offsets[0] = 1; });
  refuses_batch([](Batch& b) { b.offsets[3] = 3; });
  refuses_batch([](Batch& b) { b.offsets = {0, 4, 3, 4}; });
  refuses_batch([](Batch& b) { b.offsets = {0, -1, 3, 4}; });
  refuses_batch(
      [](Batch& b) {
        b.outcomes.push_back(1.0);
        b.start_verdicts = {};
      },
      4);
  refuses_batch([](Batch& b) { b.start_verdicts.pop_back(); });
  for (const double bad : {kNan, 1.5}) {
    refuses_batch([bad](Batch& b) { b.verdicts[1] = bad; });
    refuses_batch([bad](Batch& b) { b.start_verdicts[1] = bad; });
  }
  refuses_batch([](Batch& b) { b.outcomes[1] = -1.5; });
  CHECK_THROWS(Batch().rewards(3, {RewardForm::kPaper, -1.0}), std::invalid_argument);
}

void path_returns_by_hand() {
  const std::vector<double> scores{0.5, -0.25, 0.75, 0.25};
  const std::array expected = {1.25, 0.3125, 0.75, -0.25, -0.0234375, 0.25};
  for (std::size_t i = 0; i < kAll.size(); ++i) {
    CHECK(tercet::path_return(scores, kAll[i]) == expected[i]);
    CHECK_THROWS(tercet::path_return({}, kAll[i]), std::invalid_argument);
    const std::vector<double> bad{1.0, kNan};
    CHECK_THROWS(tercet::path_return(bad, kAll[i]), std::invalid_argument);
  }
  CHECK(tercet::path_return(std::vector{-0.5, -0.25}, Aggregation::kMax) == -0.25);
  CHECK(tercet::path_return(std::vector{0.5, 0.25}, Aggregation::kMin) == 0.25);
}

void a_node_folds_its_returns_as_a_path_folds_its_scores() {
  const std::vector<double> returns{-0.5, -0.25, -2.0};
  for (const Aggregation how : kAll) {
    double accumulated = tercet::identity(how);
    for (const double value : returns) accumulated = tercet::absorbed(accumulated, value, how);
    CHECK(tercet::value_of(accumulated, 3, how) == tercet::path_return(returns, how));
    CHECK_THROWS(tercet::absorbed(0.0, kInfinity, how), std::invalid_argument);
  }
  CHECK(tercet::value_of(0.0, 0, Aggregation::kSum) == 0.0);
  for (const Aggregation how : {kAll[1], kAll[2], kAll[3], kAll[4], kAll[5]}) {
    CHECK_THROWS(tercet::value_of(tercet::identity(how), 0, how), std::invalid_argument);
  }
}

void decay_is_a_repeated_product() {
  CHECK(tercet::decayed(0.3, 0.9, 0) == 0.3);
  CHECK(tercet::decayed(0.3, 0.9, 3) == 0.3 * 0.9 * 0.9 * 0.9);
  for (const double edge : {0.0, 1.0}) CHECK(tercet::decayed(2.0, edge, 2) == 2.0 * edge);
  for (const double bad : {kNan, -0.1, 1.1}) {
    CHECK_THROWS(tercet::decayed(1.0, bad, 1), std::invalid_argument);
  }
  CHECK_THROWS(tercet::decayed(kNan, 0.9, 1), std::invalid_argument);
}

// A start at depth 2, as in the released code: it gets u, its parent 0.9 u, the root 0.81 u.
void channels_of_a_node_go_up_side_by_side() {
  const std::array channels = {Channel{Aggregation::kSum, 0.9}, Channel{Aggregation::kMax, 1.0},
                               Channel{}};
  std::array values = {0.75, 1.0, -0.5};
  std::array<std::array<double, 3>, 3> path{};
  for (auto& node : path) {
    node = {0.5, -kInfinity, 0.25};
    tercet::backup_node(node, values, channels);
  }
  CHECK(path[0][0] == 0.5 + 0.75);
  CHECK(path[1][0] == 0.5 + 0.75 * 0.9);
  CHECK(path[2][0] == 0.5 + 0.75 * 0.9 * 0.9);
  CHECK(path[2][1] == 1.0);
  CHECK(path[2][2] == -0.25);
}

void a_refused_backup_leaves_the_node_as_it_was() {
  std::array accumulated = {1.0, 2.0};
  const std::array good = {Channel{Aggregation::kSum, 0.5}, Channel{Aggregation::kSum, 0.5}};
  const auto refused = [&accumulated](std::vector<double> values, std::vector<Channel> channels) {
    CHECK_THROWS(tercet::backup_node(accumulated, values, channels), std::invalid_argument);
    CHECK(accumulated[0] == 1.0 && accumulated[1] == 2.0);
    CHECK(values[0] == 1.0);
  };
  refused({1.0, kNan}, {good[0], good[1]});
  for (const double bad : {kNan, 1.1}) refused({1.0, 1.0}, {good[0], {Aggregation::kSum, bad}});
  refused({1.0}, {good[0], good[1]});
  refused({1.0, 1.0, 1.0}, {good[0], good[1], good[0]});
}

void rest_mcts_by_hand() {
  CHECK(tercet::mixed(0.5, 1.0, 0.25) == 0.625);
  for (const double edge : {0.0, 1.0}) CHECK(tercet::mixed(0.0, 1.0, edge) == edge);
  for (const double bad : {kNan, -0.1, 1.1}) {
    CHECK_THROWS(tercet::mixed(0.0, 1.0, bad), std::invalid_argument);
  }
  CHECK_THROWS(tercet::mixed(kNan, 1.0, 0.5), std::invalid_argument);
  CHECK_THROWS(tercet::mixed(1.0, kNan, 0.5), std::invalid_argument);

  const std::vector<double> values{0.5, -1.0, 2.0};
  const std::vector<std::uint32_t> visits{3, 1, 0};
  CHECK(tercet::visit_weighted_mean(values, visits, 7.0) == 0.125);
  CHECK(tercet::visit_weighted_mean(values, std::vector<std::uint32_t>(3), 7.0) == 7.0);
  CHECK(tercet::visit_weighted_mean({}, {}, 7.0) == 7.0);
  CHECK_THROWS(tercet::visit_weighted_mean(values, std::vector<std::uint32_t>(2), 7.0),
               std::invalid_argument);
  const std::vector<double> bad{0.5, kNan, 1.0};
  CHECK_THROWS(tercet::visit_weighted_mean(bad, visits, 7.0), std::invalid_argument);
}

}  // namespace

int main() {
  worked_values_of_the_released_form();
  long_rollouts_speak_more_quietly_in_the_released_form();
  paper_form_by_hand();
  start_verdict_is_a_part_only_where_the_config_adds_it();
  truncated_rollouts();
  a_config_outside_its_ranges_is_refused();
  scores_outside_their_range_are_refused();
  a_batch_is_its_rollouts();
  a_batch_that_does_not_fit_together_is_refused();
  path_returns_by_hand();
  a_node_folds_its_returns_as_a_path_folds_its_scores();
  decay_is_a_repeated_product();
  channels_of_a_node_go_up_side_by_side();
  a_refused_backup_leaves_the_node_as_it_was();
  rest_mcts_by_hand();
  return 0;
}
