#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "tercet/reward.hpp"

namespace py = pybind11;
using namespace py::literals;
using tercet::Aggregation;
using tercet::Channel;
using tercet::RewardConfig;
using tercet::RewardForm;
using tercet::RolloutReward;

namespace {

using Scores = std::vector<double>;
constexpr const char* kRewards = "rollout_rewards";

// Named columns over the struct itself; built on the first call, for it imports numpy.
py::array rewards_of(std::size_t n) {
  static const bool registered = [] {
    PYBIND11_NUMPY_DTYPE(RolloutReward, step, outcome, start, total);
    return true;
  }();
  (void)registered;
  return py::array_t<RolloutReward>(static_cast<py::ssize_t>(n));
}

py::array rollout_rewards(const py::array& verdicts, const py::array& offsets,
                          const py::array& outcomes, const std::optional<py::array>& start_verdicts,
                          const RewardConfig& config) {
  const tercet::RolloutBatch batch{
      row<double>(verdicts, kRewards, "verdicts"), row<std::int64_t>(offsets, kRewards, "offsets"),
      row<double>(outcomes, kRewards, "outcomes"),
      start_verdicts ? row<double>(*start_verdicts, kRewards, "start_verdicts")
                     : std::span<const double>()};
  py::array out = rewards_of(batch.outcomes.size());
  const std::span rewards(static_cast<RolloutReward*>(out.mutable_data()), batch.outcomes.size());
  {
    const py::gil_scoped_release released;
    tercet::rollout_rewards(batch, config, rewards);
  }
  return out;
}

RewardConfig config_of(RewardForm form, double outcome_weight, double step_decay,
                       std::optional<double> truncated_outcome,
                       std::optional<bool> add_start_verdict) {
  RewardConfig config = tercet::published(form);
  config.outcome_weight = outcome_weight;
  config.step_decay = step_decay;
  config.truncated_outcome = truncated_outcome.value_or(config.truncated_outcome);
  config.add_start_verdict = add_start_verdict.value_or(config.add_start_verdict);
  tercet::check_config(config);
  return config;
}

void bind_rollout_reward(py::module_& m) {
  py::enum_<RewardForm>(m, "RewardForm", "Whose formula.")
      .value("paper", RewardForm::kPaper)
      .value("released", RewardForm::kReleased);
  py::class_<RewardConfig>(m, "RewardConfig", "Formula of a rollout's reward. Immutable.")
      .def(py::init(&config_of), py::kw_only(), "form"_a = RewardForm::kPaper,
           "outcome_weight"_a = 1.0, "step_decay"_a = 1.0, "truncated_outcome"_a = py::none(),
           "add_start_verdict"_a = py::none())
      .def_readonly("form", &RewardConfig::form)
      .def_readonly("outcome_weight", &RewardConfig::outcome_weight)
      .def_readonly("step_decay", &RewardConfig::step_decay)
      .def_readonly("truncated_outcome", &RewardConfig::truncated_outcome)
      .def_readonly("add_start_verdict", &RewardConfig::add_start_verdict)
      .def("__repr__", [](const RewardConfig& c) {
        return py::str(
                   "RewardConfig(form={}, outcome_weight={}, step_decay={}, truncated_outcome={}, "
                   "add_start_verdict={})")
            .format(c.form, c.outcome_weight, c.step_decay, c.truncated_outcome,
                    c.add_start_verdict);
      });
  py::class_<RolloutReward>(m, "RolloutReward", "Parts of a rollout's reward and their sum.")
      .def_readonly("step", &RolloutReward::step)
      .def_readonly("outcome", &RolloutReward::outcome)
      .def_readonly("start", &RolloutReward::start)
      .def_readonly("total", &RolloutReward::total)
      .def("__repr__", [](const RolloutReward& r) {
        return py::str("RolloutReward(step={}, outcome={}, start={}, total={})")
            .format(r.step, r.outcome, r.start, r.total);
      });
  m.def(
      "rollout_reward",
      [](const Scores& verdicts, std::optional<double> outcome, double start_verdict,
         const RewardConfig& config) {
        return tercet::rollout_reward({verdicts, outcome, start_verdict}, config);
      },
      "verdicts"_a, "outcome"_a, py::kw_only(), "start_verdict"_a = 0.0,
      "config"_a = RewardConfig{}, "Reward of one rollout.");
  m.def("rollout_rewards", &rollout_rewards, "verdicts"_a, "offsets"_a, "outcomes"_a, py::kw_only(),
        "start_verdicts"_a = py::none(), "config"_a = RewardConfig{}, "Rewards of n rollouts.");
}

void bind_backup(py::module_& m) {
  py::enum_<Aggregation>(m, "Aggregation", "How several numbers become one.")
      .value("sum", Aggregation::kSum)
      .value("mean", Aggregation::kMean)
      .value("max", Aggregation::kMax)
      .value("min", Aggregation::kMin)
      .value("product", Aggregation::kProduct)
      .value("last", Aggregation::kLast);
  py::class_<Channel>(m, "Channel", "One of several values that a node keeps at once. Immutable.")
      .def(py::init([](Aggregation how, double gamma) { return Channel{how, gamma}; }),
           "how"_a = Aggregation::kMean, py::kw_only(), "gamma"_a = 1.0)
      .def_readonly("how", &Channel::how)
      .def_readonly("gamma", &Channel::gamma);
  m.def("identity", &tercet::identity, "how"_a, "What a node holds before its first return.");
  m.def("absorbed", &tercet::absorbed, "accumulated"_a, "value"_a, "how"_a,
        "What a node holds after one more return.");
  m.def("value_of", &tercet::value_of, "accumulated"_a, "returns"_a, "how"_a,
        "Value of a node that has taken in `returns` returns.");
  m.def("decayed", &tercet::decayed, "value"_a, "gamma"_a, "distance"_a,
        "value * gamma^distance, as a repeated product.");
  m.def("mixed", &tercet::mixed, "value"_a, "simulated"_a, "alpha"_a,
        "(1 - alpha) * value + alpha * simulated.");
  m.def(
      "path_return",
      [](const Scores& scores, Aggregation how) { return tercet::path_return(scores, how); },
      "scores"_a, "how"_a, "The scores of a path as one number.");
  m.def(
      "visit_weighted_mean",
      [](const Scores& values, const std::vector<std::uint32_t>& visits, double own) {
        return tercet::visit_weighted_mean(values, visits, own);
      },
      "values"_a, "visits"_a, "own"_a, "Mean of children by visits; `own` while there are none.");
  m.def(
      "backup_node",
      [](Scores accumulated, Scores values, const std::vector<Channel>& channels) {
        tercet::backup_node(accumulated, values, channels);
        return std::pair(std::move(accumulated), std::move(values));
      },
      "accumulated"_a, "values"_a, "channels"_a,
      "One step of a backup: what the node holds then, and the values for its parent.");
}

}  // namespace

void bind_reward(py::module_& m) {
  bind_rollout_reward(m);
  bind_backup(m);
}
