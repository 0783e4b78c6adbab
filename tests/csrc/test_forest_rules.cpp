// What trees do beside the plain search of test_forest.cpp: kinds of tickets, ends, budgets and
// changes of a tree; and that a call with one bad element changes nothing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "tercet/forest.hpp"
#include "tercet/snapshot.hpp"

using tercet::BadTicket;
using tercet::Counters;
using tercet::Forest;
using tercet::ForestConfig;
using tercet::Kind;
using tercet::Leaves;
using tercet::Snapshot;
using tercet::StopReason;
using tercet::Ticket;
using tercet::TicketFault;
using tercet::TicketMode;
using tercet::TreeColumns;

namespace {

using Handles = std::vector<std::int64_t>;
using Tickets = std::vector<Ticket>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

constexpr Ticket value(std::uint32_t n, tercet::TreeId tree = 0) {
  return tercet::ticket_of(tree, n, false);
}
constexpr Ticket expand(std::uint32_t n, tercet::TreeId tree = 0) {
  return tercet::ticket_of(tree, n, true);
}

struct Extra {
  std::vector<float> priors{};
  std::vector<std::uint8_t> terminal{};
  double outcome{kNan};
  std::vector<double> cost{};
};

void tell(Forest& forest, Ticket ticket, double value, const Handles& handles,
          const Extra& extra = {}) {
  const auto n = static_cast<std::uint32_t>(handles.size());
  forest.tell({{&ticket, 1},
               {&value, 1},
               {&n, 1},
               handles,
               extra.priors,
               extra.terminal,
               {&extra.outcome, 1},
               {},
               extra.cost});
}

void tell_value(Forest& forest, Ticket ticket, double value, const Extra& extra = {}) {
  forest.tell_values(
      {{&ticket, 1}, {&value, 1}, {}, {}, {}, {}, {&extra.outcome, 1}, {}, extra.cost});
}

void tell_children(Forest& forest, Ticket ticket, const Handles& handles, const Extra& extra = {}) {
  const auto n = static_cast<std::uint32_t>(handles.size());
  forest.tell_children(
      {{&ticket, 1}, {}, {&n, 1}, handles, extra.priors, extra.terminal, {}, {}, extra.cost});
}

void tell_verdict(Forest& forest, Ticket ticket, std::uint32_t step, double verdict) {
  forest.tell_verdicts({{&ticket, 1}, {&step, 1}, {&verdict, 1}});
}

void tell_outcome(Forest& forest, Ticket ticket, std::uint32_t steps, double outcome,
                  double start) {
  forest.tell_outcome({{&ticket, 1}, {&steps, 1}, {&outcome, 1}, {&start, 1}});
}

void cancel(Forest& forest, Ticket ticket) { forest.cancel({&ticket, 1}); }
void fail(Forest& forest, Ticket ticket) { forest.fail({&ticket, 1}); }

Forest with_tree(const ForestConfig& config, std::uint32_t simulations = 20,
                 const tercet::Budget& budget = {}) {
  Forest forest(config);
  forest.add_tree(7, simulations, 3, budget);
  return forest;
}

Forest restored(const Forest& forest) { return Snapshot::restore(Snapshot::of(forest)); }

// Answers all that is asked until nothing is: half a value, and children as `children` says.
void run(Forest& forest, const std::function<Handles(std::int64_t)>& children) {
  for (Leaves leaves = forest.ask(64); leaves.size() > 0; leaves = forest.ask(64)) {
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      const auto kind = static_cast<Kind>(leaves.kind[i]);
      const Handles handles = kind == Kind::kVerify ? Handles{} : children(leaves.handle[i]);
      if (kind == Kind::kEvaluate) tell(forest, leaves.ticket[i], 0.5, handles);
      if (kind == Kind::kExpand) tell_children(forest, leaves.ticket[i], handles);
      if (kind == Kind::kVerify) tell_value(forest, leaves.ticket[i], 0.5);
    }
  }
}

// The call is refused, as a whole.
template <typename Refusal, typename Call>
void refuses(Forest& forest, const Call& call) {
  const tercet::Bytes before = Snapshot::of(forest);
  CHECK_THROWS(call(), Refusal);
  CHECK(Snapshot::of(forest) == before);
}

// Kinds of tickets.

ForestConfig apart(TicketMode mode = TicketMode::kApart) {
  ForestConfig config;
  config.tickets = mode;
  config.max_in_flight = 2;
  config.visits_per_flight = 1;
  config.max_unverified = 3;
  return config;
}

void children_come_before_values() {
  Forest forest = with_tree(apart());
  const Leaves root = forest.ask(9);
  CHECK(root.ticket == (Tickets{expand(0), value(0)}));
  CHECK(root.kind == (std::vector<std::uint8_t>{1, 2}) && root.node[0] == root.node[1]);
  CHECK(forest.columns(0).in_flight[0] == 2 && forest.status(0).in_flight == 2);
  tell_children(forest, expand(0), {10, 11});
  CHECK(forest.counters().expansions == 1 && forest.status(0).committed == 0);
  const Leaves first = forest.ask(9);  // the tree has room for one expansion, and two values
  CHECK(first.ticket == (Tickets{expand(1), value(1)}) && first.handle[0] == 10);
  tell_value(forest, value(0), 0.5);
  CHECK(forest.counters().waiting == 1);  // expansions are committed first
  tell_children(forest, expand(1), {});
  CHECK(forest.ask(9).ticket == (Tickets{expand(2), value(2)}));
  CHECK(forest.columns(0).terminal == (std::vector<std::uint8_t>{0, 1, 0}));
  tell_children(forest, expand(2), {12});
  CHECK(forest.status(0).committed == 1);  // three values are out: the first is committed
  CHECK(forest.columns(0).total[0] == 0.5 && forest.columns(0).visits[1] == 0);
}

void the_second_ticket_of_a_look_waits_for_a_batch_with_room() {
  Forest forest = with_tree(apart());
  CHECK(forest.ask(1).ticket == Tickets{expand(0)} && forest.counters().in_flight == 1);
  const Leaves next = forest.ask(1);
  CHECK(next.ticket == Tickets{value(0)} && next.attempt[0] == 1);
}

void lazy_leaves_are_expanded_at_the_second_visit() {
  Forest forest = with_tree(apart(TicketMode::kLazy));
  CHECK(forest.ask(9).ticket == Tickets{expand(0)});  // the root, at once
  CHECK(forest.ask(9).size() == 0);
  tell_children(forest, expand(0), {10});
  const Leaves next = forest.ask(9);
  CHECK(next.ticket == (Tickets{value(0), expand(1)}) && next.handle == (Handles{10, 10}));
  tell_value(forest, value(0), 0.25);
  tell_children(forest, expand(1), {});  // an end: it has the value that it was told
  CHECK(forest.is_finished(0) || forest.ask(9).size() == 0);
  CHECK(forest.columns(0).total[0] == 20 * 0.25 && forest.counters().evaluations == 1);
}

