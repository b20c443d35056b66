// decoder.h: one function's statements become instructions with handlers; then registers get their places in the frame.
// What is not supported ends the process with the statement.
#pragma once

#include <initializer_list>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tests/ptx/machine.h"

namespace ptx {

class Decoder {
 public:
  Decoder(Module& module, Function& function) : m(module), f(function) {}
  void run();

 private:
  // ---- modifiers of the statement: each one must be taken
  bool take(const std::string& name);
  Type take_type();
  int take_rounding();
  Space take_space();
  void ignore(std::initializer_list<const char*> names);

  // ---- operands
  Place constant(uint64_t bits, bool wide);
  Place special(const std::string& name);
  // The address of a variable in its own state space.
  uint64_t address(const std::string& name);
  // A register, special register, immediate or symbol. `bytes` (2, 4, 8): what the instruction reads; 0: as the
  // register is.
  Place value(const Operand& o, int bytes);
  int predicate(const Operand& o);
  void dest(const Operand& o, int bytes);
  void source(const Operand& o, int bytes);
  // [register + offset]: the base becomes a source, the rest imm.
  void memory(const Operand& o);
  void count(size_t n);
  // A destination and the sources, all of one size.
  void same(Type t, size_t sources, int dest_bytes = 0);
  void handler(Handler h);

  // ---- a group of instructions each
  void move();
  void add_or_extreme();
  void multiply();
  void divide();
  void root_or_reciprocal();
  void approximation();
  void sign();
  void logic();
  void logical_not();
  void shift_bits();
  void count_bits();
  void reverse_bits();
  void extract_field();
  void insert_field();
  void any_logic();
  void permute_bytes();
  void shift_pair();
  void select_value();
  void compare_values();
  void convert_value();
  void convert_address();
  void load_memory();
  void store_memory();
  void atomic_operation();
  void copy_async();
  void branch();
  void return_();
  void trap();
  void barrier();
  void order_memory();
  void no_operation();
  void shuffle_lanes();
  void vote_of_lanes();
  void reduce_lanes();
  void match_lanes();
  void active_lanes();
  void load_matrices();
  void multiply_matrices();

  [[noreturn]] void bad(const std::string& what);
  const std::vector<Operand>& operands() const { return s->operands; }
  int new_virtual(bool wide);
  void declare_variables();
  void declare_registers();
  void statement();
  void instruction();
  void place_registers();

  Module& m;
  Function& f;
  std::unordered_map<std::string, std::pair<int, Type>> regs;  // to virtual number (predicates count apart)
  std::vector<uint8_t> virtual_wide;
  std::unordered_map<std::string, Variable*> variables;
  std::map<std::pair<uint64_t, bool>, Place> constants;
  std::unordered_map<std::string, int> special_register;
  // The statement at hand.
  const Statement* s = nullptr;
  Instruction* i = nullptr;
  std::string root;  // what comes before the first modifier
  std::vector<bool> used;
};

}  // namespace ptx
