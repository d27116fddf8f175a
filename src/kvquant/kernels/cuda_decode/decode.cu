// Decode attention straight from packed blocks for Hopper: one query per sequence, its blocks shared among warps.
//
// The sums of triton_kernels/decode.py, laid out for what bounds them there, instructions (numbers: triton_kernels/attention.py).
// A warp takes a run of blocks (shares.py) of one (sequence, KV head) by itself: nothing waits for another warp, and what
// is done once per block is done by one warp. All warps of a multiprocessor share tables, so that a look-up of two
// sixteen-valued codes takes two instructions (look_up.cuh).
//
// Keys are neither scaled nor rotated. With pair (x, y) of channels scaled by (s, t) and shifted by (u, v), the token's
// angle j in the block and the query turned back to the block's first token (p, q), a score is the sum over pairs of
//   x cos j * s p + y cos j * t q  +  x sin j * s q - y sin j * t p  +  cos j * (u p + v q) + sin j * (u q - v p)
// which are three products for the tensor core: codes' centroids times cosines, times sines, and the angles themselves,
// with queries that carry what does not depend on the token. Two multiplications of two numbers each are all that a pair
// of keys costs beside its look-up. A value's range belongs to its token and goes into the weight.
//
// Weights are relative to a largest score that may be exceeded by 2^SLACK before sums are scaled anew, which is rare then.
#include "fetch.cuh"

#define SLACK 4.f
#define WEIGHT_BITS 10.f  // weights are at most 2^(10 + SLACK): fp16 holds smaller ones so
#define LOG2E 1.4426950408889634f

// Two pairs of each lane of a unit: their part of the scores of all tokens.
template <int HALF> INLINE void add_scores(float (*s)[4], const Work& w, const Table<KB>& table, const u32* c, int n) {
  u32 base[2], query[2], scale[2], zero[2], cosine[2], sine[2], shift[2];
  const u32 at = (n * 4 + w.r) * 16 + HALF * 8;
  load2(base, w.s.mine + W_BASES + at);
  load2(query, w.s.mine + W_QUERY + (w.q & (GN - 1)) * QUERY_ROW + at);
  load2(scale, w.s.mine + W_SCALE + at);
  load2(zero, w.s.mine + W_ZERO + at);
#pragma unroll
  for (int k = 0; k < 2; k++) {
#if BF16
    const u32 back = half_mul(query[k], low_twice(base[k]));
    const u32 p = half_fma(quarter_turn(query[k]), high_twice(base[k]), back), q = quarter_turn(p);
    cosine[k] = half_mul(p, scale[k]);
    sine[k] = half_mul(q, scale[k]);
    shift[k] = half_fma(q, high_twice(zero[k]), half_mul(p, low_twice(zero[k])));
#else  // rounded once: what is lost of a query moves the scores of all tokens alike, and fp16 loses no more itself
    const float x = low_of(query[k]), y = high_of(query[k]), cb = low_of(base[k]), sb = high_of(base[k]);
    const float p = x * cb + y * sb, q = y * cb - x * sb;
    cosine[k] = half_pair(p * low_of(scale[k]), q * high_of(scale[k]));
    sine[k] = half_pair(q * low_of(scale[k]), -p * high_of(scale[k]));
    shift[k] = half_pair(low_of(zero[k]) * p + high_of(zero[k]) * q, low_of(zero[k]) * q - high_of(zero[k]) * p);
#endif
  }
#pragma unroll
  for (int m = 0; m < 4; m++) {
    u32 t[4], x[4];  // rows q and q + 8 of one pair, then of the next
    look4(t, w.s.angles + (((n * 4 + m) * 2 + HALF) * 32 + w.lane) * 16);
    pairs_of<HALF>(table, c[2 * m], x[0], x[2]);
    pairs_of<HALF>(table, c[2 * m + 1], x[1], x[3]);
    multiply_add(s[m], t[0], t[1], t[2], t[3], shift[0], shift[1]);
    multiply_add(s[m], half_mul(x[0], low_twice(t[0])), half_mul(x[1], low_twice(t[1])), half_mul(x[2], low_twice(t[2])),
                 half_mul(x[3], low_twice(t[3])), cosine[0], cosine[1]);
    multiply_add(s[m], half_mul(x[0], high_twice(t[0])), half_mul(x[1], high_twice(t[1])),
                 half_mul(x[2], high_twice(t[2])), half_mul(x[3], high_twice(t[3])), sine[0], sine[1]);
  }
}

