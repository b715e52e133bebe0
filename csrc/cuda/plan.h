// How the rows of a matrix are divided among blocks: the launches of the row kernel, and their workspace. Host code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace roadmap::cuda {

// What the device has, and bounds that tests tighten.
struct Resources {
  int multiprocessors;
  // Bytes. Long rows may take 32 a column instead; where rows are scanned, 64 a column, or up to four times as much.
  int64_t workspace = int64_t(64) << 20;
  int threads = 0;         // a block; 0: chosen
  int blocks_per_row = 0;  // 0: chosen
  int capacity = kPiece;
  // Rows of more positives are scanned. By count: the scan of a row of 65,536 costs as much as some 200 positives of
  // the pairwise kernel; no GPU has measured it.
  int scan_above = 256;
};

struct Plan {
  std::vector<Schedule> launches;
  int64_t bytes = 0;  // of workspace
};

// Hands out one piece of memory, array after array.
class BumpAllocator {
 public:
  explicit BumpAllocator(char* begin) : begin_(begin) {}
  template <typename T>
  Global<T> take(int64_t count) {
    const int64_t at = size_;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return view<T>(at, count);
  }
  // An array that lies over what was taken at `at`.
  template <typename T>
  Global<T> view(int64_t at, int64_t count) const {
    return begin_ ? simt::global(reinterpret_cast<T*>(begin_ + at), count) : Global<T>(nullptr);
  }
  int64_t size() const { return size_; }

 private:
  char* begin_;
  int64_t size_ = 0;
};

// Of a bitmap, with room for the first place of a row (rows.cuh, shift).
inline int64_t words_of(int64_t columns) { return (columns + 7 + 31) / 32; }

// The workspace of a launch at `memory`, or with null just its size.
template <typename T>
Workspace<T> workspace_of(const Schedule& s, int64_t rows, int64_t columns, int capacity, char* memory,
                          int64_t& bytes) {
  BumpAllocator allocator(memory);
  Workspace<T> w;
  w.words = words_of(columns);
  w.count = allocator.take<int32_t>(rows);  // first: launches hand it on
  if (s.scan_above != kNever) w.done = allocator.take<int32_t>(rows);
  w.negative = allocator.take<uint32_t>(s.slots * w.words);
  w.positive = allocator.take<uint32_t>(s.slots * w.words);
  if (!s.in_shared) {
    w.block_positives = allocator.take<int32_t>(s.slots * s.blocks_per_row);
    w.column = allocator.take<int32_t>(s.slots * columns);
    w.above = allocator.take<double>(s.slots * columns);
    const int64_t below = allocator.size();
    w.below = allocator.take<double>(s.slots * columns);
    w.slope = allocator.take<double>(s.slots * columns);
    if (s.blocks_per_row > 1) w.partial = allocator.take<double>(s.slots * s.blocks_per_row * 2 * capacity);
    w.hinge = allocator.take<double>(s.slots * s.blocks_per_row);
    w.flag = allocator.take<int32_t>(s.slots * s.blocks_per_row * 2);
    w.outcome = allocator.take<double>(s.slots * kOutcome);
    if (s.scan_above != kNever) {
      w.key[0] = allocator.take<uint32_t>(s.slots * columns);
      w.index[0] = allocator.take<uint32_t>(s.slots * columns);
      // A slot's over the slot's own doubles, keys before indices: blocks are not at the same step of their rows.
      w.key[1] = allocator.view<uint32_t>(below, 2 * s.slots * columns);
      w.index[1] = allocator.view<uint32_t>(below + 4 * columns, (2 * s.slots - 1) * columns);
      w.sorted = allocator.take<uint32_t>(s.slots * w.words);
      w.before = allocator.take<int32_t>(s.slots * w.words);
      w.leaf_before = allocator.take<int32_t>(s.slots * w.words);
      w.position = allocator.take<int32_t>(s.slots * columns);
      w.among = allocator.take<double>(s.slots * columns);
      w.state_below = allocator.take<double>(s.slots * (w.words + 1) * kTerms);
      w.state_above = allocator.take<double>(s.slots * (w.words + 1) * kTerms);
      w.leaf_weight = allocator.take<double>(s.slots * (w.words + 1));
      w.leaf_sum = allocator.take<double>(s.slots * (w.words + 1));
      w.digits = allocator.take<int32_t>(s.slots * s.blocks_per_row * 256);
      w.block_items = allocator.take<int32_t>(s.slots * s.blocks_per_row * 3);
    }
  }
  bytes = allocator.size();
  return w;
}

template <typename T>
int64_t workspace_bytes(const Schedule& s, int64_t rows, int64_t columns, int capacity) {
  int64_t bytes;
  workspace_of<T>(s, rows, columns, capacity, nullptr, bytes);
  return bytes;
}

