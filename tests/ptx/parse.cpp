// PTX text to decoded instructions.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>

#include "machine.h"

namespace ptx {
namespace {

std::string trimmed(const std::string& s) {
  const size_t begin = s.find_first_not_of(" \t\n"), end = s.find_last_not_of(" \t\n");
  return begin == std::string::npos ? "" : s.substr(begin, end - begin + 1);
}

// Splits outside of brackets and braces.
std::vector<std::string> split(const std::string& s, char by) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == by && !depth) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (std::string& part : parts) part = trimmed(part);
  return parts;
}

bool begins(const std::string& s, const char* with) { return s.compare(0, std::strlen(with), with) == 0; }
int bytes_of(const std::string& type) { return type == "pred" ? 0 : std::max(2, std::stoi(type.substr(1)) / 8); }

// .align 8 .b8 name[712], as of a parameter or a variable: the name, its alignment and how many bytes.
struct Declared {
  std::string name;
  int align = 1, bytes = 1;
  explicit Declared(const std::string& text) {
    const std::vector<std::string> words = split(trimmed(text), ' ');
    for (size_t k = 0; k + 1 < words.size(); ++k) {
      if (words[k] == ".align") align = std::stoi(words[k + 1]);
      if (words[k].size() > 2 && words[k][0] == '.' && std::isdigit(words[k][2])) {
        bytes = std::stoi(words[k].substr(2)) / 8;
      }
    }
    name = words.back();
    align = std::max(align, bytes);
    const size_t bracket = name.find('[');
    if (bracket == std::string::npos) return;
    const std::string count = name.substr(bracket + 1);
    bytes *= count == "]" ? 0 : std::stoi(count);
    name.resize(bracket);
  }
};

int aligned(int at, int to) { return (at + to - 1) / to * to; }

class Decoder {
 public:
  Decoder(Function& f, const std::map<std::string, u64>& symbols) : f_(f), symbols_(symbols) {}

  void decode(const std::string& text, size_t at, int line) {
    line_ = line;
    const size_t open = text.find('(', at), close = text.find(')', open);
    f_.name = trimmed(text.substr(at, open - at));
    for (const std::string& parameter : split(text.substr(open + 1, close - open - 1), ',')) {
      if (parameter.empty()) continue;
      const Declared d(parameter);
      f_.parameter_bytes = aligned(f_.parameter_bytes, d.align);
      f_.parameters.push_back({f_.parameter_bytes, d.bytes});
      symbols_[d.name] = f_.parameter_bytes;
      f_.parameter_bytes += d.bytes;
    }
    const size_t body = text.find('{', close);
    line_ += static_cast<int>(std::count(text.begin() + at, text.begin() + body, '\n'));
    statements(text, body);
    for (const auto& [instruction, label] : branches_) {
      if (!labels_.count(label)) fail("PTX: no label " + label);
      f_.code[instruction].target = labels_[label];
    }
    Instruction last;
    last.kind = Kind::kExit;
    last.name = name_of("ret");
    f_.code.push_back(last);
    deal_out();
  }

 private:
  void statements(const std::string& text, size_t at) {
    int depth = 0;
    std::string statement;
    for (;; ++at) {
      const char c = text.at(at);
      const bool empty = statement.empty();
      if (c == '\n') ++line_;
      if (empty && !std::isspace(c)) from_line_ = line_;
      if (c == '/' && text[at + 1] == '/') {
        at = text.find('\n', at) - 1;
      } else if (c == '{' && empty) {
        ++depth;
        scopes_.emplace_back();
      } else if (c == '}' && empty) {
        scopes_.pop_back();
        if (--depth == 0) return;
      } else if (c == ';' || (c == '\n' && begins(statement, ".loc"))) {
        instruction(trimmed(statement));
        statement.clear();
      } else if (c == ':' && statement.find('$') != std::string::npos) {
        labels_[trimmed(statement)] = static_cast<int>(f_.code.size());
        statement.clear();
      } else if (!empty || !std::isspace(c)) {
        statement += std::isspace(c) ? ' ' : c;
      }
    }
  }

  // --- operands ------------------------------------------------------------------------------------------------------

