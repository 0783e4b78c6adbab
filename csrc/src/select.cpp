#include "tercet/select.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <stdexcept>
#include <string>

namespace tercet {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLowest = -1e9;  // score under Gumbel, as in mctx

void require(bool holds, const char* name, const char* what, const std::string& got) {
  if (holds) return;
  throw std::invalid_argument(std::string("Forest: ") + name + " must " + what + ", got " + got);
}

void check_not_negative(const char* name, double value) {
  require(std::isfinite(value) && value >= 0.0, name, "be finite and >= 0", std::to_string(value));
}

// Calls visit(child, position) for each child in order.
template <typename Visit>
void for_each_child(const Family& family, const Visit& visit) {
  for (std::uint32_t i = 0;; ++i) {
    visit(family.children[i], i);
    if (family.children[i].is_last()) return;
  }
}

Bounds bounds_of(const Family& family, MinMax min_max) {
  if (min_max == MinMax::kTree) return family.tree;
  Bounds bounds;
  const auto take = [&](const HotNode& node) {
    if (node.visits() > 0) bounds.take(value_of(node, family.is_mean));
  };
  take(*family.parent);
  for_each_child(family, [&](const HotNode& child, std::uint32_t) { take(child); });
  return bounds;
}

// Maps values to [0, 1] where MinMax asks for it, and turns them round where low ones are wanted.
class Normal {
 public:
  Normal(const Family& family, MinMax min_max)
      : is_on_(min_max != MinMax::kNone), sign_(family.sign) {
    if (!is_on_) return;
    const Bounds bounds = bounds_of(family, min_max);
    has_width_ = bounds.low < bounds.high;
    low_ = bounds.low;
    width_ = bounds.high - bounds.low;
  }

  double operator()(double value) const {
    if (is_on_) value = has_width_ ? (value - low_) / width_ : 0.0;
    return sign_ * value;
  }

 private:
  bool is_on_;
  bool has_width_{false};
  double sign_;
  double low_{0.0};
  double width_{0.0};
};

// The value of a child without visits after that of its parent, less than it the more of the
// policy has been tried.
double parent_value(const Family& family, double reduction) {
  const HotNode& parent = *family.parent;
  const double base = parent.visits() > 0 ? value_of(parent, family.is_mean) : 0.0;
  if (reduction == 0.0) return base;  // without priors
  double mass = 0.0;
  for_each_child(family, [&](const HotNode& child, std::uint32_t i) {
    if (child.expected_visits() > 0) mass += static_cast<double>(family.priors[i]);
  });
  return base - reduction * std::sqrt(mass);
}

// The values of children as scores take them in.
class Values {
 public:
  Values(const Family& family, const SelectConfig& config)
      : normal_(family, config.min_max),
        is_mean_(family.is_mean),
        loses_(config.unfinished == Unfinished::kVirtualLoss),
        loss_(config.virtual_loss),
        priors_(config.first_play == FirstPlay::kPrior ? family.priors : nullptr) {
    if (config.first_play == FirstPlay::kValue) first_ = config.first_play_value;
    if (config.first_play == FirstPlay::kParent) {
      first_ = parent_value(family, config.first_play_value);
    }
  }

  double operator()(const HotNode& child, std::uint32_t i) const {
    return normal_(value(child, i));
  }

 private:
  double value(const HotNode& child, std::uint32_t i) const {
    if (loses_ && child.expected_visits() > 0) {
      return (child.total - loss_ * child.in_flight()) / child.expected_visits();
    }
    if (child.visits() > 0) return value_of(child, is_mean_);
    return priors_ == nullptr ? first_ : static_cast<double>(priors_[i]);
  }

