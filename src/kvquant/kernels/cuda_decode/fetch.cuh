// What a warp works on, and how it comes to shared memory and registers: asked for while the block before is worked on.
#pragma once
#include "outliers.cuh"

struct Arguments {
  const u16* heads; const float* unit; const unsigned char* bases;
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
  int first, last;  // value outliers of a closed block: the head's first, and the one behind its last
};

enum State {
  END, LENGTH, PART, SEQUENCE, SCORE_UNIT, INVERSE_SIZE, HEAP_MOST, HEAP_FACTOR,
  NEXT_LENGTH, NEXT_HEAD, NEXT_UNIT, NEXT_INVERSE,  // of the share after this one; its head is -1 where there is none
};

// A warp's work, blocks of a head of a sequence.
//
// All that is known of blocks and shares comes by asynchronous copies, each step while blocks are worked on: who is about
// to end claims a share, its row names blocks, and eight of these are described at once, in the half of sixteen places
// that the eight before do not have. What comes after eight may be more of the same share, or the next one's.
struct Work {
  int h, lane, q, r;
  Shared s;

  // State: in all lanes alike.
  INLINE void keep(State what, u32 x) const { store(s.mine + W_STATE + what * 4, x); }
  INLINE int number(State what) const { return load(s.mine + W_STATE + what * 4); }
  INLINE float real(State what) const { return as_float(load(s.mine + W_STATE + what * 4)); }
  // Of a column's tokens, those from the first one to before the other are visible, as far as they are in the block.
  INLINE int first_slot(const Arguments& a, int column) const {
    return (HAS_WINDOW ? max(a.sink_tokens, number(LENGTH) - a.window) : a.sink_tokens) - column * BS;
  }
  INLINE int end_slot(int column) const { return number(LENGTH) - column * BS; }
  INLINE int next_begin() const { return load(s.mine + W_SHARE + 4); }

  // Lane 0's: ask for a worker's share, if there is one.
  INLINE void ask_share(const Arguments& a, int worker) const {
    const int row = worker / a.H, workers = a.taken[1] * a.H;
    keep(NEXT_HEAD, worker < workers ? (worker + row) % a.H : -1);  // heads differ: each multiprocessor gets some of all
    if (worker < workers) copy16(s.mine + W_SHARE, a.shares + row * 4);
  }
  // Numbers, then the rest, of up to eight blocks: from `column` on, or the next share's first, to places `place` and on.
  INLINE void ask_numbers(const Arguments& a, int place, int column, bool of_next_share) const {
    u32 row[4] = {(u32)number(SEQUENCE), (u32)column, (u32)number(END), 0};
    if (of_next_share) load4(row, s.mine + W_SHARE);
    const int at = row[1] + lane;
    if (lane < 8 && at < (int)row[2])
      copy4(s.mine + W_COLUMNS + (place + lane) * 16, a.block_table + (u64)row[0] * a.table_stride + at);
  }
  INLINE void ask_description(const Arguments& a, int place, int column, bool of_next_share) const {
    const int count = of_next_share ? load(s.mine + W_SHARE + 8) - next_begin() : number(END) - column;
    if (lane < 8 && lane < count) {
      const u32 to = s.mine + W_COLUMNS + (place + lane) * 16;
      const int head = of_next_share ? number(NEXT_HEAD) : h;
      const u64 at = (u64)load(to) * a.H + head;
      copy4(to + 4, a.key_count + at);
      copy4(to + 8, a.spill_head + at);
      copy4(to + 12, a.value_end + at);
      if (head > 0) copy4(s.mine + W_FIRSTS + (place + lane) * 4, a.value_end + at - 1);
      else store(s.mine + W_FIRSTS + (place + lane) * 4, 0);
    }
  }
  INLINE Block block_at(int place) const {
    u32 x[4];
    load4(x, s.mine + W_COLUMNS + place * 16);
    return Block{x[0], (int)x[1], (int)x[2], (int)load(s.mine + W_FIRSTS + place * 4), (int)x[3]};
  }
  // What the next share's scores need.
  INLINE void ask_head(const Arguments& a) const {
    const int b = load(s.mine + W_SHARE), bh = b * a.H + number(NEXT_HEAD);
    const u16* rows = a.heads + (u64)bh * ((GN + 3) * D);  // of queries, then of the keys' ranges
#pragma unroll 1
    for (int i = lane; i < (GN + 3) * 16; i += 32) {
      const int row = i >> 4, at = (i & 15) * 16;
      copy16(s.mine + (row < GN ? W_QUERY + row * QUERY_ROW : W_SCALE + (row - GN) * 256) + at, rows + row * D + at / 2);
    }
    if (lane < 2) copy4(s.mine + W_STATE + (NEXT_UNIT + lane) * 4, a.unit + bh * 2 + lane);
    if (lane == 2) copy4(s.mine + W_STATE + NEXT_LENGTH * 4, a.kv_lengths + b);
  }
  // The next share becomes this one. Returns its first column.
  INLINE int take_next() {
    u32 row[4];
    load4(row, s.mine + W_SHARE);
    h = number(NEXT_HEAD);
    const u32 length = number(NEXT_LENGTH), unit = number(NEXT_UNIT), inverse = number(NEXT_INVERSE);
    __syncwarp();
    keep(SEQUENCE, row[0]);
    keep(END, row[2]);
    keep(PART, row[3]);
    keep(LENGTH, length);
    keep(SCORE_UNIT, unit);
    keep(INVERSE_SIZE, inverse);
    keep(HEAP_MOST, 0);
    keep(HEAP_FACTOR, as_word(1.f));
    __syncwarp();
    return row[1];
  }
};

