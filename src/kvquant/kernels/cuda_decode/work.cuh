// What a warp works on, and how it finds what to work on next.
#pragma once
#include "look_up.cuh"

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
  NEXT_LENGTH, NEXT_HEAD, NEXT_UNIT, NEXT_INVERSE,  // of the share after this one, once it is asked for; head -1: none
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
      const u64 at = (u64)number_at(place + lane) * a.H + head;
      copy4(to + 4, a.key_count + at);
      copy4(to + 8, a.spill_head + at);
      copy4(to + 12, a.value_end + at);
      if (head > 0) copy4(s.mine + W_FIRSTS + (place + lane) * 4, a.value_end + at - 1);
      else store(s.mine + W_FIRSTS + (place + lane) * 4, 0);
    }
  }
  INLINE u32 number_at(int place) const { return load(s.mine + W_COLUMNS + place * 16); }
  INLINE Block block_at(int place) const {
    u32 x[4];
    load4(x, s.mine + W_COLUMNS + place * 16);
    return Block{x[0], (int)x[1], (int)x[2], (int)load(s.mine + W_FIRSTS + place * 4), (int)x[3]};
  }
  // What the next share's scores need.
  INLINE void ask_head(const Arguments& a) const {
    const int b = load(s.mine + W_SHARE), bh = b * a.H + number(NEXT_HEAD);
    const u16* rows = a.heads + (u64)bh * ((GN + 3) * D);  // of queries, then of the keys' ranges
    const u32 queries = s.mine + W_QUERY + (lane >> 4) * QUERY_ROW + (lane & 15) * 16;  // two rows at a time
#pragma unroll
    for (int i = 0; i < GN + 3; i += 2)
      if (i + 1 < GN)
        copy16(queries + i * QUERY_ROW, rows + i * D + lane * 8);
      else if (i < GN)  // one head
        copy16(lane < 16 ? queries : s.mine + W_SCALE + lane * 16 - 256, rows + lane * 8);
      else if (i + 1 < GN + 3 || lane < 16)
        copy16(s.mine + W_SCALE + (i - GN) * 256 + lane * 16, rows + i * D + lane * 8);
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
