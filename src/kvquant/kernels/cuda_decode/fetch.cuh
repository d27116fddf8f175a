// What a warp works on, and how it comes to shared memory and registers: asked for while the block before is worked on.
#pragma once
#include "outliers.cuh"

struct Arguments {
  const u16* q_words; const u16* affine; const float* unit; const u16* bases; const int* shares;
  const float* offset_cos; const float* offset_sin; const int* block_table; const int* kv_lengths;
  const unsigned char* key_codes; const int* key_count; const u16* key_index; const u16* key_value;
  const int* spill_head; const int* spill_next; const u16* spill_index; const u16* spill_value;
  const float* key_centroids;
  const unsigned char* value_codes; const u16* value_zero; const u16* value_scale;
  const u16* value_index; const u16* value_value; const int* value_end; const float* value_centroids;
  int* taken; float* part_best; float* part_total; float* part_out;
  float softcap; int window; int sink_tokens; int table_stride; int H; int VG; int programs;
};

struct Block {  // of a column of the block table
  u32 id;
  int count, head;  // key outliers, the first chunk of their chain
  u32 range;        // value outliers: first entry, the one behind the last << 15, whether the block is closed << 31
};

// A warp's work: blocks begin to end - 1 of a sequence and head.
struct Work {
  int h, bh, begin, end, lane, q, r;
  Shared s;

  // Blocks are described 16 columns at a time.
  INLINE void describe(const Arguments& a, int column) const {
    Block block = {0, 0, 0, 0};
    if (lane < 16 && column + lane < end) {
      block.id = a.block_table[(u64)((bh - h) / a.H) * a.table_stride + column + lane];
      const u64 at = (u64)block.id * a.H + h;
      block.count = a.key_count[at];
      block.head = a.spill_head[at];
      if (a.value_end[(u64)block.id * a.H + a.H - 1] > 0)
        block.range = 0x80000000u | (u32)a.value_end[at] << 15 | (h > 0 ? (u32)a.value_end[at - 1] : 0u);
    }
    if (lane < 16) store4(s.mine + W_COLUMNS + lane * 16, block.id, block.count, block.head, block.range);
    __syncwarp();
  }
  INLINE Block block_of(int column) const {
    u32 x[4];
    load4(x, s.mine + W_COLUMNS + ((column - begin) & 15) * 16);
    return Block{x[0], (int)x[1], (int)x[2], x[3]};
  }
};

// Queries and the keys' ranges, as pairs of channels. prepare.py keeps each side's four numbers of a lane together.
INLINE void load_queries(const Arguments& a, const Work& w, float least) {
  const u32 mine = w.s.mine;
  const int q = w.q, r = w.r;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const u16* words = a.q_words + ((w.bh * 4 + n) * 2 * GP + q) * 16 + r * 4;
    const uint2 x = *(const uint2*)words, y = *(const uint2*)(words + GP * 16);
    const u32 at = (n * 4 + r) * 16;
    if (q < GN)
      store4(mine + W_QUERY + q * QUERY_ROW + at, __byte_perm(x.x, y.x, 0x5410), __byte_perm(x.x, y.x, 0x7632),
             __byte_perm(x.y, y.y, 0x5410), __byte_perm(x.y, y.y, 0x7632));
    if (q < 2) {  // scales, zeros
      const uint2* affine = (const uint2*)(a.affine + ((w.bh * 4 + n) * 4 + r) * 16) + q;
      const uint2 x = affine[0], y = affine[2];
      store4(mine + (q ? W_ZERO : W_SCALE) + at, __byte_perm(x.x, y.x, 0x5410), __byte_perm(x.x, y.x, 0x7632),
             __byte_perm(x.y, y.y, 0x5410), __byte_perm(x.y, y.y, 0x7632));
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 at = mine + (w.lane + 32 * i) * 4, scale = load(at + W_SCALE), zero = load(at + W_ZERO);
    store(at + W_LEAST, half_pair(low_of(scale) * least + low_of(zero), high_of(scale) * least + high_of(zero)));
  }
}

