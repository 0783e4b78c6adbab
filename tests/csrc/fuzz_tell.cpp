// Bytes as a program of calls to a forest and, after a snapshot, to its copy: valid ones and such
// as must be refused.  After each call the invariants hold, and the two forests are the same.

#include <algorithm>
#include <map>
#include <optional>
#include <stdexcept>

#include "fuzz.hpp"

using fuzz::Answers;
using fuzz::Choices;
using tercet::Bytes;
using tercet::Counters;
using tercet::Forest;
using tercet::ForestConfig;
using tercet::Kind;
using tercet::Leaves;
using tercet::Snapshot;
using tercet::Ticket;
using tercet::TreeId;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// What is known of a ticket that is out.
struct Parts {
  std::set<std::uint32_t> steps{};
  std::optional<std::uint32_t> num_steps{};
};

class Program {
 public:
  explicit Program(Choices& choices)
      : choices_(choices), config_(settings(choices)), forest_(config_), twin_(config_) {}

  void run() {
    add_tree();
    while (!choices_.empty()) {
      step();
      check();
    }
    finish();
  }

 private:
  static ForestConfig settings(Choices& choices) {
    ForestConfig config = fuzz::config_of(choices);
    if (choices.rarely(8)) config.budget.evaluations = 30;
    return config;
  }

  // Both forests do the same; what is refused changes nothing.  Whether it was accepted.
  template <typename Call>
  bool both(const Call& call) {
    const Bytes before = Snapshot::of(forest_);
    int refused = 0;
    for (Forest* forest : {&forest_, &twin_}) {
      try {
        call(*forest);
      } catch (const std::logic_error&) {  // std::invalid_argument, BadTicket, std::out_of_range
        CHECK(Snapshot::of(*forest) == before);
        refused += 1;
      }
    }
    CHECK(refused != 1);
    return refused == 0;
  }

  void step() {
    switch (choices_.below(16)) {
      case 0:
        return add_tree();
      case 1:
      case 2:
      case 3:
        return ask(1 + choices_.below(12));
      case 4:
      case 5:
      case 6:
        return tell();
      case 7:
        return tell_verdicts();
      case 8:
        return tell_outcome();
      case 9:
        return fail();
      case 10:
        return cancel();
      case 11:
        return recall();
      case 12:
        return choices_.rarely(3) ? remove() : extend();
      case 13:
        return reroot();
      case 14:
        return reallocate();
      default:
        twin_ = Snapshot::restore(Snapshot::of(forest_));
    }
  }

  void add_tree() {
    if (trees_ >= 5) return;
    const std::uint32_t simulations = choices_.below(40);
    tercet::Budget budget;
    if (choices_.rarely(4)) budget.nodes = choices_.below(20);
    if (choices_.rarely(4)) budget.tokens = choices_.below(20);
    const std::uint8_t seed = choices_.byte();
    std::vector<std::uint32_t> landings;  // of a tree that is there, now and then a wrong one
    if (!alive_.empty() && choices_.rarely(3)) landings = forest_.landings(*alive_.begin());
    if (!landings.empty() && choices_.rarely(4)) landings[simulations % landings.size()] ^= seed;
    const bool accepted = both([&](Forest& forest) {
      landings.empty() ? forest.add_tree(seed, simulations, seed, budget)
                       : forest.add_tree_along(seed, simulations, landings, seed);
    });
    if (accepted) alive_.insert(trees_++);
  }

  void ask(std::size_t n) {
    std::vector<Ticket> asked[2];
    std::size_t i = 0;
    both([&](Forest& forest) { asked[i++] = forest.ask(n).ticket; });
    CHECK(asked[0] == asked[1] && asked[0].size() <= n);
    for (const Ticket ticket : asked[0]) CHECK(out_.emplace(ticket, Parts{}).second);
  }

  TreeId tree() { return choices_.below(trees_ + 1); }

  // One that is out, if there is such; seldom any.
  Ticket ticket() {
    if (out_.empty() || choices_.rarely(24)) {
      return tercet::ticket_of(tree(), choices_.below(8), choices_.rarely(2));
    }
    auto found = out_.begin();
    std::advance(found, choices_.below(static_cast<std::uint32_t>(out_.size())));
    return found->first;
  }

