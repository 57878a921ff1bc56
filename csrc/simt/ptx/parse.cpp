// Reads a kernel from PTX text.
#include <algorithm>
#include <cctype>
#include <map>
#include <stdexcept>

#include "simt/ptx/kernel.h"

namespace simt::ptx {
namespace {

size_t bytes_of(const std::string& type) { return std::stoul(type.substr(2)) / 8; }  // .b32

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

std::string trimmed(const std::string& text) {
  const char* blanks = " \t\n\r";
  const size_t first = text.find_first_not_of(blanks);
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

// Splits at commas and blanks outside brackets.
std::vector<std::string> split_operands(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

bool one_of(const std::string& word, std::initializer_list<const char*> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

class Parser {
 public:
  Parser(const std::string& text, size_t begin, Kernel& kernel) : text_(text), at_(begin), kernel_(kernel) {
    line_ = 1 + static_cast<int>(std::count(text.begin(), text.begin() + static_cast<long>(begin), '\n'));
    static constexpr const char* kNames[] = {"%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "%laneid", "_"};
    scopes_.emplace_back();
    for (const char* name : kNames) scopes_.back()[name] = new_register(0);
  }

  void run() {
    header();
    while (!scopes_.empty()) statement();
    for (const auto& [n, label] : jumps_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) fail("no label " + label);
      kernel_.code[n].offset = static_cast<int64_t>(found->second);
    }
    kernel_.dynamic_at = round_up(kernel_.shared_bytes, 16);
    for (const int reg : dynamic_) kernel_.registers[static_cast<size_t>(reg)] = kSharedWindow + kernel_.dynamic_at;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error(kernel_.file + ":" + std::to_string(line_) + ": " + why);
  }

  int new_register(uint64_t value) {
    kernel_.registers.push_back(value);
    return static_cast<int>(kernel_.registers.size()) - 1;
  }

  // Reads up to and including one of these characters; skips comments.
  std::string take_until(const char* ends, char* end) {
    std::string taken;
    for (; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == '/' && text_[at_ + 1] == '/') at_ = text_.find('\n', at_);
      if (text_[at_] == '\n') ++line_;
      if (std::string(ends).find(text_[at_]) != std::string::npos) {
        *end = text_[at_++];
        return trimmed(taken);
      }
      taken += text_[at_];
    }
    fail("the text ends within a kernel");
  }

  // Reads parameters and limits, up to the body's brace.
  void header() {
    char end;
    const std::string parameters = take_until(")", &end);
    for (const std::string& declared : split_operands(parameters)) {
      const size_t bracket = declared.find('[');
      if (bracket != std::string::npos) {
        kernel_.parameter_bytes.push_back(std::stoul(declared.substr(bracket + 1)));
      } else {
        const std::string type = declared.substr(declared.find('.', 1), 4);  // .param .u64 NAME
        kernel_.parameter_bytes.push_back(bytes_of(trimmed(type)));
      }
    }
    const std::string limits = take_until("{", &end);
    const size_t most = limits.find(".maxntid");
    if (most != std::string::npos) {
      unsigned threads = 1;
      for (const std::string& size : split_operands(limits.substr(most + 8))) {
        threads *= static_cast<unsigned>(std::stoul(size));
      }
      kernel_.max_threads = threads;
    }
  }

  void statement() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0)
      line_ += text_[at_++] == '\n';
    if (text_[at_] == '{' || text_[at_] == '}') {
      if (text_[at_++] == '{') {
        scopes_.emplace_back();
      } else {
        scopes_.pop_back();
      }
      return;
    }
    if (text_.compare(at_, 2, "//") == 0) {
      at_ = text_.find('\n', at_);
      return;
    }
    const size_t begin = at_;
    const int begin_line = line_;
    char end;
    const std::string label = take_until(":;", &end);
    if (end == ':') {
      labels_[label] = kernel_.code.size();
      return;
    }
    at_ = begin;  // a type or a name may hold a colon
    line_ = begin_line;
    const std::string words = take_until(";", &end);
    if (starts(words, ".reg")) {
      declare_registers(words);
    } else if (starts(words, ".shared")) {
      declare_shared(words);
    } else if (starts(words, ".pragma")) {
      return;
    } else {
      instruction(words);
    }
  }

  void declare_registers(const std::string& words) {  // .reg .b32 %r<7>  or  .reg .b32 name, name
    const size_t names = words.find_first_of(" \t", words.find('.', 1));
    for (const std::string& name : split_operands(trimmed(words.substr(names)))) {
      const size_t count = name.find('<');
      if (count == std::string::npos) {
        scopes_.back()[name] = new_register(kRubbish);
        continue;
      }
      for (unsigned long n = 0; n < std::stoul(name.substr(count + 1)); ++n) {
        scopes_.back()[name.substr(0, count) + std::to_string(n)] = new_register(kRubbish);
      }
    }
  }

  void declare_shared(const std::string& words) {  // .shared .align 4 .b8 NAME[32]
    const size_t align = std::stoul(words.substr(words.find(".align") + 6));
    const size_t type = words.find('.', words.find(".align") + 1);
    const size_t name = words.find_first_not_of(" \t", words.find_first_of(" \t", type));
    const size_t bracket = words.find('[', name);
    const size_t many = bracket == std::string::npos ? 1 : std::stoul(words.substr(bracket + 1));
    kernel_.shared_bytes = round_up(kernel_.shared_bytes, align);
    scopes_.front()[words.substr(name, bracket == std::string::npos ? bracket : bracket - name)] =
        new_register(kSharedWindow + kernel_.shared_bytes);
    kernel_.shared_bytes += many * bytes_of(words.substr(type, words.find_first_of(" \t", type) - type));
  }

  // A register, a constant or the address of a variable.
  int value(const std::string& word) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(word);
      if (found != scope->end()) return found->second;
    }
    int reg = -1;
    if (starts(word, "0f") || starts(word, "0d")) {
      reg = new_register(std::stoull(word.substr(2), nullptr, 16));
    } else if (word[0] == '-') {
      reg = new_register(static_cast<uint64_t>(std::stoll(word, nullptr, 0)));
    } else if (std::isdigit(static_cast<unsigned char>(word[0])) != 0) {
      reg = new_register(std::stoull(word, nullptr, 0));
    } else if (text_.find(".extern .shared .align 16 .b8 " + word + "[]") != std::string::npos) {
      reg = new_register(0);
      dynamic_.push_back(reg);
    } else {
      fail("what is " + word + "?");
    }
    return scopes_.front()[word] = reg;
  }

