#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "check.hpp"
#include "tercet/budget.hpp"

using tercet::Budget;
using tercet::Cost;
using tercet::StopReason;

namespace {

constexpr double Budget::* kLimits[] = {&Budget::evaluations, &Budget::nodes,
                                        &Budget::model_calls, &Budget::tokens,
                                        &Budget::tool_calls,  &Budget::seconds};
constexpr double Cost::* kUnits[] = {&Cost::model_calls, &Cost::tokens, &Cost::tool_calls,
                                     &Cost::seconds};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

void costs_add_up_unit_by_unit() {
  Cost cost{1.0, 2.0, 3.0, 4.0};
  cost += {0.5, 0.25, 0.125, 0.0625};
  CHECK(cost.model_calls == 1.5 && cost.tokens == 2.25);
  CHECK(cost.tool_calls == 3.125 && cost.seconds == 4.0625);
  CHECK(!Cost{}.is_some());
  for (const auto unit : kUnits) {
    Cost one;
    one.*unit = 0.5;
    CHECK(one.is_some() && is_cost(one));
    for (const double bad : {-0.5, kInfinity, std::nan("")}) {
      one.*unit = bad;
      CHECK(!is_cost(one));
    }
  }
}

// `spent` of what the limit counts.
bool is_reached(const Budget& budget, double Budget::* limit, double spent) {
  Cost cost;
  std::uint64_t evaluations = 0, nodes = 0;
  if (limit == &Budget::evaluations) evaluations = static_cast<std::uint64_t>(spent);
  if (limit == &Budget::nodes) nodes = static_cast<std::uint64_t>(spent);
  for (int unit = 0; unit < 4; ++unit) {
    if (limit == kLimits[unit + 2]) cost.*kUnits[unit] = spent;
  }
  return budget.is_reached(evaluations, nodes, cost);
}

void a_limit_is_reached_when_as_much_is_spent() {
  CHECK(Budget{}.is_none() && !Budget{}.is_reached(1u << 30, 1u << 30, {1e9, 1e9, 1e9, 1e9}));
  for (const auto limit : kLimits) {
    Budget budget;
    budget.*limit = 3.0;
    CHECK(!budget.is_none());
    CHECK(!is_reached(budget, limit, 2.0));
    CHECK(is_reached(budget, limit, 3.0) && is_reached(budget, limit, 4.0));
    for (const auto other : kLimits) CHECK(other == limit || !is_reached(budget, other, 4.0));
  }
}

void limits_that_are_not_positive_are_refused() {
  tercet::check_budget({});
  for (const auto limit : kLimits) {
    for (const double bad : {0.0, -1.0, std::nan("")}) {
      Budget budget;
      budget.*limit = bad;
      CHECK_THROWS(tercet::check_budget(budget), std::invalid_argument);
    }
    Budget budget;
    budget.*limit = 0.5;
    tercet::check_budget(budget);
  }
  try {
    tercet::check_budget({.tool_calls = -1.0});
    CHECK(false);
  } catch (const std::invalid_argument& e) {
    CHECK(std::string(e.what()).starts_with("Forest: tool_calls must be > 0"));
  }
}

void reasons_have_names() {
  CHECK(name_of(StopReason::kRunning).empty());
  CHECK(name_of(StopReason::kSimulations) == "simulations");
  CHECK(name_of(StopReason::kCorrect) == "correct" && name_of(StopReason::kSamples) == "samples");
  CHECK(name_of(StopReason::kBudget) == "budget" && name_of(StopReason::kClosed) == "closed");
  CHECK(name_of(StopReason::kConverged) == "converged" && name_of(StopReason::kScript) == "script");
}

}  // namespace

int main() {
  costs_add_up_unit_by_unit();
  a_limit_is_reached_when_as_much_is_spent();
  limits_that_are_not_positive_are_refused();
  reasons_have_names();
}
