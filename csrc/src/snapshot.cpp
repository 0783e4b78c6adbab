#include "tercet/snapshot.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <type_traits>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace tercet {

static_assert(std::endian::native == std::endian::little, "snapshots are little-endian");

namespace {

constexpr char kMagic[8] = {'t', 'e', 'r', 'c', 'e', 't', 'F', '\n'};
constexpr std::size_t kHeader = 32;

void stir(std::uint64_t& sum, std::uint64_t word) {
  sum = (sum ^ word) * 0xff51afd7ed558ccdu;
  sum ^= sum >> 32;
}

// Of blocks of four 64-bit words, each word of which goes to a sum of its own, so that the
// processor need not wait; what is missing from the last block counts as zeros.
std::uint64_t checksum(std::span<const std::uint8_t> bytes) {
  std::uint64_t sums[4] = {1, 2, 3, 4};
  for (std::size_t i = 0; i < bytes.size(); i += 32) {
    std::uint64_t words[4] = {};
    std::memcpy(words, bytes.data() + i, std::min<std::size_t>(32, bytes.size() - i));
    for (int lane = 0; lane < 4; ++lane) stir(sums[lane], words[lane]);
  }
  std::uint64_t sum = bytes.size();
  for (const std::uint64_t lane : sums) stir(sum, lane);
  return sum;
}

class Writer {
 public:
  template <typename T>
  void put(T value) {
    static_assert(std::is_arithmetic_v<T>);
    put_all(&value, 1);
  }
  template <typename T>
  void put_all(const T* values, std::size_t n) {
    if (n == 0) return;
    const std::size_t at = bytes.size();
    bytes.resize(at + n * sizeof(T));
    std::memcpy(bytes.data() + at, values, n * sizeof(T));
  }
  template <typename Values>
  void put_list(const Values& values) {
    put(std::uint64_t{values.size()});
    for (const auto value : values) put(value);
  }

  Bytes bytes;
};

[[noreturn]] void refuse(const std::string& why) { throw SnapshotError("Forest: snapshot " + why); }

void require(bool holds, const char* what) {
  if (!holds) refuse(std::string("is damaged: ") + what);
}

class Reader {
 public:
  explicit Reader(std::span<const std::uint8_t> bytes) : left_(bytes) {}
  template <typename T>
  T get() {
    T value;
    get_all(&value, 1);
    return value;
  }
  template <typename T>
  void get_all(T* values, std::size_t n) {
    require(n <= left_.size() / sizeof(T), "it ends too early");
    if (n > 0) std::memcpy(values, left_.data(), n * sizeof(T));
    left_ = left_.subspan(n * sizeof(T));
  }
  template <typename T>
  std::vector<T> get_list() {
    const auto n = get<std::uint64_t>();
    require(n <= left_.size() / sizeof(T), "a list is too long");
    std::vector<T> values(n);
    get_all(values.data(), n);
    return values;
  }
  [[nodiscard]] bool done() const { return left_.empty(); }
  [[nodiscard]] std::size_t size() const { return left_.size(); }

 private:
  std::span<const std::uint8_t> left_;
};

}  // namespace

// What has access to the insides of a forest.
struct Snapshot::Access {
  using Tree = Forest::Tree;
  using Pending = Forest::Pending;
  using State = Forest::State;

  static void put_config(Writer& out, const ForestConfig& c) {
    out.put(c.c_uct);
    out.put(c.max_in_flight);
    out.put(c.visits_per_flight);
    out.put(c.max_attempts);
    out.put(c.failed_value);
    out.put(std::uint64_t{c.max_bytes});
  }

  static ForestConfig get_config(Reader& in) {
    ForestConfig c;
    c.c_uct = in.get<double>();
    c.max_in_flight = in.get<std::uint32_t>();
    c.visits_per_flight = in.get<std::uint32_t>();
    c.max_attempts = in.get<std::uint32_t>();
    c.failed_value = in.get<double>();
    c.max_bytes = in.get<std::uint64_t>();
    try {
      check_config(c);
    } catch (const std::invalid_argument&) {
      require(false, "a setting is out of its range");
    }
    return c;
  }