  Normal normal_;
  bool is_mean_;
  bool loses_;
  double loss_;
  const float* priors_;
  double first_{0.0};
};

// Where no score is above -infinity.
std::uint32_t first_open(const Family& family) {
  std::uint32_t i = 0;
  while (family.children[i].is_closed()) {
    if (family.children[i++].is_last()) return kNoChild;
  }
  return i;
}

// The open child with the highest score(value, expected visits, position).
template <typename Score>
std::uint32_t highest(const Family& family, const SelectConfig& config, const Score& score) {
  const Values values(family, config);
  const bool is_new_first = config.first_play == FirstPlay::kFirst;
  std::uint32_t best = kNoChild;
  double best_score = -kInfinity;
  for (std::uint32_t i = 0;; ++i) {
    const HotNode& child = family.children[i];
    if (!child.is_closed()) {
      const std::uint32_t expected = child.expected_visits();
      if (is_new_first && expected == 0) return i;
      const double its = score(values(child, i), expected, i);
      if (its > best_score) {
        best = i;
        best_score = its;
      }
    }
    if (child.is_last()) return best != kNoChild ? best : first_open(family);
  }
}

std::uint32_t by_uct(const Family& family, const SelectConfig& config, const Logarithms& log) {
  const double log_parent = log(family.parent->expected_visits() - 1);
  return highest(family, config, [&](double value, std::uint32_t expected, std::uint32_t) {
    return value + config.c_uct * std::sqrt(log_parent / expected);
  });
}

std::uint32_t by_released(const Family& family, const SelectConfig& config, const Logarithms& log) {
  const double log_parent = log(family.parent->expected_visits());
  return highest(family, config, [&](double value, std::uint32_t expected, std::uint32_t) {
    return value + config.c_uct * std::sqrt(log_parent / (expected + 1));
  });
}

std::uint32_t by_puct(const Family& family, const SelectConfig& config) {
  const double n = family.parent->expected_visits() - 1;
  const double rate = std::log((n + config.c_base + 1.0) / config.c_base) + config.c_init;
  const double root = std::sqrt(std::max(n, 1.0));
  return highest(family, config, [&](double value, std::uint32_t expected, std::uint32_t i) {
    return value + rate * static_cast<double>(family.priors[i]) * root / (1 + expected);
  });
}

// The value of children without visits under Gumbel: the parent's own, mixed with the visited
// children's by their priors.  Source: Danihelka et al. 2022, eq. 33; mctx, _compute_mixed_value.
double mixed_value(const Family& family, const Normal& normal) {
  const auto prior = [&](std::uint32_t i) {
    return std::max(static_cast<double>(family.priors[i]), std::numeric_limits<double>::min());
  };
  double visits = 0.0;
  double mass = 0.0;
  for_each_child(family, [&](const HotNode& child, std::uint32_t i) {
    visits += child.visits();
    if (child.visits() > 0) mass += prior(i);
  });
  double weighted = 0.0;
  for_each_child(family, [&](const HotNode& child, std::uint32_t i) {
    if (child.visits() == 0) return;
    weighted += prior(i) * normal(value_of(child, family.is_mean)) / mass;
  });
  const double raw = normal(std::isnan(family.own) ? 0.0 : family.own);
  return (raw + visits * weighted) / (visits + 1.0);
}

// The children of one parent under Gumbel.
struct Improved {
  std::array<double, kMaxChildren> logits;
  std::array<double, kMaxChildren> values;  // completed, rescaled to the size of logits
  std::uint32_t expected{0};                // visits of all children
  std::uint32_t count{0};
};

// Fills in the values.  Source: mctx, qtransform_completed_by_mix_value.
void complete(const Family& family, const SelectConfig& config, Improved& improved) {
  const Normal normal(family, config.min_max);
  const double mixed = mixed_value(family, normal);
  Bounds bounds;
  std::uint32_t most = 0;
  for_each_child(family, [&](const HotNode& child, std::uint32_t i) {
    const bool is_visited = child.visits() > 0;
    const double value = is_visited ? normal(value_of(child, family.is_mean)) : mixed;
    improved.values[i] = value;
    bounds.take(value);
    most = std::max(most, child.visits());
  });
  const double width = std::max(bounds.high - bounds.low, 1e-8);
  const double scale = (config.gumbel_maxvisit_init + most) * config.gumbel_value_scale;
  for (std::uint32_t i = 0; i < improved.count; ++i) {
    improved.values[i] = scale * ((improved.values[i] - bounds.low) / width);
  }
}

void improve(const Family& family, const SelectConfig& config, Improved& improved) {
  for_each_child(family, [&](const HotNode& child, std::uint32_t i) {
    improved.logits[i] = std::log(static_cast<double>(family.priors[i]));  // -inf of 0
    improved.expected += child.expected_visits();
    improved.count += 1;
  });
  complete(family, config, improved);
}

double largest(const double* values, std::uint32_t count) {
  double found = -kInfinity;
  for (std::uint32_t i = 0; i < count; ++i) {
    if (values[i] > found) found = values[i];
  }
  return found;
}

// The child with the highest score(position) among those that may be chosen.
template <typename May, typename Score>
std::uint32_t highest_among(const Family& family, const May& may, const Score& score) {
  std::uint32_t best = kNoChild;
  double best_score = -kInfinity;
  for_each_child(family, [&](const HotNode& child, std::uint32_t i) {
    if (!may(child)) return;
    const double its = score(i);
    if (its > best_score) {
      best = i;
      best_score = its;
    }
  });
  return best;
}

bool is_open(const HotNode& child) { return !child.is_closed(); }

// By the score of a root: noise + logit + value.  Source: mctx, score_considered.
template <typename May>
std::uint32_t highest_of_root(const Family& family, const Improved& improved, const May& may) {
  const double top = largest(improved.logits.data(), improved.count);
  return highest_among(family, may, [&](std::uint32_t i) {
    const double score = family.noise[i] + (improved.logits[i] - top) + improved.values[i];
    return score > kLowest ? score : kLowest;  // of NaN too
  });
}

std::uint32_t at_root(const Family& family, const Improved& improved) {
  const std::size_t step = std::min<std::size_t>(improved.expected, family.schedule.size() - 1);
  const std::uint32_t considered = family.schedule[step];
  const std::uint32_t best = highest_of_root(family, improved, [&](const HotNode& child) {
    return is_open(child) && child.expected_visits() == considered;
  });
  if (best != kNoChild) return best;
  return highest_among(family, is_open, [&](std::uint32_t i) {
    return -static_cast<double>(family.children[i].expected_visits());
  });
}

// By the distance of its share of the visits from the improved policy, softmax(logits + values).
// Source: mctx, gumbel_muzero_interior_action_selection.
std::uint32_t below_root(const Family& family, Improved& improved) {
  std::array<double, kMaxChildren>& weights = improved.values;
  for (std::uint32_t i = 0; i < improved.count; ++i) {
    weights[i] = improved.logits[i] + improved.values[i];
  }
  const double top = largest(weights.data(), improved.count);
  double sum = 0.0;
  for (std::uint32_t i = 0; i < improved.count; ++i) {
    weights[i] = std::exp(weights[i] - top);
    sum += weights[i];
  }
  const double all = 1 + improved.expected;
  const std::uint32_t best = highest_among(family, is_open, [&](std::uint32_t i) {
    return weights[i] / sum - family.children[i].expected_visits() / all;
  });
  return best != kNoChild ? best : first_open(family);  // where no child has a prior above 0
}

std::uint32_t by_gumbel(const Family& family, const SelectConfig& config) {
  Improved improved;
  improve(family, config, improved);
  return family.noise.empty() ? below_root(family, improved) : at_root(family, improved);
}

std::uint32_t gumbel_action(const Family& family, const SelectConfig& config) {
  Improved improved;
  improve(family, config, improved);
  std::uint32_t most = 0;
  for_each_child(family, [&](const HotNode& child, std::uint32_t) {
    most = std::max(most, child.expected_visits());
  });
  return highest_of_root(family, improved,
                         [&](const HotNode& child) { return child.expected_visits() == most; });
}

}  // namespace