void an_end_has_the_value_that_was_told_before() {
  ForestConfig config = apart(TicketMode::kLazy);
  config.max_unverified = 1;
  Forest forest = with_tree(config, 10);
  tell_children(forest, forest.ask(9).ticket.at(0), {10});
  CHECK(forest.ask(9).ticket == Tickets{value(0)});
  tell_value(forest, value(0), 0.25);
  CHECK(forest.ask(9).ticket == Tickets{expand(1)});
  tell_children(forest, expand(1), {});
  CHECK(forest.ask(9).size() == 0 && forest.columns(0).total[1] == 2.5);
}

// Of which no value is known yet.
void an_end_without_a_value_is_not_closed() {
  ForestConfig config = apart();
  config.solver = true;
  Forest forest = with_tree(config, 10);
  CHECK(forest.ask(9).size() == 2);
  tell_children(forest, expand(0), {});
  CHECK(forest.columns(0).terminal[0] == 1 && forest.columns(0).closed[0] == 0);
  CHECK(forest.ask(9).size() == 0);  // its value is out
  tell_value(forest, value(0), 0.5);
  CHECK(forest.columns(0).closed[0] == 1 && forest.status(0).reason == StopReason::kClosed);
}

void a_lazy_root_without_children_has_failed() {
  ForestConfig config = apart(TicketMode::kLazy);
  config.failed_value = -0.5;
  Forest forest = with_tree(config, 4);
  CHECK(forest.ask(9).size() == 1);
  tell_children(forest, expand(0), {});
  CHECK(forest.ask(9).size() == 0 && forest.is_finished(0));
  CHECK(forest.columns(0).total[0] == -2.0);
}

void a_told_end_is_evaluated_once() {
  for (const TicketMode mode : {TicketMode::kTogether, TicketMode::kApart, TicketMode::kLazy}) {
    ForestConfig config = apart(mode);
    config.select.c_uct = 0.0;
    Forest forest = with_tree(config, 6);
    const Leaves root = forest.ask(1);
    const Extra ends{.terminal = {1}};
    if (mode == TicketMode::kTogether) {
      tell(forest, root.ticket[0], 0.5, {10}, ends);
    } else {
      tell_children(forest, root.ticket[0], {10}, ends);
      if (mode == TicketMode::kApart) tell_value(forest, forest.ask(1).ticket.at(0), 0.5);
    }
    CHECK(forest.columns(0).terminal[1] == 1);
    const Leaves end = forest.ask(9);
    CHECK(end.size() == 1 && end.handle[0] == 10 && forest.ask(9).size() == 0);
    if (mode == TicketMode::kTogether) {
      Forest again = restored(forest);
      for (Forest* one : {&forest, &again}) {
        refuses<std::invalid_argument>(*one, [&] { tell(*one, end.ticket[0], 1.0, {12}); });
      }
      tell(forest, end.ticket[0], 1.0, {});
    } else {
      CHECK(end.kind[0] == static_cast<std::uint8_t>(Kind::kVerify));
      tell_value(forest, end.ticket[0], 1.0);
    }
    CHECK(forest.ask(9).size() == 0 && forest.is_finished(0));
    CHECK(forest.columns(0).total[1] == (mode == TicketMode::kLazy ? 6.0 : 5.0));
  }
}

// Tickets value(0) to value(2), and expand(2), are out; value(1) has a verdict.
Forest with_apart_tickets_out() {
  ForestConfig config = apart();
  config.select.rule = tercet::Rule::kPuct;
  config.backup.channels.resize(1);
  Forest forest = with_tree(config);
  CHECK(forest.ask(9).size() == 2);
  tell_children(forest, expand(0), {10, 11});
  CHECK(forest.ask(9).size() == 2);
  tell_children(forest, expand(1), {12, 13});
  CHECK(forest.ask(9).ticket == (Tickets{expand(2), value(2)}));
  tell_verdict(forest, value(1), 1, 0.5);
  return forest;
}

// Values by their parts.

void verdicts_come_one_by_one_and_in_any_order() {
  ForestConfig config = apart();
  config.reward.add_start_verdict = true;
  config.backup.channels = {{tercet::Source::kStep, {}},
                            {tercet::Source::kOutcome, {}},
                            {tercet::Source::kStart, {}},
                            {tercet::Source::kTotal, {}}};
  Forest forest = with_tree(config);
  CHECK(forest.ask(9).size() == 2);
  tell_children(forest, expand(0), {10, 11});
  CHECK(forest.ask(9).size() == 2);
  tell_children(forest, expand(1), {});
  (void)forest.ask(9);
  tell_verdict(forest, value(0), 2, -1.0);
  tell_verdict(forest, value(0), 0, 0.5);
  refuses<std::invalid_argument>(forest, [&] { tell_outcome(forest, value(0), 2, 1.0, 0.25); });
  tell_outcome(forest, value(0), 3, 1.0, 0.25);
  refuses<std::invalid_argument>(forest, [&] { tell_outcome(forest, value(0), 3, 1.0, 0.25); });
  refuses<std::invalid_argument>(forest, [&] { tell_verdict(forest, value(0), 2, 0.5); });
  refuses<std::invalid_argument>(forest, [&] { tell_verdict(forest, value(0), 3, 0.5); });
  Forest again = restored(forest);
  for (Forest* one : {&forest, &again}) {
    tell_verdict(*one, value(0), 1, 1.0);
    CHECK_THROWS(tell_verdict(*one, value(0), 1, 1.0), BadTicket);
    const std::vector<double> verdicts{0.5, 1.0, -1.0};
    const tercet::RolloutReward reward = rollout_reward({verdicts, 1.0, 0.25}, config.reward);
    CHECK(one->counters().waiting == 1 && one->status(0).committed == 0);
    tell_children(*one, expand(2), {});
    const TreeColumns columns = one->columns(0);
    CHECK(columns.total[0] == reward.total && columns.verdict[0] == 0.25f);
    CHECK(columns.channels[0] == reward.step && columns.channels[1] == reward.outcome);
    CHECK(columns.channels[2] == reward.start && columns.channels[3] == reward.total);
    CHECK(one->status(0).positives == 1);
  }
  CHECK(Snapshot::of(forest) == Snapshot::of(again));
}

