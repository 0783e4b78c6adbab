#include "tercet/select.hpp"

#include <vector>

namespace tercet {

Logarithms::Logarithms() {
  static const std::vector<double> table = [] {
    std::vector<double> logs(kTable);
    for (std::uint32_t n = 0; n < kTable; ++n) logs[n] = std::log(static_cast<double>(n));
    return logs;
  }();
  table_ = table.data();
}

}  // namespace tercet
