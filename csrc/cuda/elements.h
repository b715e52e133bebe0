// Parameters of the kernels around the row kernel (elements.cuh), for host and device.
#pragma once

#include "rows.h"

namespace roadmap::cuda {

constexpr int kTile = 32;         // rows and columns of a tile of symmetrise
constexpr int kScaleVectors = 4;  // of 16 bytes, of a thread of scale_rows
constexpr int kElementThreads = 256;
constexpr int kOneBlock = 512;  // threads of a kernel of one block

// The reduced loss, and what its gradients are multiplied by.
template <typename T>
struct ReduceParams {
  int64_t rows = 0;
  bool mean = false;              // over the rows that have a positive; else the sum
  Global<const T> loss{};         // [rows]
  Global<const int32_t> count{};  // [rows]  positives
  Global<T> reduced{};            // [1]
  Global<T> factor{};             // [factors]  multiplied by the weight of a row's loss in the reduced one
  int64_t factors = 0;
};

// out = weight x factor x gradient, row by row.
template <typename S>
struct ScaleParams {
  int64_t rows = 0, columns = 0;
  Global<const S> gradient{};              // [rows, columns]
  Global<const Accumulation<S>> weight{};  // [rows], or [1] for all
  Global<const Accumulation<S>> factor{};  // [rows], or [1] for all
  bool one_weight = false, one_factor = false, in_place = false;
  Global<S> out{};       // [rows, columns]
  int64_t segments = 1;  // of a row
  int threads = kElementThreads;
};

// Where the positives of each row begin among all.
struct StartParams {
  int64_t rows = 0;
  Global<const int64_t> counts{};  // [rows, 2]  positives, negatives
  Global<int64_t> first{};         // [rows + 1]
};

// gradient -= x (x . gradient) scale^2: what normalising x leaves of its gradient.
template <typename S>
struct RadialParams {
  int64_t rows = 0, dimension = 0, stride = 0;  // of x; the gradient is contiguous
  Global<Accumulation<S>> gradient{};           // [rows, dimension]
  Global<const S> x{};                          // [rows, dimension]
  Global<const Accumulation<S>> scale{};        // [rows]  1 / |x|
};

// matrix + matrix', in its own place.
template <typename T>
struct SymmetriseParams {
  int64_t n = 0;
  Global<T> matrix{};  // [n, n]
};

}  // namespace roadmap::cuda