// Codes of a block's keys, on their way: at 4 bits in registers, eight rows of sixteen bytes, else in shared memory.
struct KeyCodes {
#if KB == 4
  uint4 row[8];
#endif
  INLINE void ask(const Arguments& a, const Work& w, u32 id) {
    const unsigned char* codes = a.key_codes + ((u64)id * a.H + w.h) * (BS * K_ROW);
#if KB == 4
    codes += w.q * 8 * K_ROW + w.r * 16;
#pragma unroll
    for (int i = 0; i < 8; i++) row[i] = stream(codes + i * K_ROW);
#else
    // Sixteen bytes at a time, each among its neighbours where the eight rows of a thread are read without conflicts.
    const int lane = w.lane;
#pragma unroll
    for (int i = 0; i < 4; i++)
      copy16(w.s.mine + W_KEY_CODES + ((lane ^ (lane >> 4 | (i & 1) << 1) << 1) + 32 * i) * 16,
             codes + ((lane >> 1) + 16 * i) * K_ROW + (lane & 1) * 16);
#if KB == 3
#pragma unroll
    for (int i = 0; i < 2; i++)
      copy16(w.s.mine + W_KEY_CODES + BS * 32 + ((lane ^ (lane >> 3 | 4 * i)) + 32 * i) * 16,
             codes + (lane + 32 * i) * K_ROW + 32);
#endif
#endif
  }
#if KB < 4
  u32 word[8], third[8];
#endif
  // Selectors of unit n of the thread's eight tokens; units in turn.
  INLINE void selectors(u32* c, const Work& w, int n) {
#if KB == 4
#pragma unroll
    for (int i = 0; i < 8; i++) c[i] = (&row[i].x)[n];
#else
    const u32 at = w.s.mine + W_KEY_CODES + n * 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (n % 2 == 0) {
        word[i] = load(at + w.q * 256 + w.r * 8 + ((i * 32) ^ (w.q & 3) << 5));
        if (KB == 3) third[i] = load(at + BS * 32 + w.q * 128 + ((i ^ w.q) << 4) + (w.r & 1) * 8) >> (w.r >> 1);
      }
      c[i] = word[i] >> (2 * (n & 1)) & 0x33333333u;
      if (KB == 3) c[i] |= (n & 1 ? third[i] : third[i] << 2) & 0x44444444u;
    }
#endif
  }
};

INLINE void ask_keys(const Arguments& a, const Work& w, KeyCodes& codes, int column, const Block& block) {
  const u32 mine = w.s.mine;
  const int lane = w.lane;
  codes.ask(a, w, block.id);
  if (lane < 16) copy16(mine + W_BASES + lane * 16, a.bases + (u32)(column * 128 + lane * 8));
  const u64 own = ((u64)block.id * a.H + w.h) * K_BASE + 2 * lane;
#pragma unroll
  for (int i = 0; i < (K_BASE / 2 + 31) / 32; i++)
    if (2 * lane + 64 * i < min(block.count, K_BASE)) {
      copy4(mine + W_KEYS + lane * 4 + 128 * i, a.key_index + own + 64 * i);
      copy4(mine + W_KEYS + 2 * K_PLACES + lane * 4 + 128 * i, a.key_value + own + 64 * i);
    }
  if (lane < 16 && K_BASE + 2 * lane < block.count) {
    const u64 chunk = (u64)block.head * 32 + 2 * lane;
    copy4(mine + W_KEYS + (K_BASE + 2 * lane) * 2, a.spill_index + chunk);
    copy4(mine + W_KEYS + 2 * K_PLACES + (K_BASE + 2 * lane) * 2, a.spill_value + chunk);
  }
}

INLINE void ask_values(const Arguments& a, const Work& w, const Block& block) {
  const u32 mine = w.s.mine;
  const int lane = w.lane;
  const unsigned char* codes = a.value_codes + (((u64)block.id * a.H + w.h) * V_BYTES + lane * 16);
#pragma unroll
  for (int i = 0; i < V_BYTES / 512; i++)
#if VB == 4  // tokens 16 apart, which four lanes read at once, in different banks
    copy16(mine + W_CODES + (lane >> 3) * 128 + ((lane & 7) ^ (i >> 1) << 1) * 16 + i * 512, codes + i * 512);
#else
    copy16(mine + W_CODES + lane * 16 + i * 512, codes + i * 512);
#endif
  if (a.VG == 1) {
    const u16* ranges = lane < 8 ? a.value_scale : a.value_zero;
    if (lane < 16) copy16(mine + W_RANGES + lane * 16, ranges + ((u64)block.id * BS + (lane & 7) * 8));
  } else {
    const u64 group = (u64)block.id * BS * a.VG + w.h * a.VG / a.H;
    for (int t = lane; t < BS; t += 32) {
      store_half(mine + W_RANGES + t * 2, a.value_scale[group + t * a.VG]);
      store_half(mine + W_RANGES + 128 + t * 2, a.value_zero[group + t * a.VG]);
    }
  }
  if (V_ENTRIES > 0) {
    const int first = (block.range & 0x7fff & ~1) + 2 * lane, last = (block.range & 0x7fffffff) >> 15;
    const u64 from = (u64)block.id * (BS * V_ENTRIES) + first;
#pragma unroll
    for (int i = 0; i < V_PLACES / 64; i++)
      if (first + 64 * i < last) {
        copy4(mine + W_VALUES + lane * 4 + 128 * i, a.value_index + from + 64 * i);
        copy4(mine + W_VALUES + 2 * V_PLACES + lane * 4 + 128 * i, a.value_value + from + 64 * i);
      }
  }
}