Logarithms::Logarithms() {
  static const std::vector<double> table = [] {
    std::vector<double> logs(kTable);
    for (std::uint32_t n = 0; n < kTable; ++n) logs[n] = std::log(static_cast<double>(n));
    return logs;
  }();
  table_ = table.data();
}

void check_config(const SelectConfig& c) {
  check_not_negative("c_uct", c.c_uct);
  require(std::isfinite(c.c_base) && c.c_base > 0.0, "c_base", "be finite and > 0",
          std::to_string(c.c_base));
  check_not_negative("c_init", c.c_init);
  require(std::isfinite(c.first_play_value), "first_play_value", "be finite",
          std::to_string(c.first_play_value));
  check_not_negative("virtual_loss", c.virtual_loss);
  require(c.gumbel_considered >= 1, "gumbel_considered", "be >= 1", "0");
  check_not_negative("gumbel_value_scale", c.gumbel_value_scale);
  check_not_negative("gumbel_maxvisit_init", c.gumbel_maxvisit_init);
  check_not_negative("dirichlet_alpha", c.dirichlet_alpha);
  require(c.dirichlet_fraction >= 0.0 && c.dirichlet_fraction <= 1.0, "dirichlet_fraction",
          "be in [0, 1]", std::to_string(c.dirichlet_fraction));
  constexpr std::array kNames{"first", "value", "parent", "prior"};
  require(c.rule != Rule::kUct || c.first_play == FirstPlay::kFirst, "first_play",
          "be first with rule uct", kNames[static_cast<std::size_t>(c.first_play)]);
}

