// The emulator's own test: kernels in the style of csrc/cuda/, right ones and such as have one fault each. self_test
// NAME runs one of them under 20 seeds and prints a line for each, "ok" or what was caught; without NAME, it lists
// them. Whatever a fault was, a right kernel has to run after it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt.h"

using namespace roadmap::simt;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
using Results = std::vector<double>;  // which no seed may change

void expect(bool ok, const char* what) {
  if (!ok) throw std::logic_error(std::string("wrong: ") + what);
}

struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(8) Half4 {
  uint16_t x, y, z, w;
};

template <typename T>
Global<T> all(std::vector<T>& x) {
  return global(x.data(), static_cast<int64_t>(x.size()));
}

// Kernels

struct Rows {
  Global<const float> x = nullptr;
  Global<float> y = nullptr;
  int64_t n = 0;  // of a row, one a block
};
static_assert(std::is_trivially_copyable_v<Rows>);

template <typename T>
ROADMAP_DEVICE T block_sum(T x, Shared<T> of_warps) {
  for (int delta = kWarp / 2; delta > 0; delta /= 2) x += shuffle_down(x, delta);
  if (thread() % kWarp == 0) of_warps[thread() / kWarp] = x;
  barrier();
  T sum = 0;
  for (int i = 0; i < threads() / kWarp; ++i) sum += of_warps[i];
  barrier();  // of_warps may be used again
  return sum;
}

template <typename T>
ROADMAP_DEVICE void sum_rows(const Rows& p, char* memory) {
  SharedMemory shared(memory);
  const auto of_warps = shared.take<T>(threads() / kWarp);
  const Global<const float> row = p.x + block() * p.n;
  T sum = 0;
  for (int64_t i = thread(); i < p.n; i += threads()) sum += static_cast<T>(row[i]);
  sum = block_sum(sum, of_warps);
  const T again = block_sum(sum, of_warps);
  if (thread() == 0) p.y[block()] = static_cast<float>(sum + again / static_cast<T>(threads()));
}

ROADMAP_DEVICE void prefix_sums(const Rows& p, char* memory) {  // n = threads
  SharedMemory shared(memory);
  const auto before = shared.take<float>(threads() / kWarp);
  const int lane = thread() % kWarp;
  float x = (p.x + block() * p.n)[thread()];
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const float other = shuffle_up(x, delta);
    if (lane >= delta) x += other;
  }
  if (lane == kWarp - 1) before[thread() / kWarp] = x;
  barrier();
  if (thread() == 0) {
    float sum = 0;
    for (int i = 0; i < threads() / kWarp; ++i) {
      const float of_warp = before[i];
      before[i] = sum;
      sum += of_warp;
    }
  }
  barrier();
  p.y[block() * p.n + thread()] = x + before[thread() / kWarp];
}

template <typename T>
ROADMAP_DEVICE void shuffled(Global<T> out) {
  const int t = thread(), lane = t % kWarp;
  const T x = static_cast<T>(t) + static_cast<T>(0.5);
  expect(shuffle_down(x, 3) == x + (lane + 3 < kWarp ? 3 : 0), "shuffle_down");
  expect(shuffle_up(x, 31) == x - (lane == 31 ? 31 : 0), "shuffle_up");
  expect(shuffle_xor(x, 16) == x + (lane < 16 ? 16 : -16), "shuffle_xor");
  out[t] = shuffle_down(x, lane % 2);  // each lane has a source of its own
}

// Correct cases

template <typename T>
Results rows_sum(uint64_t seed) {
  const int64_t rows = 7, n = 129;
  std::vector<float> x(rows * n), y(rows);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 31);
  for (const int size : {32, 96, 1024}) {
    std::fill(y.begin(), y.end(), -1.0f);
    const Rows p = {all(x), all(y), n};
    run({rows, size, 128 * 8, seed}, [&](char* memory) { sum_rows<T>(p, memory); });
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = std::accumulate(x.begin() + r * n, x.begin() + (r + 1) * n, 0.0f);
      expect(y[r] == 2 * sum, "a sum");
    }
  }
  return {y.begin(), y.end()};
}

