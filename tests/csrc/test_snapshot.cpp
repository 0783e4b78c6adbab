#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "tercet/snapshot.hpp"

using tercet::Forest;
using tercet::Leaves;
using tercet::Snapshot;
using tercet::SnapshotError;

namespace {

constexpr std::size_t kHeader = 32;

void tell(Forest& forest, std::span<const tercet::Ticket> tickets) {
  const std::size_t n = tickets.size();
  std::vector<double> values(n);
  std::vector<std::uint32_t> counts(n);
  std::vector<std::int64_t> handles;
  for (std::size_t i = 0; i < n; ++i) {
    values[i] = static_cast<double>(tickets[i] % 13);
    counts[i] = static_cast<std::uint32_t>(tickets[i] % 5);
    handles.resize(handles.size() + counts[i], static_cast<std::int64_t>(tickets[i]));
  }
  forest.tell({tickets, values, counts, handles});
}

// Three trees, one of them removed; some tickets are out, some failed and some told too early.
Forest half_grown() {
  tercet::ForestConfig config;
  config.max_in_flight = 6;
  config.visits_per_flight = 1;
  Forest forest(config);
  for (int tree = 0; tree < 3; ++tree) forest.add_tree(tree, 90);
  for (int round = 0; round < 25; ++round) {
    const Leaves leaves = forest.ask(9);
    const std::span tickets(leaves.ticket);
    if (tickets.size() < 4) {
      tell(forest, tickets);
      continue;
    }
    forest.fail(tickets.subspan(2, 1));
    tell(forest, tickets.subspan(3));
    if (round % 2 == 0) tell(forest, tickets.first(2));
  }
  forest.remove_tree(1);
  return forest;
}

std::uint64_t checksum(std::span<const std::uint8_t> bytes) {
  const auto stir = [](std::uint64_t sum, std::uint64_t word) {
    sum = (sum ^ word) * 0xff51afd7ed558ccdu;
    return sum ^ sum >> 32;
  };
  std::uint64_t sums[4] = {1, 2, 3, 4};
  for (std::size_t i = 0; i < (bytes.size() + 31) / 32 * 4; ++i) {
    std::uint64_t word = 0;
    for (std::size_t b = 0; b < 8 && 8 * i + b < bytes.size(); ++b) {
      word |= std::uint64_t{bytes[8 * i + b]} << 8 * b;
    }
    sums[i % 4] = stir(sums[i % 4], word);
  }
  std::uint64_t sum = bytes.size();
  for (const std::uint64_t lane : sums) sum = stir(sum, lane);
  return sum;
}

void reseal(tercet::Bytes& bytes) {
  const std::uint64_t sizes[] = {bytes.size() - kHeader,
                                 checksum(std::span(bytes).subspan(kHeader))};
  std::memcpy(bytes.data() + 16, sizes, sizeof(sizes));
}

void a_restored_forest_is_the_same() {
  const Forest forest = half_grown();
  const tercet::Bytes bytes = Snapshot::of(forest);
  Forest again = Snapshot::restore(bytes);
  CHECK(Snapshot::of(again) == bytes);
  CHECK(again.counters().in_flight == forest.counters().in_flight);
  CHECK(again.counters().waiting == forest.counters().waiting && again.counters().waiting > 0);
  CHECK(again.counters().nodes == forest.counters().nodes && again.counters().trees == 2);
}

void every_shorter_file_is_refused() {
  tercet::Bytes bytes = Snapshot::of(half_grown());
  for (std::size_t size = 0; size < bytes.size(); size += 7) {
    tercet::Bytes cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK_THROWS(Snapshot::restore(cut), SnapshotError);
    if (size < kHeader) continue;
    reseal(cut);
    CHECK_THROWS(Snapshot::restore(cut), SnapshotError);
  }
}

// Whatever a byte becomes: refused, or a forest that can be used; the sanitizers watch.
void altered_bytes_do_no_harm() {
  const tercet::Bytes bytes = Snapshot::of(half_grown());
  std::mt19937 random(0);
  int refused = 0, ran = 0;
  for (int i = 0; i < 800; ++i) {
    tercet::Bytes altered = bytes;
    for (unsigned n = 0; n <= random() % 3; ++n) {
      altered[kHeader + random() % (altered.size() - kHeader)] =
          static_cast<std::uint8_t>(random());
    }
    reseal(altered);
    try {
      Forest forest = Snapshot::restore(altered);
      for (int round = 0; round < 4; ++round) tell(forest, forest.ask(40).ticket);
      (void)Snapshot::of(forest);
      ran += 1;
    } catch (const SnapshotError&) {
      refused += 1;
    } catch (const std::length_error&) {  // max_bytes
      refused += 1;
    }
  }
  CHECK(refused > 100 && ran > 100);
}

}  // namespace

int main() {
  a_restored_forest_is_the_same();
  every_shorter_file_is_refused();
  altered_bytes_do_no_harm();
}
