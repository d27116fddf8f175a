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
#define EVERY_SECOND (KB == 4)  // see token_of
#define PAIRS_APART (KB == 3)
#define K_ROW (16 * KB)  // bytes of a token's codes
#define V_ROW (16 * VB)

// A warp's own, bytes. What is copied there is 32 bytes aligned, as what comes from memory is.
#define GAP 32                                    // between rows that are read at once, so that they lie in different banks
#define GAPS(bits) ((bits) < 4 && !PAIRS_APART)    // or else lines of memory stay lines, which takes half as long to copy
#define LINE (GAPS(VB) ? 32 : 128)
#define V_BYTES (BS * V_ROW)
#define V_GROUP (16 * V_ROW + (GAPS(VB) ? GAP : 0))  // of 16 tokens
#define K_BYTES (BS * K_ROW + (GAPS(KB) ? 7 * GAP : 0))  // groups of 8 tokens
#define W_CODES 0                                 // values of the block
#define W_BASES (W_CODES + 4 * V_GROUP)           // (cos, sin) of its middle
#define BASES (BF16 ? 256 : 512)                  // fp16, or fp32 cosines and then sines: see Turned
#define W_RANGES (W_BASES + BASES)                 // scales of its values, then zeros
#define W_KEYS (W_RANGES + 256)                   // outliers: numbers, then what they are
#define W_VALUES (W_KEYS + 4 * K_PLACES)
#define CHUNK 32                                  // entries of a chunk of a chain
#define W_SCORES (W_VALUES + 4 * V_PLACES)        // of the keys' outliers, in fixed point: a row for each head
// Eight lanes' sixteen bytes lie in different banks, or sixteen lanes' eight.
#define SCORE_NEXT (PAIRS_APART ? 72 : 68)
#define SCORE_ROW(g) (PAIRS_APART ? (g) * 72 + (g) / 4 * 8 \
  : (g) % 2 * 68 + (EACH == 1 ? (g) / 2 * 144 : (g) / 2 * 152 + (g) / 2 % 2 * 12))
#define SCORE_WORDS (SCORE_ROW(GN - 1) + SCORE_NEXT)
#define W_WEIGHTS W_SCORES                        // once the scores are read; zeros again before the next block's
#define W_OUT (W_SCORES + 4 * SCORE_WORDS)        // of the values' outliers, in fixed point: a row for each head
#define OUT_ROW 129
#define W_QUERY ((W_OUT + 4 * GN * OUT_ROW + 31) / 32 * 32)  // (x, y) of each pair of channels: a row for each head
#define QUERY_ROW 320                             // what follows a row stays zero
#define W_SCALE (W_QUERY + QUERY_ROW * GN)        // of the keys' channels, by pairs
#define W_ZERO (W_SCALE + 256)
#define W_LEAST (W_ZERO + 256)                    // what code 0 decodes to
#define W_COLUMNS (W_LEAST + 256)                 // what there is to know of 16 blocks: Block
#define W_FIRSTS (W_COLUMNS + 256)
#define W_STATE (W_FIRSTS + 64)                   // what is looked at once a block, so that no register is taken: State
#define W_SHARE (W_STATE + 48)                    // the next row of shares
#define W_KEY_CODES ((W_STATE + 64 + LINE - 1) / LINE * LINE)  // at 2 and 3 bits; those of 4 wait in registers
#define W_BYTES ((W_KEY_CODES + (KB < 4 ? K_BYTES : 0) + LINE - 1) / LINE * LINE)

// Shared by all warps. The table of what bytes of codes mean begins at 64 KiB sharp, so that an address is a byte put
// between two bytes of where the table is. What all warps look at lies before it, at addresses that are known as well, and
// in front of that as many warps' own as there is room for.
#define TABLE_AT 0x10000u
#define TABLE_BYTES (KB == 3 && VB == 3 ? 0x7800 : 0x10000)  // two codes of three bits make no byte above 0x77
#define LISTS 768                                 // of channels, of tokens, how fast slow pairs turn, places
#define LISTS_AT (TABLE_AT - LISTS)
#define LEAST_AT (LISTS_AT + 672)                 // behind them, what code 0 of values means
#define ANGLES (BS * 64 * 4)
#define ANGLES_AT (LISTS_AT - ANGLES)
#define RESERVED 1024                             // what a kernel's own memory begins behind, at most
#define BEFORE_TABLE ((int)((ANGLES_AT - RESERVED) / W_BYTES))

