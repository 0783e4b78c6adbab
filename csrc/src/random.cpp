#include "tercet/random.hpp"

#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>

namespace tercet {

namespace {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio

// The finaliser of splitmix64, Steele et al. 2014.
std::uint64_t mix64(std::uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9;
  x ^= x >> 27;
  x *= 0x94D049BB133111EB;
  return x ^ x >> 31;
}

std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }

}  // namespace

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                    std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {high(b) ^ counter[1] ^ key[0], low(b), high(a) ^ counter[3] ^ key[1], low(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

Random::Random(std::uint64_t seed, std::int64_t root_handle) {
  const std::uint64_t root = static_cast<std::uint64_t>(root_handle);
  const std::uint64_t key = mix64(seed + kGolden * (root + 1));
  key_ = {low(key), high(key)};
}

double Random::uniform(std::uint32_t draw, std::uint32_t visit, std::uint32_t node,
                       std::uint32_t stream) const {
  const auto words = philox({draw, visit, node, stream}, key_);
  const std::uint64_t bits = (std::uint64_t{words[1]} << 32 | words[0]) >> 11;
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

double Random::gumbel(std::uint32_t child) const {
  return -std::log(-std::log(uniform(0, 0, child, kGumbelStream)));
}

// Source: Marsaglia & Tsang 2000, "A simple method for generating gamma variables"; normal
// variables by Box & Muller 1958.
double Random::gamma(double shape, std::uint32_t child) const {
  std::uint32_t draw = 0;
  const auto next = [&] { return uniform(draw++, 0, child, kDirichletStream); };
  const double d = (shape >= 1.0 ? shape : shape + 1.0) - 1.0 / 3.0;
  const double c = 1.0 / std::sqrt(9.0 * d);
  while (true) {
    const double radius = std::sqrt(-2.0 * std::log(next()));
    const double x = radius * std::cos(6.283185307179586 * next());
    const double t = 1.0 + c * x;
    if (t <= 0.0) continue;
    const double v = t * t * t;
    if (std::log(next()) < 0.5 * (x * x) + d - d * v + d * std::log(v)) {
      return shape >= 1.0 ? d * v : d * v * std::pow(next(), 1.0 / shape);
    }
  }
}

void Random::dirichlet(double alpha, std::span<double> noise) const {
  if (!std::isfinite(alpha) || alpha <= 0.0) {
    throw std::invalid_argument("Random: alpha must be finite and > 0, got " +
                                std::to_string(alpha));
  }
  double sum = 0.0;
  for (std::size_t i = 0; i < noise.size(); ++i) {
    noise[i] = gamma(alpha, static_cast<std::uint32_t>(i));
    sum += noise[i];
  }
  for (double& share : noise) {
    share = sum > 0.0 ? share / sum : 1.0 / static_cast<double>(noise.size());
  }
}

}  // namespace tercet
