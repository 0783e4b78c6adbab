#include "tercet/nodes.hpp"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tercet {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

}  // namespace

Nodes::Nodes(std::size_t max_bytes) : max_bytes_(max_bytes) {}

void Nodes::add_chunk() {
  const std::size_t chunks = chunks_.size() + 1;
  if (chunks * kChunk * kBytesPerNode > max_bytes_ || chunks * kChunk > kMaxNodes) {
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
  constexpr std::size_t kBytes = kChunk * kBytesPerNode;
  void* memory = std::aligned_alloc(kHugePage, (kBytes + kHugePage - 1) / kHugePage * kHugePage);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
  madvise(memory, kBytes, MADV_HUGEPAGE);  // a hint, which fails where there are none
#endif
  auto* hot = static_cast<HotNode*>(memory);
  auto* handle = reinterpret_cast<std::int64_t*>(hot + kChunk);
  chunks_.push_back({std::unique_ptr<HotNode[], Freed>(hot), handle,
                     reinterpret_cast<NodeIndex*>(handle + kChunk)});
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

NodeIndex Nodes::add_block(Slabs& slabs, NodeIndex parent, std::span<const std::int64_t> handles) {
  const auto size = static_cast<std::uint32_t>(handles.size());
  const std::uint32_t room = (size + 3) / 4 * 4;
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

std::vector<NodeIndex> Nodes::all(const Slabs& slabs) const {
  std::vector<NodeIndex> found;
  std::uint32_t slab = slabs.first;
  for (std::uint32_t i = 0; i < slabs.count; ++i, slab = next_[slab]) {
    const NodeIndex end = slab * kSlab + (slab == slabs.last ? slabs.used : used_[slab]);
    for (NodeIndex node = slab * kSlab; node < end; node = (node + 4) / 4 * 4) {
      found.push_back(node);
      while (!hot(node).is_last()) found.push_back(++node);
    }
  }
  return found;
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
