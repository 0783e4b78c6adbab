#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "tercet/select.hpp"

using tercet::best_child;
using tercet::FirstPlay;
using tercet::HotNode;
using tercet::kNoChild;
using tercet::MinMax;
using tercet::reads_priors;
using tercet::Rule;
using tercet::SelectConfig;
using tercet::Unfinished;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

const tercet::Logarithms kLog;

HotNode node(int visits, double value, int in_flight = 0) {
  HotNode made;
  for (int i = 0; i < visits + in_flight; ++i) made.depart();
  for (int i = 0; i < visits; ++i) made.arrive(value);
  return made;
}

HotNode with_total(int visits, int in_flight, double total) {
  HotNode made = node(visits, 0.0, in_flight);
  made.total = total;
  return made;
}

HotNode closed(HotNode made) {
  made.set_closed();
  return made;
}

// A family with all that it refers to.
struct Scene {
  SelectConfig config;
  HotNode parent;
  std::vector<HotNode> children;
  std::vector<float> priors;
  tercet::Bounds tree;
  double sign = 1.0;
  double own = kNan;
  bool is_mean = true;
  std::vector<double> noise;
  std::vector<std::uint32_t> schedule;

  tercet::Family family() {
    for (HotNode& child : children) child.set_last(&child == &children.back());
    return {&parent,
            children.data(),
            priors.empty() ? nullptr : priors.data(),
            tree,
            sign,
            own,
            is_mean,
            noise,
            schedule};
  }
  std::uint32_t child() { return choose_child(family(), config, kLog); }
  std::uint32_t action() { return choose_action(family(), config); }
};

// The total of the first child at which the choice turns from `other` to it.  Expected totals are
// those of a Python program written from the formulas.
bool turns(Scene scene, std::uint32_t other, double total) {
  const double step = std::copysign(1e-9, scene.sign);
  scene.children[0].total = total - step;
  const bool was_other = scene.child() == other;
  scene.children[0].total = total + step;
  return was_other && scene.child() == 0;
}

Scene visited(Rule rule) {
  Scene scene{.config = {.rule = rule, .c_uct = 1.25}, .parent = with_total(11, 4, 2.0)};
  scene.children = {with_total(3, 1, 0.0), with_total(5, 2, 1.5), with_total(2, 0, -0.5)};
  return scene;
}

// The second child has no visits.
Scene with_new(Rule rule, FirstPlay first_play, double value = 0.0) {
  Scene scene{.config = {.rule = rule, .c_uct = 1.25}, .parent = with_total(8, 4, 2.0)};
  scene.config.first_play = first_play;
  scene.config.first_play_value = value;
  scene.children = {with_total(3, 1, 0.0), HotNode{}, with_total(4, 0, -0.5)};
  scene.priors = {0.25f, 0.5f, 0.125f};
  return scene;
}

Scene below_root() {
  Scene scene{.config = {.rule = Rule::kGumbel}, .parent = with_total(11, 5, 2.0)};
  scene.config.gumbel_value_scale = 0.03125;
  scene.config.gumbel_maxvisit_init = 20.0;
  scene.children = {with_total(3, 1, 0.0), with_total(5, 0, 1.5), with_total(0, 3, 0.0),
                    with_total(2, 1, 1.0)};
  scene.priors = {0.3125f, 0.25f, 0.3125f, 0.125f};
  scene.own = 0.5;
  return scene;
}

Scene at_root() {
  Scene scene = below_root();
  scene.parent = with_total(4, 2, 2.0);
  scene.children = {with_total(1, 0, 0.0), with_total(1, 0, 0.5), with_total(0, 1, 0.0),
                    with_total(1, 0, 0.25)};
  scene.noise = {0.5, 0.75, 0.625, 0.25};
  scene.schedule = tercet::halving_schedule(4, 16);
  return scene;
}

void those_nobody_visits_come_first() {
  std::array block{node(3, 1.0), node(0, 0.0, 1), node(0, 0.0), node(0, 0.0)};
  block.back().set_last();
  CHECK(best_child(block.data(), std::log(5.0), 1.0) == 2);
}

void ties_go_to_the_first() {
  std::array block{node(2, 0.5), node(2, 0.5), node(2, 0.5)};
  block.back().set_last();
  CHECK(best_child(block.data(), std::log(7.0), 1.0) == 0);
}