Results reduction(uint64_t seed) {
  Results all_sums = rows_sum<float>(seed);
  for (const Results& more : {rows_sum<double>(seed), rows_sum<int64_t>(seed), rows_sum<int>(seed)}) {
    all_sums.insert(all_sums.end(), more.begin(), more.end());
  }
  return all_sums;
}

Results prefix_sum(uint64_t seed) {
  const int64_t rows = 3, n = 256;
  std::vector<float> x(rows * n, 0.1f), y(rows * n);
  const Rows p = {all(x), all(y), n};
  run({rows, static_cast<int>(n), 1024, seed}, [&](char* memory) { prefix_sums(p, memory); });
  for (int64_t i = 0; i < rows * n; ++i) expect(std::fabs(y[i] - 0.1 * (i % n + 1)) < 1e-4, "a prefix sum");
  return {y.begin(), y.end()};
}

template <typename T>
void shuffle_type(uint64_t seed, Results& results) {
  std::vector<T> out(64);
  run({1, 64, 0, seed}, [&](char*) { shuffled(all(out)); });
  results.insert(results.end(), out.begin(), out.end());
}

Results shuffles(uint64_t seed) {
  Results results;
  shuffle_type<float>(seed, results);
  shuffle_type<double>(seed, results);
  shuffle_type<int>(seed, results);
  shuffle_type<uint32_t>(seed, results);
  shuffle_type<int64_t>(seed, results);
  shuffle_type<uint64_t>(seed, results);
  return results;
}

Results votes(uint64_t seed) {
  std::vector<int> rounds(4 * 96);
  const Global<int> out = all(rounds);
  run({4, 96, 0, seed}, [&](char*) {
    const int64_t mine = block() * threads() + thread();
    int left = static_cast<int>(mine % 41), warps = 0;
    for (int x = left; warp_any(x > 0); --x) ++warps;  // as many as the warp's most
    int count = 0;
    while (barrier_or(left > 0)) {
      --left;
      ++count;
    }
    out[mine] = 100 * count + warps;
  });
  expect(rounds[0] == 4031 && rounds[95] == 4040, "rounds of votes");
  return {rounds.begin(), rounds.end()};
}

Results atomics(uint64_t seed) {
  std::vector<uint32_t> bits(8);
  std::fill_n(bits.begin() + 4, 4, 0xffffffff);
  const Global<uint32_t> out = all(bits);
  run({5, 64, 0, seed}, [&](char*) {
    const uint32_t bit = 1u << (thread() / 4 + block());
    atomic_or(out, thread() % 4, bit);
    atomic_and(out + 4, thread() % 4, ~bit);
  });
  for (int i = 0; i < 4; ++i) expect(bits[i] == 0xfffff && bits[4 + i] == 0xfff00000, "bits");
  expect(count_bits(bits[0]) == 20 && count_bits(0) == 0, "a count of bits");
  return {bits.begin(), bits.end()};
}

Results atomic_sums(uint64_t seed) {  // of which the first returns what was there
  std::vector<int64_t> sums(2);
  const Global<int64_t> out = all(sums);
  run({5, 64, 256, seed}, [&](char* memory) {
    const Shared<uint32_t> sum = SharedMemory(memory).take<uint32_t>(4);
    if (thread() < 4) sum[thread()] = 0;
    barrier();
    const uint32_t before = atomic_add(sum, thread() % 4, 3u);
    expect(before % 3 == 0 && before < 48, "what was there");
    barrier();
    const uint32_t all = sum[thread() % 4];
    expect(all == 48, "a sum in shared memory");
    atomic_add(out, 0, int64_t(all) << 32);
    atomic_add(out, 1, int64_t(-1));
  });
  expect(sums[0] == (int64_t(5 * 64 * 48) << 32) && sums[1] == -5 * 64, "sums");
  return {sums.begin(), sums.end()};
}