// Selectors of 2 units of values for tokens 16 r + 2 m + p and that eight further: lower channels x, upper channels y.
INLINE void value_selectors(u32* x, u32* y, const Work& w, int m, int p) {
  const int q = w.q, r = w.r;
#if VB == 4
  u32 u[2], v[2];
  const u32 at = w.s.mine + W_CODES + r * 1024 + m * 128 + ((4 * p | q >> 1) ^ r << 1) * 16 + (q & 1) * 8;
  load2(u, at);
  load2(v, at + 512);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    x[i] = lower_nibbles(u[i], v[i]);
    y[i] = upper_nibbles(u[i], v[i]);
  }
#else
  const u32 at = w.s.mine + W_CODES + (16 * r + 2 * m + p) * V_ROW;
  const u32 u = load(at + q * 4), v = load(at + 8 * V_ROW + q * 4);
  const u32 lower = lower_nibbles(u, v), upper = upper_nibbles(u, v);
  x[0] = lower & 0x33333333u;
  x[1] = lower >> 2 & 0x33333333u;
  y[0] = upper & 0x33333333u;
  y[1] = upper >> 2 & 0x33333333u;
#if VB == 3
  const u32 third = at + 32 + (q & 3) * 4;
  const u32 a = load(third) >> (q >> 2), b = load(third + 8 * V_ROW) >> (q >> 2);
  x[0] |= lower_nibbles(a, b) << 2 & 0x44444444u;
  x[1] |= lower_nibbles(a, b) & 0x44444444u;
  y[0] |= upper_nibbles(a, b) << 2 & 0x44444444u;
  y[1] |= upper_nibbles(a, b) & 0x44444444u;
#endif
#endif
}

template <int HALF>
INLINE void add_values(float (*sums)[4], const Table<VB>& table, const u32 (*x)[2], const u32 (*y)[2], const u32* weights) {
#pragma unroll
  for (int u = 0; u < 2; u++) {
    u32 a[4], b[4];
    pairs_of<HALF>(table, x[0][u], a[0], b[0]);
    pairs_of<HALF>(table, y[0][u], a[1], b[1]);
    pairs_of<HALF>(table, x[1][u], a[2], b[2]);
    pairs_of<HALF>(table, y[1][u], a[3], b[3]);
    multiply_add(sums[4 * u + 2 * HALF], a[0], a[1], a[2], a[3], weights[0], weights[1]);
    multiply_add(sums[4 * u + 2 * HALF + 1], b[0], b[1], b[2], b[3], weights[0], weights[1]);
  }
}

