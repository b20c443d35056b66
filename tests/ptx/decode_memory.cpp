// decode_memory.cpp: loads, stores, atomic operations, asynchronous copies, fences.
#include <algorithm>
#include <utility>

#include "tests/ptx/decoder.h"
#include "tests/ptx/operations.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

void Decoder::convert_address() {
  const bool to = take("to");
  const Space space = take_space();
  const Type t = take_type();
  same(t, 1);
  const uint64_t window = space == SHARED  ? kSharedWindow
                          : space == LOCAL ? kLocalWindow
                          : space == PARAM ? kParamWindow
                                           : 0;
  if (!is_wide(t)) bad("32-bit addresses");
  i->operands[2] = constant(window, true);
  i->sources = 2;
  return handler(to ? binary<uint64_t, uint64_t, Sub> : binary<uint64_t, uint64_t, Add>);
}

void Decoder::load_memory() {
  i->space = take_space();
  ignore({"volatile",
          "relaxed",
          "acquire",
          "weak",
          "cta",
          "gpu",
          "sys",
          "ca",
          "cg",
          "cs",
          "lu",
          "cv",
          "L1",
          "L1::evict_last",
          "L1::no_allocate",
          "L1::evict_first",
          "L1::evict_normal",
          "L2::128B",
          "L2::64B",
          "L2::256B",
          "L2::evict_last",
          "L2::evict_first"});
  if (take("nc")) i->mode |= 2;
  const int vec = take("v4") ? 4 : take("v2") ? 2 : 1;
  i->ty = take_type();
  count(2);
  i->element_size = static_cast<uint8_t>(size_of(i->ty));
  i->vector = static_cast<uint8_t>(vec);
  if (is_signed(i->ty)) i->mode |= 1;
  if (vec > 1) {
    if (operands()[0].kind != Operand::VEC || operands()[0].parts.size() != static_cast<size_t>(vec)) bad("vector");
    for (const Operand& part : operands()[0].parts)
      dest(part, part.kind == Operand::SINK ? std::max(4, size_of(i->ty)) : 0);
  } else
    dest(operands()[0], 0);
  memory(operands()[1]);
  return handler(load_handler(static_cast<Space>(i->space), i->element_size, vec));
}

void Decoder::store_memory() {
  i->space = take_space();
  ignore({"volatile", "relaxed", "release", "weak", "cta", "gpu", "sys", "wb", "cg", "cs", "wt", "L1::no_allocate",
          "L2::evict_first"});
  const int vec = take("v4") ? 4 : take("v2") ? 2 : 1;
  i->ty = take_type();
  count(2);
  i->element_size = static_cast<uint8_t>(size_of(i->ty));
  i->vector = static_cast<uint8_t>(vec);
  memory(operands()[0]);
  const auto stored = [&](const Operand& o) {
    // A register may be wider than what is stored of it, not narrower.
    source(o, o.kind == Operand::REG ? 0 : std::max(4, size_of(i->ty)));
    if (size_of(i->ty) == 8 && !i->operands[i->sources - 1].wide) bad("a narrow register");
  };
  if (vec > 1) {
    if (operands()[1].kind != Operand::VEC || operands()[1].parts.size() != static_cast<size_t>(vec)) bad("vector");
    for (const Operand& part : operands()[1].parts) stored(part);
  } else
    stored(operands()[1]);
  return handler(store_handler(static_cast<Space>(i->space), i->element_size, vec));
}

void Decoder::atomic_operation() {
  i->space = take_space();
  ignore({"relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys"});
  static const std::pair<const char*, Atomic> table[] = {
      {"add", A_ADD}, {"min", A_MIN},   {"max", A_MAX}, {"and", A_AND}, {"or", A_OR},
      {"xor", A_XOR}, {"exch", A_EXCH}, {"cas", A_CAS}, {"inc", A_INC}, {"dec", A_DEC}};
  bool found = false;
  for (const auto& [name, code] : table)
    if (!found && take(name)) {
      i->x = code;
      found = true;
    }
  if (!found) bad("operation");
  i->ty = take_type();
  i->element_size = static_cast<uint8_t>(size_of(i->ty));
  size_t k = 0;
  if (root == "atom") dest(operands()[k++], i->element_size == 8 ? 8 : 4);
  memory(operands()[k++]);
  for (; k < operands().size(); ++k) source(operands()[k], i->element_size == 8 ? 8 : 4);
  return handler(atomic_handler(static_cast<Space>(i->space)));
}

void Decoder::copy_async() {
  if (take("async")) {
    if (take("commit_group")) {
      count(0);
      return handler(cp_async_commit);
    }
    if (take("wait_all")) {
      count(0);
      i->imm = -1;
      return handler(cp_async_wait);
    }
    if (take("wait_group")) {
      count(1);
      i->imm = static_cast<int64_t>(operands()[0].imm);
      return handler(cp_async_wait);
    }
    const bool cg = take("cg");
    if (!cg && !take("ca")) bad("not supported");
    if (!take("shared") && !take("shared::cta")) bad("not supported");
    if (!take("global")) bad("not supported");
    ignore({"L2::128B", "L2::64B", "L2::256B"});
    if (operands().size() < 3) bad("operands");
    memory(operands()[0]);
    const int64_t to = i->imm;
    memory(operands()[1]);
    i->x = static_cast<uint32_t>(i->imm);
    i->imm = to;
    i->element_size = static_cast<uint8_t>(operands()[2].imm);
    if (i->element_size != 16 && (cg || (i->element_size != 8 && i->element_size != 4))) bad("size");
    if (operands().size() > 3) source(operands()[3], 4);
    return handler(cp_async);
  }
  bad("not supported");
}

void Decoder::order_memory() {
  if (take("gl") || take("gpu") || take("sys")) {
    ignore({"sc", "acq_rel"});
    return handler(memory_fence);
  }
  no_operation();
}

void Decoder::no_operation() {
  i->kind = NOP;
  for (size_t k = 1; k < used.size(); ++k) used[k] = true;
  return;
}

}  // namespace ptx
