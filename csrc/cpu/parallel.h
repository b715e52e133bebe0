// How work is divided among threads. A task writes only what no other task of the same run() reads or writes: its own
// span of columns, its own positives, its own thread's scratch. What tasks leave is added up afterwards, in their order.
#pragma once

#include <cstdint>
#include <functional>

namespace roadmap {

struct Parallel {
  int workers = 1;  // one: the calling thread
  // Calls task(index, worker) for every index below tasks, each once, at the same time for several workers.
  std::function<void(int64_t tasks, const std::function<void(int64_t, int)>& task)> share = nullptr;

  template <typename Task>
  void run(int64_t tasks, const Task& task) const {
    if (workers > 1 && tasks > 1) return share(tasks, task);
    for (int64_t index = 0; index < tasks; ++index) task(index, 0);
  }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace roadmap