// A rollout that was cut off before its first step.
void a_rollout_may_have_no_steps() {
  ForestConfig config = apart(TicketMode::kLazy);
  config.reward.truncated_outcome = -0.5;
  Forest forest = with_tree(config, 1);
  (void)forest.ask(1);
  tell_children(forest, expand(0), {10});
  (void)forest.ask(1);
  tell_outcome(forest, value(0), 0, kNan, 0.0);
  const tercet::RolloutReward reward = rollout_reward({{}, std::nullopt, 0.0}, config.reward);
  CHECK(forest.is_finished(0) && forest.columns(0).total[0] == reward.total);
  CHECK(forest.status(0).negatives == 0 && forest.status(0).positives == 0);
}

// A value that was told whole, after some of its parts, is the same whether it waits or not.
void values_told_whole_forget_their_parts() {
  std::vector<tercet::Bytes> ends;
  for (const bool waits : {false, true}) {
    Forest forest = with_tree(apart(), 1);
    CHECK(forest.ask(9).size() == 2);
    tell_outcome(forest, value(0), 2, 1.0, 0.75);
    if (!waits) tell_children(forest, expand(0), {10});
    tell_value(forest, value(0), 0.5);
    if (waits) tell_children(forest, expand(0), {10});
    CHECK(forest.is_finished(0) && std::isnan(forest.columns(0).verdict[0]));
    CHECK(forest.status(0).positives == 0);
    ends.push_back(Snapshot::of(forest));
  }
  CHECK(ends[0] == ends[1]);
}

// Whoever had them is gone, with what they had told of their parts.
void recalled_tickets_are_handed_out_as_they_were() {
  Forest forest = with_apart_tickets_out();
  const std::uint64_t out = forest.counters().in_flight;
  CHECK(out == 4 && forest.recall() == out && forest.counters().in_flight == 0);
  CHECK_THROWS(tell_verdict(forest, value(1), 1, 0.5), BadTicket);
  CHECK(forest.recall() == 0);
  const Leaves again = forest.ask(9);
  CHECK(again.size() == out && forest.counters().in_flight == out);
  CHECK(again.attempt == std::vector<std::uint32_t>(out, 1));
  tell_verdict(forest, value(1), 1, 0.5);
}

// Cancelled tickets.

void what_is_cancelled_was_never_asked() {
  Forest forest = with_tree({.max_in_flight = 3, .visits_per_flight = 1});
  tell(forest, forest.ask(9).ticket.at(0), 0.5, {10, 11, 12, 13});
  CHECK(forest.ask(9).handle == (Handles{10, 11}));
  const Ticket both[] = {value(2), value(1)};
  const double costs[] = {1, 0, 0, 0.5, 0, 8, 0, 0};  // value(2), value(1)
  forest.cancel(both, costs);
  CHECK(forest.counters().cancelled == 2 && forest.counters().in_flight == 0);
  CHECK(forest.status(0).committed == 1 && forest.status(0).spent.tokens == 8.0);
  CHECK(forest.counters().spent.model_calls == 0.0);  // the other one waits for a look
  CHECK(forest.columns(0).in_flight == (std::vector<std::uint32_t>{1, 0, 1, 0, 0}));
  for (const Ticket ticket : both) CHECK_THROWS(cancel(forest, ticket), BadTicket);
  const Leaves again = forest.ask(9);
  CHECK(again.ticket == (Tickets{value(3), value(4)}) && again.handle == (Handles{10, 11}));
  CHECK(again.attempt == (std::vector<std::uint32_t>{1, 1}));
  CHECK(forest.counters().spent.model_calls == 1.0 && forest.status(0).spent.seconds == 0.5);
  CHECK(forest.columns(0).in_flight == (std::vector<std::uint32_t>{2, 1, 1, 0, 0}));
}

// A cancelled ticket waits for its turn as others do.
void later_answers_are_those_of_a_tree_with_the_ticket() {
  Forest forest = with_tree({.max_in_flight = 3, .visits_per_flight = 1});
  tell(forest, forest.ask(9).ticket.at(0), 0.5, {10, 11, 12, 13});
  CHECK(forest.ask(9).size() == 2);
  cancel(forest, value(2));
  CHECK(forest.status(0).in_flight == 2 && forest.columns(0).in_flight[2] == 1);
  CHECK(restored(forest).counters().in_flight == 1);
  tell(forest, value(1), 0.5, {});
  // 11 counts as asked until the tree has as many out as it may.
  CHECK(forest.ask(9).handle == (Handles{12, 13, 11}));
}

void a_tree_that_waits_for_a_cancelled_ticket_goes_on() {
  Forest forest = with_tree({.max_in_flight = 2, .visits_per_flight = 1});
  tell(forest, forest.ask(9).ticket.at(0), 0.5, {10});
  CHECK(forest.ask(9).ticket == Tickets{value(1)} && forest.ask(9).size() == 0);
  cancel(forest, value(1));
  CHECK(forest.ask(9).ticket == Tickets{value(2)});
}

void either_ticket_of_a_look_can_be_cancelled() {
  Forest forest = with_tree(apart());
  (void)forest.ask(9);
  cancel(forest, expand(0));
  CHECK(forest.columns(0).in_flight[0] == 1);
  const Leaves again = forest.ask(9);  // seen before: only children are asked for
  CHECK(again.ticket == Tickets{expand(1)});
  tell_children(forest, expand(1), {10});
  const Leaves child = forest.ask(9);
  CHECK(child.ticket == (Tickets{expand(2), value(1)}));
  cancel(forest, value(0));
  cancel(forest, expand(2));
  cancel(forest, value(1));
  CHECK(forest.columns(0).in_flight == (std::vector<std::uint32_t>{2, 1}));  // the values'
  CHECK(forest.status(0).committed == 0 && forest.counters().in_flight == 0);
  run(forest, [](std::int64_t) { return Handles{1, 2}; });
  CHECK(forest.is_finished(0) && forest.columns(0).visits[0] == 20);
}

// What was told of a ticket does not count for a later one in its memory.
void costs_are_counted_once() {
  Forest forest = with_tree({.max_in_flight = 2, .visits_per_flight = 1}, 40);
  tell(forest, forest.ask(9).ticket.at(0), 0.5, {10, 11});
  CHECK(forest.ask(9).size() == 2);
  tell(forest, value(2), 0.5, {1, 2}, {.outcome = 1.0, .cost = {1, 2, 3, 4}});
  tell(forest, value(1), 0.5, {1, 2});
  run(forest, [](std::int64_t) { return Handles{1, 2}; });
  CHECK(forest.is_finished(0) && forest.status(0).spent.tokens == 2.0);
  CHECK(forest.status(0).positives == 1 && forest.counters().spent.seconds == 4.0);
}

// More or other simulations.

