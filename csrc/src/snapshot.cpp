#include "tercet/snapshot.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
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

  static void get_nodes(Reader& in, Nodes& nodes, Tree& tree) {
    const auto count = in.get<std::uint32_t>();
    require(count >= 1 && count <= in.size() / 4, "a tree has no nodes, or too many");
    nodes.reserve(count);
    std::vector<std::uint32_t> slabs;
    for (std::uint32_t i = 0; i < count; ++i) {
      const auto used = in.get<std::uint32_t>();
      require(used >= 4 && used <= Nodes::kSlab && used % 4 == 0, "the size of a slab");
      slabs.push_back(nodes.open_slab(tree.slabs));
      tree.slabs.used = used;
      nodes.used_[slabs.back()] = static_cast<std::uint8_t>(used);
      const NodeIndex first = slabs.back() * Nodes::kSlab;
      in.get_all(reinterpret_cast<std::uint8_t*>(&nodes.hot(first)), used * sizeof(HotNode));
      Nodes::Chunk& chunk = nodes.chunks_[first / Nodes::kChunk];
      in.get_all(&chunk.handle[first % Nodes::kChunk], used);
      in.get_all(&chunk.parent[first % Nodes::kChunk / 4], used / 4);
    }
    tree.root = slabs[0] * Nodes::kSlab;
    name_globally(nodes, tree, slabs);
  }

  // Local names become indices; blocks end inside their slabs, and children come after parents.
  static void name_globally(Nodes& nodes, const Tree& tree,
                            const std::vector<std::uint32_t>& slabs) {
    const auto global = [&](std::uint32_t local) {
      require(local / Nodes::kSlab < slabs.size(), "a node lies outside its tree");
      return slabs[local / Nodes::kSlab] * Nodes::kSlab + local % Nodes::kSlab;
    };
    const auto used = [&](std::uint32_t slab) { return std::uint32_t{nodes.used_[slab]}; };
    for (const std::uint32_t slab : slabs) {
      const NodeIndex first = slab * Nodes::kSlab;
      for (NodeIndex node = first; node < first + used(slab); ++node) {
        HotNode& hot = nodes.hot(node);
        const std::uint32_t local = nodes.local(node);
        if (node % 4 == 0) {
          NodeIndex& parent = nodes.chunks_[node / Nodes::kChunk].parent[node % Nodes::kChunk / 4];
          require(local == 0 ? parent == 0 : parent < local, "a parent comes after its child");
          parent = global(parent);
        }
        require(std::isfinite(hot.total), "a value is not finite");
        if (hot.is_terminal()) require(hot.end() < tree.ends.size(), "an end has no value");
        if (!hot.has_children()) continue;
        const std::uint32_t child = hot.first_child();
        require(child > local && child % 4 == 0, "a child comes before its parent");
        NodeIndex at = global(child);
        const NodeIndex end = at - at % Nodes::kSlab + used(at / Nodes::kSlab);
        hot.set_first_child(at);
        for (; at < end && !nodes.hot(at).is_last();) ++at;
        require(at < end, "a block of children has no end");
      }
    }
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
      out.put(std::uint64_t{pending.path.size()});
      for (const NodeIndex node : pending.path) out.put(nodes.local(node));
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
    for (const double end : tree.ends) require(std::isfinite(end), "a value is not finite");
    get_nodes(in, forest.nodes_, tree);
    const auto pending = in.get<std::uint64_t>();
    require(tree.simulations >= 1 && tree.simulations <= kMaxVisits &&
                tree.begun <= tree.simulations && tree.committed <= tree.begun &&
                tree.oldest <= tree.committed && pending == tree.begun - tree.committed &&
                pending <= forest.config_.max_in_flight,
            "the counts of a tree contradict each other");
    for (std::uint64_t i = 0; i < pending; ++i) get_pending(in, forest, tree);
  }

  static void get_pending(Reader& in, Forest& forest, Tree& tree) {
    Pending& pending = tree.pending.push();
    pending.path = in.get_list<NodeIndex>();
    require(!pending.path.empty(), "a ticket has no leaf");
    NodeIndex above = tree.root;
    for (NodeIndex& node : pending.path) {
      node = global_of(forest.nodes_, tree, node);
      require(forest.nodes_.parent(node) == above, "a ticket's path is none");
      require(forest.nodes_.hot(node).in_flight() > 0, "a ticket's visits are not on their way");
      above = node;
    }
    require(pending.path.front() == tree.root, "a ticket's path is none");
    require(forest.nodes_.hot(above).is_pending(), "a ticket's leaf does not wait");
    pending.handles = in.get_list<std::int64_t>();
    pending.value = in.get<double>();
    pending.attempts = in.get<std::uint32_t>();
    const auto state = in.get<std::uint8_t>();
    pending.state = static_cast<State>(state);
    require(pending.state == State::kOut || pending.state == State::kFailed ||
                pending.state == State::kTold,
            "the state of a ticket");
    require(std::isfinite(pending.value) && pending.handles.size() <= kMaxChildren &&
                pending.attempts >= 1 && pending.attempts <= forest.config_.max_attempts,
            "what was told of a ticket");
    forest.counters_.in_flight += pending.state == State::kOut;
    if (pending.state == State::kTold) {
      forest.counters_.waiting += 1;
      forest.waiting_blocks_ += !pending.handles.empty();
    }
  }

  static NodeIndex global_of(const Nodes& nodes, const Tree& tree, std::uint32_t local) {
    std::uint32_t slab = tree.slabs.first;
    require(local / Nodes::kSlab < tree.slabs.count, "a node lies outside its tree");
    for (std::uint32_t i = 0; i < local / Nodes::kSlab; ++i) slab = nodes.next_[slab];
    require(local % Nodes::kSlab < nodes.used_[slab], "a node lies outside its tree");
    return slab * Nodes::kSlab + local % Nodes::kSlab;
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
      const std::uint64_t id = ticket >> 32;
      require(id < trees && forest.trees_[id].alive && failed.insert(ticket).second,
              "a queue names no tree, or a ticket twice");
      Tree& tree = forest.trees_[id];
      const std::uint64_t position = (ticket & 0xffffffffu) - tree.oldest;
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

[[noreturn]] void fail(const std::string& path) {
  throw std::system_error(errno, std::generic_category(), path);
}

File opened(const std::string& path, const char* mode) {
  File file(std::fopen(path.c_str(), mode));
  if (!file) fail(path);
  return file;
}

// Until the bytes are on the disk.
void write_through(const std::string& path, std::span<const std::uint8_t> bytes) {
  File file = opened(path, "wb");
  if (std::fwrite(bytes.data(), 1, bytes.size(), file.get()) != bytes.size()) fail(path);
  if (std::fflush(file.get()) != 0) fail(path);
#if defined(__unix__) || defined(__APPLE__)
  if (fsync(fileno(file.get())) != 0) fail(path);
#endif
  if (std::fclose(file.release()) != 0) fail(path);
}

}  // namespace

void Snapshot::save(const Forest& forest, const std::string& path) {
  const Bytes bytes = of(forest);
  const std::string part = path + ".tmp";
  try {
    write_through(part, bytes);
    if (std::rename(part.c_str(), path.c_str()) != 0) fail(path);
  } catch (const std::system_error&) {
    std::remove(part.c_str());
    throw;
  }
}

Forest Snapshot::load(const std::string& path) {
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