  static constexpr std::uint64_t Counters::* kCounted[] = {
      &Counters::simulations, &Counters::evaluations, &Counters::failures, &Counters::given_up};

  // Nodes by their local names, slab by slab.
  static void put_nodes(Writer& out, const Nodes& nodes, const Tree& tree) {
    out.put(tree.slabs.count);
    std::uint32_t slab = tree.slabs.first;
    for (std::uint32_t i = 0; i < tree.slabs.count; ++i, slab = nodes.next_[slab]) {
      const std::uint32_t used = slab == tree.slabs.last ? tree.slabs.used : nodes.used_[slab];
      out.put(used);
      const NodeIndex first = slab * Nodes::kSlab;
      HotNode hot[Nodes::kSlab];
      std::copy_n(&nodes.hot(first), used, hot);
      for (HotNode& node : std::span(hot, used)) {
        if (node.has_children()) node.set_first_child(nodes.local(node.first_child()));
      }
      NodeIndex parents[Nodes::kSlab / 4];
      for (std::uint32_t group = 0; group < used / 4; ++group) {
        parents[group] = nodes.local(nodes.parent(first + 4 * group));
      }
      const Nodes::Chunk& chunk = nodes.chunks_[first / Nodes::kChunk];
      out.put_all(hot, used);
      out.put_all(&chunk.handle[first % Nodes::kChunk], used);
      out.put_all(parents, used / 4);
    }
  }

  // The slabs of a tree, as its local names count them.
  using SlabNames = std::vector<std::uint32_t>;

  static NodeIndex global(const Nodes& nodes, const SlabNames& slabs, std::uint32_t local) {
    require(local / Nodes::kSlab < slabs.size(), "a node lies outside its tree");
    const std::uint32_t slab = slabs[local / Nodes::kSlab];
    require(local % Nodes::kSlab < nodes.used_[slab], "a node lies outside its tree");
    return slab * Nodes::kSlab + local % Nodes::kSlab;
  }

  static SlabNames get_nodes(Reader& in, Nodes& nodes, Tree& tree) {
    const auto count = in.get<std::uint32_t>();
    SlabNames slabs;
    for (std::uint32_t i = 0; i < count; ++i) {
      const auto used = in.get<std::uint32_t>();
      require(used >= 4 && used <= Nodes::kSlab && used % 4 == 0, "the size of a slab");
      slabs.push_back(nodes.open_slab(tree.slabs));
      tree.slabs.used = used;
      nodes.used_[slabs.back()] = static_cast<std::uint8_t>(used);
      const NodeIndex first = slabs.back() * Nodes::kSlab;
      in.get_all(reinterpret_cast<std::uint8_t*>(&nodes.hot(first)), used * sizeof(HotNode));
      const Nodes::Chunk& chunk = nodes.chunks_[first / Nodes::kChunk];
      in.get_all(&chunk.handle[first % Nodes::kChunk], used);
      in.get_all(&chunk.parent[first % Nodes::kChunk / 4], used / 4);
    }
    tree.root = global(nodes, slabs, 0);
    return slabs;
  }

  // Blocks fill the slabs, each the children of a node before it, whose counts theirs explain.
  // Local names become indices.
  static void check_nodes(Nodes& nodes, const Tree& tree, const SlabNames& slabs) {
    std::size_t blocks = 0;
    std::size_t grown = 0;
    for (const std::uint32_t slab : slabs) {
      const NodeIndex end = slab * Nodes::kSlab + nodes.used_[slab];
      for (NodeIndex at = slab * Nodes::kSlab; at < end; ++blocks) {
        NodeIndex after = at;
        std::uint32_t visits = 1;  // that of the parent before it had children
        std::uint32_t in_flight = 0;
        for (bool last = false; !last; ++after) {
          require(after < end, "a block of children has no end");
          HotNode& node = nodes.hot(after);
          grown += check_node(nodes, tree, slabs, after);
          visits += node.visits();
          in_flight += node.in_flight();
          last = node.is_last();
        }
        for (; after % 4 != 0; ++after) require(is_empty(nodes.hot(after)), "a node of no block");
        const NodeIndex parent = check_parent(nodes, slabs, at, after);
        if (at == tree.root) {
          require(parent == at && nodes.hot(at).is_last() && visits == tree.committed + 1 &&
                      in_flight == tree.begun - tree.committed,
                  "the counts of a root");
        } else {
          const HotNode& above = nodes.hot(parent);
          require(nodes.local(parent) < nodes.local(at) && above.has_children() &&
                      above.first_child() == at,
                  "a node is not its parent's child");
          require(visits == above.visits() && in_flight == above.in_flight(),
                  "the counts of children");
        }
        at = after;
      }
    }
    require(blocks == grown + 1, "children are missing");
  }

