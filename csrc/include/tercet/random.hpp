// Random numbers that depend on a tree and on the place of their use, and on nothing drawn before.
//
// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter
// and a key into four words.  The key is made of the seed and the name of a tree's root, the
// counter of the place: which draw, visit, node and stream.  So the numbers of a tree are the same
// whatever else the forest holds and in whatever order results come.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace tercet {

// Streams of a tree, the last word of a counter.
inline constexpr std::uint32_t kGumbelStream = 1;     // node: child of the root
inline constexpr std::uint32_t kDirichletStream = 2;  // node: child of the root

// Ten rounds; words of counter and key from low to high.
[[nodiscard]] std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                                  std::array<std::uint32_t, 2> key);

// The numbers of one tree.
class Random {
 public:
  Random(std::uint64_t seed, std::int64_t root_handle);

  // Multiples of 2^-53, halves added, in (0, 1]: 1 by rounding, once in 2^53.
  [[nodiscard]] double uniform(std::uint32_t draw, std::uint32_t visit, std::uint32_t node,
                               std::uint32_t stream) const;

  // Standard Gumbel noise of a child of the root.
  [[nodiscard]] double gumbel(std::uint32_t child) const;

  // Fills in one sample of the symmetric Dirichlet distribution.  Throws std::invalid_argument
  // unless alpha is finite and > 0.
  void dirichlet(double alpha, std::span<double> noise) const;

 private:
  // A sample of the gamma distribution with scale 1, for a child of the root.
  [[nodiscard]] double gamma(double shape, std::uint32_t child) const;

  std::array<std::uint32_t, 2> key_;
};

}  // namespace tercet