Results vectors(uint64_t seed) {
  alignas(16) float x[64], y[64] = {};
  alignas(8) uint16_t h[128] = {};
  std::iota(x, x + 64, 1.0f);
  const Global<const float> from = global(x, 64);
  const Global<float> to = global(y, 64);
  const Global<uint16_t> halves = global(h, 128);
  expect(address(from + 4) == reinterpret_cast<uint64_t>(x + 4), "an address");
  run({1, 32, 0, seed}, [&](char*) {
    if (thread() >= 16) return;
    const auto v = load_as<Float4>(from, 4 * thread());
    store_as(to + 4, 4 * thread() - 4, Float4{v.w, v.z, v.y, v.x});
    const uint16_t one = float_to_half(v.x), two = float_to_bfloat(v.y);
    expect(half_to_float(one) == v.x && bfloat_to_float(two) == v.y, "halves");
    store_as(halves, 8 * thread() + 4, Half4{one, two, one, two});
    expect(load_as<Half4>(halves + 4, 8 * thread()).y == two, "a vector of halves");
  });
  for (int i = 0; i < 64; ++i) expect(y[i] == static_cast<float>(i / 4 * 4 + 4 - i % 4), "a vector");
  return {y, y + 64};
}

// Through shared memory, within a warp: what strict_warp does not allow.
void exchange_in_warp(const Launch& launch) {
  run(launch, [](char* memory) {
    SharedMemory shared(memory);
    const auto x = shared.take<int>(threads());
    for (int round = 0; round < 3; ++round) {
      x[thread()] = thread() + round;
      warp_any(false);
      expect(x[thread() ^ 5] == (thread() ^ 5) + round, "the neighbour's");
      warp_any(false);
    }
  });
}

Results warp_exchange(uint64_t seed) {
  Launch launch = {2, 64, 256, seed};
  launch.warp_calls_order_memory = true;
  exchange_in_warp(launch);
  return {};
}

// What must not be taken for a fault.
Results shared_elements(uint64_t seed) {
  struct Pair {
    float value;
    int index;
  };
  std::vector<float> out(3 * 64);
  const Global<float> result = all(out);
  run({3, 64, 1024, seed}, [&](char* memory) {
    const int t = thread();
    SharedMemory shared(memory);
    const auto bytes = shared.take<uint8_t>(67);  // neighbours of one word belong to different threads
    const auto none = shared.take<double>(0);
    const auto pairs = shared.take<Pair>(64);
    const auto sums = shared.take<float>(64);
    (void)none;
    bytes[t] = static_cast<uint8_t>(t);
    pairs[t] = Pair{1.5f * static_cast<float>(t), t};
    sums[t] = 1;
    (sums + t)[0] += 2;
    sums[t] -= 0.5;
    barrier();
    const Shared<const Pair> read_only = pairs;
    const Pair other = (read_only + 63)[-t];
    if (t == 0) bytes[64] = bytes[1];
    for (int i = 0; i < 64; ++i) expect(bytes[i] == i, "a byte, which all read");
    barrier();
    pairs[t] = pairs[t];
    barrier();
    const Pair own = pairs[63 - t];
    sums[63 - t] += own.value;
    sums[63 - t] += bytes[63 - t];
    barrier();
    result[64 * block() + t] = sums[t] + other.value;
  });
  for (int i = 0; i < 3 * 64; ++i) {
    const int t = i % 64;
    expect(out[i] == 2.5f + 2.5f * t + 1.5f * (63 - t), "a sum of shared memory");
  }
  return {out.begin(), out.end()};
}

Results global_elements(uint64_t seed) {
  std::vector<uint32_t> x(2 * 64, 1), flags(2), out(4 * 64);
  std::vector<uint16_t> halves(4 * 64);
  const Global<uint32_t> result = all(out), flag = all(flags);
  const Global<uint16_t> narrow = all(halves);
  run({4, 64, 0, seed}, [&](char*) {
    const int t = thread();
    const Global<uint32_t> own = result + 64 * block();
    const Global<const uint32_t> read_only = all(x);
    own[t] = read_only[64 + t] + read_only[7];            // which all blocks read
    narrow[64 * block() + t] = static_cast<uint16_t>(t);  // two threads a word
    own[t] += 2;
    if (block() < 2) atomic_or(flag, block(), 1u << (t % 4));
    barrier();
    const uint32_t other = own[63 - t];
    uint32_t bits = 0;
    if (block() < 2) bits = flag[block()];
    if (block() < 2) expect(bits == 15, "bits of other threads");
    barrier();
    own[t] = other + 1;
  });
  run({2, 32, 0, seed}, [&](char*) {  // another launch may read what any block has written
    for (int i = 0; i < 256; ++i) expect(result[i] == 5 && narrow[i] == i % 64, "an element of another block");
  });
  return {out.begin(), out.end()};
}

