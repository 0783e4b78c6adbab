// A forest as bytes, and back: tickets that are out, their order and all counts included.
//
// What continues from a snapshot equals what was never interrupted, bit for bit.  Equal forests
// give equal bytes, wherever their nodes lie in memory.  Format, all numbers little-endian:
//
//   "tercetF\n"  version u32  0 u32  bytes of what follows u64  their checksum u64
//   settings, counters, trees (numbers, ends, slabs of nodes by local names, tickets), queues
//
// Reading checks lengths, the checksum and that nodes and tickets are those of a tree that a search
// can have, so that no file can make it read or later walk outside its own nodes, or wait forever.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "tercet/forest.hpp"

namespace tercet {

inline constexpr std::uint32_t kSnapshotVersion = 2;

// Does not clear what a vector makes room for: it is written at once.
template <typename T>
struct Uncleared : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Uncleared<U>;
  };
  template <typename U>
  void construct(U* place) {
    ::new (static_cast<void*>(place)) U;
  }
  template <typename U, typename... Args>
  void construct(U* place, Args&&... args) {
    ::new (static_cast<void*>(place)) U(std::forward<Args>(args)...);
  }
};
using Bytes = std::vector<std::uint8_t, Uncleared<std::uint8_t>>;

// Bytes that are no snapshot, one of a newer version, cut off or altered.
class SnapshotError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Snapshot {
 public:
  [[nodiscard]] static Bytes of(const Forest& forest);

  // Throws SnapshotError, or std::length_error where max_bytes of the settings does not allow it.
  [[nodiscard]] static Forest restore(std::span<const std::uint8_t> bytes);

  // Writes to path + ".tmp", then renames, so that `path` is the old file or the whole new one.
  // Throws std::filesystem::filesystem_error, and leaves no temporary file.
  static void save(const Forest& forest, const std::filesystem::path& path);

  // Throws std::filesystem::filesystem_error or as restore().
  [[nodiscard]] static Forest load(const std::filesystem::path& path);

 private:
  struct Access;
};

}  // namespace tercet
