// Outliers of values: each adds its difference to what code 0 decodes to, times its token's weight, to a channel's sums.
#pragma once
#include "fetch.cuh"

// A token's range makes the difference.
INLINE float value_difference(u32 mine, float value, u32 token, float first) {
  const float scale = kept(load_half(mine + W_RANGES + token * 2)), zero = kept(load_half(mine + W_RANGES + 128 + token * 2));
  return value - (zero + scale * first);
}

INLINE void add_value(const Shared& s, u32 token, u32 channel, float scaled, bool live) {
  const u32 mine = s.mine, at = mine + W_WEIGHTS + (EVERY_SECOND ? look(s.lists + 256 + token * 4) >> 16 : token * 4);
  u32 weight[GN];
#pragma unroll
  for (int g = 0; g < GN; g++) weight[g] = load(at + SCORE_ROW(g) * 4);
  if (live)
#pragma unroll
    for (int g = 0; g < GN; g++)
      add(mine + W_OUT + (g * OUT_ROW + OUT_PLACE(channel)) * 4, to_int(as_float(weight[g]) * scaled));
}

// Entries of a block's values. A closed block lists each head's together, of which the first V_PLACES or up to fifteen fewer
// lie in shared memory (see first_copied) and of these the first 128 in registers; an open one all heads', token by token,
// V_ENTRIES each, numbered by channel of the layer. What tokens before ``hidden`` left there may be any number: they count
// for nothing, or they would be what the others are scaled by.
struct Values {
  Shared s;
  u32 mine, id;
  int from, first, to, near_to, rest, lane, h, hidden;  // near_to: of those in registers
  float least;                                           // the first centroid
  bool closed;

  INLINE Values(const Arguments& a, const Work& w, int place, int column)
      : s(w.s), mine(w.s.mine), lane(w.lane), h(w.h), hidden(w.first_slot(a, column)),
        least(as_float(load(w.s.lists + LEAST_AT))) {
    const Block block = w.block_at(place);
    id = block.id;
    first = block.first;
    closed = block.last > 0 || a.value_end[(u64)id * a.H + a.H - 1] > 0;
    from = closed ? first_copied(first) : 0;
    near_to = closed ? block.last : 0;
    to = closed ? block.last : min(w.end_slot(column), BS) * V_ENTRIES;
    rest = closed ? from + 128 : 0;
  }
  INLINE bool near(int i) const {
    const int e = from + lane + 32 * i;
    return e < near_to && (i > 0 || e >= first);
  }
  INLINE float further(const Arguments& a, int e, u32& token, u32& channel) const {
    u32 number;
    float value;
    if (closed && e - from < V_PLACES) {
      const u32 at = mine + W_VALUES + (e - from) * 2;
      number = load_half(at);
      value = kept(load_half(at + 2 * V_PLACES));
    } else {
      const u64 at = (u64)id * (BS * V_ENTRIES) + e;
      number = a.value_index[at];
      value = kept(a.value_value[at]);
    }
    token = closed ? number >> 7 & 63 : e / (V_ENTRIES > 0 ? V_ENTRIES : 1);
    channel = closed ? number & 127 : number - h * D;
    const bool counts = channel < D && (int)token >= hidden;
    return counts ? value_difference(mine, value, token, least) : 0.f;
  }
  // The largest difference that this lane has.
  INLINE float read(const Arguments& a, float* difference) const {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 at = mine + W_VALUES + (lane + 32 * i) * 2;
      const u32 token = load_half(at) >> 7 & 63;
      difference[i] = value_difference(mine, kept(load_half(at + 2 * V_PLACES)), token, least);
      if ((int)token < hidden) difference[i] = 0.f;
      if (near(i)) largest = fmaxf(largest, fabsf(difference[i]));
    }
#pragma unroll 1
    for (int e = rest + lane; e < to; e += 32) {
      u32 token, channel;
      largest = fmaxf(largest, fabsf(further(a, e, token, channel)));
    }
    return largest;
  }
  INLINE void add(const Arguments& a, const float* difference, float factor) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i == 3 && from + 96 >= near_to) break;
      const u32 number = load_half(mine + W_VALUES + (lane + 32 * i) * 2);
      add_value(s, number >> 7 & 63, number & 127, difference[i] * factor, near(i));
    }
#pragma unroll 1
    for (int e = rest + lane; e < to; e += 32) {
      u32 token, channel;
      const float delta = further(a, e, token, channel);
      if (delta != 0.f) add_value(s, token, channel, delta * factor, true);
    }
  }
};

// Differences of values times weights are summed in fixed point (W_OUT), until they are moved to where other sums are, or a
// part is stored. No difference is larger than HEAP_MOST; HEAP_FACTOR makes whole numbers of a difference times a weight.
// Weights times Seen::size, which is in the factor, are up to 2^14, so that one addend is up to 2^20, and 16 blocks of 64
// tokens fit.
INLINE float limit_of_heap(float largest) { return power_of_two(fmaxf(largest_of_warp(largest), 1e-30f)); }
INLINE void empty_heap(float (*sums)[4], u32 mine, float factor, int lane) {  // once in a while, see store_part
  const int q = lane >> 2, r = lane & 3;
  const float back = reciprocal(factor);
  __syncwarp();
  if (EACH * r < GN)
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int upper = 0; upper < 2; upper++)
#pragma unroll
        for (int x = 0; x < EACH; x++) {
          const u32 at = mine + W_OUT + ((EACH * r + x) * OUT_ROW + OUT_PLACE(out_channel(i, q, upper))) * 4;
          sums[i][2 * upper + x] += (float)(int)load(at) * back;
          store(at, 0);
        }
  __syncwarp();
}
