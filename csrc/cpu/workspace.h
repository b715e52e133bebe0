// What threads need for their work, and keep for the next call: allocating it anew costs more page faults than a small
// batch costs time.
#pragma once

#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace roadmap {

// Bytes that wait for the next call, all threads and kinds of workspace together.
constexpr size_t kIdleBytes = size_t(48) << 20;

struct Idle {
  std::mutex lock;
  size_t bytes = 0;

  static Idle& all() {
    static auto* const own = new Idle;  // for good: threads may outlive the rest
    return *own;
  }
};

// A Workspace, which says about how many bytes() it holds, for as long as this lives: one that waited, or a new one.
template <typename Workspace>
class Leased {
 public:
  Workspace& get() {
    if (!space_) take();
    return *space_;
  }
  ~Leased() {
    if (!space_) return;
    const size_t bytes = space_->bytes();
    Idle& idle = Idle::all();
    const std::lock_guard<std::mutex> guard(idle.lock);
    if (idle.bytes + bytes > kIdleBytes) return;
    try {
      waiting().push_back(std::move(space_));
      idle.bytes += bytes;
    } catch (const std::bad_alloc&) {  // not even for that is there memory
    }
  }

 private:
  static std::vector<std::unique_ptr<Workspace>>& waiting() {
    static auto* const own = new std::vector<std::unique_ptr<Workspace>>;
    return *own;
  }

  void take() {
    Idle& idle = Idle::all();
    {
      const std::lock_guard<std::mutex> guard(idle.lock);
      if (!waiting().empty()) {
        space_ = std::move(waiting().back());
        waiting().pop_back();
        idle.bytes -= space_->bytes();
        return;
      }
    }
    space_ = std::make_unique<Workspace>();
  }

  std::unique_ptr<Workspace> space_;
};

}  // namespace roadmap
