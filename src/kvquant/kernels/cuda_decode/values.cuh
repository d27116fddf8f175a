// Sums of a block's values, but for outliers, and what a warp has summed so far.
#pragma once
#include "value_outliers.cuh"

// What is stored of each token, of a lane's eight.
INLINE void load_ranges(float* x, u32 from, int q) {
  constexpr int WORDS = EVERY_SECOND ? 8 : 4;
  u32 word[WORDS];
  from += 2 * token_of(EVERY_SECOND ? q & 6 : q, 0);
#pragma unroll
  for (int i = 0; i < WORDS; i++)
    if (PAIRS_APART)
      word[i] = load(from + 2 * token_of(0, 2 * i));
    else if (i % 4 == 0)
      load4(word + i, from + i * 4);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = EVERY_SECOND ? kept_of(word[i], q & 1) : kept_of(word[i >> 1], i & 1);
}

// Values of tokens 2m (+ 1) of lanes 2r and 2r + 1 (token_of), times their weights.
INLINE void add_values(float (*sums)[4], const Work& w, const Table<VB>& table, int m, const u32* weights) {
  const int q = w.q, r = w.r;
#if VB == 2
  u32 u[2], v[2];
#pragma unroll
  for (int p = 0; p < 2; p++) {
    const u32 at = w.s.mine + W_CODES + m * value_row(0, 2) + value_row(0, p) + q * 4;
    u[p] = load(at + value_row(2 * r, 0));
    v[p] = load(at + value_row(2 * r + 1, 0));
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 a[2][4];  // of the byte's lower fields and the upper ones
#pragma unroll
    for (int p = 0; p < 2; p++) {
      u32 x[2], y[2];
      table.look_up(u[p], k, x[0], x[1]);
      table.look_up(v[p], k, y[0], y[1]);
#pragma unroll
      for (int f = 0; f < 2; f++) {
        a[f][2 * p] = __byte_perm(x[f], y[f], 0x5410);
        a[f][2 * p + 1] = __byte_perm(x[f], y[f], 0x7632);
      }
    }
#pragma unroll
    for (int f = 0; f < 2; f++)
      multiply_add(sums[4 * f + k], a[f][0], a[f][1], a[f][2], a[f][3], weights[0], weights[1]);
  }
#else
  u32 x[2][2], y[2][2];
#pragma unroll
  for (int p = 0; p < 2; p++) {
#if VB == 4
    u32 u[2], v[2];
    const u32 at = w.s.mine + W_CODES + q * 8;
#if EVERY_SECOND
    load2(u, (at + r * V_GROUP ^ r * 32) + (2 * m + p) * 128);
    load2(v, (at + r * V_GROUP + 64 ^ r * 32) + (2 * m + p) * 128);
#else
    const int first = token_of(2 * r, 0), second = token_of(2 * r + 1, 0);
    const u32 later = m * value_row(0, 2);
    load2(u, (at + first * 64 + p * 64 ^ sector_of(first) * 32) + later);
    load2(v, (at + second * 64 + p * 64 ^ sector_of(second) * 32) + later);
#endif
#pragma unroll
    for (int i = 0; i < 2; i++) {
      x[p][i] = lower_nibbles(u[i], v[i]);
      y[p][i] = upper_nibbles(u[i], v[i]);
    }
#else
    const u32 at = w.s.mine + W_CODES + m * value_row(0, 2) + value_row(0, p), third = at + 32 + (q & 3) * 4;
    const u32 first = value_row(2 * r, 0), second = value_row(2 * r + 1, 0);
    const u32 u = load(at + q * 4 + first), v = load(at + q * 4 + second);
    const u32 a = third_bits(load(third + first), q >> 2), b = third_bits(load(third + second), q >> 2);
    const u32 lower = lower_nibbles(u, v), upper = upper_nibbles(u, v);
    const u32 lower_third = lower_nibbles(a, b), upper_third = upper_nibbles(a, b);
    x[p][0] = three_bits(lower, lower_third << 2);
    x[p][1] = three_bits(lower >> 2, lower_third);
    y[p][0] = three_bits(upper, upper_third << 2);
    y[p][1] = three_bits(upper >> 2, upper_third);
#endif
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 a[2][4];
#pragma unroll
      for (int p = 0; p < 2; p++) {
        table.look_up(x[p][i], half, a[0][2 * p], a[1][2 * p]);
        table.look_up(y[p][i], half, a[0][2 * p + 1], a[1][2 * p + 1]);
      }
#pragma unroll
      for (int k = 0; k < 2; k++)
        multiply_add(sums[4 * i + 2 * half + k], a[k][0], a[k][1], a[k][2], a[k][3], weights[0], weights[1]);
    }
#endif
}

