// The CUDA ops on the CPU, as torch.ops.roadmap_ext_emulated: csrc/cuda/ops.cpp as it is, with launchers that run the
// kernel bodies under the emulator. tests/support/emulated_ops.py builds this and puts it in place of the real ops.
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "../../csrc/cuda/ops.cpp"
#if !defined(ROADMAP_PTX)
#include "../../csrc/cuda/boxes.cuh"
#include "../../csrc/cuda/elements.cuh"
#endif

namespace roadmap::cuda {

namespace {

// A small device: few multiprocessors, little workspace and short pieces bring every path within reach of small inputs.
Resources emulated = {2};
constexpr int kShortPiece = 32;
}  // namespace

Resources device_resources() { return emulated; }

#if defined(ROADMAP_PTX)  // the launchers of csrc/cuda as nvcc compiles them, those of rows for two sizes of pieces

template <typename S>
int launch_long_rows(const RowParams<S>&, void*);
template <typename S>
int launch_short_rows(const RowParams<S>&, void*);
template <typename S>
int launch_rows(const RowParams<S>& p, void* stream) {
  return emulated.capacity == kShortPiece ? launch_short_rows(p, stream) : launch_long_rows(p, stream);
}

void poison(void* begin, int64_t bytes) {
  // Not a number for every floating-point type, and far out of range as a column.
  std::memset(begin, 0xFF, static_cast<size_t>(bytes));
  ptx::forget_content(begin, bytes);
}
// What an op was given it may have told of before, without a launch so far.
void end_op() {
  static int64_t before = 0;
  if (std::exchange(before, ptx::machine.launches) != ptx::machine.launches) ptx::forget_memory();
}

#else

namespace {

std::string failure;
int64_t launched = 0;
uint64_t noise = 1;  // of the errors of the fast functions

template <typename Body>
int emulate(int64_t blocks, int threads, int bytes, const Body& body) {
  ++launched;
  try {
    simt::run({blocks, threads, bytes, 0, noise}, body);
    return 0;
  } catch (const std::exception& error) {
    failure = error.what();
    return 1;
  }
}

}  // namespace

const char* error_text(int) { return failure.c_str(); }

void poison(void* begin, int64_t bytes) { std::memset(begin, 0xFF, static_cast<size_t>(bytes)); }
void end_op() {}

template <typename S, int kCapacity>
int emulate_rows(const RowParams<S>& p) {
  const Schedule& s = p.schedule;
  const int bytes = shared_bytes<Accumulation<S> >(s.by_boxes ? kBoxPiece : kCapacity, s.threads, s.by_boxes);
  return emulate(s.slots * s.blocks_per_row, s.threads, bytes, [&](char* shared) {
    if (s.in_shared) return RowKernel<S, kCapacity, true>(p, shared).run();
    if constexpr (!std::is_same_v<S, double>) {
      if (s.by_boxes) return BoxKernel<S>(p, shared).run();
    }
    RowKernel<S, kCapacity, false>(p, shared).run();
  });
}

template <typename S>
int launch_rows(const RowParams<S>& p, void*) {
  return emulated.capacity == kShortPiece ? emulate_rows<S, kShortPiece>(p) : emulate_rows<S, kPiece>(p);
}

template <typename T>
int launch_reduce(const ReduceParams<T>& p, void*) {
  return emulate(1, 64, 64 / 32 * 8, [&](char* shared) { reduce_losses(p, shared); });
}
int launch_starts(const StartParams& p, void*) {
  return emulate(1, 64, 64 * 8, [&](char* shared) { find_starts(p, shared); });
}
template <typename S>
int launch_scale(const ScaleParams<S>& p, void*) {
  return emulate(std::min<int64_t>(3, p.rows * p.segments), p.threads, 0, [&](char*) { scale_rows(p); });
}
template <typename S>
int launch_radial(const RadialParams<S>& p, void*) {
  return emulate((p.rows + 1) / 2, 64, 0, [&](char*) { remove_radial(p); });
}
template <typename T>
int launch_symmetrise(const SymmetriseParams<T>& p, void*) {
  const int64_t tiles = (p.n + kTile - 1) / kTile;
  const int bytes = 2 * ((kTile * (kTile + 1) * static_cast<int>(sizeof(T)) + 15) / 16 * 16);
  return emulate(tiles * tiles, 64, bytes, [&](char* shared) { symmetrise(p, shared); });
}

int read_back(Global<const int64_t> from, int64_t& to, void*) {
  to = from[0];
  return 0;
}

#endif

}  // namespace roadmap::cuda

// For the tests: what device to play, the order of its threads, and the errors of its fast functions.
#define ROADMAP_EXPORT extern "C" __attribute__((visibility("default")))

ROADMAP_EXPORT void emulate_device(int multiprocessors, int64_t workspace, int threads, int parts, int short_pieces,
                                   int boxes_above, uint64_t seed, uint64_t noise) {
  roadmap::cuda::emulated = {
      multiprocessors, workspace, threads, parts, short_pieces ? roadmap::cuda::kShortPiece : roadmap::cuda::kPiece,
      boxes_above};
#if defined(ROADMAP_PTX)
  ptx::machine.seed = seed;
  ptx::machine.noise = noise;
}
ROADMAP_EXPORT int64_t launches() { return ptx::machine.launches; }
#else
  roadmap::simt::seed() = seed;
  roadmap::cuda::noise = noise;
}
ROADMAP_EXPORT int64_t launches() { return roadmap::cuda::launched; }
#endif
// Launches and bytes of workspace of the plan for a matrix on a device of so many multiprocessors.
ROADMAP_EXPORT void plan_of(int64_t rows, int64_t columns, int is_double, int multiprocessors, int64_t* out) {
  using namespace roadmap::cuda;
  const Resources r = {multiprocessors};
  const Plan plan = is_double ? make_plan<double>(rows, columns, false, kAllSteps, kNever, 0, r)
                              : make_plan<float>(rows, columns, false, kAllSteps, boxes_pay_above(columns), 300, r);
  out[0] = static_cast<int64_t>(plan.launches.size());
  out[1] = plan.bytes;
  out[2] = 0;  // blocks in flight at least, over the launches that do most of the work
  for (const Schedule& s : plan.launches) {
    if (s.steps & kNegatives) out[2] = std::max(out[2], s.slots * s.blocks_per_row * s.threads);
  }
}

STABLE_TORCH_LIBRARY(roadmap_ext_emulated, m) { roadmap::ops::define(m); }
STABLE_TORCH_LIBRARY_IMPL(roadmap_ext_emulated, CPU, m) { roadmap::cuda::implement(m); }