void extended_trees_go_on() {
  const auto binary = [](std::int64_t handle) { return Handles{2 * handle, 2 * handle + 1}; };
  Forest forest = with_tree({}, 12), whole = with_tree({}, 30);
  run(forest, binary);
  CHECK(forest.is_finished(0) && forest.status(0).reason == StopReason::kSimulations);
  forest.extend(0, 18);
  CHECK(!forest.is_finished(0) && forest.counters().finished == 0);
  CHECK(forest.status(0).reason == StopReason::kRunning);
  run(forest, binary);
  run(whole, binary);
  CHECK(Snapshot::of(forest) == Snapshot::of(whole));
  refuses<std::invalid_argument>(forest, [&] { forest.extend(0, 0); });
  refuses<std::invalid_argument>(forest, [&] { forest.extend(0, tercet::kMaxVisits - 29); });
  refuses<std::out_of_range>(forest, [&] { forest.extend(1, 1); });
  forest.extend(0, tercet::kMaxVisits - 30);
}

// Sequential halving is planned anew, as a restored forest plans it.
void extended_halving_is_that_of_all_simulations() {
  const auto children = [](std::int64_t) { return Handles{1, 2, 3, 4, 5, 6, 7, 8}; };
  ForestConfig config;
  config.select.rule = tercet::Rule::kGumbel;
  Forest forest = with_tree(config, 10);
  run(forest, children);
  forest.extend(0, 40);
  Forest again = restored(forest);
  run(forest, children);
  run(again, children);
  CHECK(Snapshot::of(forest) == Snapshot::of(again));
}

void simulations_that_are_left_over_go_to_others() {
  const auto children = [](std::int64_t handle) {
    return handle == 9 ? Handles{} : Handles{2 * handle, 2 * handle + 1};
  };
  Forest forest({.solver = true});
  for (const std::int64_t root : {9, 7, 8}) forest.add_tree(root, 12);  // the first is an end
  refuses<std::logic_error>(forest, [&] { forest.reallocate(); });
  run(forest, children);
  CHECK(forest.status(0).reason == StopReason::kClosed && forest.status(0).committed == 1);
  CHECK(forest.counters().finished == 3);
  CHECK(forest.reallocate() == 11 && forest.counters().finished == 1);
  CHECK(forest.status(0).simulations == 1 && forest.status(1).simulations == 18);
  CHECK(forest.status(2).simulations == 17);  // the odd one went to the first
  run(forest, children);
  CHECK(forest.counters().finished == 3 && forest.counters().simulations == 36);
  CHECK(forest.reallocate() == 0);
}

// All of a tree that was stopped before its first simulation.
void a_tree_may_give_all_away() {
  for (const auto rule : {tercet::Rule::kUct, tercet::Rule::kGumbel}) {
    ForestConfig config = apart();
    config.select.rule = rule;
    Forest forest = with_tree(config, 5, {.nodes = 2});
    forest.add_tree(8, 5);
    (void)forest.ask(2);
    tell_children(forest, expand(0), {10, 11});
    cancel(forest, value(0));
    CHECK(forest.is_finished(0) && forest.status(0).committed == 0);
    run(forest, [](std::int64_t) { return Handles{1, 2}; });
    CHECK(forest.reallocate() == 5 && forest.status(0).simulations == 0);
    Forest again = restored(forest);
    for (Forest* one : {&forest, &again}) run(*one, [](std::int64_t) { return Handles{3}; });
    CHECK(Snapshot::of(forest) == Snapshot::of(again) && forest.counters().finished == 2);
  }
}

std::vector<std::size_t> children_of(const TreeColumns& tree, std::size_t node) {
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < tree.node.size(); ++i) {
    if (tree.parent[i] == static_cast<std::int64_t>(node)) found.push_back(i);
  }
  return found;
}

// Bit for bit, in all but the depth and the prior of the root; how many nodes it has.
std::size_t check_subtree(const TreeColumns& all, std::size_t root, const TreeColumns& part,
                          std::size_t top) {
  CHECK(all.handle[root] == part.handle[top] && all.visits[root] == part.visits[top]);
  CHECK(all.total[root] == part.total[top] && all.terminal[root] == part.terminal[top]);
  CHECK(part.in_flight[top] == 0 && (top == 0 || all.prior[root] == part.prior[top]));
  const std::vector<std::size_t> old = children_of(all, root), now = children_of(part, top);
  CHECK(old.size() == now.size());
  std::size_t nodes = 1;
  for (std::size_t i = 0; i < old.size(); ++i) nodes += check_subtree(all, old[i], part, now[i]);
  return nodes;
}

void a_search_goes_on_from_a_node() {
  ForestConfig config;
  config.select.rule = tercet::Rule::kPuct;
  Forest forest(config);
  forest.add_tree(1, 5);
  forest.add_tree(2, 200);
  forest.remove_tree(0);
  const auto children = [](std::int64_t handle) {
    return handle % 7 == 0 ? Handles{} : Handles{3 * handle, 3 * handle + 1, 3 * handle + 2};
  };
  run(forest, children);
  const TreeColumns before = forest.columns(1);
  const std::uint32_t next = forest.choice(1).value();
  const auto root =
      static_cast<std::size_t>(std::ranges::find(before.node, next) - before.node.begin());
  forest.reroot(1, next, 50);
  const TreeColumns after = forest.columns(1);
  CHECK(check_subtree(before, root, after, 0) == after.node.size());
  CHECK(after.parent[0] == -1 && after.node[0] == 0);
  CHECK(forest.counters().nodes == after.node.size() && after.node.size() < before.node.size());
  CHECK(forest.status(1).committed == after.visits[0]);
  CHECK(forest.status(1).simulations == after.visits[0] + 50 && !forest.is_finished(1));
  CHECK_THROWS(tell(forest, value(0, 1), 0.5, {}), BadTicket);  // told long ago
  Forest again = restored(forest);
  for (Forest* one : {&forest, &again}) run(*one, children);
  CHECK(Snapshot::of(forest) == Snapshot::of(again));
  CHECK(forest.columns(1).visits[0] == after.visits[0] + 50 && forest.is_finished(1));
  refuses<std::out_of_range>(forest, [&] { forest.reroot(1, 1, 5); });  // beside the root
  refuses<std::out_of_range>(forest, [&] { forest.reroot(1, 1u << 20, 5); });
  refuses<std::out_of_range>(forest, [&] { forest.reroot(0, 0, 5); });
  refuses<std::invalid_argument>(forest, [&] { forest.reroot(1, 0, 0); });
  refuses<std::invalid_argument>(forest, [&] { forest.reroot(1, 0, tercet::kMaxVisits); });
}

void the_nodes_of_a_left_tree_are_free() {
  ForestConfig config;
  config.max_bytes = tercet::Nodes::kChunk * tercet::Nodes::kBytesPerNode;
  Forest forest = with_tree(config, 400);
  const auto children = [](std::int64_t) { return Handles(64, 5); };
  for (int round = 0; round < 40; ++round) {
    run(forest, children);
    forest.reroot(0, forest.choice(0).value(), 400);  // 400 slabs more, of 4096
  }
  CHECK(forest.counters().bytes == config.max_bytes);
}

