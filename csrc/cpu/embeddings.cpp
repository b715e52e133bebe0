// Around the matrix products: see embeddings.h.
#include "embeddings.h"

#include <algorithm>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace roadmap {

template <typename T>
void symmetrise(T* matrix, int64_t n, const Parallel& parallel) {
  constexpr int64_t kTile = 32;  // a tile of each side of the diagonal, and the sums, stay in the L1 cache
  const int64_t tiles = (n + kTile - 1) / kTile;
  parallel.run(tiles, [&](int64_t index, int) {
    // From both ends in turn: a row of tiles is as long as it is far from the last.
    const int64_t upper = index % 2 ? tiles - 1 - index / 2 : index / 2;
    const int64_t top = upper * kTile, height = std::min(kTile, n - top);
    for (int64_t left = top; left < n; left += kTile) {
      const int64_t width = std::min(kTile, n - left);
      T sums[kTile][kTile];
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) sums[i][j] = matrix[(top + i) * n + left + j];
      }
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t i = 0; i < height; ++i) sums[i][j] += matrix[(left + j) * n + top + i];
      }
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) matrix[(top + i) * n + left + j] = sums[i][j];
      }
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t i = 0; i < height; ++i) matrix[(left + j) * n + top + i] = sums[i][j];
      }
    }
  });
}

template <typename T>
void remove_radial(T* gradient, const T* x, int64_t stride, const T* scale, int64_t n, int64_t dimension,
                   const Parallel& parallel) {
  const auto remove = instruction_set().kernels<T>().remove_radial;
  const int64_t rows_a_task = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, dimension));
  parallel.run((n + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    for (int64_t row = task * rows_a_task; row < std::min(n, (task + 1) * rows_a_task); ++row) {
      remove(gradient + row * dimension, x + row * stride, scale[row], dimension);
    }
  });
}

void prefault(void* begin, int64_t bytes, const Parallel& parallel) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE of Linux 5.14, which older headers lack
  constexpr uintptr_t kPiece = uintptr_t(1) << 21;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
  if (first >= last) return;
  parallel.run(static_cast<int64_t>((last - first + kPiece - 1) / kPiece), [&](int64_t piece, int) {
    const uintptr_t at = first + static_cast<uintptr_t>(piece) * kPiece;
    // Where the system refuses, pages come one by one as ever.
    (void)madvise(reinterpret_cast<void*>(at), std::min(kPiece, last - at), kPopulateWrite);
  });
#else
  (void)begin, (void)bytes, (void)parallel;
#endif
}

#define ROADMAP_INSTANTIATE(T)                               \
  template void symmetrise<T>(T*, int64_t, const Parallel&); \
  template void remove_radial<T>(T*, const T*, int64_t, const T*, int64_t, int64_t, const Parallel&);
ROADMAP_INSTANTIATE(float)
ROADMAP_INSTANTIATE(double)

}  // namespace roadmap
