// What happens around the row kernel: the reduction of the losses, the gradient scaled in backward, where the ranks of
// each row begin, and what surrounds the matrix products of an embedding loss.
#pragma once

#include "elements.h"
#include "pairs.cuh"

namespace roadmap::cuda {

// --- one block: sums in a fixed order --------------------------------------------------------------------------------

// The sum over a block, for every thread. scratch: [warps]
ROADMAP_DEVICE double block_sum(double x, const simt::Shared<double>& scratch) {
  for (int delta = simt::kWarp / 2; delta > 0; delta /= 2) x += simt::shuffle_down(x, delta);
  simt::barrier();  // others may still read what was here
  if (simt::thread() % simt::kWarp == 0) scratch[simt::thread() / simt::kWarp] = x;
  simt::barrier();
  double total = 0;
  for (int w = 0; w < simt::threads() / simt::kWarp; ++w) total += scratch[w];
  return total;
}

template <typename T>
ROADMAP_DEVICE void reduce_losses(const ReduceParams<T>& p, char* shared) {
  simt::SharedMemory memory(shared);
  const simt::Shared<double> scratch = memory.take<double>(simt::threads() / simt::kWarp);
  double loss = 0, ranked = 0;
  for (int64_t row = simt::thread(); row < p.rows; row += simt::threads()) {
    loss += static_cast<double>(p.loss[row]);
    ranked += p.count[row] > 0;
  }
  loss = block_sum(loss, scratch);
  ranked = block_sum(ranked, scratch);
  const double by = p.mean ? larger(ranked, 1.0) : 1.0;
  if (simt::thread() == 0) p.reduced[0] = static_cast<T>(loss / by);
  for (int64_t i = simt::thread(); i < p.factors; i += simt::threads()) {
    p.factor[i] = static_cast<T>(static_cast<double>(p.factor[i]) / by);
  }
}

ROADMAP_DEVICE void find_starts(const StartParams& p, char* shared) {
  simt::SharedMemory memory(shared);
  const simt::Shared<int64_t> sums = memory.take<int64_t>(simt::threads());
  const int me = simt::thread();
  const int64_t begin = p.rows * me / simt::threads(), end = p.rows * (me + 1) / simt::threads();
  int64_t own = 0;
  for (int64_t row = begin; row < end; ++row) own += p.counts[2 * row];
  sums[me] = own;
  simt::barrier();
  int64_t at = 0;
  for (int other = 0; other < me; ++other) at += sums[other];
  for (int64_t row = begin; row < end; ++row) {
    p.first[row] = at;
    at += p.counts[2 * row];
  }
  if (me == simt::threads() - 1) p.first[p.rows] = at;
}

// --- scale_rows ------------------------------------------------------------------------------------------------------

// A factor in two parts, m 2^e with 1 <= |m| < 2: of a half type it may pass float's range where the product does not.
struct SplitFactor {
  float mantissa, power, power_too;
  explicit ROADMAP_DEVICE SplitFactor(double by) {
    int e = 0;
    mantissa = static_cast<float>(frexp(by, &e));
    if (mantissa == 0 || !is_finite(by)) e = 0;
    e = e < -250 ? -250 : e > 250 ? 250 : e;
    power = static_cast<float>(exp2(static_cast<double>(e / 2)));
    power_too = static_cast<float>(exp2(static_cast<double>(e - e / 2)));
  }
};

ROADMAP_DEVICE float scaled(float x, float by) { return x == 0 ? 0.0f : x * by; }  // whatever arrives: no 0 x infinity
ROADMAP_DEVICE double scaled(double x, double by) { return x == 0 ? 0.0 : x * by; }
ROADMAP_DEVICE Half scaled(Half x, const SplitFactor& by) {
  const float value = simt::half_to_float(x.bits);
  return {value == 0 ? uint16_t(0) : simt::float_to_half(value * by.mantissa * by.power * by.power_too)};
}
ROADMAP_DEVICE BFloat scaled(BFloat x, const SplitFactor& by) {
  const float value = simt::bfloat_to_float(x.bits);
  return {value == 0 ? uint16_t(0) : simt::float_to_bfloat(value * by.mantissa * by.power * by.power_too)};
}
ROADMAP_DEVICE float factor_as(double by, float) { return static_cast<float>(by); }
ROADMAP_DEVICE double factor_as(double by, double) { return by; }
ROADMAP_DEVICE SplitFactor factor_as(double by, Half) { return SplitFactor(by); }
ROADMAP_DEVICE SplitFactor factor_as(double by, BFloat) { return SplitFactor(by); }

// Blocks take segments of rows in turn. Where nothing changes in place, nothing is read.
template <typename S>
ROADMAP_DEVICE void scale_rows(const ScaleParams<S>& p) {
  constexpr int kEach = 16 / sizeof(S);
  for (int64_t task = simt::block(); task < p.rows * p.segments; task += simt::blocks()) {
    const int64_t row = task / p.segments, segment = task % p.segments, from = row * p.columns;
    const double product =
        static_cast<double>(p.weight[p.one_weight ? 0 : row]) * static_cast<double>(p.factor[p.one_factor ? 0 : row]);
    if (product == 1 && p.in_place) {
      if (p.one_weight && p.one_factor) return;
      continue;
    }
    const auto by = factor_as(product, S{});
    // Whole vectors from the first address that is a multiple of 16 in both; the rest one by one.
    const uint64_t past = simt::address(p.gradient + from) % 16;
    const bool alike = simt::address(p.out + from) % 16 == past;
    const int64_t head = smaller<int64_t>((16 - past) % 16 / sizeof(S), p.columns);
    const int64_t whole = alike ? (p.columns - head) / kEach : 0;
    const int64_t stride = int64_t(simt::threads()) * p.segments, first = segment * simt::threads() + simt::thread();
    for (int64_t v = first; v < whole; v += kScaleVectors * stride) {
      Vector<S> x[kScaleVectors];  // all on their way before the first is written: a store holds back later loads
#pragma unroll
      for (int k = 0; k < kScaleVectors; ++k) {
        if (v + k * stride < whole) x[k] = simt::load_as<Vector<S>>(p.gradient, from + head + (v + k * stride) * kEach);
      }
#pragma unroll
      for (int k = 0; k < kScaleVectors; ++k) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) x[k].at[j] = scaled(x[k].at[j], by);
        if (v + k * stride < whole) simt::store_as(p.out, from + head + (v + k * stride) * kEach, x[k]);
      }
    }
    for (int64_t i = first; i < p.columns - whole * kEach; i += stride) {
      const int64_t j = i < head ? i : i + whole * kEach;
      const S x = p.gradient[from + j];
      p.out[from + j] = scaled(x, by);
    }
  }
}

