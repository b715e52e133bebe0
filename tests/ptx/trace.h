// What the warps of each launch do, for tools/count: by PTXRUN_TRACE, a folder, a file a launch, 0, 1, ... Its first line
// says entry, blocks, threads a block and bytes of shared memory. Then come records of four u32, with lines of the PTX:
//
//   warp, first line, last line, 0               instructions that the warp ran through without a jump
//   warp, line, 1 << 30 | passes, 0              an access to shared memory; bank conflicts make several passes
//   warp, line, 1 << 31 | sectors, first sector  one to global memory, adjacent sectors; 3 << 30: more of the same one
#pragma once

#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace ptx {

class Trace {
 public:
  explicit operator bool() const { return file_; }
  void begin(const Function& f, s64 blocks, int threads, int shared_bytes) {
    const char* const folder = std::getenv("PTXRUN_TRACE");
    if (!folder) return;
    const std::string name = folder + ("/" + std::to_string(launches_++));
    file_ = std::fopen(name.c_str(), "wb");
    if (!file_) fail("no file can be written at " + name);
    std::fprintf(file_, "%s %lld %d %d\n", f.name.c_str(), static_cast<long long>(blocks), threads, shared_bytes);
  }
  void end() {
    if (!file_) return;
    end_run();
    std::fclose(file_);
    file_ = nullptr;
  }

  void instruction(const Warp& w, const Instruction& i) {
    if (number(w) != run_.warp || &i != last_ + 1) {
      end_run();
      run_ = {number(w), static_cast<u32>(i.line), 0, 0};
    }
    run_.last = static_cast<u32>(i.line);
    last_ = &i;
  }
  void shared_access(const Warp& w, const Instruction& i, u32 passes) {
    put({number(w), static_cast<u32>(i.line), 1u << 30 | passes, 0});
  }
  // n sectors, ascending.
  void global_access(const Warp& w, const Instruction& i, const u64* sectors, int n) {
    for (int k = 0, more; k < n; k += more) {
      for (more = 1; k + more < n && sectors[k + more] == sectors[k] + more;) ++more;
      put({number(w), static_cast<u32>(i.line), (k ? 3u << 30 : 1u << 31) | more, static_cast<u32>(sectors[k])});
    }
  }

 private:
  struct Record {
    u32 warp, first, last, more;
  };
  static u32 number(const Warp& w) {
    return static_cast<u32>(w.block->index * w.block->warps.size() + w.first / kLanes);
  }
  void put(const Record& r) { std::fwrite(&r, sizeof r, 1, file_); }
  void end_run() {
    if (last_) put(run_);
    last_ = nullptr;
  }

  FILE* file_ = nullptr;
  int launches_ = 0;
  Record run_ = {};
  const Instruction* last_ = nullptr;
};

}  // namespace ptx
