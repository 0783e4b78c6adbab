#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "tercet/random.hpp"

using tercet::philox;
using tercet::Random;

namespace {

using Words = std::array<std::uint32_t, 4>;

constexpr std::uint64_t kMaxSeed = std::numeric_limits<std::uint64_t>::max();

// Logarithms may differ in the last place between machines.
bool is_near(double value, double expected) {
  return std::abs(value - expected) <= 1e-13 * std::abs(expected);
}

// Source: Random123, kat_vectors, "philox4x32 10".
void philox_gives_the_published_words() {
  CHECK((philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t kOnes = 0xffffffff;
  CHECK((philox({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
         Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
         Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// Expected values of these tests are those of a Python program written from the papers.
void uniform_numbers_are_made_of_the_first_two_words() {
  CHECK(Random(7, 42).uniform(0, 0, 0, 0) == 0x1.9c9b438e941e6p-3);
  CHECK(Random(7, 42).uniform(1, 2, 3, 4) == 0x1.71d8ae2db8ebap-1);
  CHECK(Random(kMaxSeed, -1).uniform(5, 0, 63, 1) == 0x1.9d15594c7a8aap-1);
  CHECK(Random(0, 0).uniform(4294967295, 0, 0, 0) == 0x1.56f3a0ba909d4p-1);
}

void gumbel_noise_belongs_to_a_child() {
  CHECK(is_near(Random(7, 42).gumbel(0), 0.005199284081629486));
  CHECK(is_near(Random(7, 42).gumbel(5), -0.04361456798419042));
  CHECK(is_near(Random(kMaxSeed, -1).gumbel(1), -0.32324411555214905));
}

void all_that_names_a_number_changes_it() {
  const Random random(7, 7);
  const double one = random.uniform(1, 1, 1, 1);
  CHECK(one == Random(7, 7).uniform(1, 1, 1, 1));
  for (const double other : {random.uniform(2, 1, 1, 1), random.uniform(1, 2, 1, 1),
                             random.uniform(1, 1, 2, 1), random.uniform(1, 1, 1, 2),
                             Random(8, 7).uniform(1, 1, 1, 1), Random(7, 8).uniform(1, 1, 1, 1)}) {
    CHECK(other != one);
  }
}

void uniform_numbers_fill_the_unit_interval() {
  const Random random(0, 0);
  double sum = 0.0;
  double low = 1.0;
  double high = 0.0;
  for (std::uint32_t draw = 0; draw < 10000; ++draw) {
    const double u = random.uniform(draw, 0, 0, 9);
    CHECK(u > 0.0 && u <= 1.0);
    sum += u;
    low = std::min(low, u);
    high = std::max(high, u);
  }
  CHECK(std::abs(sum / 10000 - 0.5) < 0.01);
  CHECK(low < 0.001 && high > 0.999);
}

void dirichlet_noise_belongs_to_the_children() {
  std::array<double, 3> noise{};
  Random(7, 42).dirichlet(0.3, noise);
  CHECK(is_near(noise[0], 0.26488371254552306));
  CHECK(is_near(noise[1], 0.7206248533919959));
  CHECK(is_near(noise[2], 0.014491434062481028));
  Random(7, 42).dirichlet(2.5, noise);
  CHECK(is_near(noise[0], 0.459358716982396));
  CHECK(is_near(noise[1], 0.2884687502750229));
  CHECK(is_near(noise[2], 0.2521725327425811));
  Random(kMaxSeed, -1).dirichlet(0.03, noise);
  CHECK(is_near(noise[0], 0.9939006509954219));
  CHECK(is_near(noise[1], 1.4699723366241695e-09));
  CHECK(is_near(noise[2], 0.006099347534605731));
}

// Of n shares, each has mean 1 / n and variance (n - 1) / (n^2 (n alpha + 1)).
void dirichlet_noise_has_its_mean_and_variance() {
  for (const double alpha : {0.3, 1.0, 2.5}) {
    constexpr int kSamples = 20000;
    double sum = 0.0;
    double squares = 0.0;
    std::array<double, 4> noise{};
    for (int i = 0; i < kSamples; ++i) {
      Random(3, i).dirichlet(alpha, noise);
      sum += noise[1];
      squares += noise[1] * noise[1];
    }
    const double mean = sum / kSamples;
    const double variance = squares / kSamples - mean * mean;
    CHECK(std::abs(mean - 0.25) < 0.01);
    CHECK(std::abs(variance / (3.0 / (16.0 * (4.0 * alpha + 1.0))) - 1.0) < 0.05);
  }
}

void noise_that_vanishes_is_shared_evenly() {
  std::vector<double> noise(5);
  Random(1, 1).dirichlet(1e-300, noise);
  for (const double share : noise) CHECK(share == 0.2);
  std::vector<double> none;
  Random(1, 1).dirichlet(0.3, none);
}

void alpha_is_positive() {
  std::vector<double> noise(2);
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {0.0, -1.0, infinity, std::nan("")}) {
    CHECK_THROWS(Random(1, 1).dirichlet(bad, noise), std::invalid_argument);
  }
}

}  // namespace

int main() {
  philox_gives_the_published_words();
  uniform_numbers_are_made_of_the_first_two_words();
  gumbel_noise_belongs_to_a_child();
  all_that_names_a_number_changes_it();
  uniform_numbers_fill_the_unit_interval();
  dirichlet_noise_belongs_to_the_children();
  dirichlet_noise_has_its_mean_and_variance();
  noise_that_vanishes_is_shared_evenly();
  alpha_is_positive();
}