Results pointers(uint64_t) {
  std::vector<float> x = {1, 2, 3};
  const Global<float> p = all(x);
  const Global<const float> q = p, null = nullptr, missing = global<const float>(nullptr, 3);
  expect(p && q && !null && !missing && null == nullptr && q != nullptr && Rows{}.x == nullptr, "null");
  expect((p + 5)[-3] == 3 && (q + 1)[0] == 2 && p + 1 == q + 1, "arithmetic");
  return {};
}

// Every thread runs once; who comes first changes with the seed, the block and the barrier.
Results orders(uint64_t seed) {
  struct Order {
    std::vector<int64_t> blocks;
    std::vector<std::vector<int>> threads;  // of a block: before the barrier, and after it
  };
  const auto order = [](uint64_t of_seed) {
    Order seen;
    run({8, 64, 0, of_seed}, [&](char*) {
      if (seen.blocks.empty() || seen.blocks.back() != block()) {
        seen.blocks.push_back(block());
        seen.threads.resize(seen.threads.size() + 2);
      }
      seen.threads[seen.threads.size() - 2].push_back(thread());
      barrier();
      seen.threads.back().push_back(thread());
    });
    return seen;
  };
  Order seen = order(seed);
  const Order again = order(seed), other = order(seed + 1000);
  expect(seen.blocks == again.blocks && seen.threads == again.threads, "one seed, one order");
  expect(seen.blocks.size() == 8 && seen.blocks != other.blocks, "the order of the blocks");
  expect(seen.threads[0] != other.threads[0] && seen.threads[0] != seen.threads[2], "the order of the threads");
  expect(seen.threads[0] != seen.threads[1], "the order after a barrier");
  for (std::vector<int>& threads : seen.threads) {
    std::sort(threads.begin(), threads.end());
    for (int i = 0; i < 64; ++i) expect(threads[i] == i, "all threads");
  }
  std::sort(seen.blocks.begin(), seen.blocks.end());
  for (int i = 0; i < 8; ++i) expect(seen.blocks[i] == i, "all blocks");
  return {};
}

Results fast_functions(uint64_t seed) {
  double worst[2] = {};
  int different = 0, inexact = 0;
  const auto check = [&](int which, float fast, double exact) {
    int exponent;
    std::frexp(exact, &exponent);
    worst[which] = std::max(worst[which], std::fabs(fast - exact) / std::ldexp(1.0, exponent - 24));
    different += fast != static_cast<float>(exact);
  };
  run({1, 32, 0, 1, seed}, [&](char*) {
    for (int i = thread(); i < 2000; i += threads()) {
      const float x = 0.123f * static_cast<float>(i - 1000) + 0.001f;
      check(0, exp2_fast(x), std::exp2(static_cast<double>(x)));
      check(1, reciprocal_fast(x), 1.0 / static_cast<double>(x));
    }
    for (int n = thread(); n < 100; n += threads())
      inexact += reciprocal_fast(std::ldexp(1.0f, n)) != std::ldexp(1.0f, -n);
  });
  expect(worst[0] <= 2.0 && worst[0] > 1.0, "errors of 2^x");
  expect(worst[1] <= 1.0 && worst[1] > 0.75, "errors of 1 / x");
  expect(different > 1500 && inexact > 10, "errors of the fast functions");
  const float denormal = 1e-39f, nan = std::numeric_limits<float>::quiet_NaN();
  expect(exp2_fast(kInfinity) == kInfinity && exp2_fast(-kInfinity) == 0, "2^inf");
  expect(exp2_fast(128) == kInfinity && exp2_fast(127.9999f) < kInfinity && exp2_fast(-127) == 0, "2^x at the ends");
  expect(std::isnan(exp2_fast(nan)) && std::isnan(reciprocal_fast(nan)), "NaN");
  expect(reciprocal_fast(0.0f) == kInfinity && reciprocal_fast(-denormal) == -kInfinity, "1 / 0");
  expect(reciprocal_fast(kInfinity) == 0 && std::signbit(reciprocal_fast(-3e38f)), "1 / inf");
  return {};  // the errors differ between seeds
}

// Faults. Most are one body over 64 threads and two blocks.