  // Whether it has children.
  static bool check_node(Nodes& nodes, const Tree& tree, const SlabNames& slabs, NodeIndex at) {
    HotNode& node = nodes.hot(at);
    require(std::abs(node.total) <= kMaxValue * kMaxVisits, "a value is out of its range");
    require(!node.is_closed() && (node.is_leaf() || !node.is_asked()), "the flags of a node");
    if (node.has_children()) {
      node.set_first_child(global(nodes, slabs, node.first_child()));
      return true;
    }
    require(!node.is_terminal() || node.end() < tree.ends.size(), "an end has no value");
    require((node.visits() > 0) == node.is_terminal() && node.in_flight() == node.is_asked(),
            "the counts of a leaf");
    return false;
  }

  static bool is_empty(const HotNode& node) {
    return node.is_leaf() && !node.is_asked() && !node.is_last() && node.expected_visits() == 0;
  }

  // The one parent of a block.
  static NodeIndex check_parent(Nodes& nodes, const SlabNames& slabs, NodeIndex at,
                                NodeIndex after) {
    const Nodes::Chunk& chunk = nodes.chunks_[at / Nodes::kChunk];
    const std::span<NodeIndex> parents(chunk.parent + at % Nodes::kChunk / 4, (after - at) / 4);
    const NodeIndex parent = global(nodes, slabs, parents[0]);
    for (NodeIndex& of_group : parents) {
      require(global(nodes, slabs, of_group) == parent, "siblings have two parents");
      of_group = parent;
    }
    return parent;
  }

  static void put_tree(Writer& out, const Nodes& nodes, const Tree& tree) {
    out.put(std::uint8_t{tree.alive});
    if (!tree.alive) return;
    out.put(tree.simulations);
    out.put(tree.begun);
    out.put(tree.committed);
    out.put(tree.oldest);
    out.put(std::uint8_t{tree.blocked});
    out.put_list(tree.ends);
    put_nodes(out, nodes, tree);
    out.put(std::uint64_t{tree.pending.size()});
    for (std::size_t i = 0; i < tree.pending.size(); ++i) {
      const Pending& pending = tree.pending[i];
      const bool told = pending.state == State::kTold;
      out.put(nodes.local(pending.path.back()));
      out.put_list(told ? pending.handles : std::vector<std::int64_t>{});
      out.put(told ? pending.value : 0.0);
      out.put(pending.attempts);
      out.put(static_cast<std::uint8_t>(pending.state));
    }
  }

  static void get_tree(Reader& in, Forest& forest, Tree& tree) {
    tree.alive = in.get<std::uint8_t>() != 0;
    if (!tree.alive) return;
    tree.simulations = in.get<std::uint32_t>();
    tree.begun = in.get<std::uint32_t>();
    tree.committed = in.get<std::uint32_t>();
    tree.oldest = in.get<std::uint32_t>();
    tree.blocked = in.get<std::uint8_t>() != 0;
    tree.ends = in.get_list<double>();
    for (const double end : tree.ends) {
      require(std::abs(end) <= kMaxValue, "a value is out of its range");
    }
    require(tree.simulations >= 1 && tree.simulations <= kMaxVisits &&
                tree.begun <= tree.simulations && tree.committed <= tree.begun &&
                tree.oldest <= tree.committed,
            "the counts of a tree contradict each other");
    const SlabNames slabs = get_nodes(in, forest.nodes_, tree);
    check_nodes(forest.nodes_, tree, slabs);
    const auto pending = in.get<std::uint64_t>();
    require(pending == tree.begun - tree.committed && pending <= forest.config_.max_in_flight,
            "the number of tickets");
    std::set<NodeIndex> leaves;
    for (std::uint64_t i = 0; i < pending; ++i) {
      get_pending(in, forest, tree, slabs);
      require(leaves.insert(tree.pending[i].path.back()).second, "two tickets have one leaf");
    }
    require(!tree.blocked || pending > 0, "a tree waits for nothing");
    require(forest.may_issue(tree) || pending == 0 || tree.pending[0].state != State::kTold,
            "a tree waits for what was told");
  }