  std::vector<Ticket> tickets() {
    std::vector<Ticket> found(choices_.below(4));
    for (Ticket& ticket : found) ticket = this->ticket();
    if (!choices_.rarely(16)) {  // none twice
      std::ranges::sort(found);
      found.erase(std::ranges::unique(found).begin(), found.end());
    }
    return found;
  }

  std::vector<double> costs(std::size_t n) {
    std::vector<double> found;
    if (!choices_.rarely(3)) return found;
    for (std::size_t i = 0; i < 4 * n; ++i) found.push_back(choices_.below(5));
    if (n > 0 && choices_.rarely(16)) found[choices_.below(4) % found.size()] = -1.0;
    return found;
  }

  // Something that must be refused, at most positions.
  void spoil(Answers& answers) {
    const double values[] = {kNan, 1e301, -1e301, 1e300};
    const float priors[] = {-1.0f, static_cast<float>(kNan), 3e38f, 3e38f};
    const auto one_of = [&](auto& list, const auto& bad) {
      if (!list.empty()) {
        list[choices_.byte() % list.size()] = bad[choices_.below(4)];
      }
    };
    const double outcomes[] = {1.5, -1.5, 2.0, 9.0};
    const std::uint32_t counts[] = {65, 7, 1000, 2};
    switch (choices_.below(7)) {
      case 0:
        return one_of(answers.values, values);
      case 1:
        return one_of(answers.priors, priors);
      case 2:
        return one_of(answers.outcomes, outcomes);
      case 3:
        return one_of(answers.num_children, counts);
      case 4:
        return one_of(answers.channels, values);
      case 5:
        return answers.handles.push_back(1);
      default:
        return answers.terminal.push_back(1);
    }
  }

  void tell() {
    const Kind wanted = choices_.one_of(Kind::kVerify);
    Answers answers;
    for (const Ticket ticket : tickets()) {
      const Kind kind = fuzz::kind_of(ticket, config_);
      if (kind == wanted || choices_.rarely(24)) answers.add(ticket, wanted, config_, choices_);
    }
    answers.costs = costs(answers.tickets.size());
    if (choices_.rarely(6)) spoil(answers);
    if (both([&](Forest& forest) { fuzz::tell(forest, wanted, answers.results()); })) {
      for (const Ticket ticket : answers.tickets) CHECK(out_.erase(ticket) == 1);
    }
  }

  void settle_parts(Ticket ticket) {
    const Parts& parts = out_.at(ticket);
    if (parts.num_steps && parts.steps.size() == *parts.num_steps) out_.erase(ticket);
  }

  void tell_verdicts() {
    std::vector<Ticket> tickets;
    std::vector<std::uint32_t> steps;
    std::vector<double> verdicts;
    for (std::uint32_t i = choices_.below(5); i > 0; --i) {
      tickets.push_back(i % 2 == 0 || tickets.empty() ? ticket() : tickets.back());
      steps.push_back(choices_.rarely(40) ? 5000 : choices_.below(4));
      verdicts.push_back(choices_.rarely(40) ? 1.5 : choices_.unit());
    }
    if (!both([&](Forest& forest) { forest.tell_verdicts({tickets, steps, verdicts}); })) return;
    for (std::size_t i = 0; i < tickets.size(); ++i) {
      CHECK(out_.at(tickets[i]).steps.insert(steps[i]).second);
    }
    for (const Ticket ticket : tickets) {
      if (out_.contains(ticket)) settle_parts(ticket);
    }
  }

  void tell_outcome() {
    const std::vector<Ticket> tickets = this->tickets();
    std::vector<std::uint32_t> steps;
    std::vector<double> outcomes, starts;
    const bool has_starts = choices_.rarely(2);
    for (std::size_t i = 0; i < tickets.size(); ++i) {
      steps.push_back(choices_.rarely(40) ? 5000 : choices_.below(4));
      outcomes.push_back(choices_.rarely(3) ? kNan : choices_.unit());
      if (has_starts) starts.push_back(choices_.rarely(40) ? -1.5 : choices_.unit());
    }
    const std::vector<double> costs = this->costs(tickets.size());
    const auto call = [&](Forest& forest) {
      forest.tell_outcome({tickets, steps, outcomes, starts, costs});
    };
    if (!both(call)) return;
    for (std::size_t i = 0; i < tickets.size(); ++i) {
      CHECK(!out_.at(tickets[i]).num_steps);
      out_.at(tickets[i]).num_steps = steps[i];
      settle_parts(tickets[i]);
    }
  }

