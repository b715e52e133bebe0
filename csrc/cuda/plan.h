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
  // Bytes. Long rows may take 32 a column instead; where rows go by boxes, 64 a column, or up to four times as much.
  int64_t workspace = int64_t(64) << 20;
  int threads = 0;         // a block; 0: chosen
  int blocks_per_row = 0;  // 0: chosen
  int capacity = kPiece;
  int boxes_above = -1;  // rows of more positives go by boxes; negative: chosen
  bool boxes = true;     // whether a block has shared memory enough for them
};

// The positives from which on boxes are taken to be faster than pairs. By count, for no GPU has measured it: on an H200 a
// row by boxes takes some 50 us and 100 instructions a score, and a positive of the pairwise kernel 20 a score.
inline int boxes_pay_above(int64_t columns) {
  return static_cast<int>(std::max<int64_t>(24, (int64_t(1) << 18) / std::max<int64_t>(1, columns)));
}

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
  if (s.boxes_above != kNever) {
    w.done = allocator.take<int32_t>(rows);
    w.sigmoid = allocator.take<float>(kDerivatives * (2 * int64_t(s.reach) + 1));
  }
  w.negative = allocator.take<uint32_t>(s.slots * w.words);
  w.positive = allocator.take<uint32_t>(s.slots * w.words);
  if (!s.in_shared) {
    w.block_positives = allocator.take<int32_t>(s.slots * s.blocks_per_row);
    w.column = allocator.take<int32_t>(s.slots * s.places);
    w.above = allocator.take<double>(s.slots * s.places);
    w.below = allocator.take<double>(s.slots * s.places);
    w.slope = allocator.take<double>(s.slots * s.places);
    if (s.blocks_per_row > 1) w.partial = allocator.take<double>(s.slots * s.blocks_per_row * 2 * capacity);
    w.hinge = allocator.take<double>(s.slots * s.blocks_per_row);
    w.flag = allocator.take<int32_t>(s.slots * s.blocks_per_row * 2);
    w.outcome = allocator.take<double>(s.slots * kOutcome);
    if (s.room) {
      for (Global<float>& list : w.sorted) list = allocator.take<float>(s.slots * s.room);
      for (Global<int32_t>& list : w.sorted_column) list = allocator.take<int32_t>(s.slots * s.room);
      w.before = allocator.take<int32_t>(s.slots * w.words);
      w.key = allocator.take<float>(s.slots * 2 * s.room);
      w.first = allocator.take<int32_t>(s.slots * (kMostBoxes + 1));
      w.first_positive = allocator.take<int32_t>(s.slots * (kMostBoxes + 1));
      w.sums = 4 * (2 * s.room + kMostBoxes + 2);
      const int64_t sum = allocator.size();
      w.sum = allocator.take<int64_t>(s.slots * w.sums);
      w.cubic = allocator.view<float>(sum, 2 * s.slots * w.sums);
      w.block_sum = allocator.take<int64_t>(s.slots * s.blocks_per_row * 4);
      w.among = allocator.take<double>(s.slots * s.room);
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
  int64_t bound = std::max(r.workspace, (s.boxes_above == kNever ? 32 : 64) * columns);
  // Boxes take 250 KB a row, and 60 bytes a column where positives are many. Where scores are many, half as much as
  // these, so that few of the multiprocessors stand idle.
  if (s.boxes_above != kNever) bound = std::max(bound, std::min(4 * r.workspace, 2 * rows * columns));
  if (fixed > bound / 2) bound += fixed;  // counts of so many rows must not leave all of them to one slot
  s.slots = std::max<int64_t>(1, std::min(most, (bound - fixed) / std::max<int64_t>(1, each) + 1));
  while (s.slots > 1 && workspace_bytes<T>(s, rows, columns, r.capacity) > bound) --s.slots;
  return s.slots;
}

// Launches in order, each with the rows it takes. Only the device knows which rows have more positives than fit in
// shared memory: a launch for them comes along, and finds nothing to do if there are none.
template <typename T>
Plan make_plan(int64_t rows, int64_t columns, bool count_only, uint32_t steps, int boxes_above, int reach,
               const Resources& r) {
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
  if (!count_only) s.boxes_above = boxes_above < columns ? boxes_above : kNever;
  const bool by_boxes = s.boxes_above != kNever;
  if (by_boxes) s.reach = reach;
  if (!by_boxes) steps &= kPairwiseSteps;
  s.places = columns;
  const int64_t resident = int64_t(r.multiprocessors) * std::max(1, kMostThreads / s.threads);
  const int64_t tiles = (columns + s.threads * kThreadColumns - 1) / (s.threads * kThreadColumns);
  const auto add = [&](const Schedule& launch) {
    plan.launches.push_back(launch);
    plan.bytes = std::max(plan.bytes, workspace_bytes<T>(launch, rows, columns, r.capacity));
  };
  const auto add_sigmoid_table = [&](Schedule launch) {
    launch.slots = 1;
    launch.blocks_per_row = 4;
    launch.by_boxes = true;
    launch.steps = kSigmoidTable;
    add(launch);
  };
  // Few long rows: blocks share them, a step a launch, as many rows at a time as the workspace holds. The launches of a
  // batch take as long as some ten thousand columns.
  Schedule split = s;
  split.in_shared = false;
  if (by_boxes) split.room = std::max(std::min<int64_t>(columns, kFewPositives), columns / 3);
  split.slots = fit_slots<T>(split, rows, rows, columns, r);
  const bool few = rows < 2 * resident && rows <= 8 * split.slots && columns >= 16384;
  if (!count_only && (r.blocks_per_row > 1 || (!r.blocks_per_row && few))) {
    s = split;
    const int64_t most_blocks = std::min({int64_t(128), tiles, 2 * resident / s.slots});
    s.blocks_per_row = r.blocks_per_row ? r.blocks_per_row : static_cast<int>(std::max<int64_t>(1, most_blocks));
    s.slots = fit_slots<T>(s, rows, rows, columns, r);
    if (by_boxes) add_sigmoid_table(s);
    for (int64_t first = 0; first < rows; first += s.slots) {
      s.first_row = first;
      s.last_row = std::min(rows, first + s.slots);
      for (uint32_t step = 1; step & kAllSteps; step *= 2) {
        if (!(step & steps)) continue;
        s.steps = step;
        s.by_boxes = by_boxes && (step & kBoxSteps);
        if (step == kMerge) {
          for (s.run = kSortChunk; s.run < s.room; s.run *= 2) add(s);
          s.run = 0;
          continue;
        }
        add(s);
        if (!s.by_boxes || !(step & (kWeights | kScatter))) continue;  // of which each kernel does its own rows'
        s.by_boxes = false;
        add(s);
      }
    }
    return plan;
  }
  Schedule first = s;
  first.steps = steps & kPairwiseSteps;
  first.most = std::min(r.capacity, s.boxes_above);
  first.boxes_above = kNever;
  first.slots = fit_slots<T>(first, std::min(rows, kBlocksPerMultiprocessor<T> * resident), rows, columns, r);
  add(first);
  if (count_only || columns <= first.most) return plan;
  s.most = first.most;
  s.in_shared = false;
  s.only_longer = true;
  if (by_boxes) {
    add_sigmoid_table(s);
    s.steps = steps & kBoxSteps;
    s.by_boxes = true;
    const int64_t most_room = std::max(std::min<int64_t>(columns, kFewPositives), columns / 2);
    for (const int64_t room : {std::min<int64_t>(columns, kFewPositives), most_room}) {
      if (s.room == room) continue;
      s.room = s.places = room;
      s.slots = fit_slots<T>(s, std::min(rows, 2 * resident), rows, columns, r);
      add(s);
      s.skip_done = true;
    }
    s.by_boxes = false;  // what was left
    s.room = 0;
    s.places = columns;
  }
  s.steps = steps & kPairwiseSteps;
  s.slots = fit_slots<T>(s, std::min(rows, resident), rows, columns, r);
  add(s);
  return plan;
}

}  // namespace roadmap::cuda