void visits_on_their_way_lower_the_bonus_and_not_the_mean() {
  std::array block{node(2, 0.5, 1), node(2, 0.5), node(2, -1.0)};
  block.back().set_last();
  CHECK(best_child(block.data(), std::log(8.0), 1.0) == 1);
  CHECK(best_child(block.data(), std::log(8.0), 0.0) == 0);  // equal means
}

void exploration_grows_with_c() {
  std::array block{node(50, 0.6), node(2, 0.1)};
  block.back().set_last();
  CHECK(best_child(block.data(), std::log(53.0), 0.1) == 0);
  CHECK(best_child(block.data(), std::log(53.0), 2.0) == 1);
}

void logarithms_are_the_library_s() {
  for (const std::uint32_t n : {1u, 2u, 65535u, 65536u, tercet::kMaxVisits}) {
    CHECK(kLog(n) == std::log(static_cast<double>(n)));
  }
}

// All counts of three children and their parent: the general choice is the plain one.
void plain_choices_are_those_of_best_child() {
  for (int i = 0; i < 4 * 4 * 4 * 8; ++i) {
    const int a = i % 4;
    const int b = i / 4 % 4;
    const int c = i / 16 % 4;
    Scene scene{.children = {node(a, 0.25, i / 64 % 2), node(b, -0.5, i / 128 % 2), node(c, 0.5)}};
    scene.parent = node(a + b + c, 0.0, 4);
    const std::uint32_t chosen = scene.child();
    const std::uint32_t total = scene.parent.expected_visits() - 1;
    CHECK(chosen == best_child(scene.children.data(), kLog(total), scene.config.c_uct));
  }
}

void rules_add_their_own_bonus() {
  CHECK(turns(visited(Rule::kUct), 2, 0.511682267044613));
  CHECK(turns(visited(Rule::kReleased), 1, 0.32201744995529));
  Scene puct = visited(Rule::kPuct);
  puct.priors = {0.25f, 0.5f, 0.125f};
  puct.config.c_base = 12.0;
  puct.config.c_init = 0.75;
  CHECK(turns(puct, 1, 1.11901747776542));
}

void ties_go_to_the_first_under_each_rule() {
  for (const Rule rule : {Rule::kUct, Rule::kReleased, Rule::kPuct, Rule::kGumbel}) {
    Scene scene{.config = {.rule = rule}, .parent = node(6, 0.5, 1)};
    scene.children = {closed(node(2, 0.5)), node(2, 0.5), node(2, 0.5)};
    scene.priors = {0.5f, 0.25f, 0.25f};
    CHECK(scene.child() == 1);
    if (rule != Rule::kGumbel) continue;
    scene.noise = {0.0, 0.0, 0.0};
    scene.schedule = {2};
    CHECK(scene.child() == 1);
    scene.schedule = {7};
    CHECK(scene.child() == 1);
  }
}

void children_without_visits_have_a_value_of_first_play() {
  Scene in_flight = with_new(Rule::kReleased, FirstPlay::kFirst);
  in_flight.children[1] = node(0, 0.0, 2);
  CHECK(turns(in_flight, 1, 0.76928277592225));
  CHECK(turns(with_new(Rule::kReleased, FirstPlay::kValue, 0.375), 1, 4.39271115081632));
  CHECK(turns(with_new(Rule::kReleased, FirstPlay::kPrior), 1, 4.76771115081632));
  Scene puct = with_new(Rule::kPuct, FirstPlay::kValue, -0.25);
  puct.parent = with_total(11, 4, 2.0);
  puct.config.c_base = 12.0;
  puct.config.c_init = 0.75;
  CHECK(turns(puct, 1, 7.13462919955504));
}

void the_value_of_the_parent_shrinks_with_the_priors_tried() {
  CHECK(turns(with_new(Rule::kReleased, FirstPlay::kParent, 0.5), 1, 3.09915249727263));
  Scene without = with_new(Rule::kReleased, FirstPlay::kParent);
  without.priors.clear();  // not read
  CHECK(turns(without, 1, 4.01771115081632));
  Scene no_visits = with_new(Rule::kReleased, FirstPlay::kParent, 0.5);
  no_visits.parent = with_total(0, 12, 0.0);
  CHECK(turns(no_visits, 1, 2.34915249727263));
  Scene total = without;
  total.is_mean = false;  // 2, and half of the children's 0 and -0.5
  total.children[0] = with_total(1, 0, 0.0);
  total.children[1] = node(0, 0.0, 1);
  CHECK(turns(total, 1, 2.0));
}

