// report.cpp: see report.h.
#include "tests/cuda_on_cpu/report.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <vector>

namespace cuda_on_cpu {

namespace {

// Addresses and mangled names of the functions in this program's own symbol table.
std::map<uintptr_t, std::string> read_symbols() {
  std::map<uintptr_t, std::string> names;
  std::ifstream file("/proc/self/exe", std::ios::binary);
  Elf64_Ehdr header;
  if (!file.read(reinterpret_cast<char*>(&header), sizeof header)) return names;
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  file.seekg(static_cast<std::streamoff>(header.e_shoff));
  file.read(reinterpret_cast<char*>(sections.data()),
            static_cast<std::streamsize>(sections.size() * sizeof(Elf64_Shdr)));
  uintptr_t base = 0;  // the program itself comes first
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        *static_cast<uintptr_t*>(result) = info->dlpi_addr;
        return 1;
      },
      &base);
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB || section.sh_link >= sections.size()) continue;
    std::vector<Elf64_Sym> symbols(section.sh_size / sizeof(Elf64_Sym));
    file.seekg(static_cast<std::streamoff>(section.sh_offset));
    file.read(reinterpret_cast<char*>(symbols.data()),
              static_cast<std::streamsize>(symbols.size() * sizeof(Elf64_Sym)));
    const Elf64_Shdr& strings = sections[section.sh_link];
    std::vector<char> text(strings.sh_size + 1);
    file.seekg(static_cast<std::streamoff>(strings.sh_offset));
    file.read(text.data(), static_cast<std::streamsize>(strings.sh_size));
    for (const Elf64_Sym& symbol : symbols) {
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && symbol.st_value != 0 && symbol.st_name < strings.sh_size) {
        names[base + symbol.st_value] = text.data() + symbol.st_name;
      }
    }
  }
  return names;
}

// "void f<float>(float*, int)" becomes "f<float>".
std::string without_signature(std::string name) {
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  if (name.starts_with("void ")) name.erase(0, 5);
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

}  // namespace

void fail(const std::string& report) {
  static std::mutex mutex;
  mutex.lock();  // the first report is the one
  fflush(stdout);
  fprintf(stderr, "\nCUDA on CPU: %s%s", report.c_str(), report.ends_with("\n") ? "" : "\n");
  fflush(stderr);
  std::abort();
}

std::string setting_text(const char* variable) {
  const char* value = getenv(variable);
  return value == nullptr ? "" : value;
}

uint64_t setting(const char* variable, uint64_t otherwise) {
  const char* value = getenv(variable);
  return value == nullptr || *value == '\0' ? otherwise : strtoull(value, nullptr, 10);
}

namespace {
uint64_t& current_seed() {
  static uint64_t value = setting("CUDA_ON_CPU_SEED", 1);
  return value;
}
}  // namespace

uint64_t seed() { return current_seed(); }
void set_seed(uint64_t seed) { current_seed() = seed; }

std::string kernel_name(const void* function) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  static std::map<const void*, std::string> known;
  std::string& name = known[function];
  if (!name.empty()) return name;
  static const std::map<uintptr_t, std::string> symbols = read_symbols();
  const auto it = symbols.find(reinterpret_cast<uintptr_t>(function));
  if (it == symbols.end()) {
    char text[32];
    snprintf(text, sizeof text, "at %p", function);
    return name = text;
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(it->second.c_str(), nullptr, nullptr, &status);
  name = status == 0 ? without_signature(demangled) : it->second;
  free(demangled);
  return name;
}

}  // namespace cuda_on_cpu
