// Exact retrieval metrics of rows of scores on the CPU. Knows nothing of torch.
//
// The positives of a row are collected and sorted; every block of its columns is packed to the scores that reach the
// lowest of them, and these are counted: against each positive where there are few, else through a table of buckets.
// Counts are integers, so that no result depends on instruction set or threads.
#pragma once

#include <cstdint>

#include "rows.h"

namespace roadmap {

// AP, mAP@R, R-precision (NaN without positives) and the smallest rank of a positive (infinite without); all NaN where
// a score that counts is NaN and there is a positive.
constexpr int kRankValues = 4;

template <typename T>  // the scores' own type, and no scales; below 2^31 columns
void rank_metrics(const Matrix&, const Parallel&, double* values);  // [rows, kRankValues]

}  // namespace roadmap
