// Outliers: each adds its difference to what code 0 decodes to, to a token's scores or to a channel's sums.
//
// They are added in shared memory, as whole numbers: atomics of those give the same sum in every order. An entry is
// number slot * D + channel and what is kept.
#pragma once
#include "look_up.cuh"

#define SCORE_FRACTION 16384.f  // of a score, log2
#define LARGEST_SCORE 67108864.f  // of one outlier, in these units: sums of 16 fit

// Entries of the keys, N of each lane. ``unit``: what a difference relative to the largest key, times a query, is worth.
template <int N>
INLINE void add_keys(const Shared& s, const u32* number, const float* value, const bool* live, float inverse_size,
                     float unit) {
  u32 query[N][GN], angle[N], channel[N], token[N];
  float least[N], cb[N], sb[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    channel[i] = look(s.lists + (number[i] << 2 & 0xFC));
    token[i] = look(s.lists + 256 + (number[i] >> 5 & 0xFC));
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const u32 at = s.mine + (channel[i] >> 16);
    angle[i] = look(s.angles + token[i] + (channel[i] & 0xFFFF));
#if BF16
    const u32 base = load(at + W_BASES);
    cb[i] = low_of(base);
    sb[i] = high_of(base);
#else
    cb[i] = as_float(load(s.mine + W_BASES + (number[i] & 63) * 4));
    sb[i] = as_float(load(s.mine + W_BASES + (number[i] & 63) * 4 + 256));
#endif
    const u32 pair = load(at + W_LEAST);
    least[i] = number[i] & 64 ? high_of(pair) : low_of(pair);
#pragma unroll
    for (int g = 0; g < GN; g++) query[i][g] = load(at + W_QUERY + g * QUERY_ROW);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float cj = low_of(angle[i]), sj = high_of(angle[i]);
    const float scaled = (value[i] * inverse_size - least[i]) * unit;
    const float delta = fminf(fmaxf(scaled, -LARGEST_SCORE), LARGEST_SCORE);
    const float cosine = (cb[i] * cj - sb[i] * sj) * delta, sine = (sb[i] * cj + cb[i] * sj) * delta;
    const bool upper = number[i] & 64;
    const float x = upper ? -sine : cosine, y = upper ? cosine : sine;
    const u32 at = s.mine + W_SCORES + (number[i] >> 5 & 0xFC);
    if (live[i])
#pragma unroll
      for (int g = 0; g < GN; g++)
        add(at + SCORE_ROW(g) * 4, to_int(x * low_of(query[i][g]) + y * high_of(query[i][g])));
  }
}

// All of a block's: its own row and the first chunk of its chain lie in shared memory, further chunks are fetched.
template <class Arguments>
INLINE void add_keys_of_block(const Arguments& a, const Shared& s, int lane, int count, int chunk, float inverse_size,
                              float unit) {
  const u32 at = s.mine + W_KEYS + lane * 2;  // the last lanes may look behind the entries, and are not live
  const int near = min(count, K_BASE + 32);
  u32 number[3];
  float value[3];
  bool live[3];
#pragma unroll
  for (int i = 0; i < 3; i++) {
    number[i] = load_half(at + 64 * i);
    value[i] = kept(load_half(at + 2 * K_PLACES + 64 * i));
    live[i] = lane + 32 * i < near;
  }
  add_keys<3>(s, number, value, live, inverse_size, unit);
  for (int e = 96; e < near; e += 32) {
    number[0] = load_half(at + 2 * e);
    value[0] = kept(load_half(at + 2 * K_PLACES + 2 * e));
    live[0] = e + lane < near;
    add_keys<1>(s, number, value, live, inverse_size, unit);
  }
  for (int left = count - K_BASE - 32; left > 0; left -= 32) {
    chunk = a.spill_next[chunk];
    number[0] = a.spill_index[(u64)chunk * 32 + lane];
    value[0] = kept(a.spill_value[(u64)chunk * 32 + lane]);
    live[0] = lane < left;
    add_keys<1>(s, number, value, live, inverse_size, unit);
  }
}

// A token's range makes the difference.
INLINE float value_difference(u32 mine, float value, u32 token, float first) {
  const float scale = kept(load_half(mine + W_RANGES + token * 2)), zero = kept(load_half(mine + W_RANGES + 128 + token * 2));
  return value - (zero + scale * first);
}

INLINE void add_value(u32 mine, u32 token, u32 channel, float scaled, bool live) {
  u32 weight[GN];
#pragma unroll
  for (int g = 0; g < GN; g++) weight[g] = load(mine + W_WEIGHTS + (SCORE_ROW(g) + token) * 4);
  if (live)
#pragma unroll
    for (int g = 0; g < GN; g++)
      add(mine + W_OUT + (g * OUT_ROW + OUT_PLACE(channel)) * 4, to_int(as_float(weight[g]) * scaled));
}