  void instruction(std::string words) {
    Instruction i;
    i.line = line_;
    if (words[0] == '@') {
      i.unless = words[1] == '!';
      const size_t end = words.find_first_of(" \t");
      i.guard = value(words.substr(i.unless ? 2 : 1, end - (i.unless ? 2 : 1)));
      words = trimmed(words.substr(end));
    }
    const size_t end = std::min(words.find_first_of(" \t"), words.size());
    std::string opcode = words.substr(0, end);
    const std::string kind = opcode.substr(0, opcode.find('.'));
    std::vector<std::string> operands = split_operands(words.substr(end));
    int results = 0, sources = 0;
    std::fill(std::begin(i.to), std::end(i.to), static_cast<int>(kNowhere));
    if (kind == "mov" && operands[0][0] == '{') opcode += ".split";
    if (kind == "mov" && operands.size() == 2 && operands[1][0] == '{') opcode += ".join";
    if (kind == "bra") {
      jumps_.emplace_back(kernel_.code.size(), operands.at(0));
      operands.clear();
    }
    const bool stores = one_of(kind, {"st", "red"}) || one_of(opcode, {"bar.sync", "barrier.sync", "bar.warp.sync"});
    for (size_t n = 0; n < operands.size(); ++n) {
      if (n == 0 && !stores) {
        result(operands[0], i, &results);
      } else {
        source(operands[n], i, &sources);
      }
    }
    i.copies = kind == "mov" && operands[0][0] == '%' && operands[1][0] == '%' && i.from[0] >= kSpecials;
    i.run = handler_of(opcode);
    if (i.run == nullptr) fail("an instruction that is not known: " + opcode);
    kernel_.code.push_back(i);
  }

  void result(const std::string& operand, Instruction& i, int* results) {  // %r1, {%r1, %r2} or %r1|%p1
    const bool many = operand[0] == '{';
    std::string list = many ? operand.substr(1, operand.size() - 2) : operand;
    std::replace(list.begin(), list.end(), '|', ',');
    for (const std::string& word : split_operands(list)) {
      if (*results == kMostOperands) fail("too many results");
      i.to[(*results)++] = value(word);
    }
  }

  void source(const std::string& operand, Instruction& i,
              int* sources) {  // %r1, {%r1, %r2}, [%rd1+4] or [NAME_param_0+4]
    std::vector<std::string> words{operand};
    if (operand[0] == '{') words = split_operands(operand.substr(1, operand.size() - 2));
    if (operand[0] == '[') {
      std::string address = operand.substr(1, operand.size() - 2);
      const size_t plus = address.find('+');
      if (plus != std::string::npos) i.offset = std::stoll(address.substr(plus + 1));
      address = address.substr(0, plus);
      const size_t parameter = address.rfind("_param_");
      if (parameter != std::string::npos) {
        i.from[(*sources)++] = std::stoi(address.substr(parameter + 7));
        return;
      }
      words = {address};
    }
    for (const std::string& word : words) {
      if (*sources == kMostOperands) fail("too many operands");
      i.from[(*sources)++] = value(word);
    }
  }

  static constexpr uint64_t kRubbish = 0xA5A5A5A5A5A5A5A5ull;

  const std::string& text_;
  size_t at_;
  Kernel& kernel_;
  int line_ = 0;
  std::vector<std::map<std::string, int>> scopes_;
  std::map<std::string, size_t> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
  std::vector<int> dynamic_;  // registers with the address of the launch's shared memory
};

}  // namespace

Kernel parse(const std::string& text, const std::string& name, const std::string& file) {
  const std::string entry = ".entry " + name + "(";
  const size_t found = text.find(entry);
  if (found == std::string::npos) throw std::runtime_error(file + ": no kernel " + name);
  Kernel kernel;
  kernel.name = name;
  kernel.file = file;
  Parser(text, found + entry.size(), kernel).run();
  return kernel;
}

}  // namespace simt::ptx