  void fail() {
    const std::vector<Ticket> tickets = this->tickets();
    const std::vector<double> costs = this->costs(tickets.size());
    if (!both([&](Forest& forest) { forest.fail(tickets, costs); })) return;
    for (const Ticket ticket : tickets) CHECK(out_.erase(ticket) == 1);
  }

  void cancel() {
    const std::vector<Ticket> tickets = this->tickets();
    const std::vector<double> costs = this->costs(tickets.size());
    if (!both([&](Forest& forest) { forest.cancel(tickets, costs); })) return;
    for (const Ticket ticket : tickets) CHECK(out_.erase(ticket) == 1);
  }

  void recall() {
    both([&](Forest& forest) { CHECK(forest.recall() == out_.size()); });
    out_.clear();
  }

  void remove() {
    const TreeId id = tree();
    if (!both([&](Forest& forest) { forest.remove_tree(id); })) return;
    CHECK(alive_.erase(id) == 1);
    std::erase_if(out_, [&](const auto& one) { return tercet::tree_of(one.first) == id; });
  }

  void extend() {
    const TreeId id = tree();
    const std::uint32_t more = choices_.below(20);
    both([&](Forest& forest) { forest.extend(id, more); });
  }

  void reroot() {
    const TreeId id = tree();
    std::uint32_t node = choices_.byte();
    const std::uint32_t more = choices_.below(20);
    if (alive_.contains(id) && choices_.rarely(2)) {
      node = forest_.choice(id).value_or(node);
    }
    both([&](Forest& forest) { forest.reroot(id, node, more); });
  }

  void reallocate() {
    std::uint64_t given[2] = {};
    std::size_t i = 0;
    both([&](Forest& forest) { given[i++] = forest.reallocate(); });
    CHECK(given[0] == given[1]);
  }

  void check() {
    const Bytes bytes = Snapshot::of(forest_);
    CHECK(bytes == Snapshot::of(twin_));
    const Counters counters = forest_.counters();
    CHECK(counters.in_flight == out_.size() && counters.trees == alive_.size());
    std::uint64_t nodes = 0, finished = 0, tickets = 0;
    for (const TreeId id : alive_) {
      fuzz::check_tree(forest_, id);
      nodes += forest_.status(id).nodes;
      finished += forest_.is_finished(id);
      tickets += forest_.status(id).in_flight;
    }
    CHECK(counters.nodes == nodes && counters.finished == finished);
    CHECK(counters.in_flight + counters.waiting <= tickets);
  }

  // With answers to all that is asked, every tree comes to its end.
  void finish() {
    twin_ = Snapshot::restore(Snapshot::of(forest_));
    for (int round = 0; forest_.counters().finished < alive_.size(); ++round) {
      CHECK(round < 2000);
      ask(64);
      const auto done = static_cast<double>(forest_.counters().evaluations);
      if (out_.empty() && done >= config_.budget.evaluations) break;
      CHECK(!out_.empty() || forest_.counters().finished == alive_.size());
      for (const Kind kind : {Kind::kEvaluate, Kind::kExpand, Kind::kVerify}) {
        Answers answers;
        for (const auto& [ticket, parts] : out_) {
          if (fuzz::kind_of(ticket, config_) == kind) {
            answers.tickets.push_back(ticket);
            if (kind != Kind::kExpand) answers.values.push_back(0.5);
            if (kind != Kind::kVerify) answers.num_children.push_back(0);
          }
        }
        const std::size_t values = answers.values.size();
        answers.channels.resize(values * config_.backup.channels.size(), 0.25);
        CHECK(both([&](Forest& forest) { fuzz::tell(forest, kind, answers.results()); }));
      }
      out_.clear();
    }
    check();
  }

  Choices& choices_;
  ForestConfig config_;
  Forest forest_;
  Forest twin_;
  std::uint32_t trees_{0};
  std::set<TreeId> alive_;
  std::map<Ticket, Parts> out_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Choices choices({data, size});
  Program(choices).run();
  return 0;
}
