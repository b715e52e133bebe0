// Included before a source of csrc/cuda: its row kernels once more, with pieces so short that small inputs have many.
#include "../../csrc/cuda/rows.h"

#define kPiece 32
#define launch_rows launch_short_rows
