// Checks of arguments, whose messages are made where they are needed only.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "tercet/forest.hpp"

namespace tercet {

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// NaN is not.
inline bool is_verdict(double value) { return std::abs(value) <= 1.0; }

template <typename Message>
void require(bool holds, const Message& message) {
  if (!holds) throw std::invalid_argument(message());
}

inline void require_length(std::size_t got, std::size_t wanted, const char* op, const char* name) {
  require(got == wanted, [&] {
    return std::string("Forest::") + op + ": " + name + " must have " + std::to_string(wanted) +
           " elements, got " + std::to_string(got);
  });
}

inline void require_range(std::uint32_t value, std::uint32_t low, std::uint32_t high,
                          const char* name) {
  require(value >= low && value <= high, [&] {
    return std::string("Forest: ") + name + " must be in [" + std::to_string(low) + ", " +
           std::to_string(high) + "], got " + std::to_string(value);
  });
}

}  // namespace tercet
