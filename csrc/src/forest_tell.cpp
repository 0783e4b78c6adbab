// Tickets, and what is told of them.

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <utility>

#include "require.hpp"
#include "tercet/forest.hpp"

namespace tercet {

namespace {

constexpr std::size_t kAhead = 4;  // results whose memory is asked for before their turn

std::string told(TicketFault fault) {
  switch (fault) {
    case TicketFault::kUnknown:
      return "was never issued";
    case TicketFault::kRepeated:
      return "has been told already";
    case TicketFault::kLate:
      return "is of a tree that was removed";
    case TicketFault::kKind:
      return "is of another kind; tell answers those of kind evaluate, tell_children expand, and "
             "tell_values, tell_verdicts and tell_outcome verify";
  }
  return "";
}

double part_of(const RolloutReward& reward, Source source) {
  switch (source) {
    case Source::kStep:
      return reward.step;
    case Source::kOutcome:
      return reward.outcome;
    case Source::kStart:
      return reward.start;
    default:
      return reward.total;
  }
}

Cost cost_at(std::span<const double> costs, std::size_t i) {
  if (costs.empty()) return {};
  const double* of = &costs[4 * i];
  return {of[0], of[1], of[2], of[3]};
}

}  // namespace

BadTicket::BadTicket(TicketFault why, Ticket which)
    : std::invalid_argument("Forest: ticket " + std::to_string(which) + " of tree " +
                            std::to_string(tree_of(which)) + " " + told(why)),
      fault(why),
      ticket(which) {}

Kind Forest::kind_of(Ticket ticket) const {
  if (expands(ticket)) return Kind::kExpand;
  return config_.tickets == TicketMode::kTogether ? Kind::kEvaluate : Kind::kVerify;
}

Forest::Pending& Forest::find(Ticket ticket) {
  const TreeId id = tree_of(ticket);
  if (id >= trees_.size()) throw BadTicket(TicketFault::kUnknown, ticket);
  Tree& tree = trees_[id];
  if (!tree.alive) throw BadTicket(TicketFault::kLate, ticket);
  const Queue& queue = queue_of(tree, ticket);
  const std::uint32_t ordinal = ordinal_of(ticket);
  if (ordinal < queue.oldest) throw BadTicket(TicketFault::kRepeated, ticket);
  if (ordinal - queue.oldest >= queue.size()) throw BadTicket(TicketFault::kUnknown, ticket);
  Pending& pending = pending_of(ticket);
  if (pending.state != State::kOut) throw BadTicket(TicketFault::kRepeated, ticket);
  return pending;
}

Forest::Pending& Forest::find(Ticket ticket, std::optional<Kind> kind) {
  Pending& pending = find(ticket);
  if (kind && kind_of(ticket) != *kind) throw BadTicket(TicketFault::kKind, ticket);
  return pending;
}

// All of them or, where one is bad, none.
void Forest::claim(std::span<const Ticket> tickets, std::optional<Kind> kind) {
  std::size_t claimed = 0;
  try {
    for (; claimed < tickets.size(); ++claimed) {
      find(tickets[claimed], kind).state = State::kClaimed;
    }
  } catch (...) {
    while (claimed > 0) pending_of(tickets[--claimed]).state = State::kOut;
    throw;
  }
}

void Forest::queue_again(Ticket ticket) {
  Pending& pending = pending_of(ticket);
  pending.state = State::kAgain;
  if (pending.details) {  // of the attempt before, only the cost remains
    const Cost cost = pending.details->cost;
    *pending.details = {};
    pending.details->cost = cost;
  }
  again_.push_back(ticket);
}

std::size_t Forest::recall() {
  check_whole();
  torn_ = true;
  std::size_t recalled = 0;
  for (TreeId id = 0; id < trees_.size(); ++id) {
    for (const bool expanding : {false, true}) {
      const Queue& queue = expanding ? trees_[id].expanding : trees_[id].pending;
      for (std::uint32_t i = 0; i < queue.size(); ++i) {
        if (queue[i].state != State::kOut) continue;
        queue_again(ticket_of(id, queue.oldest + i, expanding));
        recalled += 1;
      }
    }
  }
  counters_.in_flight -= recalled;
  torn_ = false;
  return recalled;
}

void Forest::fail(std::span<const Ticket> tickets, std::span<const double> costs) {
  check_whole();
  check_costs(costs, tickets.size(), "fail");
  claim(tickets, std::nullopt);
  torn_ = true;
  counters_.in_flight -= tickets.size();
  for (std::size_t i = 0; i < tickets.size(); ++i) {
    const Ticket ticket = tickets[i];
    Pending& pending = pending_of(ticket);
    counters_.failures += 1;
    if (!costs.empty()) pending.detailed().cost += cost_at(costs, i);
    if (pending.attempts < config_.max_attempts) {
      pending.attempts += 1;
      queue_again(ticket);
      continue;
    }
    counters_.given_up += 1;
    const Cost cost = pending.details ? pending.details->cost : Cost{};
    pending.details.reset();
    Finding given_up{.cost = cost};
    if (!expands(ticket)) {
      given_up.value = config_.failed_value;
      given_up.channels = failed_channels_;
    }
    keep(pending, given_up);
    advance(tree_of(ticket));
  }
  torn_ = false;
}

void Forest::cancel(std::span<const Ticket> tickets, std::span<const double> costs) {
  check_whole();
  check_costs(costs, tickets.size(), "cancel");
  claim(tickets, std::nullopt);
  torn_ = true;
  counters_.in_flight -= tickets.size();
  counters_.cancelled += tickets.size();
  for (std::size_t i = 0; i < tickets.size(); ++i) {
    Pending& pending = pending_of(tickets[i]);
    pending.state = State::kCancelled;
    if (!costs.empty()) pending.detailed().cost += cost_at(costs, i);
    advance(tree_of(tickets[i]));
  }
  torn_ = false;
}

// Telling.

void Forest::check_costs(std::span<const double> costs, std::size_t n, const char* op) const {
  if (costs.empty()) return;
  require_length(costs.size(), 4 * n, op, "costs");
  for (std::size_t i = 0; i < n; ++i) {
    require(is_cost(cost_at(costs, i)), [&] {
      return std::string("Forest::") + op + ": costs must be finite and >= 0, not so at " +
             std::to_string(i);
    });
  }
}

void Forest::check_values(const Results& results, const char* op) const {
  const std::size_t n = results.tickets.size();
  require_length(results.values.size(), n, op, "values");
  const double most = config_.backup.how == Backup::kProduct ? 1.0 : kMaxValue;
  for (std::size_t i = 0; i < n; ++i) {
    require(std::abs(results.values[i]) <= most, [&] {
      return std::string("Forest::") + op + ": values must be in [" +
             (most == 1.0 ? "-1, 1] where they are multiplied" : "-1e300, 1e300]") + ", got " +
             std::to_string(results.values[i]) + " at " + std::to_string(i);
    });
  }
  const std::size_t channels = n * config_.backup.channels.size();
  require_length(results.channels.size(), channels, op, "channels");
  for (std::size_t i = 0; i < channels; ++i) {
    const ChannelConfig& channel = config_.backup.channels[i % config_.backup.channels.size()];
    const bool multiplies = channel.channel.how == Aggregation::kProduct;
    require(std::abs(results.channels[i]) <= (multiplies ? 1.0 : kMaxValue), [&] {
      return std::string("Forest::") + op + ": channels must be in [" +
             (multiplies ? "-1, 1] where they are multiplied" : "-1e300, 1e300]") + ", got " +
             std::to_string(results.channels[i]);
    });
  }
  if (!results.outcomes.empty()) require_length(results.outcomes.size(), n, op, "outcomes");
  for (const double outcome : results.outcomes) {
    require(is_verdict(outcome) || std::isnan(outcome), [&] {
      return std::string("Forest::") + op + ": outcomes must be in [-1, 1], or NaN, got " +
             std::to_string(outcome);
    });
  }
}

void Forest::check_children(const Results& results, const char* op) {
  const std::size_t n = results.tickets.size();
  require_length(results.num_children.size(), n, op, "num_children");
  std::size_t children = 0;
  std::size_t blocks = 0;
  for (std::size_t i = 0; i < n; ++i) {
    require(results.num_children[i] <= config_.max_children, [&] {
      return std::string("Forest::") + op +
             ": num_children must be <= " + std::to_string(config_.max_children) + ", got " +
             std::to_string(results.num_children[i]) + " at " + std::to_string(i);
    });
    children += results.num_children[i];
    blocks += results.num_children[i] > 0;
  }
  require_length(results.handles.size(), children, op, "handles");
  if (!results.priors.empty()) {
    require(nodes_.layout().priors, [&] {
      return std::string("Forest::") + op +
             ": priors are told, but these settings read none; set rule=\"puct\" or leave them out";
    });
    require_length(results.priors.size(), children, op, "priors");
    for (const float prior : results.priors) {
      require(prior >= 0.0f && prior <= kMaxPrior, [&] {
        return std::string("Forest::") + op + ": priors must be in [0, 1e30], got " +
               std::to_string(prior);
      });
    }
  }
  if (!results.terminal.empty()) {
    require_length(results.terminal.size(), children, op, "terminal");
  }
  nodes_.reserve(waiting_blocks_ + blocks);
}

// What depends on the leaf of a ticket.
void Forest::check_leaves(const Results& results, const char* op) {
  for (std::size_t i = 0; i < results.tickets.size(); ++i) {
    const Ticket ticket = results.tickets[i];
    const NodeIndex index = find(ticket).path.back();
    const HotNode& leaf = nodes_.hot(index);
    const std::uint32_t children = results.num_children[i];
    require(children == 0 || !leaf.is_terminal(), [&] {
      return std::string("Forest::") + op + ": num_children must be 0 for ticket " +
             std::to_string(ticket) + ", whose leaf was told to be terminal, got " +
             std::to_string(children);
    });
    const std::uint32_t there = leaf.has_children() ? nodes_.num_children(index) : 0;
    require(children + there <= config_.max_children, [&] {
      return std::string("Forest::") + op +
             ": num_children must be <= " + std::to_string(config_.max_children - there) +
             " for ticket " + std::to_string(ticket) + ", whose node has " + std::to_string(there) +
             " already, got " + std::to_string(children);
    });
  }
}

void Forest::prefetch(Ticket ticket) {
  for (const NodeIndex node : pending_of(ticket).path) nodes_.prefetch(node);
  nodes_.prefetch_next(trees_[tree_of(ticket)].slabs);
}

// What was told waits for its turn.
void Forest::keep(Pending& pending, const Finding& finding) {
  pending.state = State::kTold;
  pending.value = finding.value;
  pending.handles.assign(finding.handles.begin(), finding.handles.end());
  counters_.waiting += 1;
  waiting_blocks_ += !finding.handles.empty();
  const bool more = !finding.priors.empty() || !finding.terminal.empty() ||
                    !finding.channels.empty() || !std::isnan(finding.outcome) ||
                    finding.cost.is_some();
  if (!more && !pending.details) return;
  Details& details = pending.detailed();
  details = {};  // parts of a value do not count beside it
  details.priors.assign(finding.priors.begin(), finding.priors.end());
  details.terminal.assign(finding.terminal.begin(), finding.terminal.end());
  details.channels.assign(finding.channels.begin(), finding.channels.end());
  details.outcome = finding.outcome;
  details.cost = finding.cost;
}

void Forest::forget_waiting(const Pending& pending) {
  counters_.waiting -= 1;
  waiting_blocks_ -= !pending.handles.empty();
}

void Forest::answer(const Results& results, Kind kind) {
  claim(results.tickets, kind);
  torn_ = true;
  counters_.in_flight -= results.tickets.size();
  const std::size_t num_channels = config_.backup.channels.size();
  std::size_t next = 0;
  for (std::size_t i = 0; i < results.tickets.size(); ++i) {
    if (i + kAhead < results.tickets.size()) prefetch(results.tickets[i + kAhead]);
    const Ticket ticket = results.tickets[i];
    const TreeId id = tree_of(ticket);
    Tree& tree = trees_[id];
    Queue& queue = queue_of(tree, ticket);
    Pending& pending = queue[ordinal_of(ticket) - queue.oldest];
    Finding finding;
    if (kind != Kind::kExpand) finding.value = results.values[i];
    if (kind != Kind::kVerify) {
      const std::size_t children = results.num_children[i];
      finding.handles = results.handles.subspan(next, children);
      if (!results.priors.empty()) finding.priors = results.priors.subspan(next, children);
      if (!results.terminal.empty()) finding.terminal = results.terminal.subspan(next, children);
      next += children;
    }
    if (num_channels > 0 && kind != Kind::kExpand) {
      finding.channels = results.channels.subspan(i * num_channels, num_channels);
    }
    if (!results.outcomes.empty()) finding.outcome = results.outcomes[i];
    if (pending.details) finding.cost = pending.details->cost;
    if (!results.costs.empty()) finding.cost += cost_at(results.costs, i);
    const bool its_turn = ordinal_of(ticket) == queue.oldest && !may_go_down(tree) &&
                          (kind == Kind::kExpand || tree.expanding.empty());
    if (!its_turn) {
      keep(pending, finding);
    } else if (kind == Kind::kExpand) {
      commit_expansion(id, finding);
    } else {
      commit_simulation(id, finding);
    }
    advance(id);
  }
  torn_ = false;
}

void Forest::tell(const Results& results) {
  check_whole();
  check_values(results, "tell");
  check_costs(results.costs, results.tickets.size(), "tell");
  check_children(results, "tell");
  if (knows_terminal_) check_leaves(results, "tell");
  answer(results, Kind::kEvaluate);
}

void Forest::tell_values(const Results& results) {
  check_whole();
  check_values(results, "tell_values");
  check_costs(results.costs, results.tickets.size(), "tell_values");
  answer(results, Kind::kVerify);
}

void Forest::tell_children(const Results& results) {
  check_whole();
  check_costs(results.costs, results.tickets.size(), "tell_children");
  check_children(results, "tell_children");
  check_leaves(results, "tell_children");
  answer(results, Kind::kExpand);
}

void Forest::tell_verdicts(const Verdicts& told) {
  check_whole();
  require_length(told.steps.size(), told.tickets.size(), "tell_verdicts", "steps");
  require_length(told.verdicts.size(), told.tickets.size(), "tell_verdicts", "verdicts");
  std::set<std::pair<Ticket, std::uint32_t>> here;
  for (std::size_t i = 0; i < told.tickets.size(); ++i) {
    const Ticket ticket = told.tickets[i];
    const std::uint32_t step = told.steps[i];
    const Details* known = find(ticket, Kind::kVerify).details.get();
    const std::uint32_t steps = known && known->num_steps ? *known->num_steps : kMaxSteps;
    const auto at = [&] { return std::to_string(step) + " of ticket " + std::to_string(ticket); };
    require(is_verdict(told.verdicts[i]), [&] {
      return "Forest::tell_verdicts: verdicts must be in [-1, 1], got " +
             std::to_string(told.verdicts[i]) + " for step " + at();
    });
    require(step < steps, [&] {
      return "Forest::tell_verdicts: steps must be < " + std::to_string(steps) + ", got step " +
             at();
    });
    const bool is_known =
        known && step < known->verdicts.size() && !std::isnan(known->verdicts[step]);
    require(!is_known && here.emplace(ticket, step).second,
            [&] { return "Forest::tell_verdicts: step " + at() + " has a verdict already"; });
  }
  torn_ = true;
  for (std::size_t i = 0; i < told.tickets.size(); ++i) {
    std::vector<double>& verdicts = pending_of(told.tickets[i]).detailed().verdicts;
    if (verdicts.size() <= told.steps[i]) verdicts.resize(told.steps[i] + 1, kNaN);
    verdicts[told.steps[i]] = told.verdicts[i];
    complete(told.tickets[i]);
  }
  torn_ = false;
}

// Rewards of rollouts can be larger than 1: their product would have no bound.
void Forest::check_factors() const {
  bool multiplies = config_.backup.how == Backup::kProduct;
  for (const ChannelConfig& channel : config_.backup.channels) {
    const bool is_small =
        channel.source == Source::kStep || channel.source == Source::kStart ||
        (channel.source == Source::kOutcome && config_.reward.outcome_weight <= 1.0);
    multiplies |= channel.channel.how == Aggregation::kProduct && !is_small;
  }
  require(!multiplies, [] {
    return std::string(
        "Forest::tell_outcome: the rewards of rollouts may be larger than 1, and these settings "
        "multiply them; use tell_values or another backup");
  });
}

void Forest::check_outcomes(const Outcomes& told) {
  const std::size_t n = told.tickets.size();
  require_length(told.num_steps.size(), n, "tell_outcome", "num_steps");
  require_length(told.outcomes.size(), n, "tell_outcome", "outcomes");
  if (!told.start_verdicts.empty()) {
    require_length(told.start_verdicts.size(), n, "tell_outcome", "start_verdicts");
  }
  check_costs(told.costs, n, "tell_outcome");
  for (std::size_t i = 0; i < n; ++i) {
    const Details* known = find(told.tickets[i], Kind::kVerify).details.get();
    const auto at = [&] { return " for ticket " + std::to_string(told.tickets[i]); };
    require(is_verdict(told.outcomes[i]) || std::isnan(told.outcomes[i]), [&] {
      return "Forest::tell_outcome: outcomes must be in [-1, 1], or NaN, got " +
             std::to_string(told.outcomes[i]) + at();
    });
    require(told.start_verdicts.empty() || is_verdict(told.start_verdicts[i]), [&] {
      return "Forest::tell_outcome: start_verdicts must be in [-1, 1], got " +
             std::to_string(told.start_verdicts[i]) + at();
    });
    require(!known || !known->num_steps,
            [&] { return "Forest::tell_outcome: there is an outcome already" + at(); });
    const std::size_t least = known ? known->verdicts.size() : 0;
    require(told.num_steps[i] >= least && told.num_steps[i] <= kMaxSteps, [&] {
      return "Forest::tell_outcome: num_steps must be in [" + std::to_string(least) + ", " +
             std::to_string(kMaxSteps) + "], got " + std::to_string(told.num_steps[i]) + at();
    });
  }
}

void Forest::tell_outcome(const Outcomes& told) {
  check_whole();
  check_factors();
  check_outcomes(told);
  claim(told.tickets, Kind::kVerify);  // none comes twice
  torn_ = true;
  for (const Ticket ticket : told.tickets) pending_of(ticket).state = State::kOut;
  for (std::size_t i = 0; i < told.tickets.size(); ++i) {
    Details& details = pending_of(told.tickets[i]).detailed();
    details.num_steps = told.num_steps[i];
    details.verdicts.resize(told.num_steps[i], kNaN);
    details.outcome = told.outcomes[i];
    if (!told.start_verdicts.empty()) details.start_verdict = told.start_verdicts[i];
    details.cost += cost_at(told.costs, i);
    complete(told.tickets[i]);
  }
  torn_ = false;
}

// Once all parts of a value are there, the value is.
void Forest::complete(Ticket ticket) {
  Pending& pending = pending_of(ticket);
  Details& details = *pending.details;
  const auto is_missing = [](double verdict) { return std::isnan(verdict); };
  if (!details.num_steps || std::ranges::any_of(details.verdicts, is_missing)) return;
  Rollout rollout{details.verdicts, std::nullopt, details.start_verdict.value_or(0.0)};
  if (!std::isnan(details.outcome)) rollout.outcome = details.outcome;
  const RolloutReward reward = rollout_reward(rollout, config_.reward);
  for (const ChannelConfig& channel : config_.backup.channels) {
    details.channels.push_back(part_of(reward, channel.source));
  }
  pending.state = State::kTold;
  pending.value = reward.total;
  pending.handles.clear();
  counters_.in_flight -= 1;
  counters_.waiting += 1;
  advance(tree_of(ticket));
}

}  // namespace tercet