  struct Register {
    int bytes;  // of a lane; 0 for a predicate
    s32 byte;   // in the file; -1 until it is dealt out
  };
  int new_register(int bytes) {
    registers_.push_back({bytes, -1});
    return static_cast<int>(registers_.size()) - 1;
  }
  int size_of(const Register& r) const { return r.bytes ? r.bytes * kLanes : 64; }
  // A register that has its content from the beginning.
  int fixed(const std::string& content, int bytes) {
    const int r = new_register(bytes);
    registers_[r].byte = f_.file_bytes;
    f_.fixed.push_back({f_.file_bytes, content});
    f_.file_bytes += size_of(registers_[r]);
    return r;
  }
  int number(u64 x, int bytes) {
    const auto [found, is_new] = numbers_.insert({{x, bytes}, 0});
    if (is_new) {
      std::string content;
      if (!bytes) x = x ? kAll : 0;
      for (int l = 0; l < (bytes ? kLanes : 1); ++l) content.append(reinterpret_cast<char*>(&x), bytes ? bytes : 4);
      found->second = fixed(content, bytes);
    }
    return found->second;
  }
  int find(const std::string& name) {
    for (size_t s = scopes_.size(); s-- > 0;) {
      const auto found = scopes_[s].find(name);
      if (found != scopes_[s].end()) return found->second;
    }
    static const std::set<std::string> kSpecial = {"%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x", "%laneid"};
    if (!kSpecial.count(name)) fail("PTX: no register " + name);
    const int r = scopes_[0][name] = new_register(4);
    registers_[r].byte = f_.special[name] = f_.file_bytes;
    f_.file_bytes += size_of(registers_[r]);
    return r;
  }
  // bytes: what the instruction reads.
  int source(const std::string& s, int bytes) {
    if (s[0] == '%') return find(s);
    if (begins(s, "0f") || begins(s, "0d")) return number(std::stoull(s.substr(2), nullptr, 16), bytes);
    if (s[0] == '-') return number(static_cast<u64>(std::stoll(s)), bytes);
    if (std::isdigit(s[0])) return number(std::stoull(s, nullptr, 0), bytes);
    const size_t plus = s.find('+');
    const auto found = symbols_.find(trimmed(s.substr(0, plus)));
    if (found == symbols_.end()) fail("PTX: what is " + s);
    return number(found->second + (plus == std::string::npos ? 0 : std::stoll(s.substr(plus + 1))), bytes);
  }
  void use(Instruction& i, int k, std::string s, int bytes) {
    i.negated[k] = s[0] == '!';
    if (i.negated[k]) s.erase(0, 1);
    i.from[k] = source(s, bytes);
  }
  // [%rd1+16]
  void address(Instruction& i, const std::string& text) {
    std::string s = text.substr(1, text.rfind(']') - 1);
    const size_t plus = s.find('+');
    if (s[0] == '%' && plus != std::string::npos) {
      i.offset = std::stoll(s.substr(plus + 1));
      s = trimmed(s.substr(0, plus));
    }
    use(i, 0, s, 8);
    i.wide = registers_[i.from[0]].bytes == 8;
  }
  static std::vector<std::string> elements(const std::string& s) {
    return s[0] == '{' ? split(s.substr(1, s.rfind('}') - 1), ',') : std::vector<std::string>{s};
  }

  // --- instructions --------------------------------------------------------------------------------------------------

  void declaration(const std::string& s) {
    if (begins(s, ".reg")) {
      const std::vector<std::string> words = split(trimmed(s.substr(4)), ' ');
      const int bytes = bytes_of(words[0].substr(1));
      for (const std::string& name : split(trimmed(s.substr(s.find('%'))), ',')) {
        const size_t angle = name.find('<');
        const int count = angle == std::string::npos ? 0 : std::stoi(name.substr(angle + 1));
        if (!count) scopes_.back()[name] = new_register(bytes);
        for (int k = 0; k < count; ++k) {
          scopes_.back()[name.substr(0, angle) + std::to_string(k)] = new_register(bytes);
        }
      }
    } else if (begins(s, ".shared")) {
      const Declared d(s);
      f_.static_shared = aligned(f_.static_shared, d.align);
      symbols_[d.name] = f_.static_shared;
      f_.static_shared += d.bytes;
      for (const std::string& dynamic : f_.dynamic_shared) symbols_[dynamic] = aligned(f_.static_shared, 16);
    } else if (begins(s, ".loc")) {
      const std::vector<std::string> words = split(trimmed(s.substr(4)), ' ');
      file_ = std::stoi(words[0]);
      source_line_ = std::stoi(words[1]);
    } else if (!begins(s, ".pragma")) {
      fail("PTX: not supported: " + s);
    }
  }

