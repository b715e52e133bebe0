// A GPU on the CPU, for tests: everything that csrc/cuda/simt.h defines, once more, so that kernel bodies run under
// run(launch, body) with every access, barrier and warp call checked. A violation leaves run() as std::runtime_error;
// fail() is where a debugger stops.
//
// Threads of a block are fibers, resumed in a random order by the launch's seed; blocks run one after another,
// shuffled. Races are found from who accessed what between which barriers, so whatever the order was: on shared memory,
// and on global memory between threads of a block and between blocks, which nothing orders within a launch.
//
// What it cannot see: races between launches that overlap; fences and whatever else is weaker on a GPU than "all that
// came before"; blocks or threads that spin on each other (they hang); an index that is wrong yet inside the same
// array; a size that the launcher states wrongly; registers, stack frames, bank conflicts, speed; that nvcc contracts
// a * b + c to one fma where this compiler does not.
//
// One launch at a time, on one thread of the host. Compile without _FORTIFY_SOURCE, which takes a switch of stacks for
// an attack, and without AddressSanitizer, which does too.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../../csrc/cpu/half.h"

#define ROADMAP_DEVICE inline

namespace roadmap::simt {

constexpr int kWarp = 32;

inline uint64_t& seed() {  // of launches that state none
  static uint64_t value = 1;
  return value;
}

struct Launch {
  int64_t blocks = 1;
  int threads = kWarp;
  int shared_bytes = 0;
  uint64_t seed = 0;   // of the order of blocks and threads, and of the poison; 0: seed()
  uint64_t noise = 0;  // of the errors of exp2_fast and reciprocal_fast; 0: the seed above
  // Whether a shuffle or vote orders the accesses of its warp to shared memory: CUDA promises it of __syncwarp() alone.
  bool warp_calls_order_memory = false;
};

namespace detail {

constexpr int kMaxThreads = 1024;
constexpr int kMaxShared = 227 * 1024;     // a block of an H100
constexpr size_t kStack = 64 * 1024 + 64;  // not a power of two: stacks would compete for the same lines of cache
constexpr size_t kCanary = 256;            // bytes at the end of a stack that must never change
constexpr char kCanaryByte = 0x5a;
constexpr int kStep = 16;  // bytes of shared memory that SharedMemory hands out at least

inline uint64_t hash(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

struct Site {  // the line of a body
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Call {
  const char* name = "";
  Site site = {"", 0};
  bool operator==(const Call& other) const {
    return std::strcmp(name, other.name) == 0 && site.line == other.site.line;
  }
  friend std::ostream& operator<<(std::ostream& out, const Call& call) {
    const char* const slash = std::strrchr(call.site.file, '/');
    return out << call.name << " (" << (slash ? slash + 1 : call.site.file) << ":" << call.site.line << ")";
  }
};

// Where the threads of a block, or of a warp, wait for each other.
struct Meeting {
  Call call;
  int first = 0, threads = 0;  // who comes
  int arrived = 0;
  uint32_t epoch = 1;  // rises when all have come. Of the block's: over all launches, so that memory need not be reset
};

struct Warp {
  Meeting meeting;
  uint64_t in[kWarp], out[kWarp];
  int source[kWarp];
};

struct Fiber {
  int thread = 0;
  bool started = false, returned = false;
  const Meeting* waits = nullptr;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
};

// An element of shared memory: its last writer, and who read it since that meeting of the block. Of readers two are
// enough: a write races either with one of them or with none. other: one of another warp, else another lane in the same
// epoch of the warp, else the reader itself.
struct Cell {
  uint32_t written = 0, written_warp = 0, read = 0, read_warp = 0;  // epochs of the block and of the warp
  uint16_t writer = 0, reader = 0, other = 0;
  uint32_t changed = 0;  // by atomics, likewise
  uint16_t changer = 0, other_changer = 0;
};

struct Array {  // in shared memory
  int64_t begin, count;
  const void* type;
  bool operator==(const Array& other) const {
    return begin == other.begin && count == other.count && type == other.type;
  }
};
template <typename T>
inline char type_of = 0;  // its address stands for the type

struct State {
  struct alignas(kStep) Step {
    char bytes[kStep];
  };
  Launch launch;
  const std::function<void(char*)>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;  // may be resumed
  Fiber* current = nullptr;
  int returned = 0;
  int64_t block = 0;
  Meeting barrier;
  bool any = false, any_of_all = false;  // of barrier_or: so far, and of the last one
  Warp warps[kMaxThreads / kWarp];
  std::vector<Step> shared;
  std::vector<Cell> cells;    // element i of the array at byte b: cell b + i
  std::vector<Array> arrays;  // dealt out in the running block, by whoever came first
  uint32_t first_epoch = 0;   // of the running block
  uint32_t launch_epoch = 0;  // of the launch's first block
  uint64_t random = 0, noise = 0;
  jmp_buf scheduler;
  std::exception_ptr error;
  bool abandoned = false;  // fibers stopped midway: their stacks start anew

  char* bytes() { return reinterpret_cast<char*>(shared.data()); }
  Warp& warp() { return warps[current->thread / kWarp]; }
  int64_t below(int64_t n) {  // n < 2^32
    random = random * 6364136223846793005 + 1442695040888963407;
    return static_cast<int64_t>((random >> 32) * static_cast<uint64_t>(n) >> 32);
  }
};
inline State state;

template <typename... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail_in(const Fiber* fiber, const Parts&... parts) {
  std::ostringstream what;
  (what << ... << parts);
  if (fiber) {
    what << "; thread " << fiber->thread << " of " << state.launch.threads << ", block " << state.block << " of "
         << state.launch.blocks;
  }
  throw std::runtime_error(what.str());
}
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  fail_in(state.current, parts...);
}

// Back to the scheduler, until it resumes the fiber.
[[gnu::noinline]] inline void pause() {
  if (_setjmp(state.current->at) == 0) _longjmp(state.scheduler, 1);
}

// A fiber's whole life: a block after the other.
inline void live() {
  for (;;) {
    try {
      (*state.body)(state.bytes());
    } catch (...) {
      state.error = std::current_exception();
    }
    state.current->returned = true;
    ++state.returned;
    pause();
  }
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(state.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  std::memset(fiber.stack.get(), kCanaryByte, kCanary);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

// The running thread waits until all that take part have come; the last of them calls complete() and frees all.
template <typename Complete>
void meet(Meeting& meeting, bool orders_memory, const Call& call, const Complete& complete) {
  if (meeting.arrived == 0) meeting.call = call;
  if (!(meeting.call == call)) fail("divergent: ", call, " while others wait in ", meeting.call);
  state.current->waits = &meeting;
  if (++meeting.arrived == meeting.threads) {
    complete();
    meeting.arrived = 0;
    meeting.epoch += orders_memory;
    for (int i = meeting.first; i < meeting.first + meeting.threads; ++i) {
      state.fibers[i].waits = nullptr;
      state.ready.push_back(&state.fibers[i]);
    }
  }
  pause();
}

inline bool meet_block(bool x, const Call& call) {
  state.any |= x;
  meet(state.barrier, true, call, [] { state.any_of_all = std::exchange(state.any, false); });
  return state.any_of_all;
}

template <typename Complete>
uint64_t meet_warp(uint64_t bits, int source, const Call& call, const Complete& complete) {
  Warp& warp = state.warp();
  const int lane = state.current->thread % kWarp;
  warp.in[lane] = bits;
  warp.source[lane] = source < 0 || source >= kWarp ? lane : source;
  meet(warp.meeting, state.launch.warp_calls_order_memory, call, [&] { complete(warp); });
  return warp.out[lane];
}

template <typename T>
T shuffle(T x, int source, int delta, const Call& call) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a type that __shfl_sync takes");
  if (delta < 0 || delta >= kWarp) fail(call, " by ", delta, ", which is none of 0 to 31");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = meet_warp(bits, source, call, [](Warp& warp) {
    for (int lane = 0; lane < kWarp; ++lane) warp.out[lane] = warp.in[warp.source[lane]];
  });
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// All fibers wait, or have returned, and nobody comes any more.
[[noreturn]] inline void deadlock() {
  const auto stuck = [](const Fiber& fiber, bool in_warp) {
    return fiber.waits && (fiber.waits != &state.barrier) == in_warp;
  };
  const Fiber* lost = nullptr;  // in a warp call, where there is one: a barrier may wait just for its warp
  for (int i = 0; i < state.launch.threads; ++i) {
    const Fiber& fiber = state.fibers[i];
    if (stuck(fiber, true) || (!lost && stuck(fiber, false))) lost = &fiber;
  }
  const Meeting& meeting = *lost->waits;
  fail_in(lost, meeting.call, " that not all threads of the ", &meeting == &state.barrier ? "block" : "warp",
          " reach: ", meeting.arrived, " of ", meeting.threads, " wait there, ", state.returned,
          " of the block's have returned");
}

inline void run_block(int64_t block) {
  State& s = state;
  s.block = block;
  s.first_epoch = ++s.barrier.epoch;
  s.returned = 0;
  std::fill_n(s.bytes(), s.shared.size() * kStep, static_cast<char>(hash(s.random)));  // poison
  s.arrays.clear();
  s.ready.clear();
  for (int i = 0; i < s.launch.threads; ++i) {
    s.fibers[i].returned = false;
    s.ready.push_back(&s.fibers[i]);
  }
  while (!s.ready.empty()) {
    std::swap(s.ready[s.below(static_cast<int64_t>(s.ready.size()))], s.ready.back());
    s.current = s.ready.back();
    s.ready.pop_back();
    resume(*s.current);
    const Fiber* fiber = std::exchange(s.current, nullptr);
    if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
    if (!fiber->returned) continue;
    const char* const canary = fiber->stack.get();
    const bool intact = std::all_of(canary, canary + kCanary, [](char c) { return c == kCanaryByte; });
    if (!intact) fail_in(fiber, "stack overflow");
  }
  if (s.returned != s.launch.threads) deadlock();
}

// Whether an access by `thread` in the given epoch of its warp, during this epoch of the block, may happen at the same
// time as what the running thread does now.
inline bool unordered(int thread, uint32_t warp_epoch) {
  const int self = state.current->thread;
  return thread != self && (thread / kWarp != self / kWarp || warp_epoch == state.warp().meeting.epoch);
}

enum Kind { kRead, kWrite, kAtomic };
constexpr int kGranule = 2;  // bytes of global memory that are watched together: nothing narrower is written

// Accesses of one kind to a granule: which blocks they came from in this launch, and which threads of the last of these
// since its barrier. Two of each are enough: the next access races with one of them or with none.
struct Accesses {
  uint32_t epoch = 0;  // of the last one
  int32_t block = 0, other_block = 0;
  uint16_t thread = 0, other_thread = 0;

  void add(const State& s) {
    const auto of_block = static_cast<int32_t>(s.block);
    const auto self = static_cast<uint16_t>(s.current->thread);
    if (epoch < s.launch_epoch) {
      block = other_block = of_block;
    } else if (block != of_block) {
      other_block = of_block;
    }
    if (epoch != s.barrier.epoch) {
      thread = other_thread = self;
    } else if (thread != self) {
      other_thread = self;
    }
    epoch = s.barrier.epoch;
  }
  // Fails if one of them may happen at the same time as what the running thread does now.
  void check(const State& s, const char* does, const char* did, const Site& site) const {
    if (epoch < s.launch_epoch) return;
    if (block != s.block || other_block != s.block) {
      fail("race on global memory: ", Call{does, site}, " what block ", block != s.block ? block : other_block, " ",
           did);
    }
    const int self = s.current->thread;
    if (epoch != s.barrier.epoch || (thread == self && other_thread == self)) return;
    fail("race on global memory: ", Call{does, site}, " what thread ", thread != self ? thread : other_thread, " ", did,
         " with no barrier between");
  }
};

// The accesses to all of global memory, by address.
class Watch {
 public:
  using Granule = Accesses[3];  // of each kind
  // What came before no longer counts: a good time to give memory back.
  void begin_launch() {
    if (pages_.size() <= kMostPages) return;
    pages_.clear();
    std::fill_n(found_, kFound, Found());
  }
  Granule& operator[](uint64_t granule) {
    const uint64_t number = granule / kPage;
    Found& found = found_[number % kFound];
    if (found.number != number) {
      std::unique_ptr<Granule[]>& page = pages_[number];
      if (!page) page.reset(new Granule[kPage]);
      found = {number, page.get()};
    }
    return found.page[granule % kPage];
  }

 private:
  static constexpr uint64_t kPage = 1024, kFound = 256, kMostPages = 2048;
  struct Found {  // a page that was asked for lately: a search for each access would take most of the time
    uint64_t number = ~uint64_t{0};
    Granule* page = nullptr;
  };
  std::unordered_map<uint64_t, std::unique_ptr<Granule[]>> pages_;
  Found found_[kFound];
};
inline Watch watch;

inline void access(Kind kind, const void* p, size_t bytes, const Site& site) {
  static constexpr const char* kDoes[] = {"reads", "writes", "changes"};
  static constexpr const char* kDid[] = {"has read", "has written", "has changed"};
  if (!state.current) return;  // the host
  const auto at = reinterpret_cast<uint64_t>(p);
  for (uint64_t granule = at / kGranule; granule <= (at + bytes - 1) / kGranule; ++granule) {
    Watch::Granule& all = watch[granule];
    for (const Kind other : {kRead, kWrite, kAtomic}) {
      if (other != kind || kind == kWrite) all[other].check(state, kDoes[kind], kDid[other], site);
    }
    all[kind].add(state);
  }
}

struct Index {  // into global memory, with the line that it stands in
  template <typename I, typename = std::enable_if_t<std::is_integral_v<I>>>
  Index(I i, const Site& site = Site::here()) : i(static_cast<int64_t>(i)), site(site) {}
  int64_t i;
  Site site;
};

// p[i], before it is known whether it will be read or written. Not to be kept: `const T x = p[i]`, never auto.
template <typename Place>
class Element {
  using Value = typename Place::Value;

 public:
  explicit Element(const Place& place) : place_(place) {}
  Element(const Element&) = delete;
  operator Value() const&& { return place_.read(); }
  Value operator=(const Value& x) const&& { return place_.write(x); }
  Value operator=(const Element& other) const&& { return place_.write(other.place_.read()); }
  template <typename U>
  Value operator+=(U&& x) const&& {
    return place_.write(static_cast<Value>(place_.read() + std::forward<U>(x)));
  }
  template <typename U>
  Value operator-=(U&& x) const&& {
    return place_.write(static_cast<Value>(place_.read() - std::forward<U>(x)));
  }

 private:
  const Place place_;
};

}  // namespace detail

// Runs body(shared memory) for every thread of every block.
inline void run(const Launch& launch, const std::function<void(char*)>& body) {
  detail::State& s = detail::state;
  if (s.current) detail::fail("a launch within a launch");
  s.launch = launch;
  if (launch.blocks < 1 || launch.blocks > INT32_MAX || launch.threads < 1 || launch.threads > detail::kMaxThreads ||
      launch.threads % kWarp != 0 || launch.shared_bytes < 0 || launch.shared_bytes > detail::kMaxShared) {
    detail::fail("bad launch: ", launch.blocks, " blocks of ", launch.threads, " threads (multiples of 32) and ",
                 launch.shared_bytes, " shared bytes");
  }
  s.random = detail::hash(launch.seed ? launch.seed : seed());
  s.noise = launch.noise ? launch.noise : s.random;
  s.body = &body;

  const size_t steps = (static_cast<size_t>(launch.shared_bytes) + detail::kStep - 1) / detail::kStep;
  s.shared.resize(steps);
  s.cells.resize(std::max(s.cells.size(), steps * detail::kStep));
  if (s.fibers.size() < static_cast<size_t>(launch.threads)) s.fibers.resize(launch.threads);
  for (size_t i = 0; i < s.fibers.size(); ++i) {
    s.fibers[i].thread = static_cast<int>(i);
    s.fibers[i].waits = nullptr;
    if (s.abandoned) s.fibers[i].started = false;
  }
  s.any = false;
  s.barrier.threads = launch.threads;
  s.barrier.arrived = 0;
  for (int i = 0; i < launch.threads / kWarp; ++i) {
    s.warps[i].meeting.first = i * kWarp;
    s.warps[i].meeting.threads = kWarp;
    s.warps[i].meeting.arrived = 0;
  }

  std::vector<int64_t> order(launch.blocks);
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int64_t i = launch.blocks - 1; i > 0; --i) std::swap(order[i], order[s.below(i + 1)]);
  s.launch_epoch = s.barrier.epoch + 1;
  detail::watch.begin_launch();
  s.abandoned = true;  // if what follows throws
  for (const int64_t block : order) detail::run_block(block);
  s.abandoned = false;
}

inline int thread() { return detail::state.current->thread; }
inline int threads() { return detail::state.launch.threads; }
inline int64_t block() { return detail::state.block; }
inline int64_t blocks() { return detail::state.launch.blocks; }

inline void barrier(detail::Site site = detail::Site::here()) { detail::meet_block(false, {"barrier", site}); }
inline bool barrier_or(bool x, detail::Site site = detail::Site::here()) {
  return detail::meet_block(x, {"barrier_or", site});
}
template <typename T>
T shuffle_down(T x, int delta, detail::Site site = detail::Site::here()) {
  return detail::shuffle(x, thread() % kWarp + delta, delta, {"shuffle_down", site});
}
template <typename T>
T shuffle_up(T x, int delta, detail::Site site = detail::Site::here()) {
  return detail::shuffle(x, thread() % kWarp - delta, delta, {"shuffle_up", site});
}
template <typename T>
T shuffle_xor(T x, int mask, detail::Site site = detail::Site::here()) {
  return detail::shuffle(x, thread() % kWarp ^ mask, mask, {"shuffle_xor", site});
}
inline bool warp_any(bool x, detail::Site site = detail::Site::here()) {
  return detail::meet_warp(x, 0, {"warp_any", site}, [](detail::Warp& warp) {
    std::fill_n(warp.out, kWarp, std::any_of(warp.in, warp.in + kWarp, [](uint64_t x) { return x != 0; }));
  });
}
inline uint32_t ballot(bool x, detail::Site site = detail::Site::here()) {
  return static_cast<uint32_t>(detail::meet_warp(x, 0, {"ballot", site}, [](detail::Warp& warp) {
    uint64_t lanes = 0;
    for (int lane = 0; lane < kWarp; ++lane) lanes |= warp.in[lane] << lane;
    std::fill_n(warp.out, kWarp, lanes);
  }));
}

// Memory of the device from `begin` on, size elements of it: a pointer to one of them.
template <typename T>
class Global {
  struct Place {
    using Value = std::remove_const_t<T>;
    T* p;
    detail::Site site;
    Value read() const {
      detail::access(detail::kRead, p, sizeof(T), site);
      return *p;
    }
    Value write(const Value& x) const {
      static_assert(!std::is_const_v<T>, "read only");
      detail::access(detail::kWrite, p, sizeof(T), site);
      return *p = x;
    }
  };

 public:
  Global() = default;
  Global(std::nullptr_t) {}
  Global(T* begin, int64_t size) : begin_(begin), size_(begin ? size : 0) {
    if (size < 0) detail::fail("global memory of ", size, " elements");
    if (reinterpret_cast<uintptr_t>(begin) % alignof(T) != 0) detail::fail("misaligned global memory");
  }
  template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T> && !std::is_same_v<U, T>>>
  Global(const Global<U>& other) : begin_(other.begin_), size_(other.size_), at_(other.at_) {}

  explicit operator bool() const { return begin_ != nullptr; }
  friend bool operator==(const Global& p, const Global& q) { return p.address() == q.address(); }
  friend bool operator!=(const Global& p, const Global& q) { return p.address() != q.address(); }

  Global operator+(int64_t n) const {
    Global p = *this;
    p.at_ += n;
    return p;
  }
  Global& operator+=(int64_t n) { return *this = *this + n; }
  detail::Element<Place> operator[](const detail::Index& at) const {
    return detail::Element<Place>({checked(at.i, 1), at.site});
  }

  // The first of n elements from i on, all of which exist.
  T* checked(int64_t i, int64_t n) const {
    if (!begin_) detail::fail("a null pointer, index ", i);
    if (at_ + i < 0 || at_ + i > size_ - n) {
      detail::fail("global memory out of bounds: index ", at_ + i, " to ", at_ + i + n - 1, " of ", size_);
    }
    return begin_ + (at_ + i);
  }
  template <typename V>
  T* checked_vector(int64_t i) const {
    constexpr size_t size = sizeof(V);
    static_assert(size >= 2 && size <= 16 && (size & (size - 1)) == 0 && size % sizeof(T) == 0, "no such access");
    static_assert(std::is_trivially_copyable_v<V>);
    T* const p = checked(i, size / sizeof(T));
    if (reinterpret_cast<uintptr_t>(p) % size != 0) {
      detail::fail("misaligned vector access: index ", at_ + i, " of ", size_, " lies at no multiple of ", size,
                   " bytes");
    }
    return p;
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(begin_) + at_ * sizeof(T); }

 private:
  template <typename>
  friend class Global;
  T* begin_ = nullptr;
  int64_t size_ = 0, at_ = 0;
};

template <typename T>
Global<T> global(T* p, int64_t size) {
  return Global<T>(p, size);
}

inline void atomic_or(Global<uint32_t> p, const detail::Index& at, uint32_t bits) {
  uint32_t* const word = p.checked(at.i, 1);
  detail::access(detail::kAtomic, word, sizeof *word, at.site);
  *word |= bits;
}
inline void atomic_and(Global<uint32_t> p, const detail::Index& at, uint32_t bits) {
  uint32_t* const word = p.checked(at.i, 1);
  detail::access(detail::kAtomic, word, sizeof *word, at.site);
  *word &= bits;
}
inline void atomic_add(Global<int64_t> p, const detail::Index& at, int64_t x) {
  int64_t* const sum = p.checked(at.i, 1);
  detail::access(detail::kAtomic, sum, sizeof *sum, at.site);
  *sum += x;
}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

template <typename V, typename T>
V load_as(Global<T> p, const detail::Index& at) {
  V x;
  const T* const from = p.template checked_vector<V>(at.i);
  detail::access(detail::kRead, from, sizeof x, at.site);
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <typename V, typename T>
void store_as(Global<T> p, const detail::Index& at, V x) {
  T* const to = p.template checked_vector<V>(at.i);
  detail::access(detail::kWrite, to, sizeof x, at.site);
  std::memcpy(to, &x, sizeof x);
}
template <typename T>
uint64_t address(Global<T> p) {
  return p.address();
}

// An array in the block's shared memory: a pointer to one of its elements.
template <typename T>
class Shared {
  using Value = std::remove_const_t<T>;
  struct Place {
    using Value = Shared::Value;
    const Shared& array;
    int64_t i;
    Value read() const { return array.read(i); }
    Value write(const Value& x) const { return array.write(i, x); }
  };

 public:
  Shared() = default;
  Shared(int64_t begin, int64_t count) : begin_(begin), count_(count) {}  // at byte `begin` of the block's
  template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T> && !std::is_same_v<U, T>>>
  Shared(const Shared<U>& other) : begin_(other.begin_), count_(other.count_), at_(other.at_) {}

  detail::Element<Place> operator[](int64_t i) const { return detail::Element<Place>({*this, i}); }
  Shared operator+(int64_t n) const {
    Shared p = *this;
    p.at_ += n;
    return p;
  }
  Shared& operator+=(int64_t n) { return *this = *this + n; }

 private:
  template <typename>
  friend class Shared;

  template <typename... Parts>
  [[noreturn]] void fail(int64_t i, const Parts&... parts) const {
    detail::fail(parts..., "index ", at_ + i, " of ", count_, " of the shared array at byte ", begin_);
  }
  [[noreturn]] void race(int64_t i, const char* does, const char* other_did, int other) const {
    fail(i, "data race: ", does, " what thread ", other, " ", other_did, " with nothing between: ");
  }
  detail::Cell& cell(int64_t i) const {
    if (at_ + i < 0 || at_ + i >= count_) fail(i, "shared memory out of bounds: ");
    return detail::state.cells[begin_ + at_ + i];
  }
  void check_writer(int64_t i, const detail::Cell& c, const char* does) const {
    const bool now = c.written == detail::state.barrier.epoch;
    if (now && detail::unordered(c.writer, c.written_warp)) race(i, does, "wrote", c.writer);
  }
  // Atomics are ordered among themselves alone, until the next barrier.
  void check_changers(int64_t i, const detail::Cell& c, const char* does) const {
    if (c.changed != detail::state.barrier.epoch) return;
    const int self = detail::state.current->thread;
    if (c.changer != self) race(i, does, "has changed", c.changer);
    if (c.other_changer != self) race(i, does, "has changed", c.other_changer);
  }
  char* bytes(int64_t i) const { return detail::state.bytes() + begin_ + (at_ + i) * static_cast<int64_t>(sizeof(T)); }

  void check_readers(int64_t i, const detail::Cell& c, const char* does) const {
    if (c.read != detail::state.barrier.epoch) return;
    for (const int thread : {c.reader, c.other}) {
      if (detail::unordered(thread, c.read_warp)) race(i, does, "read", thread);
    }
  }

  Value read(int64_t i) const {
    detail::State& s = detail::state;
    detail::Cell& c = cell(i);
    if (c.written < s.first_epoch) fail(i, "uninitialised shared memory: reads ");
    check_writer(i, c, "reads");
    check_changers(i, c, "reads");
    const auto self = static_cast<uint16_t>(s.current->thread);
    const uint32_t epoch = s.warp().meeting.epoch;
    const bool one_warp = c.reader / kWarp == c.other / kWarp, its_warp = c.reader / kWarp == self / kWarp;
    if (c.read != s.barrier.epoch || (one_warp && its_warp && c.read_warp != epoch)) {
      c.read = s.barrier.epoch;
      c.read_warp = epoch;
      c.reader = c.other = self;
    } else if (one_warp && c.reader != self) {
      c.other = self;
    }
    Value x;
    std::memcpy(&x, bytes(i), sizeof x);
    return x;
  }

  Value write(int64_t i, const Value& x) const {
    static_assert(!std::is_const_v<T>, "read only");
    detail::State& s = detail::state;
    detail::Cell& c = cell(i);
    check_writer(i, c, "writes");
    check_changers(i, c, "writes");
    check_readers(i, c, "writes");
    c.written = s.barrier.epoch;
    c.written_warp = s.warp().meeting.epoch;
    c.writer = static_cast<uint16_t>(s.current->thread);
    std::memcpy(bytes(i), &x, sizeof x);
    return x;
  }

  Value add(int64_t i, const Value& x) const {
    detail::Cell& c = cell(i);
    if (c.written < detail::state.first_epoch) fail(i, "uninitialised shared memory: changes ");
    check_writer(i, c, "changes");
    check_readers(i, c, "changes");
    const uint32_t epoch = detail::state.barrier.epoch;
    const auto self = static_cast<uint16_t>(detail::state.current->thread);
    if (c.changed != epoch) c.changer = c.other_changer = self;
    if (c.changer != self) c.other_changer = self;
    c.changed = epoch;
    Value old;
    std::memcpy(&old, bytes(i), sizeof old);
    const Value sum = old + x;
    std::memcpy(bytes(i), &sum, sizeof sum);
    return old;
  }
  friend uint32_t atomic_add(Shared<uint32_t> p, int64_t i, uint32_t x);

  int64_t begin_ = 0, count_ = 0, at_ = 0;
};
inline uint32_t atomic_add(Shared<uint32_t> p, int64_t i, uint32_t x) { return p.add(i, x); }

// Every thread constructs its own over the same bytes, and takes the same arrays in the same order.
class SharedMemory {
 public:
  explicit SharedMemory(char* begin) {
    if (begin != detail::state.bytes()) detail::fail("shared memory that is not the launch's");
  }
  template <typename T>
  Shared<T> take(int count) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= detail::kStep);
    std::vector<detail::Array>& arrays = detail::state.arrays;
    const detail::Array array = {at_, count, &detail::type_of<T>};
    at_ += static_cast<int64_t>(sizeof(T)) * count;
    if (count < 0 || at_ > detail::state.launch.shared_bytes) {
      detail::fail("past the launch's shared memory: ", count, " elements of ", sizeof(T), " bytes at byte ",
                   array.begin, " of ", detail::state.launch.shared_bytes);
    }
    at_ = (at_ + detail::kStep - 1) / detail::kStep * detail::kStep;
    if (taken_ == arrays.size()) arrays.push_back(array);
    if (!(arrays[taken_++] == array)) detail::fail("threads divide shared memory differently, at byte ", array.begin);
    return Shared<T>(array.begin, count);
  }

 private:
  int64_t at_ = 0;
  size_t taken_ = 0;
};

namespace detail {

inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// The value of a fast function: up to so many ulp off what is true, differently for every argument and noise.
inline float perturbed(double y, float argument, double ulps) {
  const auto nearest = static_cast<float>(y);
  if (!std::isfinite(nearest) || std::fabs(nearest) < FLT_MIN) return flush(nearest);
  const double ulp = static_cast<double>(bits_float(float_bits(nearest) & 0x7f800000)) * FLT_EPSILON;
  const double unit = static_cast<double>(hash(float_bits(argument) ^ state.noise) >> 11) * 0x1p-53;
  return flush(static_cast<float>(y + (2 * unit - 1) * (ulps - 0.5) * ulp));  // rounding may add the other half
}

}  // namespace detail

// By the PTX manual 2^0 is 1, 2^x is good to 2 ulp, and a reciprocal to 1. That 1 / 2^n is exact it does not say.
inline float exp2_fast(float x) {
  return x == 0 ? 1 : detail::perturbed(std::exp2(static_cast<double>(detail::flush(x))), x, 2);
}
inline float reciprocal_fast(float x) { return detail::perturbed(1.0 / static_cast<double>(detail::flush(x)), x, 1); }

using roadmap::bfloat_to_float;
using roadmap::bits_float;
using roadmap::float_bits;
using roadmap::float_to_bfloat;
using roadmap::float_to_half;
using roadmap::half_to_float;

}  // namespace roadmap::simt