void no_search_goes_on_while_tickets_are_out() {
  Forest forest = with_tree({.max_in_flight = 2, .visits_per_flight = 1}, 3);
  tell(forest, forest.ask(9).ticket.at(0), 0.5, {10, 11, 12});
  CHECK(forest.ask(9).size() == 2);
  refuses<std::logic_error>(forest, [&] { forest.reroot(0, 4, 5); });
  tell(forest, value(2), 0.5, {});  // waits
  refuses<std::logic_error>(forest, [&] { forest.reroot(0, 4, 5); });
  tell(forest, value(1), 0.5, {});
  forest.reroot(0, 5, 5);
  CHECK(forest.columns(0).handle == Handles{11} && forest.columns(0).terminal[0] == 1);
  CHECK(forest.ask(9).size() == 0 && forest.is_finished(0));
  CHECK(forest.columns(0).total[0] == 3.0);  // 1 visit and 5 more
}

// Widening, solver, merging.

ForestConfig widening() {
  ForestConfig config = apart();
  config.widening = 1.0;
  config.widening_alpha = 0.5;
  config.max_children = 3;
  return config;
}

void nodes_get_children_as_they_are_visited() {
  Forest forest = with_tree(widening(), 40);
  std::size_t asked = 0;
  for (Leaves leaves = forest.ask(1); leaves.size() > 0; leaves = forest.ask(1)) {
    if (leaves.kind[0] == static_cast<std::uint8_t>(Kind::kVerify)) {
      tell_value(forest, leaves.ticket[0], 0.5);
    } else {
      const TreeColumns columns = forest.columns(0);
      if (leaves.node[0] == 0 && asked++ > 0) {  // the root, for more
        const auto there = std::ranges::count(columns.parent, 0);
        CHECK(static_cast<double>(there) < std::sqrt(columns.visits[0] + columns.in_flight[0]));
        const Handles many(static_cast<std::size_t>(4 - there), 1);
        refuses<std::invalid_argument>(forest,
                                       [&] { tell_children(forest, leaves.ticket[0], many); });
      }
      tell_children(forest, leaves.ticket[0], {leaves.handle[0] + 1});
    }
  }
  const TreeColumns columns = forest.columns(0);
  CHECK(asked == 3 && std::ranges::count(columns.parent, 0) == 3);
  CHECK(forest.is_finished(0) && columns.visits[0] == 40);
}

void priors_that_are_not_told_are_even_when_they_come() {
  ForestConfig config = widening();
  config.select.rule = tercet::Rule::kPuct;
  Forest forest = with_tree(config, 40);
  run(forest, [](std::int64_t handle) { return Handles{handle + 1}; });
  const TreeColumns columns = forest.columns(0);
  std::vector<float> priors;
  for (std::size_t i = 0; i < columns.node.size(); ++i) {
    if (columns.parent[i] == 0) priors.push_back(columns.prior[i]);
  }
  CHECK(priors == (std::vector<float>{1.0f, 0.5f, 1.0f / 3.0f}));
}

void a_node_that_gets_no_more_is_asked_no_more() {
  Forest forest = with_tree(widening(), 40);
  std::size_t asked = 0;
  run(forest, [&](std::int64_t handle) {
    if (handle == 7) asked += 1;
    return handle == 7 && asked == 2 ? Handles{} : Handles{handle + 1};
  });
  CHECK(asked == 2 && std::ranges::count(forest.columns(0).parent, 0) == 1);
}

void known_trees_are_closed() {
  ForestConfig config;
  config.solver = true;
  Forest forest = with_tree(config, 20);
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {10, 11});
  tell(forest, forest.ask(1).ticket.at(0), 1.0, {});
  CHECK(forest.columns(0).closed == (std::vector<std::uint8_t>{0, 1, 0}));
  const Leaves open = forest.ask(9);
  CHECK(open.handle == Handles{11});  // though the other one is better
  tell(forest, open.ticket[0], 0.0, {12});
  tell(forest, forest.ask(1).ticket.at(0), 0.0, {});
  CHECK(forest.columns(0).closed == (std::vector<std::uint8_t>{1, 1, 1, 1}));
  CHECK(forest.is_finished(0) && forest.status(0).reason == StopReason::kClosed);
  CHECK(forest.status(0).committed == 4 && forest.choice(0) == 5u);  // most visits
  forest.extend(0, 5);
  CHECK(forest.is_finished(0) && forest.ask(9).size() == 0);
}

void what_may_still_widen_is_not_closed() {
  ForestConfig config = widening();
  config.solver = true;
  Forest forest = with_tree(config, 30);
  int rounds = 0;
  run(forest, [&](std::int64_t handle) {
    return handle == 7 && ++rounds < 3 ? Handles{10 + rounds} : Handles{};
  });
  CHECK(rounds == 3 && forest.status(0).reason == StopReason::kClosed);
  CHECK(std::ranges::count(forest.columns(0).parent, 0) == 2);
}

// All children are ends, and too few visits for another: there is nothing else to do.
void a_node_whose_children_are_closed_is_asked_for_more() {
  ForestConfig config;
  config.solver = true;
  config.widening = 1.0;
  config.widening_alpha = 0.0;
  config.max_children = 2;
  Forest forest = with_tree(config, 9);
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {10});
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {});
  const Leaves more = forest.ask(1);
  CHECK(more.node == std::vector<std::uint32_t>{0} && more.ticket == Tickets{expand(0)});
  tell_children(forest, expand(0), {11});
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {});
  CHECK(forest.status(0).reason == StopReason::kClosed && forest.status(0).committed == 3);
}

void children_with_one_handle_are_one() {
  ForestConfig config;
  config.select.rule = tercet::Rule::kPuct;
  config.merge_duplicates = true;
  Forest forest = with_tree(config);
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {10, 11, 10, 12, 11},
       {.priors = {0.25f, 0.5f, 0.125f, 0.0f, 0.0625f}, .terminal = {1, 0, 0, 0, 1}});
  const TreeColumns columns = forest.columns(0);
  CHECK(columns.handle == (Handles{7, 10, 11, 12}) && forest.counters().merged == 2);
  CHECK(columns.prior[1] == 0.375f && columns.prior[2] == 0.5625f && columns.prior[3] == 0.0f);
  CHECK(columns.terminal == (std::vector<std::uint8_t>{0, 1, 0, 0}));  // as the first said
  CHECK(forest.counters().nodes == 4 && forest.status(0).nodes == 4);
}

