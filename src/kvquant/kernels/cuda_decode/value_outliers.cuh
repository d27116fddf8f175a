// Outliers of values: each adds its difference to what code 0 decodes to, times its token's weight, to a channel's sums.
#pragma once
#include "fetch.cuh"

// A token's range makes the difference.
INLINE float value_difference(u32 mine, float value, u32 token, float first) {
  const float scale = kept(load_half(mine + W_RANGES + token * 2)), zero = kept(load_half(mine + W_RANGES + 128 + token * 2));
  return value - (zero + scale * first);
}

// N of a lane's entries, number token * D + channel: what is ``scaled`` by its weights; 0 is none.
template <int N> INLINE void add_values_of(const Shared& s, const u32* number, const float* scaled) {
  u32 weight[N][GN];
#pragma unroll
  for (int i = 0; i < N; i++) {  // none waits for another
    const u32 token = number[i] >> 5 & 0xFC;
    const u32 at = s.mine + W_WEIGHTS + (EVERY_SECOND ? look_at<LISTS_AT + 256>(token) >> 16 : token);
#pragma unroll
    for (int g = 0; g < GN; g++) weight[i][g] = load(at + SCORE_ROW(g) * 4);
  }
#pragma unroll
  for (int i = 0; i < N; i++)
    if (scaled[i] != 0.f)
#pragma unroll
      for (int g = 0; g < GN; g++)
        add(s.mine + W_OUT + g * OUT_ROW * 4 + (number[i] << 2 & 0x1FC), to_int(as_float(weight[i][g]) * scaled[i]));
}

// A closed block lists each head's entries together. Up to V_PLACES of these lie in shared memory, or fifteen fewer (see
// first_copied), and lane e % 32 has the e-th of them. Three of a lane are all in half of the blocks, four in four of five (of
// the bench's made-up values at 1%): differences of these are kept.
#define NEAR 4
INLINE bool has_fourth(const Block& block) { return block.last > first_copied(block.first) + 96; }

// The difference of a lane's i-th; 0 if there is none.
INLINE float near_difference(const Shared& s, int lane, int i, const Block& block, float least) {
  const u32 at = s.mine + W_VALUES + (lane + 32 * i) * 2, token = load_half(at) >> 7 & 63;
  const float x = value_difference(s.mine, kept(load_half(at + 2 * V_PLACES)), token, least);
  const int e = first_copied(block.first) + lane + 32 * i;
  return e < block.last && (i > 0 || e >= block.first) ? x : 0.f;
}
// What tokens before ``hidden`` left there may be any number: they count for nothing, or they would be what the others are
// scaled by.
INLINE bool near_is_hidden(const Shared& s, int lane, int i, int hidden) {
  return (int)(load_half(s.mine + W_VALUES + (lane + 32 * i) * 2) >> 7 & 63) < hidden;
}
// N of a lane's from the i-th on.
template <int N> INLINE void add_near(const Shared& s, int lane, int i, const float* differences, float factor) {
  u32 number[N];
  float scaled[N];
#pragma unroll
  for (int j = 0; j < N; j++) {
    number[j] = load_half(s.mine + W_VALUES + (lane + 32 * (i + j)) * 2);
    scaled[j] = differences[i + j] * factor;
  }
  add_values_of<N>(s, number, scaled);
}

// Further entries of a block's values: of a closed block those behind the first 128 places. An open one lists all heads',
// token by token, V_ENTRIES each, numbered by channel of the layer, and none lies in shared memory.
struct FurtherValues {
  Shared s;
  u32 id;
  int from, to, start, lane, h, hidden;
  bool closed;

  // Whether there may be any.
  static INLINE bool there(const Block& block) {
    return block.last == 0 || block.last > first_copied(block.first) + 32 * NEAR;
  }
  INLINE FurtherValues(const Arguments& a, const Work& w, const Block& block, int column)
      : s(w.s), id(block.id), lane(w.lane), h(w.h), hidden(w.first_slot(a, column)) {
    closed = block.last > 0 || a.value_end[(u64)id * a.H + a.H - 1] > 0;
    from = closed ? first_copied(block.first) : 0;
    to = closed ? block.last : min(w.end_slot(column), BS) * V_ENTRIES;
    start = closed ? from + 32 * NEAR : 0;
  }
  INLINE float difference(const Arguments& a, int e, u32& token, u32& channel) const {
    u32 number;
    float value;
    if (closed && e - from < V_PLACES) {
      const u32 at = s.mine + W_VALUES + (e - from) * 2;
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
    return counts ? value_difference(s.mine, value, token, as_float(load(LEAST_AT))) : 0.f;
  }
  // The largest difference that this lane has.
  INLINE float largest(const Arguments& a) const {
    float most = 0.f;
#pragma unroll 1
    for (int e = start + lane; e < to; e += 32) {
      u32 token, channel;
      most = fmaxf(most, fabsf(difference(a, e, token, channel)));
    }
    return most;
  }
  INLINE void add(const Arguments& a, float factor) const {
#pragma unroll 1
    for (int e = start + lane; e < to; e += 32) {
      u32 token, channel;
      const float scaled = difference(a, e, token, channel) * factor;
      const u32 number = token * D + (channel < D ? channel : 0);
      add_values_of<1>(s, &number, &scaled);
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
          const u32 at = mine + W_OUT + ((EACH * r + x) * OUT_ROW + out_channel(i, q, upper)) * 4;
          sums[i][2 * upper + x] += (float)(int)load(at) * back;
          store(at, 0);
        }
  __syncwarp();
}
