// Chooses the instruction set of the kernels when the first of them runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace roadmap {

std::vector<const InstructionSet*> available_instruction_sets() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C, too, which older compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&kAvx512);
  }
  if (avx2) sets.push_back(&kAvx2);
#endif
  sets.push_back(&kBaseline);
  return sets;
}

static const InstructionSet& choose() {
  const std::vector<const InstructionSet*> sets = available_instruction_sets();
  const char* wanted = std::getenv("ROADMAP_EXT_CPU");
  if (!wanted || !*wanted) return *sets.front();
  std::string names;
  for (const InstructionSet* set : sets) {
    if (std::string(wanted) == set->name) return *set;
    names += names.empty() ? set->name : std::string(", ") + set->name;
  }
  throw std::runtime_error("ROADMAP_EXT_CPU=" + std::string(wanted) + " cannot be used: this processor runs " + names +
                           ". Unset it for the widest.");
}

const InstructionSet& instruction_set() {
  static const InstructionSet& set = choose();
  return set;
}

}  // namespace roadmap