template <typename Body>
void run_faulty(uint64_t seed, const Body& body, int blocks = 2) {
  run({blocks, 64, 256, seed}, [&](char* memory) {
    SharedMemory shared(memory);
    body(shared.take<int>(64), thread());
  });
}

template <bool written_first>
Results no_barrier(uint64_t seed) {
  run_faulty(seed, [](Shared<int> x, int t) {
    x[t] = 0;
    barrier();
    if (written_first) x[t] = t;
    const int other = x[63 - t];
    if (!written_first) x[t] = other;
  });
  return {};
}

Results two_writers(uint64_t seed) {
  run_faulty(seed, [](Shared<int> x, int t) { x[t / 2] = 0; });
  return {};
}

Results race_in_warp(uint64_t seed) {
  run_faulty(seed, [](Shared<int> x, int t) {
    x[t] = t;
    warp_any(true);
    x[t] = x[t ^ 1];
  });
  return {};
}

Results race_of_warps(uint64_t seed) {  // a vote is no barrier
  run_faulty(seed, [](Shared<int> x, int t) {
    x[t] = t;
    barrier();
    x[t] = 0;
    warp_any(true);
    const int other = x[t ^ 32];
    (void)other;
  });
  return {};
}

Results race_with_readers(uint64_t seed) {  // of two warps; the writer's own has met, and it has read, too
  const auto body = [](Shared<int> x, int t) {
    x[t] = t;
    barrier();
    const int read = x[7];
    if (t < kWarp) warp_any(true);
    if (t == 1) x[7] = read;
  };
  run_faulty(seed, body, 1);  // one chance only
  return {};
}

Results race_with_late_reader(uint64_t seed) {  // another lane's read is long past
  run_faulty(seed, [](Shared<int> x, int t) {
    x[t] = t;
    barrier();
    int read = 0;
    if (t == 0) read = x[7];
    warp_any(true);
    if (t == 1) read = x[7];
    if (t == 2) x[7] = read;
  });
  return {};
}

template <bool reads>
Results shared_atomic_and_plain(uint64_t seed) {
  run({2, 64, 256, seed}, [&](char* memory) {
    const Shared<uint32_t> x = SharedMemory(memory).take<uint32_t>(64);
    x[thread()] = 0;
    barrier();
    atomic_add(x, 7, 1u);
    if (reads && thread() == 40) {
      const uint32_t sum = x[7];
      (void)sum;
    }
    if (!reads && thread() == 40) x[7] = 0;
  });
  return {};
}

Results strict_warp(uint64_t seed) {
  Launch launch = {2, 64, 256, seed};
  exchange_in_warp(launch);
  return {};
}

// Global memory. One body over two blocks of 64 threads, on 256 words.
template <typename Body>
void run_on_global(uint64_t seed, const Body& body, int blocks = 2) {
  std::vector<uint32_t> words(256);
  run({blocks, 64, 0, seed}, [&](char*) { body(all(words), thread()); });
}

template <bool written_first>
Results global_no_barrier(uint64_t seed) {
  const auto body = [](Global<uint32_t> x, int t) {
    if (written_first) x[t] = 1;
    const uint32_t other = x[63 - t];
    if (!written_first) x[t] = other;
  };
  run_on_global(seed, body, 1);
  return {};
}

Results global_race_in_warp(uint64_t seed) {  // a vote orders no memory
  const auto body = [](Global<uint32_t> x, int t) {
    x[t] = 1;
    warp_any(true);
    const uint32_t other = x[t ^ 1];
    (void)other;
  };
  run_on_global(seed, body, 1);
  return {};
}

template <bool written>
Results global_race_of_blocks(uint64_t seed) {  // which a barrier does not order
  run_on_global(seed, [](Global<uint32_t> x, int t) {
    if (written || block() == 0) x[t] = 1;
    barrier();
    if (written || block() == 0) return;
    const uint32_t other = x[t];
    (void)other;
  });
  return {};
}

Results global_race_of_widths(uint64_t seed) {  // what is 4 bytes to one block, and 8 to another
  run_on_global(seed, [](Global<uint32_t> x, int t) {
    if (block() == 0) {
      x[64 + t] = 1;
    } else if (t < 48) {
      store_as(x, 2 * t, Half4{1, 2, 3, 4});
    }
  });
  return {};
}

