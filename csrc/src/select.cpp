#include "tercet/select.hpp"

namespace tercet {

Logarithms::Logarithms() : table_(1u << 16) {
  for (std::size_t n = 0; n < table_.size(); ++n) table_[n] = std::log(static_cast<double>(n));
}

}  // namespace tercet
