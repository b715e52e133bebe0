// Blocks, warps and barriers; and the checks of every access to memory: within bounds, aligned, of bytes that somebody
// has written, and racing with nobody.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sstream>

#include "machine.h"
#include "trace.h"

namespace ptx {

Machine machine;

static std::string source_of(const Function& f, const Instruction& i) {
  const auto file = f.files->find(i.source_file);
  return file == f.files->end() ? "?" : file->second;
}

void fail(const std::string& what) { throw std::runtime_error(what); }
void fail_at(const Warp& w, const Instruction& i, int lane, const std::string& what) {
  std::ostringstream s;
  const Function& f = *w.block->f;
  s << what << "; " << source_of(f, i) << ":" << i.source_line << ", PTX line " << i.line << " (" << f.names[i.name]
    << "), thread " << w.first + lane << " of " << w.block->threads << ", block " << w.block->index << ", " << f.name;
  fail(s.str());
}

namespace {

u64 hash(u64 x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}
template <typename T>
void shuffle(std::vector<T>& all, u64 seed) {
  for (size_t k = all.size(); k > 1; --k) std::swap(all[k - 1], all[(seed = hash(seed)) % k]);
}

// --- what is known of memory -----------------------------------------------------------------------------------------

struct Range {
  u64 begin, end;
  bool writable;
};
std::vector<Range> ranges;

// Of four bytes, or of two where half types have been accessed: its last writer, and who has read since. Of readers the
// last one is kept and whether there were others: a write races with one of them or with none. In times, so that nothing
// need be cleared: what is older than the launch, the block or the barrier is ordered before what is younger.
enum Others : u16 { kNone = 0, kInWarp = 1, kInBlock = 2 };
struct Cell {
  u32 written = kByHost, read = 0, first_read = 0;  // first_read: in this launch
  u16 writer = 0;
  u16 reader = 0;  // thread, 10 bits; and Others
  static constexpr u32 kNever = 1, kByHost = 2;
  static constexpr u16 kAtomic = 1 << 15, kThread = 1023;  // of the writer
};
struct Page {
  static constexpr u64 kBytes = 4096;
  Cell words[kBytes / 4];
  std::unique_ptr<Cell[]> upper;  // of the upper halves of words
};
std::unordered_map<u64, std::unique_ptr<Page>> pages;
u64 last_number = ~u64(0);
Page* last_page = nullptr;

Page& page_of(u64 address) {
  const u64 number = address / Page::kBytes;
  if (number != last_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_number = number;
    last_page = page.get();
  }
  return *last_page;
}

// f(cell) for each cell of some bytes.
template <typename F>
inline void each_cell(u64 address, s64 bytes, const F& f) {
  for (const u64 end = address + bytes; address < end;) {
    Page& page = page_of(address);
    const u64 word = address % Page::kBytes / 4;
    const u64 in_word = std::min<u64>(end - address, 4 - address % 4);
    if (in_word < 4 && !page.upper) {
      page.upper = std::make_unique<Cell[]>(Page::kBytes / 4);
      std::copy(page.words, page.words + Page::kBytes / 4, page.upper.get());
    }
    if (address % 4 < 2) f(page.words[word]);
    if (page.upper && address % 4 + in_word > 2) f(page.upper[word]);
    address += in_word;
  }
}

struct Checked {
  const Warp& w;
  const Instruction& i;
  u32 now, launch, block, barrier, ordered;
  bool shared;