template <bool in_block>
Results global_atomic_and_plain(uint64_t seed) {
  run_on_global(seed, [](Global<uint32_t> x, int t) {
    atomic_or(x, in_block ? block() : 0, 1u << (t % 32));
    if (!in_block) barrier();
    const uint32_t bits = x[in_block ? block() : 0];
    (void)bits;
  });
  return {};
}

template <int64_t index>
Results global_index(uint64_t seed) {
  std::vector<float> x(70, 1.0f);
  const Global<const float> p = all(x);
  run({2, 64, 0, seed}, [&](char*) {
    if (thread() == 3) expect((p + 3)[index - 3] == 1, "a value");
  });
  return {};
}

template <int64_t index>
Results shared_index(uint64_t seed) {
  run({2, 64, 1024, seed}, [](char* memory) {
    SharedMemory shared(memory);
    const auto before = shared.take<int>(64), x = shared.take<int>(30), after = shared.take<int>(64);
    before[thread()] = after[thread()] = 0;
    if (thread() == 3) (x + 3)[index - 3] = 1;
  });
  return {};
}

Results null_pointer(uint64_t seed) {
  const Rows p;
  run({1, 32, 128, seed}, [&](char*) { p.y[thread()] = 0; });
  return {};
}

Results uninitialised(uint64_t seed) {  // in the second block, though the first has written all
  std::vector<int> first(1, -1);
  run_faulty(seed, [&](Shared<int> x, int t) {
    if (first[0] < 0) first[0] = static_cast<int>(block());
    if (first[0] == block() || t != 5) x[t] = t;
    barrier();
    const int read = x[5];
    (void)read;
  });
  return {};
}

Results divergent_barrier(uint64_t seed) {
  run_faulty(seed, [](Shared<int>, int t) {
    if (t % 2 == 0) {
      barrier();
    } else {
      barrier();
    }
  });
  return {};
}

Results barriers_too_many(uint64_t seed) {  // for the threads of one warp
  run_faulty(seed, [](Shared<int>, int t) {
    for (int i = 0; i < 2 + t / kWarp; ++i) barrier();
  });
  return {};
}

Results early_return(uint64_t seed) {
  run_faulty(seed, [](Shared<int>, int t) {
    if (t == 40) return;
    barrier();
  });
  return {};
}

Results lanes_missing(uint64_t seed) {  // at a barrier
  run_faulty(seed, [](Shared<int>, int t) {
    if (t != 40) shuffle_down(t, 1);
    barrier();
  });
  return {};
}

Results lanes_gone(uint64_t seed) {
  run_faulty(seed, [](Shared<int>, int t) {
    if (t % kWarp >= 8) shuffle_xor(t, 1);
  });
  return {};
}

Results lanes_elsewhere(uint64_t seed) {
  run_faulty(seed, [](Shared<int>, int t) { t % 2 == 0 ? shuffle_up(t, 1) : shuffle_xor(t, 1); });
  return {};
}

Results shuffle_too_far(uint64_t seed) {
  run_faulty(seed, [](Shared<int>, int t) { shuffle_down(t, 32); });
  return {};
}

template <int offset, bool load>
Results vector_at(uint64_t seed) {
  alignas(16) float x[64] = {};
  const Global<float> p = global(x, 63);
  run({1, 32, 0, seed}, [&](char*) {
    if (thread() != 3) return;
    if (load) load_as<Float4>(p, offset);
    if (!load) store_as<Float4>(p, offset, {});
  });
  return {};
}

Results too_little_shared(uint64_t seed) {
  run({1, 32, 16 + 64 * 4 - 1, seed}, [](char* memory) {
    SharedMemory shared(memory);
    shared.take<uint8_t>(1);
    shared.take<int>(64);
  });
  return {};
}

Results shared_twice(uint64_t seed) {
  run({1, 64, 1024, seed}, [](char* memory) {
    SharedMemory shared(memory);
    if (thread() < 50) shared.take<float>(64);
    if (thread() >= 50) shared.take<int>(64);
  });
  return {};
}

Results odd_threads(uint64_t seed) {
  run({1, 48, 0, seed}, [](char*) {});
  return {};
}

