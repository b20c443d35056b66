// attention_tiles.h: what all attention kernels share: where a head's rows are in the packed tensors, and which tile of
// which head a block works on. No CUDA in here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

// Shared memory that a block can have on every GPU from sm_80 on.
inline constexpr size_t kLeastSharedMemory = 99 << 10;

struct AttentionSizes {
  int channels = 0;        // C = NH * HD
  int sequence = 0;        // T
  int heads = 0;           // NH
  int head_dim = 0;        // HD
  int total_heads = 0;     // B * NH
  int heads_together = 1;  // heads whose tiles are scheduled as one group, see attention_tile()
  float scale = 0;         // 1 / sqrt(HD)
};

// A tile of rows of one head, and where the head is in each tensor. Kept in a few integers, of which 64-bit positions
// are one multiply-add away: registers are what limits these kernels.
struct AttentionTile {
  int tile;
  int head;           // of all B * NH
  int first_token;    // of the sequence, among all B * T
  int first_channel;  // of the head, among C

  // Position of the head's first element of token t in qkv [B,T,3C]: Q; K is C elements further, V another C.
  HOST_DEVICE int64_t packed(const AttentionSizes& sizes, int t) const {
    return static_cast<int64_t>(first_token + t) * (3 * sizes.channels) + first_channel;
  }
  // The same in out [B,T,C].
  HOST_DEVICE int64_t channel(const AttentionSizes& sizes, int t) const {
    return static_cast<int64_t>(first_token + t) * sizes.channels + first_channel;
  }
  // Position of the head's first column of Q in the sums of the columns of every tile [B,tiles,3C]; K and V as above.
  HOST_DEVICE int64_t tile_sums(const AttentionSizes& sizes, int tiles) const {
    return (static_cast<int64_t>(first_token / sizes.sequence) * tiles + tile) * (3 * sizes.channels) + first_channel;
  }
  // Position of query t in lse [B,NH,T].
  HOST_DEVICE int64_t row(const AttentionSizes& sizes, int t) const {
    return static_cast<int64_t>(head) * sizes.sequence + t;
  }
};

// Blocks are numbered so that the hardware, which starts them in order, gets long ones first and short ones last: a
// group of heads at a time, and within the group all tiles with the most work before those with less. One group is as
// many heads as keep their K and V in the L2 cache while their tiles are at work. `tiles` is their number per head;
// causality gives the last tile of queries, or the first tile of keys, the most work.
HOST_DEVICE inline AttentionTile attention_tile(const AttentionSizes& sizes, int block, int tiles,
                                                bool last_is_longest) {
  const int group_blocks = sizes.heads_together * tiles;
  const int first_head = block / group_blocks * sizes.heads_together, left = sizes.total_heads - first_head;
  const int group_heads = left < sizes.heads_together ? left : sizes.heads_together;
  const int in_group = block % group_blocks, rank = in_group / group_heads;
  const int head = first_head + in_group % group_heads;
  return {.tile = last_is_longest ? tiles - 1 - rank : rank,
          .head = head,
          .first_token = head / sizes.heads * sizes.sequence,
          .first_channel = head % sizes.heads * sizes.head_dim};
}

HOST_DEVICE inline int attention_tiles(int sequence, int tile_rows) { return (sequence + tile_rows - 1) / tile_rows; }
