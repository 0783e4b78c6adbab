#include "tercet/nodes.hpp"

#include <algorithm>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tercet {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

}  // namespace

Nodes::Nodes(std::size_t max_bytes, Layout layout) : max_bytes_(max_bytes), layout_(layout) {}

std::size_t Nodes::bytes_per_node() const {
  return kBytesPerNode + (layout_.priors ? sizeof(float) : 0) + (layout_.cold ? sizeof(Cold) : 0) +
         sizeof(double) * layout_.channels;
}

void Nodes::add_chunk() {
  const std::size_t chunks = chunks_.size() + 1;
  const std::size_t size = kChunk * bytes_per_node();
  if (chunks * size > max_bytes_ || chunks * kChunk > kMaxNodes) {
    throw std::length_error("Forest: nodes hold " + std::to_string(bytes()) +
                            " bytes, and another chunk would pass max_bytes = " +
                            std::to_string(max_bytes_) + "; remove finished trees or allow more");
  }
  constexpr std::size_t kSlabs = kChunk / kSlab;
  ordinals_.resize(chunks * kSlabs);
  next_.resize(chunks * kSlabs);
  used_.resize(chunks * kSlabs);
  free_.reserve(chunks * kSlabs);
  chunks_.reserve(chunks);
  void* memory = std::aligned_alloc(kHugePage, (size + kHugePage - 1) / kHugePage * kHugePage);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
  madvise(memory, size, MADV_HUGEPAGE);  // a hint, which fails where there are none
#endif
  Chunk chunk{};
  chunk.hot.reset(static_cast<HotNode*>(memory));
  chunk.handle = reinterpret_cast<std::int64_t*>(chunk.hot.get() + kChunk);
  chunk.channels = reinterpret_cast<double*>(chunk.handle + kChunk);
  chunk.cold = reinterpret_cast<Cold*>(chunk.channels + std::size_t{kChunk} * layout_.channels);
  chunk.prior = reinterpret_cast<float*>(chunk.cold + (layout_.cold ? kChunk : 0));
  chunk.parent = reinterpret_cast<NodeIndex*>(chunk.prior + (layout_.priors ? kChunk : 0));
  chunks_.push_back(std::move(chunk));
  // The lowest last, so that it is taken first; behind what was free before.
  for (std::size_t slab = chunks * kSlabs; slab-- > (chunks - 1) * kSlabs;) {
    free_.push_back(static_cast<std::uint32_t>(slab));
  }
}

void Nodes::reserve(std::size_t blocks) {
  while (free_.size() < blocks) add_chunk();
}

std::uint32_t Nodes::open_slab(Slabs& slabs) {
  reserve(1);
  const std::uint32_t slab = free_.back();
  free_.pop_back();
  ordinals_[slab] = slabs.count;
  if (slabs.count > 0) used_[slabs.last] = static_cast<std::uint8_t>(slabs.used);
  (slabs.count == 0 ? slabs.first : next_[slabs.last]) = slab;
  slabs.last = slab;
  slabs.count += 1;
  slabs.used = 0;
  return slab;
}

std::uint32_t Nodes::room_of(std::uint32_t children) const {
  return (std::max(children, layout_.room) + 3) / 4 * 4;
}

NodeIndex Nodes::add_block(Slabs& slabs, NodeIndex parent, std::span<const std::int64_t> handles) {
  const auto size = static_cast<std::uint32_t>(handles.size());
  const std::uint32_t room = room_of(size);
  if (slabs.count == 0 || slabs.used + room > kSlab) open_slab(slabs);
  const NodeIndex first = slabs.last * kSlab + slabs.used;
  slabs.used += room;
  const Chunk& chunk = chunks_[first / kChunk];
  const std::uint32_t at = first % kChunk;
  std::fill_n(&chunk.hot[at], room, HotNode{});
  chunk.hot[at + size - 1].set_last();
  std::copy(handles.begin(), handles.end(), chunk.handle + at);
  std::fill_n(chunk.handle + at + size, room - size, 0);  // nobody's, up to the next block
  std::fill_n(chunk.parent + at / 4, room / 4, parent);
  std::fill_n(chunk.channels + std::size_t{at} * layout_.channels,
              std::size_t{room} * layout_.channels, 0.0);
  if (layout_.cold) std::fill_n(chunk.cold + at, room, Cold{});
  if (layout_.priors) std::fill_n(chunk.prior + at, room, 0.0f);
  return first;
}