  static void get_pending(Reader& in, Forest& forest, Tree& tree, const SlabNames& slabs) {
    Pending& pending = tree.pending.push();
    const Nodes& nodes = forest.nodes_;
    pending.path = {global(nodes, slabs, in.get<std::uint32_t>())};
    require(nodes.hot(pending.path[0]).is_asked(), "a ticket's leaf does not wait");
    while (pending.path.back() != tree.root) {
      pending.path.push_back(nodes.parent(pending.path.back()));
    }
    std::reverse(pending.path.begin(), pending.path.end());
    pending.handles = in.get_list<std::int64_t>();
    pending.value = in.get<double>();
    pending.attempts = in.get<std::uint32_t>();
    pending.state = static_cast<State>(in.get<std::uint8_t>());
    require(pending.state == State::kOut || pending.state == State::kFailed ||
                pending.state == State::kTold,
            "the state of a ticket");
    require(std::abs(pending.value) <= kMaxValue && pending.handles.size() <= kMaxChildren &&
                pending.attempts >= 1 && pending.attempts <= forest.config_.max_attempts,
            "what was told of a ticket");
    forest.counters_.in_flight += pending.state == State::kOut;
    if (pending.state == State::kTold) {
      forest.counters_.waiting += 1;
      forest.waiting_blocks_ += !pending.handles.empty();
    }
  }

  static Bytes write(const Forest& forest) {
    Writer out;
    out.bytes.reserve(kHeader + 1024 + forest.counters_.nodes * (Nodes::kBytesPerNode + 3));
    out.bytes.resize(kHeader);
    put_config(out, forest.config_);
    for (const auto counter : kCounted) out.put(forest.counters_.*counter);
    out.put(std::uint64_t{forest.trees_.size()});
    for (const Tree& tree : forest.trees_) put_tree(out, forest.nodes_, tree);
    std::vector<TreeId> ready;  // without those that were removed in the meantime
    for (const TreeId id : forest.ready_) {
      if (forest.trees_[id].alive) ready.push_back(id);
    }
    out.put_list(ready);
    out.put_list(forest.failed_);
    return std::move(out.bytes);
  }

  static Forest read(Reader& in) {
    Forest forest(get_config(in));
    for (const auto counter : kCounted) forest.counters_.*counter = in.get<std::uint64_t>();
    const auto trees = in.get<std::uint64_t>();
    require(trees <= in.size(), "there are too many trees");
    for (std::uint64_t i = 0; i < trees; ++i) {
      Tree& tree = forest.trees_.emplace_back();
      get_tree(in, forest, tree);
      if (!tree.alive) continue;
      forest.counters_.trees += 1;
      forest.counters_.finished += tree.committed == tree.simulations;
      forest.counters_.nodes += forest.nodes_.all(tree.slabs).size();
    }
    forest.nodes_.reserve(forest.waiting_blocks_);
    std::size_t num_failed = 0;
    for (const Tree& tree : forest.trees_) {
      for (std::size_t i = 0; i < tree.pending.size(); ++i) {
        num_failed += tree.pending[i].state == State::kFailed;
      }
    }
    for (const TreeId id : in.get_list<TreeId>()) {
      require(id < trees && forest.trees_[id].alive && !forest.trees_[id].queued,
              "a queue names no tree, or one twice");
      forest.ready_.push_back(id);
      forest.trees_[id].queued = true;
    }
    for (const Tree& tree : forest.trees_) {
      require(!tree.alive || tree.queued == forest.may_issue(tree), "a tree is forgotten");
    }
    std::set<Ticket> failed;
    for (const Ticket ticket : in.get_list<Ticket>()) {
      const TreeId id = tree_of(ticket);
      require(id < trees && forest.trees_[id].alive && failed.insert(ticket).second,
              "a queue names no tree, or a ticket twice");
      Tree& tree = forest.trees_[id];
      const std::uint32_t position = ordinal_of(ticket) - tree.oldest;
      require(position < tree.pending.size() && tree.pending[position].state == State::kFailed,
              "a queue names no ticket");
      forest.failed_.push_back(ticket);
    }
    require(failed.size() == num_failed, "a failed ticket is forgotten");
    require(in.done(), "something follows its end");
    return forest;
  }
};