  void instruction(std::string s) {
    if (s.empty()) return;
    if (s[0] == '.') return declaration(s);
    Instruction i;
    i.line = from_line_;
    i.source_file = file_;
    i.source_line = source_line_;
    if (s[0] == '@') {
      const size_t end = s.find(' ');
      use(i, kGuard, s.substr(1, end - 1), 0);
      s = trimmed(s.substr(end));
    }
    const size_t end = s.find(' ');
    const std::string name = s.substr(0, end), type = name.substr(name.rfind('.') + 1);
    std::vector<std::string> operands;
    if (end != std::string::npos) operands = split(s.substr(end), ',');
    i.name = name_of(name);
    const std::string kind = name.substr(0, name.find('.'));
    if (kind == "bra") {
      i.kind = Kind::kBranch;
      branches_.push_back({static_cast<int>(f_.code.size()), operands[0]});
    } else if (kind == "ret" || kind == "exit") {
      i.kind = Kind::kExit;
    } else if (kind == "ld" || kind == "st" || kind == "atom" || kind == "red") {
      of_memory(i, kind, name, type, operands);
    } else if (kind == "membar" || kind == "fence" || kind == "prefetch") {
      return;
    } else if (kind == "mov" && operands[0][0] == '{') {
      const auto parts = elements(operands[0]);
      for (size_t k = 0; k < parts.size(); ++k) i.to[k] = parts[k] == "_" ? -1 : find(parts[k]);
      const int whole = bytes_of(type);
      operate(i, "split." + std::to_string(whole) + "." + std::to_string(whole / parts.size()), {operands[1]});
    } else if (kind == "mov" && operands[1][0] == '{') {
      i.to[0] = find(operands[0]);
      const auto parts = elements(operands[1]);
      const int whole = bytes_of(type);
      operate(i, "join." + std::to_string(whole) + "." + std::to_string(whole / parts.size()), parts);
    } else {
      const bool sources_alone = name == "bar.sync" || name == "barrier.sync" || name == "bar.warp.sync";
      if (!sources_alone) {
        const auto to = split(operands[0], '|');
        for (size_t k = 0; k < to.size(); ++k) i.to[k] = to[k] == "_" ? -1 : find(to[k]);
        operands.erase(operands.begin());
      }
      std::string full = name == "barrier.sync" ? "bar.sync" : name;
      const auto words = split(name, '.');
      const auto bits = [](const std::string& t) {
        return t[0] == 's' ? -std::stoi(t.substr(1)) : std::stoi(t.substr(1));
      };
      if (kind == "cvt" && words.size() == 3 && type[0] != 'f' && type[0] != 'b' && words[1][0] != 'f') {
        i.to_bits = static_cast<s8>(bits(words[1])), i.from_bits = static_cast<s8>(bits(type));
        full = "cvt/" + std::to_string(registers_[i.to[0]].bytes) + "." +
               std::to_string(registers_[find(operands[0])].bytes);
      }
      operate(i, full, operands);
      if (i.kind == Kind::kBarrier && operands[0] != "0") fail("PTX: a barrier other than 0: " + s);
    }
    f_.code.push_back(i);
  }

  void operate(Instruction& i, const std::string& name, const std::vector<std::string>& sources) {
    const Operation* const o = operation(name);
    if (!o) return unsupported(i, name);
    i.execute = o->execute;
    i.kind = o->kind;
    if (sources.size() > o->from.size()) return unsupported(i, name);
    for (size_t k = 0; k < sources.size(); ++k) use(i, static_cast<int>(k), sources[k], o->from[k]);
  }
  static void unsupported(Instruction& i, const std::string&) {
    i.kind = Kind::kPlain;
    i.execute = [](Warp& w, const Instruction& self, u32 mask) {
      fail_at(w, self, __builtin_ctz(mask), "not supported: an instruction");
    };
  }