// What a warp has seen of a lane's heads: in all lanes q alike what is largest, of a lane's own tokens totals, and sums of
// tiles of channels, rows q and q + 8 of columns 2r and 2r + 1. Where both are one head's, each has half of the tokens.
struct Seen {
  float best[EACH], total[EACH], zeros[EACH];  // best is in units of a score
  float size = 0x1p-60f;                       // of ranges of values: all that is summed is relative to it, weights too
  float sums[8][4];
  INLINE Seen() {
#pragma unroll
    for (int x = 0; x < EACH; x++) best[x] = -INFINITE, total[x] = zeros[x] = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
  }
  INLINE void scale_anew(const float* most, float largest, float unit) {
    const float new_size = largest > size ? power_of_two(largest) : size, keep = size * reciprocal(new_size);
#pragma unroll
    for (int x = 0; x < EACH; x++) {
      const float now = fmaxf(best[x], most[x]), fade = fast_exp2((best[x] - (now == -INFINITE ? 0.f : now)) * unit);
      best[x] = now;
      total[x] *= fade * keep;
      zeros[x] *= fade * keep;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sums[i][x] *= fade * keep;
        sums[i][x + 2] *= fade * keep;
        if (EACH == 1) sums[i][1] *= fade * keep, sums[i][3] *= fade * keep;
      }
    }
    size = new_size;
  }
};

// ``heap``: what one of the whole numbers is worth that outliers have summed, whose place is empty afterwards.
INLINE void store_part(const Arguments& a, const Work& w, Seen& seen, int part, float unit, float heap) {
  const float size = seen.size * 0x1p-10f;
#pragma unroll
  for (int i = 4; i < 32; i *= 2)
#pragma unroll
    for (int x = 0; x < EACH; x++) {
      seen.total[x] += __shfl_xor_sync(ALL_LANES, seen.total[x], i);
      seen.zeros[x] += __shfl_xor_sync(ALL_LANES, seen.zeros[x], i);
    }
#pragma unroll
  for (int y = 0; y < EACH; y++) {
    const int g = EACH * w.r + y;
    if (g >= G) continue;
    const u64 row = ((u64)part * a.H + w.h) * GN + g;
    if (w.q == 0) {
      a.part_best[row] = seen.best[y] * unit;
      a.part_total[row] = seen.total[y] * size;
    }
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float* sums = seen.sums[i] + 2 * upper;
        x[i] = EACH == 1 ? sums[0] + sums[1] : sums[y];
      }
      if (V_ENTRIES > 0) {
        const u32 at = w.s.mine + W_OUT + g * OUT_ROW * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += (float)(int)load(at + out_channel(i, w.q, upper) * 4) * heap;
      }
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = (x[i] + seen.zeros[y]) * size;
#pragma unroll
      for (int i = 0; i < 8; i += 4)
        put4(a.part_out + row * D + out_channel(i, w.q, upper), x[i], x[i + 1], x[i + 2], x[i + 3]);
    }
  }
  __syncwarp();
  if (V_ENTRIES > 0)
    for (int i = w.lane * 16; i < GN * OUT_ROW * 4; i += 512) store4(w.s.mine + W_OUT + i, 0, 0, 0, 0);
}