void widening_merges_with_what_is_there() {
  ForestConfig config = widening();
  config.merge_duplicates = true;
  config.select.rule = tercet::Rule::kPuct;
  Forest forest = with_tree(config, 60);
  int rounds = 0;
  for (Leaves leaves = forest.ask(1); leaves.size() > 0; leaves = forest.ask(1)) {
    if (leaves.kind[0] == static_cast<std::uint8_t>(Kind::kVerify)) {
      tell_value(forest, leaves.ticket[0], 0.5);
    } else if (leaves.handle[0] != 7) {
      tell_children(forest, leaves.ticket[0], {});
    } else if (++rounds == 4) {
      tell_children(forest, leaves.ticket[0], {11, 10}, {.priors = {0.25f, 0.5f}});
    } else {
      tell_children(forest, leaves.ticket[0], {10}, {.priors = {0.125f}});
    }
  }
  const TreeColumns columns = forest.columns(0);
  CHECK(rounds == 7 && columns.handle == (Handles{7, 10, 11}));  // three in a row brought none
  CHECK(columns.prior[1] == 0.5f + 6 * 0.125f && columns.prior[2] == 0.25f);
  CHECK(forest.counters().merged == 6);
}

// Ends of a search.

StopReason reason_of(const ForestConfig& config, const tercet::Budget& budget,
                     const std::vector<double>& outcomes, std::uint32_t committed) {
  Forest forest = with_tree(config, 20, budget);
  std::size_t told = 0;
  for (Leaves leaves = forest.ask(1); leaves.size() > 0; leaves = forest.ask(1)) {
    const double outcome = told < outcomes.size() ? outcomes[told] : kNan;
    tell(forest, leaves.ticket[0], 0.5, {1, 2},
         {.outcome = outcome, .cost = {1.0, 100.0, 2.0, 0.25}});
    told += 1;
    forest = restored(forest);
  }
  CHECK(forest.is_finished(0) && forest.status(0).committed == committed);
  return forest.status(0).reason;
}

void rules_stop_a_tree() {
  using std::vector;
  CHECK(reason_of({}, {}, {1.0, -1.0}, 20) == StopReason::kSimulations);
  CHECK(reason_of({.stop = {.correct = true}}, {}, {0.0, -1.0, 0.25}, 3) == StopReason::kCorrect);
  const ForestConfig samples{.stop = {.positives = 2, .negatives = 1}};
  CHECK(reason_of(samples, {}, {1.0, 1.0, 0.0, -0.5}, 4) == StopReason::kSamples);
  CHECK(reason_of(samples, {}, {-1.0, -1.0, 1.0, 1.0}, 4) == StopReason::kSamples);
  CHECK(reason_of(samples, {}, {1.0, 1.0}, 20) == StopReason::kSimulations);
  CHECK(reason_of({.stop = {.negatives = 1}}, {}, {0.0, -0.5}, 2) == StopReason::kSamples);
  CHECK(reason_of({.stop = {.positives = 1}}, {}, {0.0, 0.5}, 2) == StopReason::kSamples);
  CHECK(reason_of({}, {.evaluations = 3}, {}, 3) == StopReason::kBudget);
  CHECK(reason_of({}, {.nodes = 6}, {}, 3) == StopReason::kBudget);  // 1, 3, 5, 7
  CHECK(reason_of({}, {.model_calls = 4}, {}, 4) == StopReason::kBudget);
  CHECK(reason_of({}, {.tokens = 450}, {}, 5) == StopReason::kBudget);
  CHECK(reason_of({}, {.tool_calls = 4}, {}, 2) == StopReason::kBudget);
  CHECK(reason_of({}, {.seconds = 1.0}, {}, 4) == StopReason::kBudget);
  // The first that holds.
  const ForestConfig all{.stop = {.positives = 1, .correct = true}};
  CHECK(reason_of(all, {.evaluations = 1}, {1.0}, 1) == StopReason::kCorrect);
}

void what_is_out_when_a_tree_stops_is_still_told() {
  Forest forest =
      with_tree({.stop = {.correct = true}, .max_in_flight = 3, .visits_per_flight = 1}, 20);
  tell(forest, forest.ask(9).ticket.at(0), 0.5, {10, 11, 12});
  CHECK(forest.ask(9).size() == 2);
  tell(forest, value(1), 0.5, {}, {.outcome = 1.0});
  CHECK(forest.status(0).reason == StopReason::kCorrect && !forest.is_finished(0));
  CHECK(forest.ask(9).size() == 0);
  tell(forest, value(2), 0.5, {});
  CHECK(forest.is_finished(0) && forest.status(0).committed == 3);
}

void a_lead_that_cannot_be_overtaken_is_enough() {
  ForestConfig config;
  config.stop.converged = true;
  config.select.c_uct = 0.01;
  Forest forest = with_tree(config, 22);
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {10, 11});
  for (Leaves leaves = forest.ask(1); leaves.size() > 0; leaves = forest.ask(1)) {
    const bool good = leaves.handle[0] % 2 == 0;
    tell(forest, leaves.ticket[0], good ? 1.0 : 0.0, {leaves.handle[0] + 2});
  }
  const TreeColumns columns = forest.columns(0);
  CHECK(forest.status(0).reason == StopReason::kConverged);
  const std::uint32_t left = 22 - columns.visits[0];
  CHECK(columns.visits[1] - columns.visits[2] == left + 1);  // and not before
}

// Visits of ends count as others do.
void a_lead_among_ends_is_enough() {
  ForestConfig config;
  config.stop.converged = true;
  config.select.c_uct = 0.01;
  Forest forest = with_tree(config, 21);
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {10, 11});
  for (const double value : {1.0, 0.0}) tell(forest, forest.ask(1).ticket.at(0), value, {});
  CHECK(forest.ask(1).size() == 0 && forest.status(0).reason == StopReason::kConverged);
  CHECK(forest.status(0).committed == 13);  // 11 and 1 of the children; 12 could draw level
}

void low_values_are_looked_for_after_a_positive_outcome() {
  ForestConfig config;
  config.dual_target = true;
  config.select.c_uct = 0.0;
  Forest forest = with_tree(config, 10);
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {10, 11});
  tell(forest, forest.ask(1).ticket.at(0), 1.0, {12});
  tell(forest, forest.ask(1).ticket.at(0), -1.0, {13});
  const Leaves high = forest.ask(1);
  CHECK(high.handle == Handles{12});
  tell(forest, high.ticket[0], 1.0, {14}, {.outcome = 1.0});
  CHECK(forest.ask(1).handle == Handles{13});
}