// Which group of PIECES pieces piece lane + 32 i belongs to, without a division.
template <int PIECES> INLINE int group_of(int lane, int i) {
  return 32 * i / PIECES + (lane >= PIECES - 32 * i % PIECES ? 1 : 0);
}

// Codes of a block's keys, eight rows for each lane: on their way at 4 bits in registers, else in shared memory.
struct KeyCodes {
#if KB == 4
  uint4 row[8];
#else
  uint2 row[8], third[8];
#endif

  INLINE void ask(const Arguments& a, const Work& w, u64 id_and_head) {
    const unsigned char* codes = a.key_codes + id_and_head * (BS * K_ROW);
#if KB == 4
    codes += w.q * 8 * K_ROW + w.r * 16;
#pragma unroll
    for (int i = 0; i < 8; i++) row[i] = stream(codes + i * K_ROW);
#else
    const int lane = anew(w.lane);
#pragma unroll
    for (int i = 0; i < 2 * KB; i++) {
      const int piece = lane + 32 * i;
      copy16(w.s.mine + W_KEY_CODES + piece * 16 + group_of<K_ROW / 2>(lane, i) * GAP, codes + piece * 16);
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

// Outliers of a block's keys, of its own row and of its chain's first chunk: numbers, then what they are.
INLINE void ask_key_entries(const Arguments& a, const Work& w, u64 id_and_head, const Block& block) {
  const int lane = w.lane;
  // Eight at a time.
  constexpr int ROW = K_PLACES / 8, OWN = K_BASE / 8;
#pragma unroll
  for (int first = 0; first < 2 * ROW; first += 32) {
    const int piece = first + lane, side = piece >= ROW, at = piece - side * ROW;
    const u16* own = (side ? a.key_value : a.key_index) + id_and_head * K_BASE + 8 * at;
    const u16* chunk = (side ? a.spill_value : a.spill_index) + (u64)block.head * CHUNK + 8 * (at - OWN);
    if (piece < 2 * ROW && 8 * at < min(block.count, K_BASE + CHUNK))
      copy16(w.s.mine + W_KEYS + piece * 16, at < OWN ? own : chunk);
  }
}

INLINE void ask_keys(const Arguments& a, const Work& w, KeyCodes& codes, int column, int h, const Block& block) {
  const int lane = w.lane;
  const u64 id_and_head = (u64)block.id * a.H + h;
  codes.ask(a, w, id_and_head);
  if (lane < BASES / 16) copy16(w.s.mine + W_BASES + lane * 16, a.bases + (u64)column * BASES + lane * 16);
  ask_key_entries(a, w, id_and_head, block);
}

INLINE void ask_values(const Arguments& a, const Work& w, int h, const Block& block) {
  const u32 mine = w.s.mine;
  const int lane = w.lane;
  const unsigned char* codes = a.value_codes + (((u64)block.id * a.H + h) * V_BYTES + lane * 16);
#pragma unroll
  for (int i = 0; i < V_BYTES / 512; i++)
    copy16(mine + W_CODES + lane * 16 + i * 512 + group_of<V_ROW>(lane, i) * GAP, codes + i * 512);
  if (a.VG == 1) {
    const u16* ranges = lane < 8 ? a.value_scale : a.value_zero;
    if (lane < 16) copy16(mine + W_RANGES + lane * 16, ranges + ((u64)block.id * BS + (lane & 7) * 8));
  } else {
    const u64 group = (u64)block.id * BS * a.VG + h * a.VG / a.H;
    for (int t = lane; t < BS; t += 32) {
      store_half(mine + W_RANGES + t * 2, a.value_scale[group + t * a.VG]);
      store_half(mine + W_RANGES + 128 + t * 2, a.value_zero[group + t * a.VG]);
    }
  }
  if (V_ENTRIES > 0) {
    // Eight entries at a time: numbers by the first half of lanes, what they are by the other. Seldom are there more than
    // 128, and a second copy that few lanes take costs more than the first.
    const int side = lane >> 4, piece = lane & 15, near = block.last - (block.first & ~7);
    const u16* from = (side ? a.value_value : a.value_index) + (u64)block.id * (BS * V_ENTRIES) + (block.first & ~7);
    const u32 to = mine + W_VALUES + side * 2 * V_PLACES;
    if (8 * piece < near) copy16(to + piece * 16, from + 8 * piece);
    if (V_PLACES > 128 && near > 128 && piece < V_PLACES / 8 - 16 && 128 + 8 * piece < near)
      copy16(to + 256 + piece * 16, from + 128 + 8 * piece);
  }
}
