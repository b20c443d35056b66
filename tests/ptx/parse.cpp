// parse.cpp: PTX text to statements.
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/ptx/module.h"

namespace ptx {

void fail(const std::string& message) {
  std::fprintf(stderr, "PTXSIM: %s\n", message.c_str());
  std::fflush(nullptr);
  std::_Exit(96);
}

Type type_of(const std::string& n) {
  static const std::unordered_map<std::string, Type> names = {
      {"u8", U8},   {"u16", U16}, {"u32", U32},   {"u64", U64},     {"s8", S8},        {"s16", S16}, {"s32", S32},
      {"s64", S64}, {"b8", B8},   {"b16", B16},   {"b32", B32},     {"b64", B64},      {"f16", F16}, {"bf16", BF16},
      {"f32", F32}, {"f64", F64}, {"pred", PRED}, {"f16x2", F16X2}, {"bf16x2", BF16X2}};
  const auto found = names.find(n);
  return found == names.end() ? NO_TYPE : found->second;
}

namespace {

struct Parser {
  Module& m;
  const std::string& t;
  size_t p = 0;
  int ptx_line = 1, file = 0, line = 0;

  Parser(Module& module, const std::string& text) : m(module), t(text) {}

  [[noreturn]] void bad(const std::string& what) {
    size_t b = t.rfind('\n', p ? p - 1 : 0), e = t.find('\n', p);
    b = b == std::string::npos ? 0 : b + 1;
    fail(m.source + ":" + std::to_string(ptx_line) + ": " + what + ": " +
         t.substr(b, (e == std::string::npos ? t.size() : e) - b));
  }

  void space() {
    while (p < t.size()) {
      if (t[p] == '\n') {
        ++ptx_line;
        ++p;
      } else if (isspace(static_cast<unsigned char>(t[p])))
        ++p;
      else if (t.compare(p, 2, "//") == 0) {
        while (p < t.size() && t[p] != '\n') ++p;
      } else if (t.compare(p, 2, "/*") == 0) {
        while (p < t.size() && t.compare(p, 2, "*/") != 0) {
          if (t[p] == '\n') ++ptx_line;
          ++p;
        }
        p += 2;
      } else
        break;
    }
  }
  bool end() {
    space();
    return p >= t.size();
  }
  bool at(char c) {
    space();
    return p < t.size() && t[p] == c;
  }
  bool eat(char c) {
    if (!at(c)) return false;
    ++p;
    return true;
  }
  void need(char c) {
    if (!eat(c)) bad(std::string("expected '") + c + "'");
  }
  static bool word_char(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }
  // An identifier, a directive with its dot, or a number.
  std::string word(bool dots = false) {
    space();
    size_t b = p;
    if (p < t.size() && t[p] == '.') ++p;
    while (p < t.size() && (word_char(t[p]) || (dots && (t[p] == '.' || t.compare(p, 2, "::") == 0))))
      p += t[p] == ':' ? 2 : 1;
    if (b == p) bad("unexpected character");
    return t.substr(b, p - b);
  }
  std::string peek_word() {
    const size_t save = p;
    const int l = ptx_line;
    std::string w = word();
    p = save;
    ptx_line = l;
    return w;
  }
  void to_end_of_line() {
    while (p < t.size() && t[p] != '\n') ++p;
  }
  uint64_t number() {
    space();
    const bool negative = eat('-');
    space();
    char* stop = nullptr;
    const uint64_t v = strtoull(t.c_str() + p, &stop, 0);
    if (stop == t.c_str() + p) bad("expected a number");
    p = static_cast<size_t>(stop - t.c_str());
    if (p < t.size() && t[p] == 'U') ++p;
    return negative ? 0 - v : v;
  }