// A warp's own begins at a line: what is exchanged in it by its number is found by its address.
static_assert(W_BYTES % LINE == 0, "lines");

struct Shared {
  u32 mine;  // address
};

INLINE Shared shared_of(u32 start, int warp) {
  return Shared{warp < BEFORE_TABLE ? start + warp * W_BYTES : TABLE_AT + TABLE_BYTES + (warp - BEFORE_TABLE) * W_BYTES};
}

// Channels c and c + D/2 are a pair. A lane r of four decodes sixteen of them, four a word (n = 0 to 3, k = 0 to 3), and
// units n = 1 and 3 are the slower half of all pairs. At 2 and 3 bits a byte of its part of a row has two pairs; at 4 bits
// sixteen bytes hold faster pairs or slower ones, and lanes two apart exchange eight of them (KeyCodes::load_words).
INLINE int channel_of(int n, int r, int k) {
#if KB == 4
  return (n & 1) * 32 + (r & 1) * 16 + (r >> 1) * 8 + 4 * (n >> 1) + k;
#else
  return (n & 1) * 32 + 8 * r + 4 * (n >> 1) + k;
#endif
}
INLINE void place_of(int c, int& n, int& r, int& k) {
#if KB == 4
  r = (c >> 4 & 1) + (c >> 3 & 1) * 2; n = (c >> 2 & 1) * 2 + (c >> 5);
#else
  r = c >> 3 & 3; n = (c >> 2 & 1) * 2 + (c >> 5);
#endif
  k = c & 3;
}

// Row q (+ 8) of tile m of scores is token 2m (+ 1) of the eight of lanes q. At 2 bits they follow one another. At 4, whose
// keys are loaded to registers, every second one does: so that a load takes lines of memory whole, which was 4 us of 170.
// At 3, pairs of tokens are eight apart, and rows that are read at once lie in different banks as they lie in memory.
INLINE int token_of(int q, int i) {
  if (EVERY_SECOND) return (q >> 1) * 16 + (q & 1) + 2 * i;
  if (PAIRS_APART) return (q >> 2) * 32 + (((q & 1) * 4 + (q & 2)) ^ (q >> 2) * 4) + (i & 1) + (i >> 1) * 8;
  return 8 * q + i;
}
// Where row q's (token_of) keys or values of token i begin, among a block's codes in shared memory.
INLINE u32 key_row(int q, int i) { return token_of(q, i) * K_ROW + (GAPS(KB) ? q * GAP : 0); }
INLINE u32 value_row(int q, int i) { return token_of(q, i) * V_ROW + (GAPS(VB) ? (q >> 1) * GAP : 0); }
// Scores of a lane's tokens t to t + 3, or weights, of its head x; ``at`` is where its first token's of its first head are.
INLINE void load_scores(u32* words, u32 at, int x, int t) {
  at += SCORE_NEXT * x * 4;
  if (PAIRS_APART) {
    load2(words, at + token_of(0, t) * 4);
    load2(words + 2, at + token_of(0, t + 2) * 4);
  } else {
    load4(words, at + t * 4);
  }
}
INLINE void store_weights(u32 at, int x, int t, u32 a, u32 b, u32 c, u32 d) {
  at += SCORE_NEXT * x * 4;
  if (PAIRS_APART) {
    store2(at + token_of(0, t) * 4, a, b);
    store2(at + token_of(0, t + 2) * 4, c, d);
  } else {
    store4(at + t * 4, a, b, c, d);
  }
}
// At 4 bits sectors of values' rows change places by this: four tokens that are read at once lie in different banks.
INLINE int sector_of(int token) { return PAIRS_APART ? token >> 1 & 3 : token >> 4; }
// Row q (+ 8) of tile i of the output is this channel.
INLINE int out_channel(int i, int q, int upper) {
#if VB == 4
  return 8 * q + i + 64 * upper;
#else
  return (i >> 2) * 32 + 4 * q + (i & 3) + 64 * upper;
#endif
}
