// What a warp works on, and how it comes to shared memory and registers: asked for while the block before is worked on.
#pragma once
#include "outliers.cuh"

struct Arguments {
  const u16* q_words; const u16* affine; const float* unit; const unsigned char* bases;
  const unsigned char* angles; const int* slow; const int* shares; const int* block_table; const int* kv_lengths;
  const unsigned char* key_codes; const int* key_count; const u16* key_index; const u16* key_value;
  const int* spill_head; const int* spill_next; const u16* spill_index; const u16* spill_value;
  const float* key_centroids;
  const unsigned char* value_codes; const u16* value_zero; const u16* value_scale;
  const u16* value_index; const u16* value_value; const int* value_end; const float* value_centroids;
  int* taken; float* part_best; float* part_total; float* part_out;
  float softcap; int window; int sink_tokens; int table_stride; int H; int VG;
};

struct Block {  // of a column of the block table
  u32 id;
  int count, head;  // key outliers, the first chunk of their chain
  u32 range;        // value outliers: first entry, the one behind the last << 15, whether the block is closed << 31
};

enum State { END, LENGTH, FIRST_VISIBLE, PART, SCORE_UNIT, INVERSE_SIZE, HEAP_MOST, HEAP_FACTOR, NEXT };

// A warp's work, a head of a sequence.
struct Work {
  int h, bh, lane, q, r;
  Shared s;

  // State: in all lanes alike.
  INLINE void keep(State what, u32 x) const { store(s.mine + W_STATE + what * 4, x); }
  INLINE int number(State what) const { return load(s.mine + W_STATE + what * 4); }
  INLINE float real(State what) const { return as_float(load(s.mine + W_STATE + what * 4)); }

  // Blocks are described eight columns at a time, so that those of the column before are still there.
  INLINE u32 id_of(const Arguments& a, int column, int end) const {
    column += lane;
    return lane < 8 && column < end ? a.block_table[(u64)((bh - h) / a.H) * a.table_stride + column] : 0;
  }
  INLINE void describe(const Arguments& a, int column, int end, u32 id) const {
    column += lane;
    Block block = {id, 0, 0, 0};
    if (lane < 8 && column < end) {
      const u64 at = (u64)id * a.H + h;
      block.count = a.key_count[at];
      block.head = a.spill_head[at];
      if (a.value_end[(u64)id * a.H + a.H - 1] > 0)
        block.range = 0x80000000u | (u32)a.value_end[at] << 15 | (h > 0 ? (u32)a.value_end[at - 1] : 0u);
    }
    if (lane < 8) store4(s.mine + W_COLUMNS + (column & 15) * 16, block.id, block.count, block.head, block.range);
    __syncwarp();
  }
  INLINE Block block_of(int column) const {
    u32 x[4];
    load4(x, s.mine + W_COLUMNS + (column & 15) * 16);
    return Block{x[0], (int)x[1], (int)x[2], x[3]};
  }
};

// Queries and the keys' ranges, as pairs of channels. prepare.py keeps each side's four numbers of a lane together.
struct Queries {
  uint2 x[4], y[4], range_x[4], range_y[4];  // on their way together; of lanes q = 0 scales, of q = 1 zeros
  INLINE Queries(const Arguments& a, const Work& w) {
    const uint2 none = {0, 0};
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const u16* words = a.q_words + ((w.bh * 4 + n) * 2 * GP + w.q) * 16 + w.r * 4;
      const uint2* affine = (const uint2*)(a.affine + ((w.bh * 4 + n) * 4 + w.r) * 16) + w.q;
      x[n] = w.q < GN ? *(const uint2*)words : none;
      y[n] = w.q < GN ? *(const uint2*)(words + GP * 16) : none;
      range_x[n] = w.q < 2 ? affine[0] : none;
      range_y[n] = w.q < 2 ? affine[2] : none;
    }
  }
  INLINE void keep(const Work& w, float least) const {
    const u32 mine = w.s.mine;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const u32 at = mine + (n * 4 + w.r) * 16;
      if (w.q < GN) store_pairs(at + W_QUERY + w.q * QUERY_ROW, x[n], y[n]);
      if (w.q < 2) store_pairs(at + (w.q ? W_ZERO : W_SCALE), range_x[n], range_y[n]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 at = mine + (w.lane + 32 * i) * 4, scale = load(at + W_SCALE), zero = load(at + W_ZERO);
      store(at + W_LEAST, half_pair(low_of(scale) * least + low_of(zero), high_of(scale) * least + high_of(zero)));
    }
  }
  INLINE static void store_pairs(u32 at, uint2 x, uint2 y) {
    store4(at, __byte_perm(x.x, y.x, 0x5410), __byte_perm(x.x, y.x, 0x7632), __byte_perm(x.y, y.y, 0x5410),
           __byte_perm(x.y, y.y, 0x7632));
  }
};

// Codes of a block's keys, eight rows for each lane: on their way at 4 bits in registers, else in shared memory.
struct KeyCodes {
#if KB == 4
  uint4 row[8];
#else
  uint2 row[8], third[8];
#endif

  INLINE void ask(const Arguments& a, const Work& w, u32 id) {
    const unsigned char* codes = a.key_codes + ((u64)id * a.H + w.h) * (BS * K_ROW);
#if KB == 4
    codes += w.q * 8 * K_ROW + w.r * 16;
#pragma unroll
    for (int i = 0; i < 8; i++) row[i] = stream(codes + i * K_ROW);
#else
#pragma unroll
    for (int i = 0; i < 2 * KB; i++) {
      const int piece = w.lane + 32 * i;
      copy16(w.s.mine + W_KEY_CODES + piece * 16 + piece / (K_ROW / 2) * GAP, codes + piece * 16);
    }
#endif
  }
  INLINE void load_words(const Work& w) {
#if KB < 4
    const u32 at = w.s.mine + W_KEY_CODES + w.q * K_GROUP;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      load2(&row[i].x, at + i * K_ROW + w.r * 8);
      if (KB == 3) {
        load2(&third[i].x, at + i * K_ROW + 32 + (w.r & 1) * 8);
        third[i].x >>= w.r >> 1;
        third[i].y >>= w.r >> 1;
      }
    }
#endif
  }
  // Of token i: at 2 bits a word of both units, else nibbles of unit n + j.
  INLINE u32 selector(int i, int j) const {
#if KB == 4
    return j ? row[i].y : row[i].x;
#elif KB == 3
    return (row[i].x >> (2 * j) & 0x33333333u) | ((j ? third[i].x : third[i].x << 2) & 0x44444444u);
#else
    return row[i].x;
#endif
  }
  INLINE void turn() {  // to units 2 and 3
#pragma unroll
    for (int i = 0; i < 8; i++) {
#if KB == 4
      row[i].x = row[i].z;
      row[i].y = row[i].w;
#else
      row[i].x = row[i].y;
      if (KB == 3) third[i].x = third[i].y;
#endif
    }
  }
};

INLINE void ask_keys(const Arguments& a, const Work& w, KeyCodes& codes, int column, const Block& block) {
  const u32 mine = w.s.mine;
  const int lane = w.lane;
  codes.ask(a, w, block.id);
  if (lane < BASES / 16) copy16(mine + W_BASES + lane * 16, a.bases + (u64)column * BASES + lane * 16);
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
    copy16(mine + W_CODES + lane * 16 + i * 512 + (lane + 32 * i) / V_ROW * GAP, codes + i * 512);
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