  Operand operand() {
    Operand o;
    space();
    const char c = t[p];
    if (c == '{') {
      ++p;
      o.kind = Operand::VEC;
      while (!at('}')) {
        o.parts.push_back(operand());
        eat(',');
      }
      ++p;
      return o;
    }
    if (c == '[') {
      ++p;
      o.kind = Operand::MEM;
      space();
      if (isdigit(static_cast<unsigned char>(t[p])) || t[p] == '-')
        o.imm = number();
      else {
        o.name = word(true);
        if (at('+')) {
          ++p;
          o.imm = number();
        } else if (at('-'))
          o.imm = number();
      }
      need(']');
      return o;
    }
    if (c == '!') {
      ++p;
      o = operand();
      o.negated = true;
      return o;
    }
    if (isdigit(static_cast<unsigned char>(c)) || c == '-') {
      o.kind = Operand::IMM;
      if (c == '0' && p + 1 < t.size() && (t[p + 1] == 'f' || t[p + 1] == 'F')) {
        o.is_float = true;
        o.imm = strtoull(t.substr(p + 2, 8).c_str(), nullptr, 16);
        p += 10;
      } else if (c == '0' && p + 1 < t.size() && (t[p + 1] == 'd' || t[p + 1] == 'D')) {
        o.is_double = true;
        o.imm = strtoull(t.substr(p + 2, 16).c_str(), nullptr, 16);
        p += 18;
      } else {
        o.imm = number();
        if (p < t.size() && t[p] == '.') bad("decimal floating-point immediate");
      }
      return o;
    }
    const std::string name = word(true);
    if (name == "_") {
      o.kind = Operand::SINK;
      return o;
    }
    o.kind = name[0] == '%' || registers.count(name) ? Operand::REG : Operand::SYM;
    o.name = name;
    if (at('+')) {
      ++p;
      o.imm = number();
    }
    if (at('|')) {
      ++p;
      Operand pair;
      pair.kind = Operand::PAIR;
      pair.parts = {o, operand()};
      return pair;
    }
    return o;
  }

  std::unordered_map<std::string, Type> registers;  // of the current function, by name without number

  // ".align 4 .b8 name[16] = {...}": after the state space.
  Variable variable(Space space_) {
    Variable v;
    v.space = space_;
    Type ty = NO_TYPE;
    while (at('.')) {
      const std::string d = word();
      if (d == ".align")
        v.align = number();
      else if (d == ".ptr" || d == ".global" || d == ".const" || d == ".shared" || d == ".local" || d == ".visible" ||
               d == ".weak")
        continue;
      else if ((ty = type_of(d.substr(1))) == NO_TYPE)
        bad("unknown directive " + d);
    }
    if (ty == NO_TYPE) bad("a variable without type");
    const uint64_t element = static_cast<uint64_t>(size_of(ty));
    v.align = std::max(v.align, element);
    v.name = word();
    v.size = element;
    bool array = false;
    while (eat('[')) {
      array = true;
      if (at(']'))
        v.size = 0;
      else
        v.size *= number();
      need(']');
    }
    if (eat('=')) {
      const auto value = [&] {
        space();
        if (isdigit(static_cast<unsigned char>(t[p])) || t[p] == '-') {
          uint64_t bits = operand().imm;
          for (uint64_t i = 0; i < element; ++i) v.init.push_back(static_cast<uint8_t>(bits >> 8 * i));
        } else {
          std::string n = word();
          if (n == "generic") {
            need('(');
            n = word();
            need(')');
          }
          v.pointers.push_back({v.init.size(), n});
          v.init.resize(v.init.size() + element);
        }
      };
      if (array) {
        need('{');
        while (!at('}')) {
          value();
          eat(',');
        }
        need('}');
      } else
        value();
      if (v.init.size() > v.size) v.size = v.init.size();
    }
    return v;
  }

  void loc() {
    file = static_cast<int>(number());
    line = static_cast<int>(number());
    to_end_of_line();
  }