void one_budget_for_all_trees() {
  ForestConfig config;
  config.budget.evaluations = 5;
  Forest forest = with_tree(config);
  forest.add_tree(8, 20);
  CHECK(forest.ask(9).size() == 2);
  tell(forest, value(0), 0.5, {10, 11});
  tell(forest, value(0, 1), 0.5, {10, 11});
  for (const Ticket ticket : forest.ask(9).ticket) tell(forest, ticket, 0.5, {1, 2});
  CHECK(forest.counters().evaluations == 4);
  CHECK(forest.ask(9).size() == 1);  // and not one per tree
  CHECK(forest.ask(9).size() == 0 && !forest.is_finished(0));
  config.budget = {.tokens = 10};
  Forest costly = with_tree(config);
  const double cost[] = {0, 10, 0, 0};
  const Ticket first = costly.ask(1).ticket.at(0);
  costly.fail({&first, 1}, cost);
  CHECK(costly.counters().spent.tokens == 0.0);  // not before its answer
  tell(costly, costly.ask(1).ticket.at(0), 0.5, {1});
  CHECK(costly.counters().spent.tokens == 10.0 && costly.ask(9).size() == 0);
}

void the_child_with_most_visits_is_taken() {
  Forest forest = with_tree({}, 4);
  CHECK(!forest.choice(0));
  tell(forest, forest.ask(1).ticket.at(0), 0.5, {10, 11, 12});
  const double values[] = {0.5, 1.0, 0.0};
  for (const double one : values) tell(forest, forest.ask(1).ticket.at(0), one, {1});
  CHECK(forest.choice(0) == 5u);  // of equal visits, the best
  CHECK_THROWS((void)forest.choice(1), std::out_of_range);
}

// One bad element.

struct Bad {
  const char* what;
  std::function<void(Forest&)> call;
};

void a_bad_element_changes_nothing() {
  const Tickets two{value(0), value(1)};
  const std::vector<double> halves{0.5, 0.5}, one{0.5}, great{0.5, 1e301}, none{0.5, kNan};
  const std::vector<double> far{0.5, -1.5}, costs{1, 1, 1, 1, 1, 1, 1, -1}, short_costs(7);
  const std::vector<std::uint32_t> steps{0, 3}, known{0, 1}, late{0, tercet::kMaxSteps};
  const std::vector<std::uint32_t> twice{3, 3}, early{3, 1}, many{3, tercet::kMaxSteps + 1};
  const auto values = [&](const Tickets& tickets, const std::vector<double>& told,
                          const std::vector<double>& channels, const std::vector<double>& outcomes,
                          const std::vector<double>& cost) {
    return [=](Forest& forest) {
      forest.tell_values({tickets, told, {}, {}, {}, {}, outcomes, channels, cost});
    };
  };
  const auto verdicts = [](const Tickets& tickets, const std::vector<std::uint32_t>& at,
                           const std::vector<double>& told) {
    return [=](Forest& forest) { forest.tell_verdicts({tickets, at, told}); };
  };
  const auto outcomes = [](const Tickets& tickets, const std::vector<std::uint32_t>& ends,
                           const std::vector<double>& told, const std::vector<double>& starts,
                           const std::vector<double>& cost) {
    return [=](Forest& forest) { forest.tell_outcome({tickets, ends, told, starts, cost}); };
  };
  const auto children = [](const Tickets& tickets, const std::vector<std::uint32_t>& counts,
                           const Handles& handles, const std::vector<float>& priors,
                           const std::vector<std::uint8_t>& terminal) {
    return [=](Forest& forest) {
      forest.tell_children({tickets, {}, counts, handles, priors, terminal});
    };
  };
  const float nan = std::nanf("");
  const std::vector<Bad> bad{
      {"no such ticket", values({value(0), value(9)}, halves, halves, {}, {})},
      {"a ticket twice", values({value(0), value(0)}, halves, halves, {}, {})},
      {"a ticket of another kind", values({value(0), expand(2)}, halves, halves, {}, {})},
      {"a value", values(two, great, halves, {}, {})},
      {"a value", values(two, none, halves, {}, {})},
      {"values", values(two, one, halves, {}, {})},
      {"a channel", values(two, halves, great, {}, {})},
      {"channels", values(two, halves, one, {}, {})},
      {"channels", values(two, halves, {}, {}, {})},
      {"an outcome", values(two, halves, halves, far, {})},
      {"outcomes", values(two, halves, halves, one, {})},
      {"a cost", values(two, halves, halves, {}, costs)},
      {"costs", values(two, halves, halves, {}, short_costs)},
      {"no such ticket", verdicts({value(0), value(9)}, steps, halves)},
      {"a ticket of another kind", verdicts({value(0), expand(2)}, steps, halves)},
      {"a step with a verdict", verdicts(two, known, halves)},
      {"a step too late", verdicts(two, late, halves)},
      {"a step twice", verdicts({value(0), value(0)}, twice, halves)},
      {"a verdict", verdicts(two, steps, far)},
      {"a verdict", verdicts(two, steps, none)},
      {"verdicts", verdicts(two, steps, one)},
      {"steps", verdicts(two, {1}, halves)},
      {"no such ticket", outcomes({value(0), value(9)}, steps, halves, {}, {})},
      {"a ticket twice", outcomes({value(0), value(0)}, steps, halves, {}, {})},
      {"a ticket of another kind", outcomes({value(0), expand(2)}, steps, halves, {}, {})},
      {"fewer steps than verdicts", outcomes(two, early, halves, {}, {})},
      {"too many steps", outcomes(two, many, halves, {}, {})},
      {"an outcome", outcomes(two, steps, far, {}, {})},
      {"a start", outcomes(two, steps, halves, far, {})},
      {"a start", outcomes(two, steps, halves, none, {})},
      {"starts", outcomes(two, steps, halves, one, {})},
      {"outcomes", outcomes(two, steps, one, {}, {})},
      {"num_steps", outcomes(two, {3}, halves, {}, {})},
      {"a cost", outcomes(two, steps, halves, {}, costs)},
      {"no such ticket", children({expand(2), expand(9)}, {1, 1}, {1, 2}, {}, {})},
      {"a ticket twice", children({expand(2), expand(2)}, {1, 1}, {1, 2}, {}, {})},
      {"a ticket of another kind", children({expand(2), value(0)}, {1, 1}, {1, 2}, {}, {})},
      {"too many children", children({expand(2)}, {65}, Handles(65), {}, {})},
      {"handles", children({expand(2)}, {2}, {1}, {}, {})},
      {"num_children", children({expand(2)}, {}, {}, {}, {})},
      {"a prior", children({expand(2)}, {2}, {1, 2}, {0.5f, -0.5f}, {})},
      {"a prior", children({expand(2)}, {2}, {1, 2}, {0.5f, nan}, {})},
      {"priors", children({expand(2)}, {2}, {1, 2}, {0.5f}, {})},
      {"terminal", children({expand(2)}, {2}, {1, 2}, {}, {1})},
      {"a ticket", [&](Forest& f) { f.fail(Tickets{value(0), expand(9)}); }},
      {"a ticket twice", [&](Forest& f) { f.fail(Tickets{value(0), value(0)}); }},
      {"a cost", [&](Forest& f) { f.fail(two, costs); }},
      {"costs", [&](Forest& f) { f.fail(two, short_costs); }},
      {"a ticket", [&](Forest& f) { f.cancel(Tickets{value(0), expand(9)}); }},
      {"a ticket twice", [&](Forest& f) { f.cancel(Tickets{value(0), value(0)}); }},
      {"a cost", [&](Forest& f) { f.cancel(two, costs); }},
      {"costs", [&](Forest& f) { f.cancel(two, short_costs); }},
      {"another kind", [](Forest& f) { tell(f, value(0), 0.5, {}); }},
  };
  Forest forest = with_apart_tickets_out();
  const tercet::Bytes before = Snapshot::of(forest);
  for (const Bad& one : bad) {
    bool refused = false;
    try {
      one.call(forest);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    if (!refused || Snapshot::of(forest) != before) std::fprintf(stderr, "%s\n", one.what);
    CHECK(refused && Snapshot::of(forest) == before);
  }
  values(two, halves, halves, halves, std::vector<double>(8, 1.0))(forest);
  children({expand(2)}, {2}, {1, 2}, {0.5f, 0.5f}, {1, 0})(forest);
}

void more_children_than_allowed_are_refused() {
  Forest forest = with_tree({.max_children = 3});
  const Ticket root = forest.ask(1).ticket.at(0);
  refuses<std::invalid_argument>(forest, [&] { tell(forest, root, 0.5, {1, 2, 3, 4}); });
  tell(forest, root, 0.5, {1, 2, 3});
}

void priors_that_nothing_reads_are_refused() {
  Forest forest = with_tree({});
  const Ticket root = forest.ask(1).ticket.at(0);
  refuses<std::invalid_argument>(forest, [&] { tell(forest, root, 0.5, {1}, {.priors = {1.0f}}); });
}

void values_that_are_multiplied_are_small() {
  Forest forest = with_tree({.backup = {.how = tercet::Backup::kProduct}});
  const Ticket root = forest.ask(1).ticket.at(0);
  for (const double bad : {1.5, -1.5}) {
    refuses<std::invalid_argument>(forest, [&] { tell(forest, root, bad, {1}); });
  }
  tell(forest, root, -1.0, {1});
}

void given_up_tickets_bring_what_failed() {
  ForestConfig config = apart();
  config.max_attempts = 1;
  config.failed_value = -0.25;
  config.backup.channels.resize(2);
  Forest forest = with_tree(config, 3);
  (void)forest.ask(9);
  fail(forest, expand(0));
  fail(forest, value(0));
  CHECK(forest.ask(9).size() == 0 && forest.is_finished(0) && forest.counters().given_up == 2);
  const TreeColumns columns = forest.columns(0);
  CHECK(columns.terminal[0] == 1 && columns.total[0] == -0.75);
  CHECK(columns.channels == (std::vector<double>{-0.75, -0.75}));
}

void settings_at_odds_are_refused() {
  const auto refuses = [](const ForestConfig& config) {
    CHECK_THROWS(Forest(config), std::invalid_argument);
  };
  refuses({.widening = -1.0});
  refuses({.widening = std::numeric_limits<double>::infinity()});
  for (const double bad : {-0.1, 1.1, kNan}) refuses({.widening_alpha = bad});
  for (const std::uint32_t bad : {0u, 65u}) refuses({.max_children = bad});
  for (const std::uint32_t bad : {0u, 256u}) refuses({.max_unverified = bad});
  refuses({.tickets = TicketMode::kLazy, .max_in_flight = 128, .max_unverified = 128});
  Forest({.tickets = TicketMode::kLazy, .max_in_flight = 127, .max_unverified = 128});
  Forest({.max_in_flight = 255, .max_unverified = 255});
  refuses({.select = {.unfinished = tercet::Unfinished::kVirtualLoss},
           .backup = {.how = tercet::Backup::kSum}});
  refuses({.select = {.dirichlet_alpha = 0.5}});
  refuses({.budget = {.tokens = 0.0}});
  refuses({.backup = {.gamma = 2.0}});
  refuses({.reward = {.outcome_weight = -1.0}});
  refuses({.reward = {.outcome_weight = 1e300}});
  refuses({.backup = {.how = tercet::Backup::kProduct}, .failed_value = -1.5});
  refuses({.backup = {.channels = {{.channel = {.how = tercet::Aggregation::kProduct}}}},
           .failed_value = 1.5});
  Forest forest({});
  CHECK_THROWS(forest.add_tree(1, 5, 0, {.nodes = -1.0}), std::invalid_argument);
  CHECK(forest.counters().trees == 0);
}

}  // namespace