void new_children_come_first_where_asked_for() {
  for (const Rule rule : {Rule::kUct, Rule::kReleased, Rule::kPuct}) {
    Scene scene = with_new(rule, FirstPlay::kFirst);
    scene.children = {node(3, 100.0), closed(HotNode{}), node(0, 0.0, 1), HotNode{}, HotNode{}};
    scene.priors = {1.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    CHECK(scene.child() == 3);
    scene.config.first_play = FirstPlay::kValue;
    if (rule != Rule::kUct) CHECK(scene.child() == 0);
  }
}

void nothing_is_nan_without_visits() {
  for (const Rule rule : {Rule::kReleased, Rule::kPuct, Rule::kGumbel}) {
    for (const MinMax min_max : {MinMax::kNone, MinMax::kSiblings, MinMax::kTree}) {
      Scene scene{.config = {.rule = rule, .min_max = min_max}, .parent = node(0, 0.0, 1)};
      scene.config.first_play = FirstPlay::kPrior;
      scene.children.resize(3);
      scene.priors = {0.25f, 0.5f, 0.25f};
      const bool by_prior = rule != Rule::kReleased || min_max == MinMax::kNone;
      CHECK(scene.child() == (by_prior ? 1 : 0));
      scene.noise = {0.5, 0.25, 0.125};
      CHECK(scene.action() == (rule == Rule::kGumbel ? 1 : 0));
    }
  }
}

void visits_on_their_way_may_count_as_losses() {
  Scene scene = visited(Rule::kUct);
  scene.config.unfinished = Unfinished::kVirtualLoss;
  scene.config.virtual_loss = 0.75;
  CHECK(turns(scene, 2, 1.43224302272615));
  scene = {.config = {.rule = Rule::kReleased, .c_uct = 0.0}, .parent = node(3, 0.0, 4)};
  scene.config.unfinished = Unfinished::kVirtualLoss;
  scene.config.first_play = FirstPlay::kValue;
  scene.config.first_play_value = -0.875;
  scene.children = {node(1, 0.0), node(0, 0.0, 3), HotNode{}};
  scene.config.virtual_loss = 0.75;
  CHECK(turns(scene, 1, -0.75));
  scene.config.virtual_loss = 1.0;
  CHECK(turns(scene, 2, -0.875));  // that of a child without any
}

void values_are_mapped_to_the_bounds_of_the_tree() {
  Scene scene = visited(Rule::kUct);
  scene.config.min_max = MinMax::kTree;
  scene.tree = {-2.0, 3.0};
  CHECK(turns(scene, 2, 5.55841133522307));
  scene = with_new(Rule::kReleased, FirstPlay::kFirst);
  scene.config.min_max = MinMax::kTree;
  scene.tree = {-2.0, 3.0};
  scene.children[1] = node(0, 0.0, 2);
  CHECK(turns(scene, 1, 3.84641387961125));
  scene = {.config = {.c_uct = 0.0, .min_max = MinMax::kTree}, .parent = node(2, 0.0, 1)};
  scene.children = {node(1, 0.25), node(1, 0.5)};
  CHECK(scene.child() == 0);  // without bounds all are 0
  scene.tree = {0.5, 0.5};
  CHECK(scene.child() == 0);
  scene.tree = {0.25, 0.5};
  CHECK(scene.child() == 1);
}

// The lowest value is that of the parent, the highest that of a closed child.
void values_are_mapped_to_the_bounds_of_the_siblings() {
  Scene scene = visited(Rule::kUct);
  scene.config.min_max = MinMax::kSiblings;
  scene.parent = with_total(2, 9, -2.0);
  scene.children[2] = closed(with_total(2, 0, 1.8));
  CHECK(turns(scene, 1, -0.419407638257861));
}

void bounds_hold_what_they_took() {
  tercet::Bounds bounds;
  bounds.take(0.5);
  CHECK(bounds.low == 0.5 && bounds.high == 0.5);
  bounds.take(-1.0);
  bounds.take(0.75);
  bounds.take(0.0);
  CHECK(bounds.low == -1.0 && bounds.high == 0.75);
}

void low_values_are_looked_for_where_the_sign_says_so() {
  Scene scene = visited(Rule::kUct);
  scene.sign = -1.0;
  CHECK(turns(scene, 2, -2.01168226704461));
}

void values_may_be_the_totals() {
  Scene scene = visited(Rule::kUct);
  scene.is_mean = false;
  CHECK(turns(scene, 1, 1.25218892806313));
}

void closed_children_are_never_chosen() {
  for (const Rule rule : {Rule::kUct, Rule::kReleased, Rule::kPuct, Rule::kGumbel}) {
    Scene scene = visited(rule);
    scene.priors = {0.25f, 0.5f, 0.25f};
    const std::uint32_t best = scene.child();
    scene.children[best].set_closed();
    const std::uint32_t second = scene.child();
    CHECK(second < 3 && second != best);
    scene.children[second].set_closed();
    CHECK(scene.child() == 3 - best - second);
    for (HotNode& child : scene.children) child.set_closed();
    CHECK(scene.child() == kNoChild);
  }
}

void the_first_open_child_is_chosen_where_no_score_counts() {
  Scene scene{.parent = node(0, 0.0, 1)};  // a logarithm of 0
  scene.children = {closed(node(1, 0.0)), node(1, 0.0), node(1, 0.5)};
  CHECK(scene.child() == 1);
  scene = below_root();
  scene.priors = {0.0f, 0.0f, 0.0f, 0.0f};
  scene.children[0].set_closed();
  CHECK(scene.child() == 1);
}

void gumbel_follows_the_improved_policy_below_the_root() {
  CHECK(turns(below_root(), 2, 1.40385197123746));
  Scene untold = below_root();
  untold.own = kNan;
  CHECK(turns(untold, 2, 1.19661338342092));
  Scene steeper = below_root();
  steeper.config.gumbel_value_scale = 0.1;
  steeper.config.gumbel_maxvisit_init = 50.0;
  CHECK(turns(steeper, 3, 1.41562218027087));
  Scene low = below_root();
  low.sign = -1.0;
  CHECK(turns(low, 2, 0.908415706082633));
  Scene total = below_root();
  total.is_mean = false;
  CHECK(turns(total, 2, 1.42432375655332));
  Scene no_prior = below_root();
  no_prior.priors = {0.3125f, 0.0f, 0.3125f, 0.375f};
  CHECK(turns(no_prior, 3, 2.0203976633825));
}

// Values are rescaled after that: a linear map changes nothing, if it takes in the parent's own.
void gumbel_maps_the_parent_s_own_value_too() {
  Scene scene = below_root();
  scene.config.min_max = MinMax::kTree;
  scene.tree = {-2.0, 3.0};
  CHECK(turns(scene, 2, 1.40385197123746));
  scene.config.min_max = MinMax::kSiblings;
  CHECK(turns(scene, 2, 1.40385197123746));
  scene.own = 0.0;
  scene.tree = {-2.0, 3.0};
  scene.config.min_max = MinMax::kTree;
  CHECK(turns(scene, 2, 1.19661338342092));
}

void closed_children_count_in_the_improved_policy() {
  Scene scene = below_root();
  scene.children[1].set_closed();
  CHECK(turns(scene, 2, 1.40385197123746));
  scene = at_root();
  scene.children[1].set_closed();
  CHECK(turns(scene, 2, 0.528868360277136));
}

void gumbel_spreads_values_that_hardly_differ_less() {
  Scene scene{.config = {.rule = Rule::kGumbel}, .parent = node(2, 0.0, 1)};
  scene.config.gumbel_value_scale = 1.0;
  scene.config.gumbel_maxvisit_init = 0.0;
  scene.children = {node(1, 5e-9), node(1, 0.0)};  // 0.5 and 0 after it
  scene.priors = {1.0f, 1.5f};
  CHECK(scene.child() == 0);
  scene.priors = {1.0f, 2.0f};
  CHECK(scene.child() == 1);
}

void gumbel_adds_noise_at_the_root() {
  CHECK(turns(at_root(), 2, 0.528868360277136));
  Scene steeper = at_root();
  steeper.config.gumbel_value_scale = 0.1;
  steeper.config.gumbel_maxvisit_init = 50.0;
  CHECK(turns(steeper, 1, 0.501323461893703));
  Scene low = at_root();
  low.sign = -1.0;
  CHECK(turns(low, 2, 0.376026272577997));
}

void the_schedule_says_who_is_considered_at_the_root() {
  Scene scene = at_root();
  scene.children = {node(2, 9.0), node(1, 0.0), node(0, 0.0, 1), HotNode{}};
  scene.noise = {0.0, 3.0, 0.0, 9.0};
  scene.schedule = {9, 9, 9, 9, 1};
  CHECK(scene.child() == 1);
  scene.schedule = {9, 9, 9, 9, 2, 0};
  CHECK(scene.child() == 0);
  scene.schedule = {9, 0};  // the last goes on
  CHECK(scene.child() == 3);
  scene.schedule = {9};  // nobody: the one with fewest
  CHECK(scene.child() == 3);
  scene.children[3].set_closed();
  CHECK(scene.child() == 1);
  scene.schedule = {0};
  CHECK(scene.child() == 1);
}

void scores_of_the_root_have_a_floor() {
  Scene scene = at_root();
  scene.children = {HotNode{}, HotNode{}};
  scene.noise = {1.0, 2.0};
  scene.priors = {0.0f, 0.0f};
  CHECK(scene.child() == 0);
  scene.priors = {0.0f, 1.0f};
  CHECK(scene.child() == 1);
  scene.noise = {-2e9, -1e9 - 1.0};
  scene.priors = {1.0f, 1.0f};
  CHECK(scene.child() == 0);
  scene.noise = {-2e9, -1e9 + 1.0};
  CHECK(scene.child() == 1);
}

void the_child_with_most_visits_is_taken() {
  Scene scene{.children = {node(2, 1.0, 5), node(3, -0.5), node(3, 0.25), node(3, 0.25)}};
  scene.sign = -1.0;  // is not asked
  CHECK(scene.action() == 2);
  scene.children[1].set_closed();
  scene.children[1].total = 3.0;
  CHECK(scene.action() == 1);
  scene.children = {with_total(3, 0, 1.0), with_total(3, 0, 1.5), with_total(4, 0, 1.0)};
  CHECK(scene.action() == 2);
  scene.children = {HotNode{}, HotNode{}, node(1, -1.0)};
  CHECK(scene.action() == 2);
  scene.children.pop_back();
  CHECK(scene.action() == 0);
}

void gumbel_takes_the_best_of_those_with_most_visits() {
  Scene scene = at_root();
  scene.children = {with_total(3, 0, 0.3), closed(with_total(2, 1, 1.0)), with_total(2, 0, 2.0)};
  scene.noise = {0.0, 0.0, 9.0};
  scene.priors = {0.25f, 0.25f, 0.5f};
  CHECK(scene.action() == 1);  // values 0.1 and 0.5
  scene.noise[0] = 5.0;
  CHECK(scene.action() == 0);
}

void halving_schedules_are_those_of_mctx() {
  using Schedule = std::vector<std::uint32_t>;
  using tercet::halving_schedule;
  CHECK((halving_schedule(0, 2) == Schedule{0, 1}));
  CHECK((halving_schedule(1, 4) == Schedule{0, 1, 2, 3}));
  CHECK((halving_schedule(2, 5) == Schedule{0, 0, 1, 1, 2}));
  CHECK((halving_schedule(3, 12) == Schedule{0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4}));
  CHECK((halving_schedule(4, 16) == Schedule{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5}));
  CHECK((halving_schedule(5, 20) ==
         Schedule{0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8}));
  CHECK((halving_schedule(16, 3) == Schedule{0, 0, 0}));
  CHECK(halving_schedule(4, 0).empty());
}

// The name of the setting that is refused, or nothing.
std::string refused(const SelectConfig& config) {
  try {
    check_config(config);
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    CHECK(message.starts_with("Forest: "));
    CHECK(message.find(", got ") != std::string::npos);
    return message.substr(8, message.find(" must ") - 8);
  }
  return "";
}

void settings_have_ranges() {
  CHECK(refused({}).empty());
  for (const double bad : {-1e-9, kInfinity, kNan}) {
    CHECK(refused({.c_uct = bad}) == "c_uct");
    CHECK(refused({.c_base = bad}) == "c_base");
    CHECK(refused({.c_init = bad}) == "c_init");
    CHECK(refused({.virtual_loss = bad}) == "virtual_loss");
    CHECK(refused({.gumbel_value_scale = bad}) == "gumbel_value_scale");
    CHECK(refused({.gumbel_maxvisit_init = bad}) == "gumbel_maxvisit_init");
    CHECK(refused({.dirichlet_alpha = bad}) == "dirichlet_alpha");
    CHECK(refused({.dirichlet_fraction = bad}) == "dirichlet_fraction");
  }
  CHECK(refused({.c_base = 0.0}) == "c_base");
  CHECK(refused({.first_play_value = -kInfinity}) == "first_play_value");
  CHECK(refused({.gumbel_considered = 0}) == "gumbel_considered");
  CHECK(refused({.dirichlet_fraction = 1.001}) == "dirichlet_fraction");
  SelectConfig least{.c_uct = 0.0, .c_base = 1e-9, .c_init = 0.0, .first_play_value = -2.0};
  least.virtual_loss = least.gumbel_value_scale = least.gumbel_maxvisit_init = 0.0;
  least.dirichlet_fraction = 0.0;
  least.gumbel_considered = 1;
  CHECK(refused(least).empty());
  CHECK(refused({.dirichlet_alpha = 10.0, .dirichlet_fraction = 1.0}).empty());
}

void uct_knows_one_first_play() {
  for (const FirstPlay other : {FirstPlay::kValue, FirstPlay::kParent, FirstPlay::kPrior}) {
    CHECK(refused({.first_play = other}) == "first_play");
    CHECK(refused({.rule = Rule::kReleased, .first_play = other}).empty());
  }
}

void some_settings_read_priors() {
  CHECK(!reads_priors({}));
  CHECK(reads_priors({.rule = Rule::kPuct}));
  CHECK(reads_priors({.rule = Rule::kGumbel}));
  SelectConfig config{.rule = Rule::kReleased, .first_play = FirstPlay::kValue};
  config.first_play_value = 0.5;
  CHECK(!reads_priors(config));
  config.first_play = FirstPlay::kParent;
  CHECK(reads_priors(config));
  config.first_play_value = 0.0;
  CHECK(!reads_priors(config));
  config.first_play = FirstPlay::kPrior;
  CHECK(reads_priors(config));
}

}  // namespace