  void statement(Function& f) {
    if (at('.')) {
      const std::string d = word();
      if (d == ".loc") return loc();
      if (d == ".reg") {
        const Type ty = type_of(word().substr(1));
        if (ty == NO_TYPE) bad("unknown register type");
        do {
          std::string name = word();
          if (eat('<')) {
            const uint64_t n = number();
            need('>');
            for (uint64_t i = 0; i < n; ++i) f.registers.push_back({name + std::to_string(i), ty});
          } else {
            f.registers.push_back({name, ty});
            registers[name] = ty;
          }
        } while (eat(','));
        need(';');
        return;
      }
      if (d == ".local" || d == ".shared") {
        f.locals.push_back(variable(d == ".local" ? LOCAL : SHARED));
        need(';');
        return;
      }
      if (d == ".pragma") {
        while (!at(';')) ++p;
        ++p;
        return;
      }
      bad("unknown directive " + d);
    }
    if (at('{') || at('}')) {
      ++p;
      return;
    }
    Statement s;
    space();
    s.ptx_line = ptx_line;
    if (eat('@')) {
      s.negated = eat('!');
      s.predicate = word();
    }
    const std::string first = word(true);
    if (s.predicate.empty() && at(':')) {
      ++p;
      f.labels[first] = static_cast<int>(f.body.size());
      return;
    }
    s.opcode = first;
    for (size_t b = 0; b <= first.size();) {
      size_t e = first.find('.', b);
      if (e == std::string::npos) e = first.size();
      s.parts.push_back(first.substr(b, e - b));
      b = e + 1;
    }
    s.file = file;
    s.line = line;
    while (!at(';')) {
      if (at('(')) bad("calls are not supported");
      s.operands.push_back(operand());
      if (!at(';')) need(',');
    }
    ++p;
    f.body.push_back(std::move(s));
  }

  void function(bool entry) {
    Function f;
    f.entry = entry;
    registers.clear();
    if (at('(')) bad("functions with results are not supported");
    f.name = word();
    if (eat('(')) {
      while (!at(')')) {
        if (word() != ".param") bad("expected .param");
        Variable v = variable(PARAM);
        f.param_bytes = (f.param_bytes + v.align - 1) / v.align * v.align;
        v.offset = f.param_bytes;
        f.param_bytes += v.size;
        f.params.push_back(v);
        eat(',');
      }
      need(')');
    }
    while (at('.')) {
      const std::string d = word();
      if (d == ".maxntid" || d == ".reqntid") {
        uint64_t n = number();
        while (eat(',')) n *= number();
        f.maxntid = static_cast<int>(n);
      } else if (d == ".minnctapersm" || d == ".maxnreg" || d == ".maxnctapersm")
        number();
      else if (d == ".noreturn" || d == ".explicitcluster")
        continue;
      else
        bad("unknown directive " + d);
    }
    if (eat(';')) return;  // a declaration
    need('{');
    int depth = 1;
    while (depth > 0) {
      if (at('{')) ++depth;
      if (at('}')) --depth;
      if (depth == 0) {
        ++p;
        break;
      }
      statement(f);
    }
    if (!f.entry) return;  // device functions: only calls would need them, and those are refused
    m.functions[f.name] = std::move(f);
  }

  void run() {
    while (!end()) {
      const std::string d = word();
      if (d == ".version") {
        word(true);
      } else if (d == ".target") {
        const std::string n = word();
        m.target = std::atoi(n.c_str() + 3);
        while (eat(',')) word();
      } else if (d == ".address_size") {
        if (number() != 64) bad("64-bit addresses only");
      } else if (d == ".visible" || d == ".weak" || d == ".common")
        continue;
      else if (d == ".extern") {
        external = true;
        continue;
      } else if (d == ".entry")
        function(true);
      else if (d == ".func")
        function(false);
      else if (d == ".loc")
        loc();
      else if (d == ".file") {
        const int id = static_cast<int>(number());
        space();
        if (t[p] != '"') bad("expected a file name");
        const size_t e = t.find('"', p + 1);
        m.files[id] = t.substr(p + 1, e - p - 1);
        p = e + 1;
        to_end_of_line();
      } else if (d == ".section") {
        while (!at('{')) ++p;
        while (!at('}')) ++p;
        ++p;
      } else if (d == ".global" || d == ".const" || d == ".shared") {
        Variable v = variable(d == ".global" ? GLOBAL : d == ".const" ? CONST : SHARED);
        v.external = external;
        need(';');
        m.globals.push_back(v);
      } else
        bad("unknown directive " + d);
      external = false;
    }
  }
  bool external = false;
};

}  // namespace

void parse(Module& module, const std::string& text) { Parser(module, text).run(); }

}  // namespace ptx
