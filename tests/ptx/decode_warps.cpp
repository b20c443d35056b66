// decode_warps.cpp: branches, barriers, and what the threads of a warp do together.
#include "tests/ptx/decoder.h"
#include "tests/ptx/lanes.h"
#include "tests/ptx/warp_ops.h"

namespace ptx {

void Decoder::branch() {
  i->kind = BRA;
  take("uni");
  count(1);
  const auto label = f.labels.find(operands()[0].name);
  if (label == f.labels.end()) bad("no such label");
  i->target = label->second;
  return;
}

void Decoder::return_() {
  i->kind = RET;
  take("uni");
  return;
}

void Decoder::trap() {
  i->kind = TRAP;
  return;
}

void Decoder::barrier() {
  take("cta");
  if (root == "bar" && take("warp")) {
    if (!take("sync")) bad("not supported");
    i->kind = SYNC_MASK;
    source(operands()[0], 4);
    i->members = 0;
    return handler(warp_barrier);
  }
  if (!take("sync")) bad("not supported");
  take("aligned");
  if (operands().size() != 1 || operands()[0].kind != Operand::IMM) bad("only whole barriers with a fixed number");
  i->kind = BARRIER;
  i->imm = static_cast<int64_t>(operands()[0].imm);
  return;
}

void Decoder::shuffle_lanes() {
  if (!take("sync")) bad("without sync");
  i->kind = SYNC_MASK;
  i->mode = take("up") ? 0 : take("down") ? 1 : take("bfly") ? 2 : take("idx") ? 3 : (bad("mode"), 0);
  if (take_type() != B32) bad("type");
  count(5);
  if (operands()[0].kind == Operand::PAIR) {
    dest(operands()[0].parts[0], 4);
    if (operands()[0].parts[1].kind != Operand::SINK)
      i->predicate_out2 = static_cast<int16_t>(predicate(operands()[0].parts[1]));
  } else
    dest(operands()[0], 4);
  for (size_t k = 1; k < 5; ++k) source(operands()[k], 4);
  i->members = 4;
  return handler(shuffle);
}

void Decoder::vote_of_lanes() {
  if (!take("sync")) bad("without sync");
  i->kind = SYNC_MASK;
  i->mode = take("all") ? 0 : take("any") ? 1 : take("uni") ? 2 : take("ballot") ? 3 : (bad("mode"), 0);
  const Type t = take_type();
  if ((t == PRED) == (i->mode == 3)) bad("type");
  count(3);
  if (i->mode == 3)
    dest(operands()[0], 4);
  else
    i->predicate_out = static_cast<int16_t>(predicate(operands()[0]));
  i->predicate_in = static_cast<int16_t>(predicate(operands()[1]));
  i->predicate_in_negated = operands()[1].negated;
  source(operands()[2], 4);
  i->members = i->results;
  return handler(vote);
}

void Decoder::reduce_lanes() {
  if (!take("sync")) bad("without sync");
  i->kind = SYNC_MASK;
  i->x = take("add")   ? A_ADD
         : take("min") ? A_MIN
         : take("max") ? A_MAX
         : take("and") ? A_AND
         : take("or")  ? A_OR
         : take("xor") ? A_XOR
                       : (bad("operation"), 0);
  i->ty = take_type();
  if (size_of(i->ty) != 4 || i->ty == F32) bad("type");
  count(3);
  dest(operands()[0], 4), source(operands()[1], 4), source(operands()[2], 4);
  i->members = 2;
  return handler(redux);
}

void Decoder::match_lanes() {
  if (!take("any") || !take("sync")) bad("not supported");
  i->kind = SYNC_MASK;
  const Type t = take_type();
  count(3);
  dest(operands()[0], 4), source(operands()[1], is_wide(t) ? 8 : 4), source(operands()[2], 4);
  i->members = 2;
  return handler(match_any);
}

void Decoder::active_lanes() {
  take_type();
  count(1);
  dest(operands()[0], 4);
  return handler(active_mask);
}

void Decoder::load_matrices() {
  if (!take("sync") || !take("aligned") || !take("m8n8")) bad("not supported");
  i->kind = SYNC_ALIGNED;
  i->x = take("x4") ? 4 : take("x2") ? 2 : take("x1") ? 1 : 0;
  i->mode = take("trans");
  if ((!take("shared") && !take("shared::cta")) || take_type() != B16 || i->x == 0) bad("not supported");
  count(2);
  for (const Operand& part : operands()[0].parts) dest(part, 4);
  if (i->results != i->x) bad("registers");
  memory(operands()[1]);
  return handler(ldmatrix);
}

void Decoder::multiply_matrices() {
  if (s->opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") bad("not supported");
  for (size_t k = 1; k < used.size(); ++k) used[k] = true;
  i->kind = SYNC_ALIGNED;
  count(4);
  const size_t sizes[] = {4, 4, 2, 4};
  for (size_t k = 0; k < 4; ++k) {
    if (operands()[k].parts.size() != sizes[k]) bad("registers");
    for (const Operand& part : operands()[k].parts) k == 0 ? dest(part, 4) : source(part, 4);
  }
  return handler(mma_m16n8k16_bf16);
}

}  // namespace ptx