// What a warp has seen: for heads 2r and 2r + 1, in all lanes q of these, and sums of tiles of channels.
struct Seen {
  float best[2] = {-INFINITE, -INFINITE};  // in units of a score
  float total[2] = {0.f, 0.f}, zeros[2] = {0.f, 0.f};  // of this lane's tokens
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

INLINE void store_part(const Arguments& a, const Work& w, Seen& seen, int program, float unit) {
#pragma unroll
  for (int x = 4; x < 32; x *= 2)
#pragma unroll
    for (int y = 0; y < 2; y++) {
      seen.total[y] += __shfl_xor_sync(ALL_LANES, seen.total[y], x);
      seen.zeros[y] += __shfl_xor_sync(ALL_LANES, seen.zeros[y], x);
    }
#pragma unroll
  for (int y = 0; y < 2; y++) {
    const int g = 2 * w.r + y;
    if (g >= G) continue;
    const u64 at = ((u64)program * a.H + w.h) * GP + g;
    if (w.q == 0) {
      a.part_best[at] = seen.best[y] * unit;
      a.part_total[at] = seen.total[y] * 0x1p-10f;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      a.part_out[at * D + out_channel(i, w.q, 0)] = (seen.sums[i][y] * seen.size + seen.zeros[y]) * 0x1p-10f;
      a.part_out[at * D + out_channel(i, w.q, 1)] = (seen.sums[i][y + 2] * seen.size + seen.zeros[y]) * 0x1p-10f;
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) decode(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Work w;
  w.lane = lane;
  const int q = w.q = lane >> 2, r = w.r = lane & 3;
  w.s = shared_of((u32)__cvta_generic_to_shared(memory), warp);
  const u32 mine = w.s.mine;
  fill_tables(w.s, a.key_centroids, a.value_centroids, a.offset_cos, a.offset_sin);
  for (int i = lane * 4; i < W_BYTES; i += 128) store(mine + i, 0);
  __syncthreads();
  const float key_least = low_of(half_pair(a.key_centroids[0], 0.f));
  const float value_least = low_of(half_pair(a.value_centroids[0], 0.f));

  // Who is done takes what is left.
  int worker = warp * gridDim.x + blockIdx.x;
  while (worker < a.programs * a.H) {
    const int program = worker / a.H, b = a.shares[program * 4];
    w.h = (worker + program) % a.H;  // heads differ in outliers: each multiprocessor gets some of all
    w.bh = b * a.H + w.h;
    w.begin = a.shares[program * 4 + 1];
    w.end = a.shares[program * 4 + 2];
    if (w.begin < w.end) {
      const int length = a.kv_lengths[b];
      const int first_visible = HAS_WINDOW ? max(a.sink_tokens, length - a.window) : a.sink_tokens;
      const float score_unit = a.unit[w.bh * 2], inverse_size = a.unit[w.bh * 2 + 1];
      const float unit = HAS_SOFTCAP ? 1.f : score_unit;
      load_queries(a, w, key_least);
      Seen seen;
      Heap heap;
      KeyCodes codes;
      w.describe(a, w.begin);
      Block block = w.block_of(w.begin);
      ask_keys(a, w, codes, w.begin, block);
      copies_end();
      ask_values(a, w, block);
      copies_end();

      for (int column = w.begin; column < w.end; column++) {
        const int first_slot = first_visible - column * BS, end_slot = length - column * BS;
        const bool whole = first_slot <= 0 && end_slot >= BS, last = column + 1 == w.end;

        // -- scores: row q (+ 8) of tile m is token 8q + 2m (+ 1), columns 2r and 2r + 1 are heads ------------------
        wait_for_older_copies();  // of keys
        const float fixed_unit = score_unit * SCORE_FRACTION;
        if (K_BASE > 0) add_keys_of_block(a, w.s, lane, block.count, block.head, inverse_size, fixed_unit);
        float s[4][4] = {};
        const Table<KB> k_table(w.s, lane, 0);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          u32 c[8];
          codes.selectors(c, w, n);
          add_scores<0>(s, w, k_table, c, n);
          add_scores<1>(s, w, k_table, c, n);
        }
        const u32 id = block.id, range = block.range;
        __syncwarp();
        if (!last) {
          if (((column + 1 - w.begin) & 15) == 0) w.describe(a, column + 1);
          ask_keys(a, w, codes, column + 1, w.block_of(column + 1));
        }
        copies_end();
        if (K_BASE > 0 && 2 * r < GN) {
          const float back = reciprocal(fixed_unit);
#pragma unroll
          for (int x = 0; x < 2 && x < GN; x++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              u32 word[4];
              load4(word, mine + W_SCORES + ((2 * r + x) * SCORE_ROW + 8 * q + 4 * half) * 4);
#pragma unroll
              for (int i = 0; i < 4; i++) s[2 * half + (i >> 1)][2 * (i & 1) + x] += (float)(int)word[i] * back;
            }
        }
        if (HAS_SOFTCAP) {  // tanh through exp, which keeps its sign at both ends
#pragma unroll
          for (int i = 0; i < 16; i++) {
            const float x = s[i >> 2][i & 3] * score_unit, decay = fast_exp2(fabsf(x / a.softcap) * (-2.f * LOG2E));
            s[i >> 2][i & 3] = copysignf(LOG2E * a.softcap * (1.f - decay) / (1.f + decay), x);
          }
        }
        if (!whole) {
#pragma unroll
          for (int i = 0; i < 16; i++) {
            const int token = 8 * q + (i >> 1);
            if (token < first_slot || token >= end_slot) s[i >> 2][i & 3] = -INFINITE;
          }
        }

        // -- weights -----------------------------------------------------------------------------------------------
        float most[2] = {-INFINITE, -INFINITE};
#pragma unroll
        for (int i = 0; i < 16; i++) most[i & 1] = fmaxf(most[i & 1], s[i >> 2][i & 3]);
#pragma unroll
        for (int x = 4; x < 32; x *= 2) {
          most[0] = fmaxf(most[0], __shfl_xor_sync(ALL_LANES, most[0], x));
          most[1] = fmaxf(most[1], __shfl_xor_sync(ALL_LANES, most[1], x));
        }
        wait_for_older_copies();  // of values
        if (!whole) {             // what no token has written is not looked at
          for (int t = lane; t < BS; t += 32)
            if (t < first_slot || t >= end_slot) {
              store_half(mine + W_RANGES + t * 2, 0);
              store_half(mine + W_RANGES + 128 + t * 2, 0);
            }
          __syncwarp();
        }
        float scale[8], zero[8], largest = 0.f;
        u32 scales[4], shifts[4];
        load4(scales, mine + W_RANGES + q * 16);
        load4(shifts, mine + W_RANGES + 128 + q * 16);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          scale[i] = kept((u16)(scales[i >> 1] >> 16 * (i & 1)));
          zero[i] = kept((u16)(shifts[i >> 1] >> 16 * (i & 1)));
          largest = fmaxf(largest, scale[i]);
        }
        largest = largest_of_warp(largest);
        Values<Arguments> values(a, w.s, id, range, min(end_slot, BS), lane, w.h, value_least);
        const float difference = V_ENTRIES > 0 ? values.read() : 0.f;
        const bool higher = (most[0] - seen.best[0]) * unit > SLACK || (most[1] - seen.best[1]) * unit > SLACK;
        const bool outgrown = (2 * r < GN && higher) || largest > seen.size || difference > heap.most;
        if (__any_sync(ALL_LANES, outgrown) || heap.full()) {
          if (V_ENTRIES > 0) {
            heap.move(seen.sums, mine, seen.size, lane);
            heap.fit(difference);
          }
          seen.scale_anew(most, largest, unit);
        }
        heap.blocks++;
        const float inverse = reciprocal(seen.size);
        float shift[2];
#pragma unroll
        for (int x = 0; x < 2; x++)
          shift[x] = WEIGHT_BITS - (seen.best[x] == -INFINITE ? 0.f : seen.best[x]) * unit;
#pragma unroll
        for (int i = 0; i < 16; i++) {
          const float p = s[i >> 2][i & 3] = fast_exp2(s[i >> 2][i & 3] * unit + shift[i & 1]);
          seen.total[i & 1] += p;
          seen.zeros[i & 1] += p * zero[i >> 1];
        }
        if (V_ENTRIES > 0 && 2 * r < GN)
#pragma unroll
          for (int x = 0; x < 2 && x < GN; x++)
#pragma unroll
            for (int half = 0; half < 2; half++)
              store4(mine + W_WEIGHTS + ((2 * r + x) * SCORE_ROW + 8 * q + 4 * half) * 4, as_word(s[2 * half][x]),
                     as_word(s[2 * half][2 + x]), as_word(s[2 * half + 1][x]), as_word(s[2 * half + 1][2 + x]));
        u32 weights[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float f = scale[i] * inverse;
          weights[i] = transposed(half_pair(s[i >> 1][2 * (i & 1)] * f, s[i >> 1][2 * (i & 1) + 1] * f));
        }

        // -- values: row q (+ 8) of tile i is a channel, two tokens a word ----------------------------------------------
        const Table<VB> v_table(w.s, lane, 1);
#pragma unroll
        for (int m = 0; m < 4; m++) {
          u32 x[2][2], y[2][2];
          value_selectors(x[0], y[0], w, m, 0);
          value_selectors(x[1], y[1], w, m, 1);
          add_values<0>(seen.sums, v_table, x, y, weights + 2 * m);
          add_values<1>(seen.sums, v_table, x, y, weights + 2 * m);
        }
        if (V_ENTRIES > 0) {
          __syncwarp();
          values.add(heap.factor);
        }
        __syncwarp();
        for (int i = lane * 16; i < GN * SCORE_ROW * 4; i += 512) store4(mine + W_SCORES + i, 0, 0, 0, 0);
        if (!last) {
          block = w.block_of(column + 1);
          ask_values(a, w, block);
        }
        copies_end();
        __syncwarp();
      }
      if (V_ENTRIES > 0) heap.move(seen.sums, mine, seen.size, lane);
      store_part(a, w, seen, program, unit);
      wait_for_copies();
    }
    int next = 0;
    if (lane == 0) next = atomicAdd(a.taken, 1);
    worker = __shfl_sync(ALL_LANES, next, 0) + gridDim.x * WARPS;
  }
}