// --- around the products ---------------------------------------------------------------------------------------------

// A warp a row.
template <typename S>
ROADMAP_DEVICE void remove_radial(const RadialParams<S>& p) {
  using T = Accumulation<S>;
  const int lane = simt::thread() % simt::kWarp, warps = simt::threads() / simt::kWarp;
  const int64_t row = simt::block() * warps + simt::thread() / simt::kWarp;
  if (row >= p.rows) return;  // with all of its warp
  T dot = 0;
  for (int64_t j = lane; j < p.dimension; j += simt::kWarp) {
    dot += widen(p.x[row * p.stride + j]) * p.gradient[row * p.dimension + j];
  }
  for (int mask = simt::kWarp / 2; mask > 0; mask /= 2) dot += simt::shuffle_xor(dot, mask);
  const T scale = p.scale[row], by = dot * scale * scale;
  for (int64_t j = lane; j < p.dimension; j += simt::kWarp) {
    const T gradient = p.gradient[row * p.dimension + j];
    p.gradient[row * p.dimension + j] = gradient - widen(p.x[row * p.stride + j]) * by;
  }
}

// A block takes a tile above the diagonal and its mirror image; both are read before either is written.
template <typename T>
ROADMAP_DEVICE void symmetrise(const SymmetriseParams<T>& p, char* shared) {
  simt::SharedMemory memory(shared);
  const simt::Shared<T> upper = memory.take<T>(kTile * (kTile + 1));  // a column more: no two lanes in one bank
  const simt::Shared<T> lower = memory.take<T>(kTile * (kTile + 1));
  const int64_t tiles = (p.n + kTile - 1) / kTile;
  const int64_t top = simt::block() / tiles * kTile, left = simt::block() % tiles * kTile;
  if (left < top) return;
  const int x = simt::thread() % kTile, rows = simt::threads() / kTile;
  for (int y = simt::thread() / kTile; y < kTile; y += rows) {
    if (top + y < p.n && left + x < p.n) upper[y * (kTile + 1) + x] = p.matrix[(top + y) * p.n + left + x];
    if (left + y < p.n && top + x < p.n) lower[y * (kTile + 1) + x] = p.matrix[(left + y) * p.n + top + x];
  }
  simt::barrier();
  for (int y = simt::thread() / kTile; y < kTile; y += rows) {
    if (top + y < p.n && left + x < p.n) {
      const T a = upper[y * (kTile + 1) + x], b = lower[x * (kTile + 1) + y];
      p.matrix[(top + y) * p.n + left + x] = a + b;
    }
    if (left + y < p.n && top + x < p.n && left > top) {
      const T a = upper[x * (kTile + 1) + y], b = lower[y * (kTile + 1) + x];
      p.matrix[(left + y) * p.n + top + x] = a + b;
    }
  }
}

}  // namespace roadmap::cuda
