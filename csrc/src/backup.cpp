#include "tercet/backup.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace tercet {

namespace {

// What a node of so many visits holds after one more return.
double taken_in(double total, std::uint32_t visits, double value, Backup how) {
  if (how == Backup::kMean || how == Backup::kSum) return total + value;
  if (visits == 0) return value;
  switch (how) {
    case Backup::kMax:
      return std::max(total, value);
    case Backup::kMin:
      return std::min(total, value);
    case Backup::kProduct:
      return total * value;
    default:
      return value;
  }
}

Backup backup_of(Aggregation how) {
  switch (how) {
    case Aggregation::kSum:
      return Backup::kSum;
    case Aggregation::kMean:
      return Backup::kMean;
    case Aggregation::kMax:
      return Backup::kMax;
    case Aggregation::kMin:
      return Backup::kMin;
    case Aggregation::kProduct:
      return Backup::kProduct;
    case Aggregation::kLast:
      return Backup::kLast;
  }
  return Backup::kLast;
}

// The mean of the children by their visits; `value` while none was visited.
double mean_of_children(const Nodes& nodes, const HotNode& node, double value) {
  if (!node.has_children()) return value;
  double total = 0.0;
  std::uint32_t visits = 0;
  for (const HotNode* child = &nodes.hot(node.first_child());; ++child) {
    total += child->total * child->visits();
    visits += child->visits();
    if (child->is_last()) break;
  }
  return visits == 0 ? value : total / visits;
}

void check_gamma(double gamma) {
  if (!(gamma >= 0.0 && gamma <= 1.0)) {
    throw std::invalid_argument("Forest: gamma must be in [0, 1], got " + std::to_string(gamma));
  }
}

}  // namespace

void check_config(const BackupConfig& config) {
  check_gamma(config.gamma);
  if (config.how == Backup::kChildren && config.gamma != 1.0) {
    throw std::invalid_argument("Forest: gamma must be 1 where backup is \"children\", got " +
                                std::to_string(config.gamma));
  }
  if (config.channels.size() > kMaxChannels) {
    throw std::invalid_argument("Forest: channels must be at most " + std::to_string(kMaxChannels) +
                                ", got " + std::to_string(config.channels.size()));
  }
  for (const ChannelConfig& channel : config.channels) check_gamma(channel.channel.gamma);
}

void back_up(Nodes& nodes, std::span<const NodeIndex> path, double value,
             std::span<const double> channels, const BackupConfig& config, Bounds* bounds) {
  double decays[kMaxChannels];
  std::copy(channels.begin(), channels.end(), decays);
  for (std::size_t i = path.size(); i-- > 0;) {
    HotNode& node = nodes.hot(path[i]);
    const std::span<double> held = nodes.channels(path[i]);
    for (std::size_t c = 0; c < channels.size(); ++c) {
      const Channel& channel = config.channels[c].channel;
      held[c] = taken_in(held[c], node.visits(), decays[c], backup_of(channel.how));
      decays[c] *= channel.gamma;
    }
    node.total = config.how == Backup::kChildren
                     ? mean_of_children(nodes, node, value)
                     : taken_in(node.total, node.visits(), value, config.how);
    node.arrive();
    if (bounds != nullptr) bounds->take(value_of(node, config.how == Backup::kMean));
    value *= config.gamma;
  }
}

}  // namespace tercet