// As many slots as there is work and workspace for.
template <typename T>
int64_t fit_slots(Schedule s, int64_t most, int64_t rows, int64_t columns, const Resources& r) {
  s.slots = 0;
  const int64_t fixed = workspace_bytes<T>(s, rows, columns, r.capacity);
  s.slots = 1;
  const int64_t each = workspace_bytes<T>(s, rows, columns, r.capacity) - fixed;
  int64_t bound = std::max(r.workspace, (s.scan_above == kNever ? 32 : 64) * columns);
  // Rows that are scanned take 57 bytes a column. Where scores are many, half as much as these, so that few of the
  // multiprocessors stand idle.
  if (s.scan_above != kNever) bound = std::max(bound, std::min(4 * r.workspace, 2 * rows * columns));
  if (fixed > bound / 2) bound += fixed;  // counts of so many rows must not leave all of them to one slot
  s.slots = std::max<int64_t>(1, std::min(most, (bound - fixed) / std::max<int64_t>(1, each) + 1));
  while (s.slots > 1 && workspace_bytes<T>(s, rows, columns, r.capacity) > bound) --s.slots;
  return s.slots;
}

// Launches in order, each with the rows it takes. Only the device knows which rows have more positives than fit in
// shared memory: a launch for them comes along, and finds nothing to do if there are none.
template <typename T>
Plan make_plan(int64_t rows, int64_t columns, bool count_only, uint32_t steps, int scan_above, const Resources& r) {
  Plan plan;
  if (!rows || !columns) return plan;
  constexpr int64_t kThreadColumns = sizeof(T) == 8 ? 4 : 8;
  Schedule s;
  s.threads = r.threads;
  if (!s.threads) {
    s.threads = 64;
    while (s.threads < kMostThreads && s.threads * kThreadColumns < columns) s.threads *= 2;
    s.threads = std::min(s.threads, kMostThreads);
  }
  s.last_row = rows;
  s.steps = steps;
  if (!count_only) s.scan_above = scan_above < columns ? scan_above : kNever;
  const bool scan = s.scan_above != kNever;
  if (!scan) steps &= kPairwiseSteps;
  const int64_t resident = int64_t(r.multiprocessors) * std::max(1, kMostThreads / s.threads);
  const int64_t tiles = (columns + s.threads * kThreadColumns - 1) / (s.threads * kThreadColumns);
  const auto add = [&](const Schedule& launch) {
    plan.launches.push_back(launch);
    plan.bytes = std::max(plan.bytes, workspace_bytes<T>(launch, rows, columns, r.capacity));
  };
  // Few long rows: blocks share them, a step a launch, as many rows at a time as the workspace holds. The launches of a
  // batch take as long as some ten thousand columns.
  Schedule split = s;
  split.in_shared = false;
  split.slots = fit_slots<T>(split, rows, rows, columns, r);
  const bool few = rows < 2 * resident && rows <= 8 * split.slots && columns >= 16384;
  if (!count_only && (r.blocks_per_row > 1 || (!r.blocks_per_row && few))) {
    s = split;
    const int64_t most_blocks = std::min({int64_t(128), tiles, 2 * resident / s.slots});
    s.blocks_per_row = r.blocks_per_row ? r.blocks_per_row : static_cast<int>(std::max<int64_t>(1, most_blocks));
    s.slots = fit_slots<T>(s, rows, rows, columns, r);
    for (int64_t first = 0; first < rows; first += s.slots) {
      s.first_row = first;
      s.last_row = std::min(rows, first + s.slots);
      for (uint32_t step = 1; step; step *= 2) {
        if (!(step & steps)) continue;
        s.steps = step;
        s.scan = scan && (step & kScanSteps);
        add(s);
        if (!s.scan || !(step & (kWeights | kScatter))) continue;  // of which each kernel does its own rows'
        s.scan = false;
        add(s);
      }
    }
    return plan;
  }
  Schedule first = s;
  first.steps = steps & kPairwiseSteps;
  first.most = std::min(r.capacity, s.scan_above);
  first.scan_above = kNever;
  first.slots = fit_slots<T>(first, std::min(rows, kBlocksPerMultiprocessor<T> * resident), rows, columns, r);
  add(first);
  if (count_only || columns <= first.most) return plan;
  s.most = first.most;
  s.in_shared = false;
  s.only_longer = true;
  s.slots = fit_slots<T>(s, std::min(rows, resident), rows, columns, r);
  s.scan = scan;
  s.steps = steps & (scan ? kScanSteps : kPairwiseSteps);
  add(s);
  if (!scan) return plan;
  s.scan = false;  // what was left
  s.steps = steps & kPairwiseSteps;
  add(s);
  return plan;
}

}  // namespace roadmap::cuda
