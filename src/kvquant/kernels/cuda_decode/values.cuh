// Sums of a block's values, but for outliers, and what a warp has summed so far.
#pragma once
#include "value_outliers.cuh"

// Values of tokens 16 r + 2 m (+ 1) and those eight further, times their weights.
INLINE void add_values(float (*sums)[4], const Work& w, const Table<VB>& table, int m, const u32* weights) {
  const int q = w.q, r = w.r;
#if VB == 2
  u32 u[2], v[2];
#pragma unroll
  for (int p = 0; p < 2; p++) {
    const u32 at = w.s.mine + W_CODES + r * V_GROUP + (2 * m + p) * V_ROW + q * 4;
    u[p] = load(at);
    v[p] = load(at + 8 * V_ROW);
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
    const u32 at = w.s.mine + W_CODES + r * V_GROUP + (2 * m + p) * V_ROW + q * 8;
    load2(u, at);
    load2(v, at + 512);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      x[p][i] = lower_nibbles(u[i], v[i]);
      y[p][i] = upper_nibbles(u[i], v[i]);
    }
#else
    const u32 at = w.s.mine + W_CODES + r * V_GROUP + (2 * m + p) * V_ROW, third = at + 32 + (q & 3) * 4;
    const u32 u = load(at + q * 4), v = load(at + 8 * V_ROW + q * 4);
    const u32 a = load(third) >> (q >> 2), b = load(third + 8 * V_ROW) >> (q >> 2);
    const u32 lower = lower_nibbles(u, v), upper = upper_nibbles(u, v);
    x[p][0] = (lower & 0x33333333u) | (lower_nibbles(a, b) << 2 & 0x44444444u);
    x[p][1] = (lower >> 2 & 0x33333333u) | (lower_nibbles(a, b) & 0x44444444u);
    y[p][0] = (upper & 0x33333333u) | (upper_nibbles(a, b) << 2 & 0x44444444u);
    y[p][1] = (upper >> 2 & 0x33333333u) | (upper_nibbles(a, b) & 0x44444444u);
#endif
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int k = 0; k < 4; k++)
      multiply_add(sums[4 * i + k], table.pair(x[0][i], k), table.pair(y[0][i], k), table.pair(x[1][i], k),
                   table.pair(y[1][i], k), weights[0], weights[1]);
#endif
}

// What a warp has seen, of columns 2r and 2r + 1: in all lanes q alike what is largest, of a lane's own tokens totals, and
// sums of tiles of channels. Where columns hold heads twice (SPLIT), each has half of the tokens, until a part is stored.
struct Seen {
  float best[2] = {-INFINITE, -INFINITE};  // in units of a score
  float total[2] = {0.f, 0.f}, zeros[2] = {0.f, 0.f};
  float size = 0x1p-60f;  // of ranges of values: sums are relative to it
  float sums[8][4];
  INLINE Seen() {
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.f;
  }
  INLINE void scale_anew(const float* most, float largest, float unit) {
    const float new_size = largest > size ? 2.f * largest : size, keep = size * reciprocal(new_size);
#pragma unroll
    for (int x = 0; x < 2; x++) {
      const float now = fmaxf(best[x], most[x]), fade = fast_exp2((best[x] - (now == -INFINITE ? 0.f : now)) * unit);
      best[x] = now;
      total[x] *= fade;
      zeros[x] *= fade;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sums[i][x] *= fade * keep;
        sums[i][x + 2] *= fade * keep;
      }
    }
    size = new_size;
  }
};

// Of columns that hold heads twice, each half of the lanes gets the sums of half of the rows. ``heap``: what one of the
// whole numbers is worth that outliers have summed, whose place is empty afterwards.
INLINE void store_part(const Arguments& a, const Work& w, Seen& seen, int part, float unit, float heap) {
  const int half = w.r >> 1, head = 2 * (SPLIT ? w.r & 1 : w.r);
#pragma unroll
  for (int x = SPLIT ? 2 : 4; x < 32; x *= 2)
#pragma unroll
    for (int y = 0; y < 2; y++) {
      seen.total[y] += __shfl_xor_sync(ALL_LANES, seen.total[y], x);
      seen.zeros[y] += __shfl_xor_sync(ALL_LANES, seen.zeros[y], x);
    }
#pragma unroll
  for (int up = 0; up < (SPLIT ? 1 : 2); up++) {
    const int upper = SPLIT ? half : up;
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const int g = head + y;
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float low = seen.sums[i][y], high = seen.sums[i][y + 2];
        x[i] = up ? high : low;
        if (SPLIT) x[i] = (half ? high : low) + __shfl_xor_sync(ALL_LANES, half ? low : high, 2);
      }
      if (g >= G) continue;
      if (V_ENTRIES > 0) {
        const u32 at = w.s.mine + W_OUT + g * OUT_ROW * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const u32 place = at + OUT_PLACE(out_channel(i, w.q, 0)) * 4 + upper * OUT_PLACE(64) * 4;
          x[i] = x[i] * seen.size + (float)(int)load(place) * heap;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= seen.size;
      }
      const u64 row = ((u64)part * a.H + w.h) * GN + g;
      if (w.q == 0 && upper == 0) {
        a.part_best[row] = seen.best[y] * unit;
        a.part_total[row] = seen.total[y] * 0x1p-10f;
      }
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = (x[i] + seen.zeros[y]) * 0x1p-10f;
#pragma unroll
      for (int i = 0; i < 8; i += 4)
        put4(a.part_out + row * D + out_channel(i, w.q, 0) + 64 * upper, x[i], x[i + 1], x[i + 2], x[i + 3]);
    }
  }
  __syncwarp();
  if (V_ENTRIES > 0)
    for (int i = w.lane * 16; i < GN * OUT_ROW * 4; i += 512) store4(w.s.mine + W_OUT + i, 0, 0, 0, 0);
}