int main() {
  children_come_before_values();
  the_second_ticket_of_a_look_waits_for_a_batch_with_room();
  lazy_leaves_are_expanded_at_the_second_visit();
  an_end_has_the_value_that_was_told_before();
  an_end_without_a_value_is_not_closed();
  a_lazy_root_without_children_has_failed();
  a_told_end_is_evaluated_once();
  verdicts_come_one_by_one_and_in_any_order();
  a_rollout_may_have_no_steps();
  values_told_whole_forget_their_parts();
  recalled_tickets_are_handed_out_as_they_were();
  what_is_cancelled_was_never_asked();
  later_answers_are_those_of_a_tree_with_the_ticket();
  a_tree_that_waits_for_a_cancelled_ticket_goes_on();
  either_ticket_of_a_look_can_be_cancelled();
  costs_are_counted_once();
  extended_trees_go_on();
  extended_halving_is_that_of_all_simulations();
  simulations_that_are_left_over_go_to_others();
  a_tree_may_give_all_away();
  a_search_goes_on_from_a_node();
  the_nodes_of_a_left_tree_are_free();
  no_search_goes_on_while_tickets_are_out();
  nodes_get_children_as_they_are_visited();
  priors_that_are_not_told_are_even_when_they_come();
  a_node_that_gets_no_more_is_asked_no_more();
  known_trees_are_closed();
  what_may_still_widen_is_not_closed();
  a_node_whose_children_are_closed_is_asked_for_more();
  children_with_one_handle_are_one();
  widening_merges_with_what_is_there();
  rules_stop_a_tree();
  what_is_out_when_a_tree_stops_is_still_told();
  a_lead_that_cannot_be_overtaken_is_enough();
  a_lead_among_ends_is_enough();
  low_values_are_looked_for_after_a_positive_outcome();
  one_budget_for_all_trees();
  the_child_with_most_visits_is_taken();
  a_bad_element_changes_nothing();
  more_children_than_allowed_are_refused();
  priors_that_nothing_reads_are_refused();
  values_that_are_multiplied_are_small();
  given_up_tickets_bring_what_failed();
  settings_at_odds_are_refused();
}
