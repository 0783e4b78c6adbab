#include "tercet/budget.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

namespace tercet {

namespace {

struct Limit {
  const char* name;
  double Budget::* value;
};

constexpr Limit kLimits[] = {
    {"evaluations", &Budget::evaluations}, {"nodes", &Budget::nodes},
    {"model_calls", &Budget::model_calls}, {"tokens", &Budget::tokens},
    {"tool_calls", &Budget::tool_calls},   {"seconds", &Budget::seconds},
};

bool is_amount(double value) { return std::isfinite(value) && value >= 0.0; }

}  // namespace

Cost& Cost::operator+=(const Cost& more) {
  model_calls += more.model_calls;
  tokens += more.tokens;
  tool_calls += more.tool_calls;
  seconds += more.seconds;
  return *this;
}

bool is_cost(const Cost& cost) {
  return is_amount(cost.model_calls) && is_amount(cost.tokens) && is_amount(cost.tool_calls) &&
         is_amount(cost.seconds);
}

bool Budget::is_none() const {
  for (const Limit& limit : kLimits) {
    if (this->*limit.value != kNone) return false;
  }
  return true;
}

bool Budget::is_reached(std::uint64_t used_evaluations, std::uint64_t used_nodes,
                        const Cost& cost) const {
  return static_cast<double>(used_evaluations) >= evaluations ||
         static_cast<double>(used_nodes) >= nodes || cost.model_calls >= model_calls ||
         cost.tokens >= tokens || cost.tool_calls >= tool_calls || cost.seconds >= seconds;
}

void check_budget(const Budget& budget) {
  for (const Limit& limit : kLimits) {
    if (!(budget.*limit.value > 0.0)) {
      throw std::invalid_argument(std::string("Forest: ") + limit.name +
                                  " must be > 0, or none, got " +
                                  std::to_string(budget.*limit.value));
    }
  }
}

std::string_view name_of(StopReason reason) {
  switch (reason) {
    case StopReason::kRunning:
      return "";
    case StopReason::kSimulations:
      return "simulations";
    case StopReason::kCorrect:
      return "correct";
    case StopReason::kSamples:
      return "samples";
    case StopReason::kBudget:
      return "budget";
    case StopReason::kConverged:
      return "converged";
    case StopReason::kClosed:
      return "closed";
    case StopReason::kScript:
      return "script";
  }
  return "";
}

}  // namespace tercet
