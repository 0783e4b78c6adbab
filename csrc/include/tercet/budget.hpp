// What a search may spend, and when it is to stop.
#pragma once

#include <cstdint>
#include <limits>
#include <string_view>

namespace tercet {

// What evaluations cost, in the units of whoever pays for them; counted as told.
struct Cost {
  double model_calls{0.0};
  double tokens{0.0};
  double tool_calls{0.0};
  double seconds{0.0};

  [[nodiscard]] bool is_some() const {
    return model_calls != 0.0 || tokens != 0.0 || tool_calls != 0.0 || seconds != 0.0;
  }
  Cost& operator+=(const Cost& more);
};

// Finite and not negative in every unit.
[[nodiscard]] bool is_cost(const Cost& cost);

// Reached when as much is spent; no limit by default.
struct Budget {
  static constexpr double kNone = std::numeric_limits<double>::infinity();

  double evaluations{kNone};  // simulations by a ticket, not by a visit of an end
  double nodes{kNone};
  double model_calls{kNone};
  double tokens{kNone};
  double tool_calls{kNone};
  double seconds{kNone};

  [[nodiscard]] bool is_none() const;
  [[nodiscard]] bool is_reached(std::uint64_t evaluations, std::uint64_t nodes,
                                const Cost& cost) const;
};

// Throws std::invalid_argument for a limit that is not positive.
void check_budget(const Budget& budget);

// Ends of a search before its simulations are used up.
struct StopRules {
  std::uint32_t positives{0};  // paths with a positive outcome, and
  std::uint32_t negatives{0};  // with a negative one; both 0: no such rule.  GroundedPRM: 3 and 3
  bool correct{false};         // at the first positive outcome
  bool converged{false};       // when the root's second child cannot overtake its first any more
};

enum class StopReason : std::uint8_t {
  kRunning,
  kSimulations,  // used up
  kCorrect,
  kSamples,  // positives and negatives
  kBudget,
  kConverged,
  kClosed,  // all of the tree is known
  kScript,  // landings that were to be followed do not fit what is told
};

[[nodiscard]] std::string_view name_of(StopReason reason);

}  // namespace tercet
