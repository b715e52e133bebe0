// What the CPU does around the matrix products of an embedding loss. Knows nothing of torch.
#pragma once

#include <cstdint>

#include "rows.h"

namespace roadmap {

// matrix + matrix' [n, n] in its own place: where queries are the references, both shares of a gradient in one product.
template <typename T>
void symmetrise(T* matrix, int64_t n, const Parallel&);

// gradient -= x (x . gradient) scale^2, row by row: what normalising x leaves of its gradient.
template <typename T>
void remove_radial(T* gradient,     // [n, dimension], contiguous
                   const T* x,      // [n, dimension]
                   int64_t stride,  // of the rows of x
                   const T* scale,  // [n]  1 / |x|
                   int64_t n, int64_t dimension, const Parallel&);

// Asks the system for the pages under new memory all at once: one by one, at the first touch of each, they take three
// times as long. Contents stay.
void prefault(void* begin, int64_t bytes, const Parallel&);

}  // namespace roadmap
