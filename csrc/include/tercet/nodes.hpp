// The nodes of all trees of a forest, in chunks that never move.
//
// The children of a node lie in one block inside one slab; a slab belongs to one tree. What
// selection reads is hot, 16 bytes per node, so that four children share a cache line; the rest is
// apart. Nodes are named by 32-bit indices into the whole, in slabs of 64:
//
//   hot      | root . . . | a0 a1 a2 a3 | b0 b1 . . | ...     total, counts, link     16 B
//   handle   | root . . . | a0 a1 a2 a3 | b0 b1 . . | ...     the caller's name        8 B
//   parent   | root       | a           | b         | ...     one per group of four    4 B / 4
//
// and, where a search needs them (Layout), priors, channels of values and what is rarely read.
// Blocks begin at multiples of four, which is what lets a group share its parent.
// Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace tercet {

using NodeIndex = std::uint32_t;

inline constexpr std::uint32_t kMaxVisits = (1u << 24) - 1;
inline constexpr std::uint32_t kMaxInFlight = (1u << 8) - 1;
inline constexpr std::uint32_t kMaxChildren = 64;
inline constexpr std::uint32_t kMaxNodes = (1u << 30) - (1u << 18);  // of a forest

class HotNode {
 public:
  double total{0.0};  // sum of the values backed up

  [[nodiscard]] std::uint32_t visits() const { return counts_ >> 8; }
  [[nodiscard]] std::uint32_t in_flight() const { return counts_ & kMaxInFlight; }
  // Visits that happened and those that are on their way.
  [[nodiscard]] std::uint32_t expected_visits() const { return visits() + in_flight(); }
  void depart() { counts_ += 1; }
  void turn_back() { counts_ -= 1; }           // of one that departed
  void arrive() { counts_ += (1u << 8) - 1; }  // of one that departed
  void arrive(double value) {
    arrive();
    total += value;
  }

  // A node is a leaf until it gets children or an end.  `asked`: for its value or for children.
  [[nodiscard]] bool is_leaf() const { return link_ < kOne; }
  [[nodiscard]] bool is_asked() const { return (link_ & kAsked) != 0; }
  [[nodiscard]] bool is_closed() const { return (link_ & kClosed) != 0; }  // all below is known
  [[nodiscard]] bool is_terminal() const { return link_ >= kEnd; }
  [[nodiscard]] bool has_children() const { return link_ - kOne < kEnd - kOne; }
  [[nodiscard]] bool is_last() const { return (link_ & kLast) != 0; }  // of its siblings
  [[nodiscard]] NodeIndex first_child() const { return ((link_ >> 1) & ~3u) - 4; }
  [[nodiscard]] std::uint32_t end() const { return (link_ & ~kEnd) >> 3; }  // its number
  void set_last(bool is = true) { link_ = is ? link_ | kLast : link_ & ~kLast; }
  void set_asked(bool is) { link_ = is ? link_ | kAsked : link_ & ~kAsked; }
  void set_closed() { link_ |= kClosed; }
  void set_first_child(NodeIndex first) { link_ = (link_ & kFlags) | (first + 4) << 1; }
  void set_end(std::uint32_t number) { link_ = (link_ & kFlags) | number << 3 | kEnd; }

 private:
  static constexpr std::uint32_t kLast = 1;
  static constexpr std::uint32_t kAsked = 2;
  static constexpr std::uint32_t kClosed = 4;
  static constexpr std::uint32_t kFlags = kLast | kAsked | kClosed;
  static constexpr std::uint32_t kOne = kFlags + 1;
  static constexpr std::uint32_t kEnd = 1u << 31;

  std::uint32_t counts_{0};  // visits << 8 | in flight
  std::uint32_t link_{0};    // kEnd | (first child / 4 + 1, or number of the end) << 3 | flags
};
static_assert(sizeof(HotNode) == 16);

// Of a node, rarely read.
struct Cold {
  double own{std::numeric_limits<double>::quiet_NaN()};  // the value told for itself
  float verdict{std::numeric_limits<float>::quiet_NaN()};
  bool is_full{false};     // gets no more children
  std::uint8_t misses{0};  // askings for more in a row that brought nothing new
};

// What is kept of each node beside 25 bytes.
struct Layout {
  bool priors{false};         // 4 bytes
  bool cold{false};           // 16 bytes
  std::uint32_t channels{0};  // 8 bytes each
  std::uint32_t room{1};      // nodes that a block has room for at least
};

// Where the next block of a tree goes.
struct Slabs {
  std::uint32_t first{0};
  std::uint32_t last{0};
  std::uint32_t count{0};
  std::uint32_t used{0};  // nodes of the last one
};

class Nodes {
 public:
  friend class Snapshot;

  static constexpr std::uint32_t kSlab = 64;
  static constexpr std::uint32_t kChunk = 1u << 18;  // nodes; 4 MiB of hot ones
  static constexpr std::size_t kBytesPerNode = 16 + 8 + 1;

  // max_bytes bounds the chunks together.
  explicit Nodes(std::size_t max_bytes, Layout layout = {});

  // A tree's first node. Throws std::length_error where max_bytes or kMaxNodes do not allow a slab.
  NodeIndex add_root(Slabs& slabs, std::int64_t handle);