  void of_memory(Instruction& i, const std::string& kind, const std::string& name, const std::string& type,
                 const std::vector<std::string>& operands) {
    const std::vector<std::string> words = split(name, '.');
    std::string operation_name = "atom";
    for (size_t k = 1; k + 1 < words.size(); ++k) {
      const std::string& word = words[k];
      if (word == "global") continue;  // as generic addresses are, of these kernels
      if (word == "param") {
        i.space = Space::kParam;
      } else if (begins(word, "shared")) {
        i.space = Space::kShared;
      } else if (word == "v2" || word == "v4") {
        i.vector = static_cast<u8>(word[1] - '0');
      } else if (kind == "atom" || kind == "red") {
        static const std::set<std::string> kIgnored = {"relaxed", "gpu", "cta", "sys", "acquire", "release", "acq_rel"};
        if (!kIgnored.count(word)) operation_name += "." + word;
      } else if (word == "local") {
        return unsupported(i, name);
      }
    }
    i.bytes = static_cast<u8>(std::stoi(type.substr(1)) / 8);
    if (kind == "atom" || kind == "red") {
      const int first = kind == "atom";
      if (first && operands[0] != "_") i.to[0] = find(operands[0]);
      const Operation* const o = operation(operation_name + "." + type);
      if (!o) return unsupported(i, name);
      i.execute = o->execute;
      address(i, operands[first]);
      for (size_t k = first + 1; k < operands.size(); ++k) use(i, static_cast<int>(k) - first, operands[k], i.bytes);
      return;
    }
    const bool is_store = kind == "st";
    int bytes = 0;
    const auto values = elements(operands[is_store ? 1 : 0]);
    address(i, operands[is_store ? 0 : 1]);
    for (size_t v = 0; v < values.size(); ++v) {
      if (is_store) {
        use(i, static_cast<int>(v) + 1, values[v], bytes_of(type));
        bytes = registers_[i.from[v + 1]].bytes;
      } else if (values[v] != "_") {
        bytes = registers_[i.to[v] = find(values[v])].bytes;
      }
    }
    i.execute = memory_access(is_store, type, bytes);
  }

  int name_of(const std::string& name) {
    const auto [found, is_new] = names_.insert({name, static_cast<int>(f_.names.size())});
    if (is_new) f_.names.push_back(name);
    return found->second;
  }

  // --- registers, dealt out by liveness ------------------------------------------------------------------------------

