// How a block's keys and values come to registers and shared memory: asked for while the block before is worked on.
#pragma once
#include "work.cuh"

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
    codes += token_of(w.q, 0) * K_ROW + w.r * 16;
#pragma unroll
    for (int i = 0; i < 8; i++) row[i] = stream(codes + token_of(0, i) * K_ROW);
#else
    const int lane = anew(w.lane);
    const u32 to = w.s.mine + W_KEY_CODES + lane * 16;
    codes += lane * 16;
#pragma unroll
    for (int i = 0; i < 2 * KB; i++)
      copy16(to + i * 512 + (GAPS(KB) ? group_of<K_ROW / 2>(lane, i) * GAP : 0), codes + i * 512);
#endif
  }
  INLINE void load_words(const Work& w) {
#if KB == 4
    const bool upper = w.r & 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const u32 x = of_lane_across(upper ? row[i].x : row[i].z, 2), y = of_lane_across(upper ? row[i].y : row[i].w, 2);
      if (upper)
        row[i].x = x, row[i].y = y;
      else
        row[i].z = x, row[i].w = y;
    }
#else
    const u32 at = w.s.mine + W_KEY_CODES + key_row(w.q, 0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      load2(&row[i].x, at + key_row(0, i) + w.r * 8);
      if (KB == 3) {
        load2(&third[i].x, at + key_row(0, i) + 32 + (w.r & 1) * 8);
        third[i].x = third_bits(third[i].x, w.r >> 1);
        third[i].y = third_bits(third[i].y, w.r >> 1);
      }
    }
#endif
  }
  // Of token i: at 2 bits a word of both units, else nibbles of unit n + j, j 1 the slower one.
  INLINE u32 selector(int i, int j) const {
#if KB == 4
    return j ? row[i].z : row[i].x;
#elif KB == 3
    return three_bits(row[i].x >> 2 * j, j ? third[i].x : third[i].x << 2);
#else
    return row[i].x;
#endif
  }
  INLINE void turn() {  // to units 2 and 3
#pragma unroll
    for (int i = 0; i < 8; i++) {
#if KB == 4
      row[i].x = row[i].y;
      row[i].z = row[i].w;
#else
      row[i].x = row[i].y;
      if (KB == 3) third[i].x = third[i].y;
#endif
    }
  }
};

// Outliers of a block's keys, of its own row and of its chain's first chunk: numbers, then what they are.
INLINE void ask_key_entries(const Arguments& a, const Work& w, u64 id_and_head, const Block& block) {
  const int lane = KB == 2 ? anew(w.lane) : w.lane;  // or an address waits in local memory; at 3 bits it would by that
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

// A copy of sixteen bytes from the middle of a sector takes several times as long.
INLINE int first_copied(int first_entry) { return first_entry & ~15; }

INLINE void ask_values(const Arguments& a, const Work& w, int h, const Block& block) {
  const u32 mine = w.s.mine;
  const int lane = w.lane;
  const unsigned char* codes = a.value_codes + (((u64)block.id * a.H + h) * V_BYTES + lane * 16);
#pragma unroll
  for (int i = 0; i < V_BYTES / 512; i++)
#if VB == 4
    copy16(mine + W_CODES + i * 512 + (lane * 16 ^ sector_of(i * 8 + (lane >> 2)) * 32), codes + i * 512);
#else
    copy16(mine + W_CODES + lane * 16 + i * 512 + (GAPS(VB) ? group_of<V_ROW>(lane, i) * GAP : 0), codes + i * 512);
#endif
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
    const int first = first_copied(block.first), side = lane >> 4, piece = lane & 15, near = block.last - first;
    const u16* from = (side ? a.value_value : a.value_index) + (u64)block.id * (BS * V_ENTRIES) + first;
    const u32 to = mine + W_VALUES + side * 2 * V_PLACES;
    if (8 * piece < near) copy16(to + piece * 16, from + 8 * piece);
    if (V_PLACES > 128 && near > 128 && piece < V_PLACES / 8 - 16 && 128 + 8 * piece < near)
      copy16(to + 256 + piece * 16, from + 128 + 8 * piece);
  }
}