Bytes Snapshot::of(const Forest& forest) {
  forest.check_whole();
  Bytes bytes = Access::write(forest);
  const std::span<const std::uint8_t> payload = std::span(bytes).subspan(kHeader);
  const std::uint64_t sizes[] = {kSnapshotVersion, payload.size(), checksum(payload)};
  std::memcpy(bytes.data(), kMagic, sizeof(kMagic));
  std::memcpy(bytes.data() + sizeof(kMagic), sizes, sizeof(sizes));
  return bytes;
}

Forest Snapshot::restore(std::span<const std::uint8_t> bytes) {
  if (bytes.size() < kHeader || std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) != 0) {
    refuse("does not begin as one: " + std::to_string(bytes.size()) + " bytes of something else");
  }
  std::uint64_t sizes[3];
  std::memcpy(sizes, bytes.data() + sizeof(kMagic), sizeof(sizes));
  const auto [version, size, sum] = sizes;
  if (version != kSnapshotVersion) {
    refuse("has version " + std::to_string(version) + "; this build reads version " +
           std::to_string(kSnapshotVersion));
  }
  const std::span<const std::uint8_t> payload = bytes.subspan(kHeader);
  if (payload.size() != size) {
    refuse("is cut off or too long: " + std::to_string(payload.size()) + " bytes of " +
           std::to_string(size));
  }
  if (checksum(payload) != sum) refuse("is damaged: its checksum differs");
  Reader in(payload);
  return Access::read(in);
}

namespace {

struct Closed {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Closed>;

[[noreturn]] void fail(const std::filesystem::path& path) {
  throw std::filesystem::filesystem_error("Forest", path, {errno, std::generic_category()});
}

File opened(const std::filesystem::path& path, const char* mode) {
  File file(std::fopen(path.c_str(), mode));
  if (!file) fail(path);
  return file;
}

// Until the bytes are on the disk.
void write_through(File file, const std::filesystem::path& path,
                   std::span<const std::uint8_t> bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), file.get()) != bytes.size()) fail(path);
  if (std::fflush(file.get()) != 0) fail(path);
#if defined(__unix__) || defined(__APPLE__)
  if (fsync(fileno(file.get())) != 0) fail(path);
#endif
  if (std::fclose(file.release()) != 0) fail(path);
}

}  // namespace

void Snapshot::save(const Forest& forest, const std::filesystem::path& path) {
  const Bytes bytes = of(forest);
  std::filesystem::path part = path;
  part += ".tmp";
  File file = opened(part, "wb");  // what is removed below is ours
  try {
    write_through(std::move(file), part, bytes);
    if (std::rename(part.c_str(), path.c_str()) != 0) fail(path);
  } catch (const std::filesystem::filesystem_error&) {
    std::remove(part.c_str());
    throw;
  }
}

Forest Snapshot::load(const std::filesystem::path& path) {
  const File file = opened(path, "rb");
  Bytes bytes;
  std::uint8_t part[1 << 16];
  for (std::size_t n; (n = std::fread(part, 1, sizeof(part), file.get())) > 0;) {
    bytes.insert(bytes.end(), part, part + n);
  }
  if (std::ferror(file.get()) != 0) fail(path);
  return restore(bytes);
}

}  // namespace tercet