int main() {
  those_nobody_visits_come_first();
  ties_go_to_the_first();
  visits_on_their_way_lower_the_bonus_and_not_the_mean();
  exploration_grows_with_c();
  logarithms_are_the_library_s();
  plain_choices_are_those_of_best_child();
  rules_add_their_own_bonus();
  ties_go_to_the_first_under_each_rule();
  children_without_visits_have_a_value_of_first_play();
  the_value_of_the_parent_shrinks_with_the_priors_tried();
  new_children_come_first_where_asked_for();
  nothing_is_nan_without_visits();
  visits_on_their_way_may_count_as_losses();
  values_are_mapped_to_the_bounds_of_the_tree();
  values_are_mapped_to_the_bounds_of_the_siblings();
  bounds_hold_what_they_took();
  low_values_are_looked_for_where_the_sign_says_so();
  values_may_be_the_totals();
  closed_children_are_never_chosen();
  the_first_open_child_is_chosen_where_no_score_counts();
  gumbel_follows_the_improved_policy_below_the_root();
  gumbel_maps_the_parent_s_own_value_too();
  closed_children_count_in_the_improved_policy();
  gumbel_spreads_values_that_hardly_differ_less();
  gumbel_adds_noise_at_the_root();
  the_schedule_says_who_is_considered_at_the_root();
  scores_of_the_root_have_a_floor();
  the_child_with_most_visits_is_taken();
  gumbel_takes_the_best_of_those_with_most_visits();
  halving_schedules_are_those_of_mctx();
  settings_have_ranges();
  uct_knows_one_first_play();
  some_settings_read_priors();
}
