// A GPU that executes PTX, on the CPU: what its parts share.
//
//   parse.cpp         PTX text to decoded instructions, with registers dealt out by liveness
//   instructions.cpp  the table of instructions
//   run.cpp           blocks, warps, barriers; every access to memory checked
//   runtime.cpp       the CUDA runtime that code compiled by nvcc calls: registers its PTX, launches it here
//
// A warp's 32 lanes share an instruction; a register is an array of 32 values, a predicate a word of 32 bits. Blocks run
// one after another, and the warps of a block one after another up to the next barrier, both in an order shuffled by a
// seed. A fault is a std::runtime_error that names the line of the source.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kAll = ~0u;

struct Warp;
struct Instruction;
// Executes an instruction for the lanes whose bits are set.
using Execute = void (*)(Warp&, const Instruction&, u32 lanes);

enum class Kind : u8 { kPlain, kBranch, kExit, kBarrier, kWarpWide };
enum class Space : u8 { kGlobal, kShared, kParam };

struct Instruction {
  Execute execute = nullptr;
  Kind kind = Kind::kPlain;
  // Of memory: where, how many elements of how many bytes, and whether the address has 64 bits.
  Space space = Space::kGlobal;
  u8 vector = 1, bytes = 0;
  bool wide = true;
  bool negated[6] = {};  // predicates among the sources, and the guard as the last
  // Registers, at first by number and once dealt out by their byte in a warp's file; -1 for none.
  s32 to[4] = {-1, -1, -1, -1};
  s32 from[6] = {-1, -1, -1, -1, -1, -1};  // the last one is the guard
  s8 to_bits = 0, from_bits = 0;           // of a conversion between integers; negative for signed ones
  s32 target = -1;                         // of a branch
  s64 offset = 0;                          // of an address
  s32 line = 0, name = 0;                  // in the PTX; index in Function::names
  s32 source_file = 0, source_line = 0;    // by .loc
};
constexpr int kGuard = 5;

struct Parameter {
  int offset, bytes;
};

struct Function {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> names;  // of instructions
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  int static_shared = 0;
  std::vector<std::string> dynamic_shared;            // names of what lies behind
  int file_bytes = 0;                                 // of a warp's registers
  std::vector<std::pair<int, std::string>> fixed;     // bytes that a warp's file holds from the beginning, at an offset
  std::map<std::string, int> special;                 // %tid.x and the like: where they lie
  const std::map<int, std::string>* files = nullptr;  // of the source, by number
  std::vector<char> file_of_warps;                    // reused from block to block
};

// The kernels of one translation unit.
class Module {
 public:
  explicit Module(std::string text);
  Function& function(const std::string& name);  // decoded when it is asked for first

 private:
  struct Entry {
    size_t begin;
    int line;
  };
  std::string text_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::unique_ptr<Function>> functions_;
  std::vector<std::string> shared_;  // declarations
  std::map<int, std::string> files_;
};

struct Block {
  Function* f;
  s64 index;
  int threads, shared_bytes;
  char* shared;
  const char* parameters;
  u32 begin = 0, barrier = 0;  // when it began, and passed its last barrier
  std::vector<Warp> warps;
};

struct Warp {
  Block* block;
  char* file;
  int first;            // thread
  u32 live = kAll;      // lanes that have not returned
  u32 waiting = 0;      // lanes at a barrier or a warp-wide instruction
  u32 ordered = 0;      // when its accesses to memory were last ordered
  s32 at[kLanes] = {};  // the next instruction of each lane

  template <typename T>
  T* lanes(int offset) const {
    return reinterpret_cast<T*>(file + offset);
  }
  u32 predicate(const Instruction& i, int k) const {
    const u32 bits = *lanes<u32>(i.from[k]);
    return i.negated[k] ? ~bits : bits;
  }
  void set_predicate(int offset, u32 mask, u32 bits) const {
    u32& all = *lanes<u32>(offset);
    all = (all & ~mask) | (bits & mask);
  }
};

// What launches share. Time passes at each barrier; every block has times of its own.
struct Machine {
  u32 now = 8, launch = 0;
  u64 seed = 1, noise = 1;
  long long launches = 0;
};
extern Machine machine;

// The table of instructions: how one is executed, and how wide its sources are, 0 for a predicate.
struct Operation {
  Execute execute = nullptr;
  std::vector<int> from;
  Kind kind = Kind::kPlain;
};
// Null where there is none. Widths of registers matter to conversions of bytes.
const Operation* operation(const std::string& name);
// Of a load or store of elements of a type such as "u16", to or from registers of so many bytes.
Execute memory_access(bool is_store, const std::string& type, int register_bytes);

[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_at(const Warp& w, const Instruction& i, int lane, const std::string& what);

enum class Access : u8 { kRead, kWrite, kAtomic };
// Where the lanes of a mask find what they load or store, once all has been checked.
void locate(Warp& w, const Instruction& i, u32 mask, Access access, char* (&at)[kLanes]);

// Which memory kernels may touch. Ranges may overlap; what lies in read-only ones alone may not be written.
void allow(const void* begin, s64 bytes, bool writable);
// Nobody has written these bytes.
void forget_content(const void* begin, s64 bytes);
// All of this ends.
void forget_memory();

// `arguments`: the parameters, one after another, as cudaLaunchKernel takes them.
void launch(Function& f, s64 blocks, int threads, int shared_bytes, void** arguments);

}  // namespace ptx