  // nvcc names a register for every value: in files of that size nothing would stay in the cache. A register's place is
  // its own from the first instruction before which its value may be wanted to the last.
  void deal_out() {
    const int n = static_cast<int>(f_.code.size());
    const size_t words = (registers_.size() + 63) / 64;
    std::vector<u64> wanted((n + 1) * words);  // before each instruction, a bit a register
    for (bool changed = true; changed;) {
      changed = false;
      for (int k = n; k-- > 0;) {
        const Instruction& i = f_.code[k];
        const bool guarded = i.from[kGuard] >= 0,
                   goes_on = guarded || (i.kind != Kind::kBranch && i.kind != Kind::kExit);
        std::vector<u64> now(words);
        for (size_t w = 0; w < words; ++w) {
          if (goes_on) now[w] = wanted[(k + 1) * words + w];
          if (i.target >= 0) now[w] |= wanted[i.target * words + w];
        }
        for (const s32 r : i.to) {
          if (r >= 0 && !guarded) now[r / 64] &= ~(u64(1) << r % 64);
        }
        for (const s32 r : i.from) {
          if (r >= 0) now[r / 64] |= u64(1) << r % 64;
        }
        changed |= !std::equal(now.begin(), now.end(), wanted.begin() + k * words);
        std::copy(now.begin(), now.end(), wanted.begin() + k * words);
      }
    }
    std::vector<std::pair<int, int>> span(registers_.size(), {n, -1});
    const auto extend = [&](int r, int k) { span[r] = {std::min(span[r].first, k), std::max(span[r].second, k)}; };
    for (int k = 0; k < n; ++k) {
      for (size_t w = 0; w < words; ++w) {
        for (u64 rest = wanted[k * words + w]; rest; rest &= rest - 1) {
          extend(static_cast<int>(64 * w) + __builtin_ctzll(rest), k);
        }
      }
      for (const s32 r : f_.code[k].to) {
        if (r >= 0) extend(r, k);
      }
    }
    std::vector<std::vector<int>> beginning(n);
    for (int r = 0; r < static_cast<int>(registers_.size()); ++r) {
      if (span[r].second >= 0 && registers_[r].byte < 0) beginning[span[r].first].push_back(r);
    }
    std::multimap<int, int> ending;        // last instruction, register
    std::map<int, std::vector<s32>> free;  // by bytes
    for (int k = 0; k < n; ++k) {
      for (; !ending.empty() && ending.begin()->first < k; ending.erase(ending.begin())) {
        const Register& gone = registers_[ending.begin()->second];
        free[gone.bytes].push_back(gone.byte);
      }
      for (const int r : beginning[k]) {
        std::vector<s32>& places = free[registers_[r].bytes];
        if (places.empty()) {
          places.push_back(f_.file_bytes);
          f_.file_bytes += size_of(registers_[r]);
        }
        registers_[r].byte = places.back();
        places.pop_back();
        ending.insert({span[r].second, r});
        // Whoever reads it before it has been written finds no number, and no place in memory.
        if (wanted[r / 64] >> r % 64 & 1) {
          f_.fixed.push_back({registers_[r].byte, std::string(size_of(registers_[r]), '\xFF')});
        }
      }
    }
    for (Instruction& i : f_.code) {
      for (s32& r : i.to) r = r < 0 ? -1 : registers_[r].byte;
      for (s32& r : i.from) r = r < 0 ? -1 : registers_[r].byte;
    }
  }

  Function& f_;
  std::map<std::string, u64> symbols_;  // what an address of each stands for
  std::vector<Register> registers_;
  std::vector<std::unordered_map<std::string, int>> scopes_;
  std::map<std::pair<u64, int>, int> numbers_;
  std::unordered_map<std::string, int> names_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<int, std::string>> branches_;
  int line_ = 1, from_line_ = 1, file_ = 0, source_line_ = 0;
};

}  // namespace

Module::Module(std::string text) : text_(std::move(text)) {
  int line = 1;
  for (size_t at = 0; at < text_.size();) {
    size_t end = text_.find('\n', at);
    if (end == std::string::npos) end = text_.size();
    const std::string s = trimmed(text_.substr(at, std::min<size_t>(end - at, 1 << 16)));
    const size_t entry = s.find(".entry ");
    if (entry != std::string::npos) {
      const size_t begin = text_.find(".entry", at) + 6;
      entries_[trimmed(text_.substr(begin, text_.find('(', begin) - begin))] = {begin, line};
    } else if (begins(s, ".file")) {
      const std::vector<std::string> words = split(s, ' ');
      const size_t open = s.find('"'), close = s.find('"', open + 1);
      const std::string path = s.substr(open + 1, close - open - 1);
      files_[std::stoi(split(trimmed(s.substr(5)), ' ')[0])] = path.substr(path.rfind('/') + 1);
    } else if (begins(s, ".extern .shared") || begins(s, ".shared")) {
      shared_.push_back(s.substr(0, s.rfind(';')));
    }
    at = end + 1;
    ++line;
  }
}

Function& Module::function(const std::string& name) {
  std::unique_ptr<Function>& f = functions_[name];
  if (f) return *f;
  const auto entry = entries_.find(name);
  if (entry == entries_.end()) fail("PTX: no kernel " + name);
  f = std::make_unique<Function>();
  f->files = &files_;
  std::map<std::string, u64> symbols;
  for (const std::string& text : shared_) {
    const Declared d(text);
    if (!d.bytes) f->dynamic_shared.push_back(d.name);
    f->static_shared = aligned(f->static_shared, d.align);
    symbols[d.name] = f->static_shared;
    f->static_shared += d.bytes;
  }
  for (const std::string& dynamic : f->dynamic_shared) symbols[dynamic] = aligned(f->static_shared, 16);
  Decoder(*f, symbols).decode(text_, entry->second.begin, entry->second.line);
  return *f;
}

}  // namespace ptx
