// Outliers of keys: each adds its difference to what code 0 decodes to, times the query, to its token's scores.
//
// They are added in shared memory, as whole numbers: atomics of those give the same sum in every order. An entry is
// number slot * D + channel and what is kept.
#pragma once
#include "fetch.cuh"

#define SCORE_FRACTION 16384.f  // of a score, log2
// Of one outlier, in these units, before it meets the query, whose components are a half at most: sums of 32 fit.
#define LARGEST_SCORE 134217728.f

// Entries of the keys, N of each lane. ``unit``: what a difference relative to the largest key, times a query, is worth.
template <int N>
INLINE void add_keys(const Shared& s, const u32* number, const float* value, const bool* live, float inverse_size,
                     float unit) {
  u32 query[N][GN], angle[N], channel[N], token[N];
  float least[N], cb[N], sb[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    channel[i] = look_at<LISTS_AT>(number[i] << 2 & 0xFC);
    token[i] = look_at<LISTS_AT + 256>(number[i] >> 5 & 0xFC);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const u32 at = s.mine + (channel[i] >> 16);
    angle[i] = look_at<ANGLES_AT>(token[i] + channel[i] & 0xFFFF);
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
    const u32 at = s.mine + W_SCORES + (EVERY_SECOND ? token[i] >> 16 : number[i] >> 5 & 0xFC);
    if (live[i])
#pragma unroll
      for (int g = 0; g < GN; g++)
        add(at + SCORE_ROW(g) * 4, to_int(x * low_of(query[i][g]) + y * high_of(query[i][g])));
  }
}

// All of a block's: its own row and the first chunk of its chain lie in shared memory, further chunks are fetched.
INLINE void add_keys_of_block(const Arguments& a, const Work& w, const Block& block) {
  const Shared& s = w.s;
  const float inverse_size = w.real(INVERSE_SIZE), unit = w.real(SCORE_UNIT) * SCORE_FRACTION;
  const int lane = w.lane, near = min(block.count, K_BASE + CHUNK);
  const u32 at = s.mine + W_KEYS + lane * 2;  // the last lanes may look behind the entries, and are not live
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
#pragma unroll 1
  for (int e = 96; e < near; e += 32) {
    number[0] = load_half(at + 2 * e);
    value[0] = kept(load_half(at + 2 * K_PLACES + 2 * e));
    live[0] = e + lane < near;
    add_keys<1>(s, number, value, live, inverse_size, unit);
  }
#pragma unroll 1
  for (int left = block.count - K_BASE - CHUNK, chunk = block.head; left > 0; left -= CHUNK) {
    chunk = a.spill_next[chunk];
    number[0] = a.spill_index[(u64)chunk * CHUNK + lane];
    value[0] = kept(a.spill_value[(u64)chunk * CHUNK + lane]);
    live[0] = lane < left;
    add_keys<1>(s, number, value, live, inverse_size, unit);
  }
}