Results stack_overflow(uint64_t seed) {  // just its last byte: a real one would go on into the heap
  run({1, 64, 0, seed}, [](char*) {
    if (thread() == 9) detail::state.current->stack[0] = 0;
  });
  return {};
}

Results fault_after_faults(uint64_t seed) {  // nothing of the first reaches the second
  const auto caught = [](const auto& fault) {
    try {
      fault();
    } catch (const std::runtime_error&) {
      return;
    }
    expect(false, "a fault");
  };
  caught([&] { run_faulty(seed, [](Shared<int>, int t) { t > 0 && barrier_or(true); }); });
  run({1, 64, 0, seed}, [](char*) { expect(!barrier_or(false), "a vote"); });
  caught([&] { lanes_gone(seed); });
  return early_return(seed);
}

struct Case {
  const char* name;
  Results (*run)(uint64_t seed);
};
const Case kCases[] = {
    {"reduction", reduction},
    {"prefix_sum", prefix_sum},
    {"shuffles", shuffles},
    {"votes", votes},
    {"atomics", atomics},
    {"atomic_sums", atomic_sums},
    {"vectors", vectors},
    {"warp_exchange", warp_exchange},
    {"shared_elements", shared_elements},
    {"global_elements", global_elements},
    {"pointers", pointers},
    {"orders", orders},
    {"fast_functions", fast_functions},
    {"no_barrier_after_write", no_barrier<true>},
    {"no_barrier_after_read", no_barrier<false>},
    {"two_writers", two_writers},
    {"race_in_warp", race_in_warp},
    {"race_of_warps", race_of_warps},
    {"race_with_readers", race_with_readers},
    {"race_with_late_reader", race_with_late_reader},
    {"shared_atomic_and_read", shared_atomic_and_plain<true>},
    {"shared_atomic_and_write", shared_atomic_and_plain<false>},
    {"strict_warp", strict_warp},
    {"global_no_barrier_after_write", global_no_barrier<true>},
    {"global_no_barrier_after_read", global_no_barrier<false>},
    {"global_race_in_warp", global_race_in_warp},
    {"global_two_writers", global_race_of_blocks<true>},
    {"global_race_of_blocks", global_race_of_blocks<false>},
    {"global_race_of_widths", global_race_of_widths},
    {"global_atomic_without_barrier", global_atomic_and_plain<true>},
    {"global_atomic_of_blocks", global_atomic_and_plain<false>},
    {"global_past_end", global_index<70>},
    {"global_negative", global_index<-1>},
    {"shared_past_end", shared_index<30>},
    {"shared_negative", shared_index<-1>},
    {"null_pointer", null_pointer},
    {"uninitialised", uninitialised},
    {"divergent_barrier", divergent_barrier},
    {"barriers_too_many", barriers_too_many},
    {"early_return", early_return},
    {"lanes_missing", lanes_missing},
    {"lanes_gone", lanes_gone},
    {"lanes_elsewhere", lanes_elsewhere},
    {"shuffle_too_far", shuffle_too_far},
    {"misaligned_load", vector_at<6, true>},
    {"misaligned_store", vector_at<6, false>},
    {"vector_past_end", vector_at<60, true>},
    {"too_little_shared", too_little_shared},
    {"shared_twice", shared_twice},
    {"odd_threads", odd_threads},
    {"stack_overflow", stack_overflow},
    {"fault_after_faults", fault_after_faults},
};

// "ok", or what was caught.
std::string outcome(const Case& c, uint64_t seed, Results* results) {
  try {
    *results = c.run(seed);
    return "ok";
  } catch (const std::exception& e) {
    return e.what();
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool found = argc < 2, ok = true;
  for (const Case& c : kCases) {
    if (argc < 2) std::puts(c.name);
    if (argc < 2 || std::strcmp(argv[1], c.name) != 0) continue;
    found = true;
    Results first, results;
    for (uint64_t s = 1; s <= 20; ++s) {
      std::string line = outcome(c, s, s == 1 ? &first : &results);
      if (s > 1 && line == "ok" && results != first) line = "results differ between seeds";
      if (line != "ok") {
        const std::string after = outcome({"prefix_sum", prefix_sum}, s, &results);
        if (after != "ok") line = "a fault leaves its traces: " + after;
        ok = false;
      }
      std::puts(line.c_str());
    }
  }
  return found && ok ? 0 : 1;
}
