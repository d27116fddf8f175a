// Where things are: rows of codes, a warp's own shared memory, and what all warps of a multiprocessor share.
//
// A compilation sets KB, VB (bits of keys and values), G and GN (query heads of a KV head; as a power of two), BF16,
// WARPS, K_BASE (outliers in a block's own row), K_PLACES (those and a chunk of 32; 96 at least), V_ENTRIES (outliers of
// a token's values), HAS_WINDOW and HAS_SOFTCAP.
#pragma once
#include "words.cuh"

#define BS 64
#define D 128
#define GP 8           // columns of a product: query heads, with padding
#define K_ROW (16 * KB)  // bytes of a token's codes
#define V_ROW (16 * VB)

// A warp's own, bytes.
#define V_BYTES (BS * V_ROW)
#define W_CODES 0                                 // values of the block
#define W_BASES (W_CODES + V_BYTES)               // (cos, sin) of its first position
#define W_RANGES (W_BASES + 256)                  // scales of its values, then zeros
#define W_KEYS (W_RANGES + 256)                   // outliers: numbers, then what they are
#define W_VALUES (W_KEYS + 4 * K_PLACES)
#define V_PLACES 128
#define W_SCORES (W_VALUES + 4 * V_PLACES)        // of the keys' outliers, in fixed point: a row for each head
#define SCORE_ROW 68
#define W_WEIGHTS W_SCORES                        // once the scores are read; zeros again before the next block's
#define W_OUT (W_SCORES + 4 * GN * SCORE_ROW)     // of the values' outliers, in fixed point: a row for each head
#define OUT_ROW 143
#define OUT_PLACE(d) ((d) + ((d) >> 3))           // what neighbours read lies in different banks
#define W_QUERY ((W_OUT + 4 * GN * OUT_ROW + 15) / 16 * 16)  // (x, y) of each pair of channels: a row for each head
#define QUERY_ROW 320
#define W_SCALE (W_QUERY + QUERY_ROW * GN)        // of the keys' channels, by pairs
#define W_ZERO (W_SCALE + 256)
#define W_LEAST (W_ZERO + 256)                    // what code 0 decodes to
#define W_COLUMNS (W_LEAST + 256)                 // Block of each of 16 columns
#define W_KEY_CODES (W_COLUMNS + 256)             // at 2 and 3 bits; those of 4 wait in registers
#define W_BYTES ((W_KEY_CODES + (KB < 4 ? BS * K_ROW : 0) + 127) / 128 * 128)

// Shared by all warps. The table of pairs, of four-bit codes, begins at 64 KiB sharp, so that an address is a byte of
// codes put between two bytes of where the table is; what else there is lies before it as far as there is room.
#define TABLE_AT 0x10000u
#define TABLE_BYTES (KB == 4 || VB == 4 ? 0x10000 : 0)
#define ANGLES (BS * 64 * 4)
#define LISTS 640                                 // of channels, of tokens, and tables of fewer bits
#define RESERVED 1024                             // what a kernel's own memory begins behind, at most
#define BEFORE_TABLE ((int)((TABLE_AT - RESERVED - ANGLES - LISTS) / W_BYTES))

struct Shared {  // addresses
  u32 angles, lists, mine;
};

INLINE Shared shared_of(u32 start, int warp) {
  Shared s;
  s.angles = start;
  s.lists = start + ANGLES;
  s.mine = s.lists + LISTS + warp * W_BYTES;
  if (TABLE_BYTES && warp >= BEFORE_TABLE) s.mine = TABLE_AT + TABLE_BYTES + (warp - BEFORE_TABLE) * W_BYTES;
  return s;
}

// Channels c and c + D/2 are a pair. A lane r of four decodes sixteen of them, those of its bytes of a row, four a word
// (n = 0 to 3, k = 0 to 3); at 2 and 3 bits a byte has two.
INLINE int channel_of(int n, int r, int k) {
#if KB == 4
  return 16 * r + 4 * n + k;
#else
  return (n & 1) * 32 + 8 * r + 4 * (n >> 1) + k;
#endif
}
INLINE void place_of(int c, int& n, int& r, int& k) {
#if KB == 4
  r = c >> 4; n = c >> 2 & 3;
#else
  r = c >> 3 & 3; n = (c >> 2 & 1) * 2 + (c >> 5);
#endif
  k = c & 3;
}

// Row q (+ 8) of tile m of scores is token 8q + 2m (+ 1): a thread's eight tokens follow one another.
// Row q (+ 8) of tile i of the output is this channel.
INLINE int out_channel(int i, int q, int upper) {
#if VB == 4
  return 8 * q + i + 64 * upper;
#else
  return (i >> 2) * 32 + 4 * q + (i & 3) + 64 * upper;
#endif
}