  [[noreturn]] void race(int lane, const char* does, const char* other, int thread) const {
    const std::string who = thread < 0 ? "another block" : "thread " + std::to_string(thread);
    fail_at(w, i, lane,
            std::string("race on ") + (shared ? "shared" : "global") + " memory: " + does + " what " + who + " " +
                other + (thread < 0 ? " in this launch" : " with no barrier between"));
  }
  // Whether what `thread` did at `time` may happen at the same time as what `self` does now.
  bool open(u32 time, int thread, int self) const {
    if (thread == self || time < barrier) return false;
    return thread / kLanes != self / kLanes || time >= ordered;
  }
  void check_writer(const Cell& c, int self, const char* does, bool atomic) const {
    if (c.written < launch || (atomic && (c.writer & Cell::kAtomic))) return;
    const int writer = c.writer & Cell::kThread;
    if (c.written < block) {
      if (!shared) race(self - w.first, does, "has written", -1);
    } else if (open(c.written, writer, self)) {
      race(self - w.first, does, "has written", writer);
    }
  }
  void read(Cell& c, int self) const {
    if (c.written < (shared ? block : Cell::kByHost)) fail_at(w, i, self - w.first, "reads what was never written");
    check_writer(c, self, "reads", false);
    if (c.first_read < launch) c.first_read = now;
    const int reader = c.reader & Cell::kThread;
    const bool in_warp = reader / kLanes == self / kLanes;
    if (c.read < barrier || (in_warp && !(c.reader >> 10 & kInBlock) && c.read < ordered)) {
      c.reader = static_cast<u16>(self);
    } else if (reader != self) {
      c.reader |= (in_warp ? kInWarp : kInBlock) << 10;
    }
    c.read = now;
  }
  void write(Cell& c, int self, bool atomic) const {
    const char* const does = atomic ? "changes" : "writes";
    check_writer(c, self, does, atomic);
    if (!shared && c.first_read >= launch && c.first_read < block) race(self - w.first, does, "has read", -1);
    const int reader = c.reader & Cell::kThread, others = c.reader >> 10;
    if (open(c.read, reader, self) || (c.read >= barrier && others & kInBlock) ||
        (others & kInWarp && (reader / kLanes != self / kLanes ? c.read >= barrier : c.read >= ordered))) {
      if (c.read >= block) race(self - w.first, does, "has read", reader);
    }
    c.written = now;
    c.writer = static_cast<u16>(self | (atomic ? Cell::kAtomic : 0));
  }
};

// --- counts ----------------------------------------------------------------------------------------------------------

// Of an instruction, by PTXRUN_STATS.
struct Count {
  unsigned long long warps = 0, lanes = 0, sectors = 0, conflicts = 0;
};
FILE* const stats = [] {
  const char* const name = std::getenv("PTXRUN_STATS");
  FILE* const file = name ? std::fopen(name, "w") : nullptr;
  if (file) std::fprintf(file, "launch,kernel,ptx_line,instruction,source,line,warps,lanes,sectors,conflicts\n");
  return file;
}();
std::vector<Count> counts;
Trace trace;

void count_access(const Warp& w, const Instruction& i, u32 mask, char* const (&at)[kLanes], int bytes, bool shared) {
  Count& count = counts[&i - w.block->f->code.data()];
  u64 seen[kLanes * 5];
  int n = 0, passes = 0;
  // 32-byte sectors of global memory; of shared memory how often a bank is asked for another word, in the parts of a
  // warp that go together: 32, 16 or 8 lanes of 4, 8 or 16 bytes.
  const int together = shared ? kLanes * 4 / std::max(4, bytes) : kLanes;
  for (int first = 0; first < kLanes; first += together) {
    n = 0;
    for (int l = first; l < first + together; ++l) {
      if (!(mask >> l & 1)) continue;
      const u64 a = reinterpret_cast<u64>(at[l]), unit = shared ? 4 : 32;
      for (u64 k = a / unit; k <= (a + bytes - 1) / unit; ++k) seen[n++] = k;
    }
    std::sort(seen, seen + n);
    n = static_cast<int>(std::unique(seen, seen + n) - seen);
    if (!shared) {
      count.sectors += n;
      continue;
    }
    int banks[32] = {}, most = 0;
    for (int k = 0; k < n; ++k) most = std::max(most, ++banks[seen[k] % 32]);
    count.conflicts += std::max(0, most - 1);
    passes += most;
  }
  if (!trace) return;
  if (shared) {
    trace.shared_access(w, i, passes);
  } else {
    trace.global_access(w, i, seen, n);
  }
}

void write_counts(const Function& f) {
  for (size_t k = 0; k < counts.size(); ++k) {
    const Count& c = counts[k];
    if (!c.warps) continue;
    const Instruction& i = f.code[k];
    std::fprintf(stats, "%lld,%s,%d,%s,%s,%d,%llu,%llu,%llu,%llu\n", machine.launches, f.name.c_str(), i.line,
                 f.names[i.name].c_str(), source_of(f, i).c_str(), i.source_line, c.warps, c.lanes, c.sectors,
                 c.conflicts);
  }
  std::fflush(stats);
}

inline void count(const Warp& w, const Instruction& i, u32 mask) {
  if (trace) trace.instruction(w, i);
  if (!stats) return;
  Count& c = counts[&i - w.block->f->code.data()];
  ++c.warps;
  c.lanes += __builtin_popcount(mask);
}

// --- running ---------------------------------------------------------------------------------------------------------

constexpr const char* kIncomplete = "a warp-wide instruction that others have reached than its mask names";

// Whether the lanes that have come to a warp-wide instruction are those that each of them names.
bool complete(const Warp& w, const Instruction& i, u32 here) {
  int last = 4;
  while (i.from[last] < 0) --last;
  const u32* const masks = w.lanes<u32>(i.from[last]);
  for (u32 rest = here; rest; rest &= rest - 1) {
    if (masks[__builtin_ctz(rest)] != here) return false;
  }
  return true;
}

u32 lanes_at(const Warp& w, u32 among, s32 pc) {
  u32 here = 0;
  for (int l = 0; l < kLanes; ++l) here |= static_cast<u32>(w.at[l] == pc) << l;
  return here & among;
}
void set_lanes(Warp& w, u32 lanes, s32 pc) {
  for (; lanes; lanes &= lanes - 1) w.at[__builtin_ctz(lanes)] = pc;
}

// Runs lanes that are at one instruction, until they part, wait or meet others.
void run_lanes(Warp& w, u32 mask, s32 pc, s32 stop) {
  const Instruction* const code = w.block->f->code.data();
  for (; pc != stop;) {
    const Instruction& i = code[pc];
    const u32 on = i.from[kGuard] >= 0 ? mask & w.predicate(i, kGuard) : mask;
    count(w, i, on);
    if (i.kind == Kind::kPlain) {
      if (on) i.execute(w, i, on);
      ++pc;
    } else if (i.kind == Kind::kBranch) {
      if (on && on != mask) {
        set_lanes(w, on, i.target);
        return set_lanes(w, mask & ~on, pc + 1);
      }
      pc = on ? i.target : pc + 1;
      if (pc > stop) break;
    } else if (i.kind == Kind::kExit) {
      w.live &= ~on;
      return set_lanes(w, mask & ~on, pc + 1);
    } else {
      if (on != mask) fail_at(w, i, __builtin_ctz(mask & ~on), "a guarded barrier or warp-wide instruction");
      if (i.kind == Kind::kBarrier || mask != kAll) {
        w.waiting |= mask;
        return set_lanes(w, mask, pc);
      }
      if (!complete(w, i, mask)) fail_at(w, i, 0, kIncomplete);
      i.execute(w, i, mask);
      ++pc;
    }
  }
  set_lanes(w, mask, pc);
}

// Runs a warp until its lanes wait at a barrier of the block, or have returned. The lanes that are furthest behind go
// first, up to the next ones.
void run_warp(Warp& w) {
  const Instruction* const code = w.block->f->code.data();
  while (w.live) {
    const u32 runnable = w.live & ~w.waiting;
    if (runnable) {
      s32 pc = INT32_MAX, stop = INT32_MAX;
      for (int l = 0; l < kLanes; ++l) {
        if (runnable >> l & 1) pc = std::min(pc, w.at[l]);
      }
      for (int l = 0; l < kLanes; ++l) {
        if ((runnable >> l & 1) && w.at[l] > pc) stop = std::min(stop, w.at[l]);
      }
      run_lanes(w, lanes_at(w, runnable, pc), pc, stop);
      continue;
    }
    u32 moved = 0, incomplete = 0;
    for (u32 rest = w.waiting & w.live; rest && !moved;) {
      const s32 pc = w.at[__builtin_ctz(rest)];
      const u32 here = lanes_at(w, rest, pc);
      rest &= ~here;
      if (code[pc].kind != Kind::kWarpWide) continue;
      if (!complete(w, code[pc], here)) {
        incomplete = here;
        continue;
      }
      code[pc].execute(w, code[pc], moved = here);
      set_lanes(w, here, pc + 1);
      w.waiting &= ~here;
    }
    if (moved) continue;
    if (incomplete) fail_at(w, code[w.at[__builtin_ctz(incomplete)]], __builtin_ctz(incomplete), kIncomplete);
    const s32 pc = w.at[__builtin_ctz(w.live)];
    if (lanes_at(w, w.live, pc) != w.live)
      fail_at(w, code[pc], __builtin_ctz(w.live), "lanes of a warp at different barriers");
    if (w.live != kAll) fail_at(w, code[pc], __builtin_ctz(w.live), "a barrier that some lanes have returned before");
    return;
  }
}

// All warps of a block wait: at the same barrier, or else at none.
void pass_barrier(Block& b) {
  const Instruction* const code = b.f->code.data();
  const auto of = [&](const Warp& w) -> const Instruction& { return code[w.at[0]]; };
  const Instruction* first = nullptr;
  bool yes = false;
  for (const Warp& w : b.warps) {
    if (w.live) first = &of(w);
  }
  for (const Warp& w : b.warps) {
    if (!w.live) fail("a barrier that some warps have returned before; " + b.f->name);
    if (of(w).name != first->name) fail_at(w, of(w), 0, "warps at different barriers");
    if (of(w).from[1] >= 0) yes |= w.predicate(of(w), 1) != 0;
  }
  b.barrier = ++machine.now;
  for (Warp& w : b.warps) {
    if (of(w).to[0] >= 0) w.set_predicate(of(w).to[0], kAll, yes ? kAll : 0);
    w.waiting = 0;
    w.ordered = machine.now;
    set_lanes(w, kAll, w.at[0] + 1);
  }
}

void run_block(Block& b, std::vector<int> order, s64 blocks) {
  Function& f = *b.f;
  for (int k = 0; k < static_cast<int>(b.warps.size()); ++k) {
    Warp& w = b.warps[k];
    w = Warp{&b, f.file_of_warps.data() + static_cast<size_t>(k) * f.file_bytes, k * kLanes};
    w.ordered = machine.now + 1;
    for (const auto& [at, content] : f.fixed) std::memcpy(w.file + at, content.data(), content.size());
    for (const auto& [name, at] : f.special) {
      for (int l = 0; l < kLanes; ++l) {
        w.lanes<u32>(at)[l] = name == "%tid.x"     ? static_cast<u32>(w.first + l)
                              : name == "%laneid"  ? static_cast<u32>(l)
                              : name == "%ntid.x"  ? static_cast<u32>(b.threads)
                              : name == "%ctaid.x" ? static_cast<u32>(b.index)
                                                   : static_cast<u32>(blocks);
      }
    }
  }
  b.begin = b.barrier = ++machine.now;
  for (u64 seed = hash(machine.seed + b.index);; seed = hash(seed)) {
    shuffle(order, seed);
    u32 live = 0;
    for (const int k : order) {
      run_warp(b.warps[k]);
      live |= b.warps[k].live;
    }
    if (!live) return;
    pass_barrier(b);
  }
}

}  // namespace

void locate(Warp& w, const Instruction& i, u32 mask, Access access, char* (&at)[kLanes]) {
  const Block& b = *w.block;
  const int bytes = i.bytes * i.vector;
  const u64* const wide = w.lanes<u64>(i.from[0]);
  const u32* const narrow = w.lanes<u32>(i.from[0]);
  const auto address = [&](int l) { return (i.wide ? wide[l] : narrow[l]) + static_cast<u64>(i.offset); };
  if (i.space == Space::kParam) {
    for (u32 rest = mask; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      const u64 a = address(l);
      if (a + bytes > static_cast<u64>(b.f->parameter_bytes) || a % bytes)
        fail_at(w, i, l, "no place in the parameters");
      at[l] = const_cast<char*>(b.parameters) + a;
    }
    return;
  }
  const bool shared = i.space == Space::kShared;
  Checked check = {w, i, machine.now, machine.launch, b.begin, b.barrier, w.ordered, shared};
  const u64 base = shared ? reinterpret_cast<u64>(b.shared) : 0;
  static Range last = {0, 0, false};  // mostly the next access lies there, too
  if (ranges.empty()) last = {0, 0, false};
  for (u32 rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    u64 a = address(l);
    if (a % bytes)
      fail_at(w, i, l, shared ? "a misaligned access to shared memory" : "a misaligned access to global memory");
    if (shared) {
      if (a + bytes > static_cast<u64>(b.shared_bytes)) {
        fail_at(w, i, l,
                "out of bounds of shared memory: byte " + std::to_string(static_cast<s64>(a)) + " of " +
                    std::to_string(b.shared_bytes));
      }
      a += base;
    } else if (a < last.begin || a + bytes > last.end || (access != Access::kRead && !last.writable)) {
      const Range* found = nullptr;
      bool read_only = false;
      for (const Range& r : ranges) {
        if (a < r.begin || a + bytes > r.end) continue;
        if (access == Access::kRead || r.writable) found = &r;
        read_only = true;
      }
      if (!found)
        fail_at(w, i, l, read_only ? "a write to memory that is only to be read" : "out of bounds of global memory");
      last = *found;
    }
    at[l] = reinterpret_cast<char*>(a);
    each_cell(a, bytes, [&](Cell& c) {
      if (access == Access::kRead) {
        check.read(c, w.first + l);
      } else {
        check.write(c, w.first + l, access == Access::kAtomic);
      }
    });
  }
  if (stats || trace) count_access(w, i, mask, at, bytes, shared);
}

void allow(const void* begin, s64 bytes, bool writable) {
  if (bytes <= 0) return;
  const u64 at = reinterpret_cast<u64>(begin);
  const auto same = [&](const Range& r) { return r.begin == at && r.end == at + bytes && r.writable == writable; };
  if (std::none_of(ranges.begin(), ranges.end(), same)) ranges.push_back({at, at + bytes, writable});
}
void forget_content(const void* begin, s64 bytes) {
  each_cell(reinterpret_cast<u64>(begin), bytes, [](Cell& c) { c.written = Cell::kNever; });
}
void forget_memory() {
  ranges.clear();
  pages.clear();
  last_number = ~u64(0);
}

void launch(Function& f, s64 blocks, int threads, int shared_bytes, void** arguments) {
  if (threads < 1 || threads > 1024 || threads % kLanes || blocks < 1)
    fail("a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads");
  std::vector<char> parameters(f.parameter_bytes);
  for (size_t k = 0; k < f.parameters.size(); ++k) {
    std::memcpy(parameters.data() + f.parameters[k].offset, arguments[k], f.parameters[k].bytes);
  }
  const int warps = threads / kLanes;
  if (f.file_of_warps.size() < static_cast<size_t>(warps) * f.file_bytes) {
    f.file_of_warps.resize(static_cast<size_t>(warps) * f.file_bytes);
  }
  const int all_shared = f.static_shared + 16 + shared_bytes;
  std::unique_ptr<char[]> shared(new char[all_shared + Page::kBytes]);
  char* const aligned = shared.get() + (Page::kBytes - reinterpret_cast<u64>(shared.get()) % Page::kBytes);
  machine.launch = ++machine.now;
  ++machine.launches;
  trace.begin(f, blocks, threads, shared_bytes);
  if (stats || trace) counts.assign(f.code.size(), Count());
  std::vector<s64> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  shuffle(order, machine.seed);
  std::vector<int> warp_order(warps);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  Block b = {&f, 0, threads, (f.static_shared + 15) / 16 * 16 + shared_bytes, aligned, parameters.data(), 0, 0, {}};
  b.warps.resize(warps);
  for (const s64 index : order) {
    b.index = index;
    std::memset(b.shared, 0xFF, b.shared_bytes);
    run_block(b, warp_order, blocks);
  }
  if (stats) write_counts(f);
  trace.end();
}

}  // namespace ptx
