// Where things are: rows of codes, a warp's own shared memory, and what all warps of a multiprocessor share.
//
// A compilation sets KB, VB (bits of keys and values), G and GN (query heads of a KV head; as a power of two), BF16,
// WARPS, K_BASE (outliers in a block's own row), K_PLACES (those and a chunk of 32; 96 at least), V_ENTRIES (outliers of
// a token's values), V_PLACES (of a head's values of a block; 128 at least), HAS_WINDOW and HAS_SOFTCAP.
#pragma once
#include "words.cuh"

#define BS 64
#define D 128
#define EACH (GN <= 4 ? 1 : 2)  // heads of a lane: of up to four its two columns are one's, see scores.cuh and values.cuh
#define K_ROW (16 * KB)  // bytes of a token's codes
#define V_ROW (16 * VB)

// A warp's own, bytes. What is copied there is 32 bytes aligned, as what comes from memory is.
#define GAP 32                                    // between rows that are read at once, so that they lie in different banks
#define V_BYTES (BS * V_ROW)
#define V_GROUP (16 * V_ROW + (VB == 4 ? 0 : GAP))  // of 16 tokens: at 4 bits sectors change places instead, so that
#define LINE (VB == 4 ? 128 : 32)                 // a line of memory stays one, which takes half as long to copy
#define K_GROUP (8 * K_ROW + GAP)                 // of 8 tokens
#define W_CODES 0                                 // values of the block
#define W_BASES (W_CODES + 4 * V_GROUP)           // (cos, sin) of its middle
#define BASES (BF16 ? 256 : 512)                  // fp16, or fp32 cosines and then sines: see Turned
#define W_RANGES (W_BASES + BASES)                 // scales of its values, then zeros
#define W_KEYS (W_RANGES + 256)                   // outliers: numbers, then what they are
#define W_VALUES (W_KEYS + 4 * K_PLACES)
#define CHUNK 32                                  // entries of a chunk of a chain
#define W_SCORES (W_VALUES + 4 * V_PLACES)        // of the keys' outliers, in fixed point: a row for each head
// Eight lanes' sixteen bytes lie in different banks.
#define SCORE_ROW(g) ((g) % 2 * 68 + (EACH == 1 ? (g) / 2 * 144 : (g) / 2 * 152 + (g) / 2 % 2 * 12))
#define SCORE_WORDS (SCORE_ROW(GN - 1) + 68)
#define W_WEIGHTS W_SCORES                        // once the scores are read; zeros again before the next block's
#define W_OUT (W_SCORES + 4 * SCORE_WORDS)        // of the values' outliers, in fixed point: a row for each head
#define OUT_ROW 143
#define OUT_PLACE(d) ((d) + ((d) >> 3))           // what neighbours read lies in different banks
#define W_QUERY ((W_OUT + 4 * GN * OUT_ROW + 31) / 32 * 32)  // (x, y) of each pair of channels: a row for each head
#define QUERY_ROW 320                             // what follows a row stays zero
#define W_SCALE (W_QUERY + QUERY_ROW * GN)        // of the keys' channels, by pairs
#define W_ZERO (W_SCALE + 256)
#define W_LEAST (W_ZERO + 256)                    // what code 0 decodes to
#define W_COLUMNS (W_LEAST + 256)                 // what there is to know of 16 blocks: Block
#define W_FIRSTS (W_COLUMNS + 256)
#define W_STATE (W_FIRSTS + 64)                   // what is looked at once a block, so that no register is taken: State
#define W_SHARE (W_STATE + 48)                    // the next row of shares
#define W_KEY_CODES (W_STATE + 64)                // at 2 and 3 bits; those of 4 wait in registers
#define W_BYTES ((W_KEY_CODES + (KB < 4 ? 8 * K_GROUP - GAP : 0) + LINE - 1) / LINE * LINE)

// Shared by all warps. The table of what bytes of codes mean begins at 64 KiB sharp, so that an address is a byte put
// between two bytes of where the table is; what else there is lies before it as far as there is room.
#define TABLE_AT 0x10000u
#define TABLE_BYTES (KB == 3 && VB == 3 ? 0x7800 : 0x10000)  // two codes of three bits make no byte above 0x77
#define ANGLES (BS * 64 * 4)
#define LISTS 768                                 // of channels, of tokens, how fast slow pairs turn, places
#define LEAST_AT 672                              // behind them, what code 0 of values means
#define RESERVED 1024                             // what a kernel's own memory begins behind, at most
#define BEFORE_TABLE ((int)((TABLE_AT - RESERVED - ANGLES - LISTS) / W_BYTES))

// A warp's own begins at a line: what is exchanged in it by its number is found by its address.
static_assert(ANGLES % LINE == 0 && LISTS % LINE == 0 && W_BYTES % LINE == 0, "lines");

struct Shared {  // addresses
  u32 angles, lists, mine;
};

INLINE Shared shared_of(u32 start, int warp) {
  Shared s;
  s.angles = start;
  s.lists = start + ANGLES;
  s.mine = s.lists + LISTS + warp * W_BYTES;
  if (warp >= BEFORE_TABLE) s.mine = TABLE_AT + TABLE_BYTES + (warp - BEFORE_TABLE) * W_BYTES;
  return s;
}

// Channels c and c + D/2 are a pair. A lane r of four decodes sixteen of them, those of its bytes of a row, four a word
// (n = 0 to 3, k = 0 to 3); at 2 and 3 bits a byte has two, and units n = 1 and 3 are the slower half of all pairs.
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

// Row q (+ 8) of tile m of scores is token 2m (+ 1) of the eight of lanes q. They follow one another, or at 4 bits, whose
// keys are loaded to registers, every second one does: so that a load takes lines of memory whole, which was 4 us of 170.
#define EVERY_SECOND (KB == 4)
INLINE int token_of(int q, int i) { return EVERY_SECOND ? (q >> 1) * 16 + (q & 1) + 2 * i : 8 * q + i; }
// Row q (+ 8) of tile i of the output is this channel.
INLINE int out_channel(int i, int q, int upper) {
#if VB == 4
  return 8 * q + i + 64 * upper;
#else
  return (i >> 2) * 32 + 4 * q + (i & 3) + 64 * upper;
#endif
}
