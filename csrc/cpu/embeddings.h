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

// Asks the system for large pages under memory that is about to be written for the first time. A hint: page by page,
// the first touch of 32 MiB costs 7 ms, and 2 ms so.
void use_large_pages(void* begin, int64_t bytes);

}  // namespace roadmap