NodeIndex Nodes::add_root(Slabs& slabs, std::int64_t handle) {
  const NodeIndex root = add_block(slabs, 0, {&handle, 1});
  chunks_[root / kChunk].parent[root % kChunk / 4] = root;
  return root;
}

NodeIndex Nodes::add_children(Slabs& slabs, NodeIndex parent,
                              std::span<const std::int64_t> handles) {
  const NodeIndex first = add_block(slabs, parent, handles);
  hot(parent).set_first_child(first);
  return first;
}

void Nodes::append_children(NodeIndex parent, std::span<const std::int64_t> handles) {
  const NodeIndex first = hot(parent).first_child();
  const NodeIndex next = first + num_children(parent);
  hot(next - 1).set_last(false);
  std::copy(handles.begin(), handles.end(), chunks_[next / kChunk].handle + next % kChunk);
  hot(next + static_cast<NodeIndex>(handles.size()) - 1).set_last();
}

std::uint32_t Nodes::num_children(NodeIndex parent) const {
  const NodeIndex first = hot(parent).first_child();
  NodeIndex child = first;
  while (!hot(child).is_last()) ++child;
  return child - first + 1;
}

std::optional<NodeIndex> Nodes::find(const Slabs& slabs, std::uint32_t local) const {
  if (local / kSlab >= slabs.count) return std::nullopt;
  std::uint32_t slab = slabs.first;
  for (std::uint32_t i = 0; i < local / kSlab; ++i) slab = next_[slab];
  const std::uint32_t used = slab == slabs.last ? slabs.used : used_[slab];
  if (local % kSlab >= used) return std::nullopt;
  const NodeIndex node = slab * kSlab + local % kSlab;
  if (local == 0) return node;
  const HotNode& above = hot(parent(node));
  if (!above.has_children() || node < above.first_child()) return std::nullopt;
  const bool is_child = node - above.first_child() < num_children(parent(node));
  return is_child ? std::optional(node) : std::nullopt;
}

std::vector<NodeIndex> Nodes::all(const Slabs& slabs) const {
  std::vector<NodeIndex> found;
  std::uint32_t slab = slabs.first;
  for (std::uint32_t i = 0; i < slabs.count; ++i, slab = next_[slab]) {
    const NodeIndex end = slab * kSlab + (slab == slabs.last ? slabs.used : used_[slab]);
    for (NodeIndex first = slab * kSlab, node = first; first < end; node = first) {
      found.push_back(node);
      while (!hot(node).is_last()) found.push_back(++node);
      first += room_of(node - first + 1);
    }
  }
  return found;
}

// All but its place among its siblings and its children.
void Nodes::copy_node(NodeIndex from, NodeIndex to) {
  const bool is_last = hot(to).is_last();
  hot(to) = hot(from);
  hot(to).set_last(is_last);
  std::ranges::copy(channels(from), channels(to).begin());
  if (layout_.cold) cold(to) = cold(from);
  if (layout_.priors) *priors(to) = *priors(from);
}

NodeIndex Nodes::copy(std::span<const NodeIndex> all, NodeIndex root, Slabs& slabs) {
  std::map<NodeIndex, NodeIndex> copies;
  const NodeIndex top = add_root(slabs, handle(root));
  copy_node(root, top);
  copies[root] = top;
  for (const NodeIndex node : all) {  // parents come before their children
    const auto found = copies.find(node);
    if (found == copies.end() || !hot(node).has_children()) continue;
    const NodeIndex first = hot(node).first_child();
    const std::uint32_t n = num_children(node);
    std::vector<std::int64_t> handles(n);
    for (std::uint32_t i = 0; i < n; ++i) handles[i] = handle(first + i);
    const NodeIndex block = add_children(slabs, found->second, handles);
    for (std::uint32_t i = 0; i < n; ++i) {
      copy_node(first + i, block + i);
      copies[first + i] = block + i;
    }
  }
  return top;
}

void Nodes::release(const Slabs& slabs) {
  std::uint32_t slab = slabs.first;
  for (std::uint32_t i = 0; i < slabs.count; ++i) {
    const std::uint32_t next = next_[slab];
    free_.push_back(slab);  // within what add_chunk reserved
    slab = next;
  }
}

}  // namespace tercet