  // Makes sure that as many blocks find room.  Throws as add_root does, and then changes nothing.
  void reserve(std::size_t blocks);

  // A block of children, zeroed but for what is given. `handles` holds 1 to kMaxChildren.
  // Throws as add_root does, and then changes nothing.
  NodeIndex add_children(Slabs& slabs, NodeIndex parent, std::span<const std::int64_t> handles);

  // More children of a node that has some, in the room of their block.
  void append_children(NodeIndex parent, std::span<const std::int64_t> handles);

  // How many children a node with children has.
  [[nodiscard]] std::uint32_t num_children(NodeIndex parent) const;

  // The part of a tree below `root`, `all` being the nodes of the tree, in slabs of its own.
  // Returns its new root.  Throws as add_root does.
  NodeIndex copy(std::span<const NodeIndex> all, NodeIndex root, Slabs& slabs);

  // Gives a tree's slabs back.
  void release(const Slabs& slabs);

  [[nodiscard]] HotNode& hot(NodeIndex i) { return chunks_[i / kChunk].hot[i % kChunk]; }
  [[nodiscard]] const HotNode& hot(NodeIndex i) const {
    return chunks_[i / kChunk].hot[i % kChunk];
  }
  [[nodiscard]] std::int64_t handle(NodeIndex i) const {
    return chunks_[i / kChunk].handle[i % kChunk];
  }
  [[nodiscard]] NodeIndex parent(NodeIndex i) const {  // a root is its own
    return chunks_[i / kChunk].parent[i % kChunk / 4];
  }

  // Of the first node of a block: those of its siblings follow.
  [[nodiscard]] float* priors(NodeIndex i) { return chunks_[i / kChunk].prior + i % kChunk; }
  [[nodiscard]] const float* priors(NodeIndex i) const {
    return chunks_[i / kChunk].prior + i % kChunk;
  }
  [[nodiscard]] Cold& cold(NodeIndex i) { return chunks_[i / kChunk].cold[i % kChunk]; }
  [[nodiscard]] const Cold& cold(NodeIndex i) const { return chunks_[i / kChunk].cold[i % kChunk]; }
  [[nodiscard]] std::span<double> channels(NodeIndex i) {
    return {chunks_[i / kChunk].channels + std::size_t{i % kChunk} * layout_.channels,
            layout_.channels};
  }
  [[nodiscard]] std::span<const double> channels(NodeIndex i) const {
    return {chunks_[i / kChunk].channels + std::size_t{i % kChunk} * layout_.channels,
            layout_.channels};
  }

  // Position among the nodes of its tree: the same whatever else the forest holds.
  [[nodiscard]] std::uint32_t local(NodeIndex i) const {
    return ordinals_[i / kSlab] * kSlab + i % kSlab;
  }
  // The node of a tree at a position; none where none was made.
  [[nodiscard]] std::optional<NodeIndex> find(const Slabs& slabs, std::uint32_t local) const;
  // All nodes of a tree in the order of their blocks.
  [[nodiscard]] std::vector<NodeIndex> all(const Slabs& slabs) const;

  // Asks for the memory of a node, of what it is called, or of a tree's next block.
  void prefetch(NodeIndex i) const { __builtin_prefetch(&hot(i)); }
  void prefetch_names(NodeIndex i) const {
    __builtin_prefetch(&chunks_[i / kChunk].handle[i % kChunk]);
    __builtin_prefetch(&ordinals_[i / kSlab]);
  }
  void prefetch_next(const Slabs& slabs) const {
    const NodeIndex next = slabs.last * kSlab + slabs.used % kSlab;
    __builtin_prefetch(&hot(next), 1);
    __builtin_prefetch(&chunks_[next / kChunk].handle[next % kChunk], 1);
  }

  [[nodiscard]] const Layout& layout() const { return layout_; }
  [[nodiscard]] std::size_t bytes_per_node() const;
  [[nodiscard]] std::size_t bytes() const { return chunks_.size() * kChunk * bytes_per_node(); }
  [[nodiscard]] std::size_t max_bytes() const { return max_bytes_; }

 private:
  struct Freed {
    void operator()(void* memory) const { std::free(memory); }
  };

  // One allocation, that of the hot nodes; 2 MiB pages are asked for where the system has them.
  struct Chunk {
    std::unique_ptr<HotNode[], Freed> hot;
    std::int64_t* handle;
    double* channels;  // [kChunk, layout.channels]
    Cold* cold;
    float* prior;
    NodeIndex* parent;  // of each group of four
  };

  // Nodes that a block of so many children takes up.
  [[nodiscard]] std::uint32_t room_of(std::uint32_t children) const;
  NodeIndex add_block(Slabs& slabs, NodeIndex parent, std::span<const std::int64_t> handles);
  std::uint32_t open_slab(Slabs& slabs);  // the next of a tree, empty
  void add_chunk();
  void copy_node(NodeIndex from, NodeIndex to);

  std::size_t max_bytes_;
  Layout layout_;
  std::vector<Chunk> chunks_;
  std::vector<std::uint32_t> ordinals_;  // of each slab in its tree
  std::vector<std::uint32_t> next_;      // slab of the same tree
  std::vector<std::uint8_t> used_;       // nodes of each slab but the last of a tree
  std::vector<std::uint32_t> free_;
};

}  // namespace tercet
