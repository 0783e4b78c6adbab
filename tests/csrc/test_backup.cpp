#include <cmath>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "tercet/backup.hpp"

using tercet::Aggregation;
using tercet::Backup;
using tercet::BackupConfig;
using tercet::Bounds;
using tercet::NodeIndex;
using tercet::Nodes;
using tercet::Source;

namespace {

// A root, two children and a child of the first; returns arrive at them as in a search.
struct Tree {
  explicit Tree(const BackupConfig& settings) : config(settings) {
    root = nodes.add_root(slabs, 1);
    const std::vector<std::int64_t> two{2, 3}, one{4};
    child = nodes.add_children(slabs, root, two);
    leaf = nodes.add_children(slabs, child, one);
  }
  void arrive(const std::vector<NodeIndex>& path, double value, std::vector<double> channels = {}) {
    for (const NodeIndex node : path) nodes.hot(node).depart();
    tercet::back_up(nodes, path, value, channels, config, &bounds);
  }
  void arrive_at_leaf(double value, std::vector<double> channels = {}) {
    arrive({root, child, leaf}, value, std::move(channels));
  }
  [[nodiscard]] double total(NodeIndex node) { return nodes.hot(node).total; }

  BackupConfig config;
  Nodes nodes{std::size_t{1} << 30, {.channels = 2}};
  tercet::Slabs slabs;
  Bounds bounds;
  NodeIndex root, child, leaf;
};

double held_after(Backup how, const std::vector<double>& values) {
  Tree tree({.how = how});
  for (const double value : values) tree.arrive({tree.root}, value);
  CHECK(tree.nodes.hot(tree.root).visits() == values.size());
  return tree.total(tree.root);
}

void each_backup_takes_values_in() {
  const std::vector<double> values{-0.5, 0.25, -0.75, 0.5};
  CHECK(held_after(Backup::kMean, values) == -0.5);
  CHECK(held_after(Backup::kSum, values) == -0.5);
  CHECK(held_after(Backup::kMax, values) == 0.5);
  CHECK(held_after(Backup::kMin, values) == -0.75);
  CHECK(held_after(Backup::kProduct, values) == 0.046875);
  CHECK(held_after(Backup::kLast, values) == 0.5);
  // The first value counts as it is, not beside a zero or a one.
  CHECK(held_after(Backup::kMax, {-0.5}) == -0.5 && held_after(Backup::kMin, {0.5}) == 0.5);
  CHECK(held_after(Backup::kProduct, {-0.5}) == -0.5 && held_after(Backup::kLast, {2.0}) == 2.0);
}

void values_decay_from_node_to_parent() {
  Tree tree({.gamma = 0.5});
  tree.arrive_at_leaf(1.0);
  tree.arrive_at_leaf(0.5);
  CHECK(tree.total(tree.leaf) == 1.5 && tree.total(tree.child) == 0.75);
  CHECK(tree.total(tree.root) == 0.375 && tree.nodes.hot(tree.root).in_flight() == 0);
}

void channels_have_a_way_of_their_own() {
  Tree tree({.how = Backup::kMax,
             .channels = {{Source::kStep, {Aggregation::kMin, 0.5}},
                          {Source::kOutcome, {Aggregation::kProduct, 1.0}}}});
  tree.arrive_at_leaf(1.0, {-1.0, 0.5});
  tree.arrive_at_leaf(0.0, {1.0, 0.5});
  CHECK(tree.total(tree.root) == 1.0);
  CHECK(tree.nodes.channels(tree.leaf)[0] == -1.0 && tree.nodes.channels(tree.child)[0] == -0.5);
  CHECK(tree.nodes.channels(tree.root)[0] == -0.25);
  CHECK(tree.nodes.channels(tree.root)[1] == 0.25 && tree.nodes.channels(tree.leaf)[1] == 0.25);
  const Aggregation hows[] = {Aggregation::kSum, Aggregation::kMean, Aggregation::kMax,
                              Aggregation::kLast};
  const double held[] = {0.5, 0.5, 0.75, -0.25};  // a mean is a sum until it is read
  for (int i = 0; i < 4; ++i) {
    Tree one({.channels = {{Source::kValue, {hows[i], 1.0}}}});
    for (const double value : {0.75, -0.25}) one.arrive({one.root}, 0.0, {value});
    CHECK(one.nodes.channels(one.root)[0] == held[i]);
  }
}

void children_are_weighed_by_their_visits() {
  Tree tree({.how = Backup::kChildren});
  const NodeIndex second = tree.child + 1;
  tree.arrive({tree.root}, 0.5);  // no child was visited
  CHECK(tree.total(tree.root) == 0.5);
  tree.arrive({tree.root, tree.child}, 1.0);
  CHECK(tree.total(tree.root) == 1.0 && tree.total(tree.child) == 1.0);
  tree.arrive({tree.root, second}, -0.5);
  CHECK(tree.total(tree.root) == 0.25);
  tree.arrive_at_leaf(0.25);  // the child becomes the mean of its own
  CHECK(tree.total(tree.child) == 0.25 && tree.total(tree.leaf) == 0.25);
  CHECK(tree.total(tree.root) == (0.25 * 2 + -0.5) / 3);
}

void bounds_see_what_nodes_hold_afterwards() {
  Tree mean({});
  mean.arrive({mean.root}, 1.0);
  mean.arrive({mean.root}, -0.5);  // the mean is 0.25
  CHECK(mean.bounds.low == 0.25 && mean.bounds.high == 1.0);
  Tree sum({.how = Backup::kSum});
  sum.arrive({sum.root}, 1.0);
  sum.arrive({sum.root}, 1.0);
  CHECK(sum.bounds.low == 1.0 && sum.bounds.high == 2.0);
  CHECK(tercet::value_of(sum.nodes.hot(sum.root), false) == 2.0);
  CHECK(tercet::value_of(sum.nodes.hot(sum.root), true) == 1.0);
  tercet::back_up(sum.nodes, std::vector<NodeIndex>{}, 9.0, {}, sum.config, nullptr);
}

void settings_out_of_range_are_refused() {
  const auto refuses = [](const BackupConfig& config) {
    CHECK_THROWS(tercet::check_config(config), std::invalid_argument);
  };
  for (const double bad : {-0.1, 1.1, std::nan("")}) {
    refuses({.gamma = bad});
    refuses({.channels = {{Source::kValue, {Aggregation::kSum, bad}}}});
  }
  refuses({.how = Backup::kChildren, .gamma = 0.5});
  BackupConfig config;
  config.channels.resize(tercet::kMaxChannels);
  tercet::check_config(config);
  config.channels.emplace_back();
  refuses(config);
  tercet::check_config({.how = Backup::kChildren});
  for (const double good : {0.0, 1.0}) tercet::check_config({.gamma = good});
}

}  // namespace

int main() {
  each_backup_takes_values_in();
  values_decay_from_node_to_parent();
  channels_have_a_way_of_their_own();
  children_are_weighed_by_their_visits();
  bounds_see_what_nodes_hold_afterwards();
  settings_out_of_range_are_refused();
}
