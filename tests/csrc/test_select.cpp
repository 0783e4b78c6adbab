#include <array>
#include <cmath>

#include "check.hpp"
#include "tercet/select.hpp"

using tercet::best_child;
using tercet::HotNode;

namespace {

HotNode node(int visits, double value, int in_flight = 0) {
  HotNode made;
  for (int i = 0; i < visits + in_flight; ++i) made.depart();
  for (int i = 0; i < visits; ++i) made.arrive(value);
  return made;
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
  const tercet::Logarithms log;
  for (const std::uint32_t n : {1u, 2u, 65535u, 65536u, tercet::kMaxVisits}) {
    CHECK(log(n) == std::log(static_cast<double>(n)));
  }
}

}  // namespace

int main() {
  those_nobody_visits_come_first();
  ties_go_to_the_first();
  visits_on_their_way_lower_the_bonus_and_not_the_mean();
  exploration_grows_with_c();
  logarithms_are_the_library_s();
}