// Entries of a block's values. A closed block lists each head's together, of which the first V_PLACES lie in shared
// memory and of these the first 128 in registers; an open one all heads', token by token, V_ENTRIES each, numbered by
// channel of the layer. What tokens before ``hidden`` left there may be any number: they count for nothing, or they would
// be what the others are scaled by.
template <class Arguments> struct Values {
  const Arguments& a;
  const Shared& s;
  u64 entries;
  int from, first, to, near_to, rest, lane, h, hidden;  // near_to: of those in registers
  float least;                                           // the first centroid
  bool closed;
  float difference[4];

  INLINE Values(const Arguments& a, const Shared& s, u32 id, int first, int last, int stored, int hidden, int lane, int h,
                float least)
      : a(a), s(s), lane(lane), h(h), hidden(hidden), least(least), first(first) {
    closed = last > 0 || a.value_end[(u64)id * a.H + a.H - 1] > 0;
    entries = (u64)id * (BS * V_ENTRIES);
    from = closed ? first & ~7 : 0;
    to = closed ? last : stored * V_ENTRIES;
    near_to = closed ? last : 0;
    rest = closed ? from + 128 : 0;
  }
  INLINE bool near(int i) const {
    const int e = from + lane + 32 * i;
    return e < near_to && (i > 0 || e >= first);
  }
  INLINE float further(int e, u32& token, u32& channel) const {
    u32 number;
    float value;
    if (closed && e - from < V_PLACES) {
      const u32 at = s.mine + W_VALUES + (e - from) * 2;
      number = load_half(at);
      value = kept(load_half(at + 2 * V_PLACES));
    } else {
      number = a.value_index[entries + e];
      value = kept(a.value_value[entries + e]);
    }
    token = closed ? number >> 7 & 63 : e / (V_ENTRIES > 0 ? V_ENTRIES : 1);
    channel = closed ? number & 127 : number - h * D;
    const bool counts = channel < D && (int)token >= hidden;
    return counts ? value_difference(s.mine, value, token, least) : 0.f;
  }
  // The largest difference that this lane has.
  INLINE float read() {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 at = s.mine + W_VALUES + (lane + 32 * i) * 2;
      const u32 token = load_half(at) >> 7 & 63;
      difference[i] = value_difference(s.mine, kept(load_half(at + 2 * V_PLACES)), token, least);
      if ((int)token < hidden) difference[i] = 0.f;
      if (near(i)) largest = fmaxf(largest, fabsf(difference[i]));
    }
    for (int e = rest + lane; e < to; e += 32) {
      u32 token, channel;
      largest = fmaxf(largest, fabsf(further(e, token, channel)));
    }
    return largest;
  }
  INLINE void add(float factor) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i == 3 && from + 96 >= near_to) break;
      const u32 number = load_half(s.mine + W_VALUES + (lane + 32 * i) * 2);
      add_value(s.mine, number >> 7 & 63, number & 127, difference[i] * factor, near(i));
    }
    for (int e = rest + lane; e < to; e += 32) {
      u32 token, channel;
      const float delta = further(e, token, channel);
      if (delta != 0.f) add_value(s.mine, token, channel, delta * factor, true);
    }
  }
};

// Sums of differences of values in fixed point, until they are moved to where the others are. No difference is larger
// than ``most``; ``factor`` makes whole numbers of a difference times a weight. Weights are up to 2^14, so that one addend
// is up to 2^20, and 16 blocks of 64 tokens fit.
struct Heap {
  float most, factor;
  INLINE void fit(float largest) {
    largest = fmaxf(largest_of_warp(largest), 1e-30f);
    most = as_float((as_word(largest) & 0x7f800000u) + 0x01000000u);  // a power of two; the largest is below half of it
    factor = 64.f * reciprocal(most);
  }
  INLINE void move(float (*sums)[4], u32 mine, float size, int lane) const {  // once in a while, see store_part
    const int q = lane >> 2, r = lane & 3;
    const float back = reciprocal(factor * size);
    __syncwarp();
    if (2 * r < GN)
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int upper = 0; upper < 2; upper++)
#pragma unroll
          for (int x = 0; x < 2 && x < GN; x++) {
            const u32 at = mine + W_OUT + ((2 * r + x) * OUT_ROW + OUT_PLACE(out_channel(i, q, upper))) * 4;
            sums[i][2 * upper + x] += (float)(int)load(at) * back;
            store(at, 0);
          }
    __syncwarp();
  }
};