bool reads_priors(const SelectConfig& config) {
  if (config.rule == Rule::kPuct || config.rule == Rule::kGumbel) return true;
  if (config.first_play == FirstPlay::kParent) return config.first_play_value != 0.0;
  return config.first_play == FirstPlay::kPrior;
}

std::uint32_t choose_child(const Family& family, const SelectConfig& config,
                           const Logarithms& log) {
  switch (config.rule) {
    case Rule::kUct:
      return by_uct(family, config, log);
    case Rule::kReleased:
      return by_released(family, config, log);
    case Rule::kPuct:
      return by_puct(family, config);
    case Rule::kGumbel:
      break;
  }
  return by_gumbel(family, config);
}

std::uint32_t choose_action(const Family& family, const SelectConfig& config) {
  if (config.rule == Rule::kGumbel) return gumbel_action(family, config);
  std::uint32_t best = 0;
  for_each_child(family, [&](const HotNode& child, std::uint32_t i) {
    const HotNode& first = family.children[best];
    if (child.visits() < first.visits() || child.visits() == 0) return;
    if (child.visits() > first.visits() ||
        value_of(child, family.is_mean) > value_of(first, family.is_mean)) {
      best = i;
    }
  });
  return best;
}

std::vector<std::uint32_t> halving_schedule(std::uint32_t considered, std::uint32_t simulations) {
  const auto rounds = static_cast<std::size_t>(std::bit_width(std::max(considered, 2u) - 1));
  std::vector<std::uint32_t> visits(std::max(considered, 1u));
  std::vector<std::uint32_t> schedule;
  schedule.reserve(simulations);
  for (std::size_t left = visits.size(); schedule.size() < simulations;) {
    const std::size_t each = std::max<std::size_t>(1, simulations / (rounds * left));
    for (std::size_t i = 0; i < each * left && schedule.size() < simulations; ++i) {
      schedule.push_back(visits[i % left]++);
    }
    left = considered < 2 ? 1 : std::max<std::size_t>(2, left / 2);
  }
  return schedule;
}

}  // namespace tercet
