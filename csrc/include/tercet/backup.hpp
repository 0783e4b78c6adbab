// What values become on their way from a leaf to the root.
//
// A node holds one number for the search to choose by, `total`, and any number of channels beside
// it.  A mean divides `total` by the visits when it is read; the other backups hold what is read.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tercet/nodes.hpp"
#include "tercet/reward.hpp"
#include "tercet/select.hpp"

namespace tercet {

enum class Backup : std::uint8_t {
  kMean,
  kSum,
  kMax,
  kMin,
  kProduct,
  kLast,
  kChildren,  // the mean of the children by their visits, as ReST-MCTS*; a leaf: its own value
};

// Where the value of a channel comes from: told beside the value, or a part of a rollout's reward.
enum class Source : std::uint8_t { kValue, kStep, kOutcome, kStart, kTotal };

inline constexpr std::uint32_t kMaxChannels = 8;

struct ChannelConfig {
  Source source{Source::kValue};
  Channel channel{};
};

struct BackupConfig {
  Backup how{Backup::kMean};
  double gamma{1.0};  // decay from a node to its parent, in [0, 1]; 1 where how is kChildren
  std::vector<ChannelConfig> channels{};  // at most kMaxChannels
};

// Throws std::invalid_argument for a setting outside its range.
void check_config(const BackupConfig& config);

// Each node of the path, from the last to the first, takes in the value and the values of the
// channels, decayed once per step.  `bounds`, where it is not null, takes in what each node then
// holds.  All nodes departed before and arrive.
void back_up(Nodes& nodes, std::span<const NodeIndex> path, double value,
             std::span<const double> channels, const BackupConfig& config, Bounds* bounds);

}  // namespace tercet
