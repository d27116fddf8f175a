// Decode attention over packed blocks, a warp for each share of a (sequence, KV head).
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define BS 64
#define D 128
#define GP 8
#define DI __device__ __forceinline__
#define FULL 0xffffffffu

// ---- half2 arithmetic on words -------------------------------------------------------------------------------
DI u32 hmul(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DI u32 hfma(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
DI u32 hneg(u32 a) { u32 r; asm("neg.f16x2 %0,%1;" : "=r"(r) : "r"(a)); return r; }
DI u32 low2(u32 a) { u32 r; asm("{ .reg .b16 l,h; mov.b32 {l,h},%1; mov.b32 %0,{l,l}; }" : "=r"(r) : "r"(a)); return r; }
DI u32 high2(u32 a) { u32 r; asm("{ .reg .b16 l,h; mov.b32 {l,h},%1; mov.b32 %0,{h,h}; }" : "=r"(r) : "r"(a)); return r; }
DI float half_low(u32 a) { float r; asm("{ .reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,l; }" : "=f"(r) : "r"(a)); return r; }
DI float half_high(u32 a) { float r; asm("{ .reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,h; }" : "=f"(r) : "r"(a)); return r; }
DI u32 pack(float low, float high) { u32 r; asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
DI float exp2_(float x) { float r; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
DI float reciprocal(float x) { float r; asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
DI int to_int(float x) { int r; asm("cvt.rni.s32.f32 %0,%1;" : "=r"(r) : "f"(x)); return r; }
DI float as_float(u32 x) { return __uint_as_float(x); }
DI u32 as_word(float x) { return __float_as_uint(x); }
DI float kept(u16 x) {  // a stored 16-bit number
#if BF16
  return as_float((u32)x << 16);
#else
  float r; asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(x)); return r;
#endif
}

// ---- shared memory by address --------------------------------------------------------------------------------
DI u32 lds(u32 at) { u32 r; asm volatile("ld.shared.b32 %0,[%1];" : "=r"(r) : "r"(at)); return r; }
DI u32 lds_const(u32 at) { u32 r; asm("ld.shared.b32 %0,[%1];" : "=r"(r) : "r"(at)); return r; }
DI u16 lds16(u32 at) { u16 r; asm volatile("ld.shared.b16 %0,[%1];" : "=h"(r) : "r"(at)); return r; }
DI void lds2(u32& a, u32& b, u32 at) { asm volatile("ld.shared.v2.b32 {%0,%1},[%2];" : "=r"(a), "=r"(b) : "r"(at)); }
DI void lds4(u32* x, u32 at) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3},[%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
}
DI void lds4_const(u32* x, u32 at) {
  asm("ld.shared.v4.b32 {%0,%1,%2,%3},[%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
}
DI void sts(u32 at, u32 x) { asm volatile("st.shared.b32 [%0],%1;" :: "r"(at), "r"(x) : "memory"); }
DI void sts2(u32 at, u32 x, u32 y) { asm volatile("st.shared.v2.b32 [%0],{%1,%2};" :: "r"(at), "r"(x), "r"(y) : "memory"); }
DI void add_shared(u32 at, int x) { asm volatile("red.shared.add.s32 [%0],%1;" :: "r"(at), "r"(x) : "memory"); }
DI void copy16(u32 to, const void* from) { asm volatile("cp.async.cg.shared.global [%0],[%1],16;" :: "r"(to), "l"(from) : "memory"); }
DI void copy4(u32 to, const void* from) { asm volatile("cp.async.ca.shared.global [%0],[%1],4;" :: "r"(to), "l"(from) : "memory"); }
DI void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DI void wait_for_older() { asm volatile("cp.async.wait_group 1;" ::: "memory"); __syncwarp(); }
DI uint4 stream4(const void* p) {
  uint4 r; asm volatile("ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3},[%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p)); return r;
}
DI uint2 stream2(const void* p) {
  uint2 r; asm volatile("ld.global.L1::no_allocate.v2.b32 {%0,%1},[%2];" : "=r"(r.x), "=r"(r.y) : "l"(p)); return r;
}

// ---- tensor core -----------------------------------------------------------------------------------------------
DI void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DI u32 transposed(u32 a) { u32 r; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(a)); return r; }
DI u32 largest_word(u32 x) { u32 r; asm volatile("redux.sync.max.u32 %0,%1,0xffffffff;" : "=r"(r) : "r"(x)); return r; }

// ---- what a row of codes is ------------------------------------------------------------------------------------
#define K_ROW (16 * KB)
#define V_ROW (16 * VB)
#define KW (KB == 4 ? 4 : 2)  // words of a row that one lane of four decodes
#define VW (VB == 4 ? 2 : 1)  // words of a row that one lane of eight decodes

// Bytes of two tokens' codes of the lower, or the upper, channels
#define MIX_LOW(u, v) (((u) & 0x0F0F0F0Fu) | (((v) << 4) & 0xF0F0F0F0u))
#define MIX_HIGH(u, v) ((((u) >> 4) & 0x0F0F0F0Fu) | ((v) & 0xF0F0F0F0u))

DI u32 permuted(u32 a, u32 b, u32 selector) { u32 r; asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector)); return r; }

// Two centroids for each byte of a selector, whose nibbles are codes. Sixteen centroids take a table of pairs in shared
// memory: rows 256 bytes apart, a column for each lane, so that no two lanes meet in a bank. Up to eight fit four
// registers, their low bytes and their high bytes.
template <int BITS> struct Table { u32 column; DI Table(u32 at, int lane) : column(at) {} };
struct Bytes { u32 x[4]; DI Bytes(u32 at, int lane) { lds4(x, at + (lane & 1) * 16); } };
template <> struct Table<3> : Bytes { using Bytes::Bytes; };
template <> struct Table<2> : Bytes { using Bytes::Bytes; };

template <int HALF> DI void pairs_of(const Table<4>& table, u32 selector, u32& a, u32& b) {
  u32 first, second;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(first) : "r"(table.column), "r"(selector), "n"(0x3240 + HALF * 0x20));
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(second) : "r"(table.column), "r"(selector), "n"(0x3250 + HALF * 0x20));
  a = lds_const(first); b = lds_const(second);
}
template <int HALF> DI void pairs_of(const Bytes& table, u32 selector, u32& a, u32& b) {
  if (HALF) selector >>= 16;
  u32 low = permuted(table.x[0], table.x[1], selector), high = permuted(table.x[2], table.x[3], selector);
  a = permuted(low, high, 0x5140); b = permuted(low, high, 0x7362);
}

// Shared memory, bytes behind TABLE_AT, 64 KiB: the look-up tables; behind them angles and what each warp has
#define TABLE_AT 0x10000u
#define ROWS_OF_TABLE (KB == 4 || VB == 4 ? 256 : 0)
#define ANGLES (BS * 64 * 4)
#define V_BYTES (BS * V_ROW)
#define SCORE_ROW 72
#define OUT_ROW 145
#define OUT_PLACE(d) ((d) + ((d) >> 3))  // spreads what a thread's neighbours read over the banks
#define W_CODES 0
#define W_BASES (W_CODES + V_BYTES)
#define W_RANGES (W_BASES + 256)
#define W_KEYS (W_RANGES + 256)
#define W_VALUES (W_KEYS + 2 * 2 * K_PLACES)  // K_PLACES: K_BASE and the 32 of a chain's first chunk, no less than 96
#define W_SCORES (W_VALUES + 2 * 2 * 128)
#define W_WEIGHTS W_SCORES  // once the scores are read; zeros again before the next block's
#define W_OUT (W_SCORES + GN * SCORE_ROW * 4)
#define W_QUERY ((W_OUT + GN * OUT_ROW * 4 + 15) / 16 * 16)
#define W_SCALE (W_QUERY + 16 * 4 * GN * 4)
#define W_ZERO (W_SCALE + 256)
#define W_KEY_CODES (W_ZERO + 256)
#define W_BYTES ((W_KEY_CODES + (KB < 4 ? BS * K_ROW : 0) + 127) / 128 * 128)
#define PLACES_OF_CHANNELS 384  // and two tables of up to eight centroids

struct Arguments {
  const u16* q_words; const u16* q_half; const u16* affine; const float* floor; const float* unit;
  const u16* bases; const int* shares; const float* offset_cos; const float* offset_sin;
  const int* block_table; const int* kv_lengths;
  const unsigned char* key_codes; const int* key_count; const u16* key_index; const u16* key_value;
  const int* spill_head; const int* spill_next; const u16* spill_index; const u16* spill_value; const float* key_centroids;
  const unsigned char* value_codes; const u16* value_zero; const u16* value_scale;
  const u16* value_index; const u16* value_value; const int* value_end; const float* value_centroids;
  int* taken; float* part_best; float* part_total; float* part_out;
  float softcap; int window; int sink_tokens; int table_stride; int H; int VG; int programs; u32 key_stride; u32 entry_stride; u32 value_stride;
};

DI int pair_channel(int n, int r, int k) {  // of the lower half's channels, pair 4n + k of lane r
#if KB == 4
  return 16 * r + 4 * n + k;
#else
  return (n & 1) * 32 + 8 * r + 4 * (n >> 1) + k;
#endif
}

DI void place_of(int c, int& n, int& r, int& k) {
#if KB == 4
  r = c >> 4; n = (c >> 2) & 3;
#else
  r = (c >> 3) & 3; n = ((c >> 2) & 1) * 2 + (c >> 5);
#endif
  k = c & 3;
}

#ifndef MTILES
#define MTILES 2
#endif
#define SLACK 4.f  // of weights, log2, before sums are scaled anew
#define SCORE_FRACTION 16384.0f
#define LARGEST 32000.0f

// Outliers of the keys, N of each lane: what they add to their tokens' scores.
template <int N> DI void add_keys(float first, const u32* index, const float* value, const bool* live,
                                  float inverse_size, float unit, u32 places, u32 angles, u32 mine) {
  float delta[N];
  u32 query[N][GN], cs[N], place[N];
  u16 base_cos[N], base_sin[N];
  float least[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    u32 d = index[i] & 127;
    place[i] = lds_const(places + (d & 63) * 4);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    u32 t = index[i] >> 7 & 63;
    cs[i] = lds_const(angles + (t >> 1 & 3) * 1024 + (t >> 3) * 64 + (t & 1) * 4 + (place[i] & 0xFFFF));
    base_cos[i] = lds16(mine + W_BASES + (place[i] >> 16));
    base_sin[i] = lds16(mine + W_BASES + 32 + (place[i] >> 16));
    u32 word = (place[i] >> 16) * 2, own = mine + W_SCALE + (word >> 7) * 64 + (word & 127);
    u32 scale = lds(own), zero = lds(own + W_ZERO - W_SCALE);
    least[i] = index[i] & 64 ? half_high(scale) * first + half_high(zero) : half_low(scale) * first + half_low(zero);
    // a lane's four pairs are half as far apart among angles
    word = mine + W_QUERY + (word >> 7) * (GN * 64) + (word & 127);
#pragma unroll
    for (int g = 0; g < GN; g++) query[i][g] = lds(word + g * 64);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    float cb, sb, cj = half_low(cs[i]), sj = half_high(cs[i]);
    asm("cvt.f32.f16 %0,%1;" : "=f"(cb) : "h"(base_cos[i])); asm("cvt.f32.f16 %0,%1;" : "=f"(sb) : "h"(base_sin[i]));
    delta[i] = fminf(fmaxf((value[i] * inverse_size - least[i]) * unit, -67108864.f), 67108864.f);  // sums of 16 fit
    float cosine = (cb * cj - sb * sj) * delta[i], sine = (sb * cj + cb * sj) * delta[i];
    const bool upper = index[i] & 64;
    if (upper) sine = -sine;
    float x[GN];
#pragma unroll
    for (int g = 0; g < GN; g++) {
      float x0 = half_low(query[i][g]), y0 = half_high(query[i][g]);
      x[g] = cosine * (upper ? y0 : x0) + sine * (upper ? x0 : y0);
    }
    u32 at = mine + W_SCORES + ((index[i] >> 7) & 63) * 4;
    if (live[i])
#pragma unroll
      for (int g = 0; g < GN; g++) add_shared(at + g * SCORE_ROW * 4, to_int(x[g]));
  }
}

struct Heap { float most; float factor; int blocks; };  // of the outliers of values in fixed point

DI float value_delta(u32 mine, float value, u32 t, float v_first) {
  float scale = kept(lds16(mine + W_RANGES + t * 2)), zero = kept(lds16(mine + W_RANGES + 128 + t * 2));
  return value - (zero + scale * v_first);
}

DI void add_value(u32 mine, u32 t, u32 d, float delta, bool live) {
  u32 p[GN], at = mine + W_OUT + OUT_PLACE(d) * 4;
#pragma unroll
  for (int g = 0; g < GN; g++) p[g] = lds(mine + W_WEIGHTS + (g * SCORE_ROW + t) * 4);
  if (live)
#pragma unroll
    for (int g = 0; g < GN; g++) add_shared(at + g * OUT_ROW * 4, to_int(as_float(p[g]) * delta));
}

// Channel of row q (+ 8) of output tile i.
DI int out_channel(int i, int q, int upper) {
#if VB == 4
  return 8 * q + i + 64 * upper;
#else
  return (i >> 2) * 32 + 4 * q + (i & 3) + 64 * upper;
#endif
}

// Move what outliers added so far from fixed point to the sums.
DI void flush(float (*acc)[4], u32 mine, float back, int lane) {
  __syncwarp();
  int q = lane >> 2, r = lane & 3;
  if (2 * r < GN) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int upper = 0; upper < 2; upper++)
#pragma unroll
        for (int x = 0; x < 2; x++)
          if (x < GN) {
            u32 at = mine + W_OUT + ((2 * r + x) * OUT_ROW + OUT_PLACE(out_channel(i, q, upper))) * 4;
            acc[i][2 * upper + x] += (float)(int)lds(at) * back;
            sts(at, 0);
          }
  }
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) decode(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  u32 start = (u32)__cvta_generic_to_shared(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane >> 2, r = lane & 3;
  // Warps' own memory and the angles go below the table as far as there is room, the others above.
  const u32 angles = start, places = angles + ANGLES;
  u32 mine = places + PLACES_OF_CHANNELS + warp * W_BYTES;
#define BELOW ((int)((TABLE_AT - 1024 - ANGLES - PLACES_OF_CHANNELS) / W_BYTES))
  if (ROWS_OF_TABLE && warp >= BELOW) mine = TABLE_AT + ROWS_OF_TABLE * 256 + (warp - BELOW) * W_BYTES;

  for (int i = threadIdx.x; i < ROWS_OF_TABLE * 64; i += 32 * WARPS) {
    int row = i >> 6, low = row & 15, high = row >> 4;
    bool values = i & 32;
    const float* centroids = values ? a.value_centroids : a.key_centroids;
    int count = values ? 1 << VB : 1 << KB;
    u32 word = 0;
    if (low < count && high < count) word = pack(centroids[low], centroids[high]);
    sts(TABLE_AT + i * 4, word);
  }
  if (threadIdx.x < 16) {  // two copies: what the compiler knew to be the same for all lanes it would keep where PRMT cannot read it
    const bool values = threadIdx.x & 8, high = threadIdx.x & 2, more = threadIdx.x & 1;
    const float* centroids = (values ? a.value_centroids : a.key_centroids);
    const int bits = values ? VB : KB;
    u32 word = 0;
    for (int i = 0; i < 4; i++)
      if (bits < 4 && 4 * more + i < 1 << bits) word |= (pack(centroids[4 * more + i], 0.f) >> (8 * high) & 255) << (8 * i);
    sts(places + 256 + threadIdx.x * 4, word);
  }
  for (int i = threadIdx.x; i < BS * 64; i += 32 * WARPS) {
    // Four words of a lane are one operand: rows q and q + 8 of pair 2 s, then of pair 2 s + 1.
    int upper = i & 1, k = (i >> 1 & 1) | (i >> 7 & 1) << 1, j = (i >> 4 & 7) * 8 + (i >> 8 & 3) * 2 + upper;
    int c = pair_channel(i >> 10, i >> 2 & 3, k);
    sts(angles + i * 4, pack(a.offset_cos[j * 64 + c], a.offset_sin[j * 64 + c]));
  }
  if (threadIdx.x < 64) {
    int n, pr, k;
    place_of(threadIdx.x, n, pr, k);
    sts(places + threadIdx.x * 4, (n * 4096 + (k >> 1) * 512 + pr * 16 + (k & 1) * 8) | (n * 64 + pr * 8 + k * 2) << 16);
  }
  for (int i = lane * 4; i < W_BYTES; i += 128) sts(mine + i, 0);
  __syncthreads();

#define K_TABLE (KB == 4 ? TABLE_AT + lane * 4 : places + 256)
#define V_TABLE (VB == 4 ? TABLE_AT + 128 + lane * 4 : places + 288)
  const float k_first = half_low(pack(a.key_centroids[0], 0.f));
  const float v_first = half_low(pack(a.value_centroids[0], 0.f));
  const int H = a.H;

  auto following = [&]() {
    int one = 0;
    if (lane == 0) one = atomicAdd(a.taken, 1);
    return (int)(__shfl_sync(FULL, one, 0) + gridDim.x * WARPS);
  };
  for (int worker = warp * gridDim.x + blockIdx.x; worker < a.programs * H; worker = following()) {
    const int program = worker / H, h = (worker + program) % H;  // heads differ in outliers: each multiprocessor gets of all
    const int b = a.shares[program * 4], begin = a.shares[program * 4 + 1], end = a.shares[program * 4 + 2];
    if (begin >= end) continue;
    const int bh = b * H + h, length = a.kv_lengths[b];
    int first_visible = a.sink_tokens;
    if (HAS_WINDOW) first_visible = max(first_visible, length - a.window);
    const float score_unit = a.unit[bh * 2], inverse_size = a.unit[bh * 2 + 1];
    const int value_group = h * a.VG / H;

    __syncwarp();
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const uint2* f = (const uint2*)(a.affine + ((bh * 4 + n) * 4 + r) * 16);
      const u16* x_words = a.q_words + (((bh * 4 + n) * 2 + 0) * GP + q) * 16 + r * 4;
      const uint2 qx = *(const uint2*)x_words, qy = *(const uint2*)(x_words + GP * 16);
      const u32 to = mine + W_QUERY + ((n * GN + q) * 4 + r) * 16;
      if (q < GN) { sts2(to, __byte_perm(qx.x, qy.x, 0x5410), __byte_perm(qx.x, qy.x, 0x7632)); sts2(to + 8, __byte_perm(qx.y, qy.y, 0x5410), __byte_perm(qx.y, qy.y, 0x7632)); }
      if (q < 2) {
        const uint2 x = f[q], y = f[2 + q];
        const u32 at = mine + (q ? W_ZERO : W_SCALE) + (n * 4 + r) * 16;
        sts2(at, __byte_perm(x.x, y.x, 0x5410), __byte_perm(x.x, y.x, 0x7632));
        sts2(at + 8, __byte_perm(x.y, y.y, 0x5410), __byte_perm(x.y, y.y, 0x7632));
      }
    }

    float acc[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;
    const float unit = HAS_SOFTCAP ? 1.f : score_unit;
    float best[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f}, zeros[2] = {0.f, 0.f}, size = 0.f;
    Heap heap = {0.f, 1.f, 0};

    int ids = 0, counts = 0, heads = 0;  // of the column that is lane's of 32
    u32 ends = 0;  // first entry of values, the one behind the last << 15, and whether the block is closed
    auto describe = [&](int column) {
      bool there = column + lane < end;
      const int* table_row = a.block_table + (long long)((bh - h) / H) * a.table_stride;
      ids = there ? table_row[column + lane] : 0;
      long long at = (long long)ids * H + h;
      counts = there ? a.key_count[at] : 0;
      heads = there ? a.spill_head[at] : 0;
      ends = 0;
      if (there && a.value_end[(long long)ids * H + H - 1] > 0)
        ends = 0x80000000u | (u32)a.value_end[at] << 15 | (h > 0 ? (u32)a.value_end[at - 1] : 0u);
    };

#if KB == 4
    uint4 kc[8];
#endif
    auto ask_keys = [&](int column, int id, int count, int head) {
      const u64 block = (u64)(u32)id * a.key_stride + (u32)(h * (BS * K_ROW));
#if KB == 4
      const unsigned char* row = a.key_codes + (block + (u32)(q * 8 * K_ROW + r * 16));
#pragma unroll
      for (int i = 0; i < 8; i++) kc[i] = stream4(row + i * K_ROW);
#else
      const unsigned char* row = a.key_codes + (block + (u32)((lane >> 1) * K_ROW + (lane & 1) * 16));
#pragma unroll
      for (int i = 0; i < 4; i++)
        copy16(mine + W_KEY_CODES + ((lane ^ ((lane >> 4 | (i & 1) << 1) << 1)) + 32 * i) * 16, row + i * 16 * K_ROW);
#if KB == 3
#pragma unroll
      for (int i = 0; i < 2; i++)
        copy16(mine + W_KEY_CODES + BS * 32 + ((lane ^ (lane >> 3 | 4 * i)) + 32 * i) * 16, a.key_codes + (block + (u32)((lane + 32 * i) * K_ROW + 32)));
#endif
#endif
      if (lane < 16) copy16(mine + W_BASES + lane * 16, a.bases + (u32)(column * 128 + lane * 8));
      int own = min(count, K_BASE);
      const u64 entry = (u64)(u32)id * a.entry_stride + (u32)(h * K_BASE + 2 * lane);
      const u16 *own_index = a.key_index + entry, *own_value = a.key_value + entry;
#pragma unroll
      for (int i = 0; i < (K_BASE / 2 + 31) / 32; i++) {
        int pair = lane + 32 * i;
        if (2 * pair < own) {
          copy4(mine + W_KEYS + pair * 4, own_index + 64 * i);
          copy4(mine + W_KEYS + 2 * K_PLACES + pair * 4, own_value + 64 * i);
        }
      }
      if (lane < 16 && count > K_BASE + 2 * lane) {
        const u64 chunk = (u64)(u32)head * 32 + 2 * lane;
        copy4(mine + W_KEYS + (K_BASE + 2 * lane) * 2, a.spill_index + chunk);
        copy4(mine + W_KEYS + 2 * K_PLACES + (K_BASE + 2 * lane) * 2, a.spill_value + chunk);
      }
      copies_end();
    };
    auto ask_values = [&](int id, u32 ends) {
      const int first_entry = ends & 0x7fff, last_entry = (ends & 0x7fffffff) >> 15;
      const unsigned char* rows = a.value_codes + ((u64)(u32)id * a.value_stride + (u32)(h * V_BYTES + lane * 16));
#pragma unroll
      for (int i = 0; i < V_BYTES / 512; i++) {
        int chunk = lane + 32 * i;
#if VB == 4
        u32 to = (lane >> 3) * 128 + ((((lane & 4) | (lane & 3)) ^ ((i >> 1) << 1)) << 4) + i * 512;
#else
        u32 to = chunk * 16;
#endif
        copy16(mine + W_CODES + to, rows + i * 512);
      }
      if (a.VG == 1) {
        if (lane < 16) copy16(mine + W_RANGES + lane * 16, (lane < 8 ? a.value_scale : a.value_zero) + ((u64)(u32)id * BS + (u32)((lane & 7) * 8)));
      } else {
        long long ranges = (long long)id * BS * a.VG;
        for (int i = lane; i < BS; i += 32) {
          u16 s = a.value_scale[ranges + i * a.VG + value_group], z = a.value_zero[ranges + i * a.VG + value_group];
          asm volatile("st.shared.b16 [%0],%1;" :: "r"(mine + W_RANGES + i * 2), "h"(s) : "memory");
          asm volatile("st.shared.b16 [%0],%1;" :: "r"(mine + W_RANGES + 128 + i * 2), "h"(z) : "memory");
        }
      }
      if (V_ENTRIES > 0) {
        u64 from = (u64)(u32)id * (BS * V_ENTRIES) + (first_entry & ~1) + 2 * lane;
        const u16 *index = a.value_index + from, *value = a.value_value + from;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int e = (first_entry & ~1) + 2 * lane + 64 * i;
          if (e < last_entry) {
            copy4(mine + W_VALUES + lane * 4 + 128 * i, index + 64 * i);
            copy4(mine + W_VALUES + 256 + lane * 4 + 128 * i, value + 64 * i);
          }
        }
      }
      copies_end();
    };
#define OF(x, column) __shfl_sync(FULL, x, ((column) - begin) & 31)

    describe(begin);
    int id = OF(ids, begin), count = OF(counts, begin), head = OF(heads, begin);
    u32 range = OF(ends, begin);
    __syncwarp();
    ask_keys(begin, id, count, head);
    ask_values(id, range);

    for (int column = begin; column < end; column++) {
      const int first_slot = first_visible - column * BS, end_slot = length - column * BS;
      wait_for_older();  // this block's keys

      // -- outliers of keys: scores in fixed point ------------------------------------------------------------
      const float fixed_unit = score_unit * SCORE_FRACTION;
      if (K_BASE > 0) {
        const int near = min(count, K_BASE + 32);
        u32 index[3]; float value[3]; bool live[3];
#pragma unroll
        for (int i = 0; i < 3; i++) {
          index[i] = lds16(mine + W_KEYS + (lane + 32 * i) * 2);
          value[i] = kept(lds16(mine + W_KEYS + 2 * K_PLACES + (lane + 32 * i) * 2));
          live[i] = lane + 32 * i < near;
        }
        add_keys<3>(k_first, index, value, live, inverse_size, fixed_unit, places, angles, mine);
        for (int e = 96 + lane; e - lane < near; e += 32) {
          index[0] = lds16(mine + W_KEYS + e * 2);
          value[0] = kept(lds16(mine + W_KEYS + 2 * K_PLACES + e * 2));
          live[0] = e < near;
          add_keys<1>(k_first, index, value, live, inverse_size, fixed_unit, places, angles, mine);
        }
        for (int left = count - K_BASE - 32, chunk = head; left > 0; left -= 32) {
          chunk = a.spill_next[chunk];
          index[0] = a.spill_index[(long long)chunk * 32 + lane];
          value[0] = kept(a.spill_value[(long long)chunk * 32 + lane]);
          live[0] = lane < left;
          add_keys<1>(k_first, index, value, live, inverse_size, fixed_unit, places, angles, mine);
        }
      }

      // -- scores: row 16 m + q (+ 8) is that token, columns 2r and 2r + 1 are heads -----------------------------
      float s[4][4];
#pragma unroll
      for (int m = 0; m < 4; m++) s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0.f;
#if KB < 4
      u32 kc[8], kt[8];
#endif
      const Table<KB> k_table(K_TABLE, lane);
#pragma unroll
      for (int n = 0; n < 4; n++) {
#if KB < 4
        if (n % 2 == 0)
#pragma unroll
          for (int i = 0; i < 8; i++) {
            kc[i] = lds(mine + W_KEY_CODES + q * 256 + (r >> 1) * 16 + (r & 1) * 8 + n * 2 + ((i * 32) ^ ((q & 3) << 5)));
            if (KB == 3) kt[i] = lds(mine + W_KEY_CODES + BS * 32 + q * 128 + ((i ^ q) << 4) + (r & 1) * 8 + n * 2) >> (r >> 1);
          }
#endif
        u32 cosine[2], sine[2], S1[4], S2[4], S3[4];
        u32 Q[4], scale[4], zero[4];
        lds4(Q, mine + W_QUERY + ((n * GN + (q & (GN - 1))) * 4 + r) * 16);
        lds4(scale, mine + W_SCALE + (n * 4 + r) * 16);
        lds4(zero, mine + W_ZERO + (n * 4 + r) * 16);
        lds2(cosine[0], cosine[1], mine + W_BASES + n * 64 + r * 8);
        lds2(sine[0], sine[1], mine + W_BASES + n * 64 + 32 + r * 8);
#pragma unroll
        for (int k = 0; k < 4; k++) {
          u32 cb = k & 1 ? high2(cosine[k >> 1]) : low2(cosine[k >> 1]);
          u32 sb = k & 1 ? high2(sine[k >> 1]) : low2(sine[k >> 1]);
          // Turned back, (x, y), and a quarter further, (y, -x).
          u32 x = hfma(__byte_perm(Q[k], 0, 0x1032) ^ 0x80000000u, sb, hmul(Q[k], cb)), y = __byte_perm(x, 0, 0x1032) ^ 0x80000000u;
          S1[k] = hmul(x, scale[k]);
          S2[k] = hmul(y, scale[k]);
          S3[k] = hfma(y, high2(zero[k]), hmul(x, low2(zero[k])));
        }
        u32 c[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
#if KB == 4
          c[i] = (&kc[i].x)[n];
#else
          c[i] = (kc[i] >> (2 * (n & 1))) & 0x33333333u;
#if KB == 3
          c[i] |= (n & 1 ? kt[i] : kt[i] << 2) & 0x44444444u;
#endif
#endif
        }
#define STEP(HALF) \
        _Pragma("unroll") for (int p = 0; p < 4; p += MTILES) { \
          u32 t[MTILES][4], l[MTILES][4];  /* rows q and q + 8 of a pair, then of the one behind it */ \
          _Pragma("unroll") for (int m = 0; m < MTILES; m++) lds4_const(t[m], angles + (((n * 4 + p + m) * 2 + HALF) * 32 + lane) * 16); \
          _Pragma("unroll") for (int m = 0; m < MTILES; m++) { \
            pairs_of<HALF>(k_table, c[2 * (p + m)], l[m][0], l[m][2]); \
            pairs_of<HALF>(k_table, c[2 * (p + m) + 1], l[m][1], l[m][3]); } \
          _Pragma("unroll") for (int m = 0; m < MTILES; m++) mma(s[p + m], t[m][0], t[m][1], t[m][2], t[m][3], S3[2 * HALF], S3[2 * HALF + 1]); \
          _Pragma("unroll") for (int m = 0; m < MTILES; m++) mma(s[p + m], hmul(l[m][0], low2(t[m][0])), hmul(l[m][1], low2(t[m][1])), hmul(l[m][2], low2(t[m][2])), hmul(l[m][3], low2(t[m][3])), S1[2 * HALF], S1[2 * HALF + 1]); \
          _Pragma("unroll") for (int m = 0; m < MTILES; m++) mma(s[p + m], hmul(l[m][0], high2(t[m][0])), hmul(l[m][1], high2(t[m][1])), hmul(l[m][2], high2(t[m][2])), hmul(l[m][3], high2(t[m][3])), S2[2 * HALF], S2[2 * HALF + 1]); }
        STEP(0) STEP(1)
      }

      // -- the coming block's keys are asked for ------------------------------------------------------------------
      const int after = column + 1 < end ? column + 1 : column;
      if (((after - begin) & 31) == 0 && after > column) describe(after);
      const int next_id = OF(ids, after), next_count = OF(counts, after), next_head = OF(heads, after);
      const u32 next_range = OF(ends, after);
      __syncwarp();
      ask_keys(after, next_id, next_count, next_head);

      // -- softmax ------------------------------------------------------------------------------------------------
      if (K_BASE > 0 && 2 * r < GN) {
        const float back = reciprocal(fixed_unit);
#pragma unroll
        for (int x = 0; x < 2; x++)
          if (x < GN)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              u32 word[4];
              lds4(word, mine + W_SCORES + ((2 * r + x) * SCORE_ROW + 8 * q + 4 * half) * 4);
#pragma unroll
              for (int i = 0; i < 4; i++) s[2 * half + (i >> 1)][2 * (i & 1) + x] += (float)(int)word[i] * back;
            }
      }
      if (HAS_SOFTCAP) {
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float x = s[m][e] * score_unit, decay = exp2_(fabsf(x / a.softcap) * (-2.f * 1.4426950408889634f));
            s[m][e] = copysignf(1.4426950408889634f * a.softcap * (1.f - decay) / (1.f + decay), x);
          }
      }
      const bool whole = first_slot <= 0 && end_slot >= BS;
      if (!whole) {
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            int row = 8 * q + 2 * m + (e >> 1);
            if (row < first_slot || row >= end_slot) s[m][e] = -INFINITY;
          }
      }
      float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int m = 0; m < 4; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) most[e & 1] = fmaxf(most[e & 1], s[m][e]);
#pragma unroll
      for (int x = 4; x < 32; x *= 2) {
        most[0] = fmaxf(most[0], __shfl_xor_sync(FULL, most[0], x));
        most[1] = fmaxf(most[1], __shfl_xor_sync(FULL, most[1], x));
      }
      wait_for_older();  // this block's values
      if (!whole) {  // what no token has written is not looked at
        for (int t = lane; t < BS; t += 32)
          if (t < first_slot || t >= end_slot) {
            asm volatile("st.shared.b16 [%0],%1;" :: "r"(mine + W_RANGES + t * 2), "h"((u16)0) : "memory");
            asm volatile("st.shared.b16 [%0],%1;" :: "r"(mine + W_RANGES + 128 + t * 2), "h"((u16)0) : "memory");
          }
        __syncwarp();
      }
      float scale[8], zero[8], largest = 0.f;
      {
        u32 x[4], y[4];
        lds4(x, mine + W_RANGES + q * 16);
        lds4(y, mine + W_RANGES + 128 + q * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          scale[2 * i] = kept((u16)x[i]); scale[2 * i + 1] = kept((u16)(x[i] >> 16));
          zero[2 * i] = kept((u16)y[i]); zero[2 * i + 1] = kept((u16)(y[i] >> 16));
          largest = fmaxf(largest, fmaxf(scale[2 * i], scale[2 * i + 1]));
        }
      }
      largest = as_float(largest_word(as_word(largest)));
      // Outliers of values are differences to what code 0 decodes to; the largest says what unit fixed point has.
      const u64 entries = (u64)(u32)id * (BS * V_ENTRIES);
      const bool is_closed = range >> 31;
      const int first_entry = range & 0x7fff, last_entry = (range & 0x7fffffff) >> 15;
      const int from = is_closed ? (first_entry & ~1) : 0;
      const int to = is_closed ? last_entry : min(end_slot, BS) * V_ENTRIES;
      const int rest = is_closed ? from + 128 : 0;
      float near[4], most_delta = 0.f;
      auto further = [&](int e, u32& t, u32& d) {
        u32 word = a.value_index[entries + e];
        t = is_closed ? (word >> 7) & 63 : e / (V_ENTRIES > 0 ? V_ENTRIES : 1);
        d = is_closed ? word & 127 : word - h * D;
        if (d >= D) return 0.f;
        return value_delta(mine, kept(a.value_value[entries + e]), t, v_first);
      };
      if (V_ENTRIES > 0) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int e = lane + 32 * i;
          near[i] = value_delta(mine, kept(lds16(mine + W_VALUES + 256 + e * 2)), lds16(mine + W_VALUES + e * 2) >> 7 & 63, v_first);
          if (is_closed && from + e >= first_entry && from + e < to) most_delta = fmaxf(most_delta, fabsf(near[i]));
        }
        for (int e = rest + lane; e < to; e += 32) { u32 t, d; most_delta = fmaxf(most_delta, fabsf(further(e, t, d))); }
      }
      const bool grew = (2 * r < GN && ((most[0] - best[0]) * unit > SLACK || (most[1] - best[1]) * unit > SLACK)) || largest > size;
      if (__any_sync(FULL, grew || (V_ENTRIES > 0 && most_delta > heap.most)) || heap.blocks >= 16) {
        if (heap.blocks > 0) flush(acc, mine, reciprocal(heap.factor * size), lane);
        heap.blocks = 0;
        if (V_ENTRIES > 0) {
          most_delta = fmaxf(as_float(largest_word(as_word(most_delta))), 1e-30f);
          heap.most = as_float((as_word(most_delta) & 0x7f800000u) + 0x01000000u);  // the largest is below half of it
          heap.factor = 64.f * reciprocal(heap.most);  // weights are up to 2^14: 2^19 and below, 16 blocks of 64 tokens fit
        }
        float new_size = largest > size ? 2.f * largest : size;
        new_size = new_size > 0.f ? new_size : 1.f;
        const float keep = size * reciprocal(new_size);
#pragma unroll
        for (int x = 0; x < 2; x++) {
          float now = fmaxf(best[x], most[x]);
          float fade = exp2_((best[x] - (now == -INFINITY ? 0.f : now)) * unit);
          best[x] = now;
          total[x] *= fade;
          zeros[x] *= fade;
#pragma unroll
          for (int i = 0; i < 8; i++) { acc[i][x] *= fade * keep; acc[i][x + 2] *= fade * keep; }
        }
        size = new_size;
      }
      heap.blocks++;
      const float inverse = reciprocal(size);
      const float shift0 = 10.f - (best[0] == -INFINITY ? 0.f : best[0]) * unit, shift1 = 10.f - (best[1] == -INFINITY ? 0.f : best[1]) * unit;
#pragma unroll
      for (int m = 0; m < 4; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float p = exp2_(s[m][e] * unit + (e & 1 ? shift1 : shift0));
          s[m][e] = p;
          total[e & 1] += p;
          zeros[e & 1] += p * zero[2 * m + (e >> 1)];
        }
      if (V_ENTRIES > 0 && 2 * r < GN)
#pragma unroll
        for (int x = 0; x < 2; x++)
          if (x < GN)
#pragma unroll
            for (int half = 0; half < 2; half++)
              asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" :: "r"(mine + W_WEIGHTS + ((2 * r + x) * SCORE_ROW + 8 * q + 4 * half) * 4),
                           "r"(as_word(s[2 * half][x])), "r"(as_word(s[2 * half][2 + x])), "r"(as_word(s[2 * half + 1][x])), "r"(as_word(s[2 * half + 1][2 + x])) : "memory");
      u32 weights[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float f = scale[i] * inverse;
        weights[i] = transposed(pack(s[i >> 1][2 * (i & 1)] * f, s[i >> 1][2 * (i & 1) + 1] * f));
      }

      // -- values: row q (+ 8) of tile i is a channel, two tokens a word ---------------------------------------------
      const Table<VB> v_table(V_TABLE, lane);
#if VB == 4
      const u32 even = mine + W_CODES + r * 1024 + (((q >> 1) ^ (r << 1)) << 4) + (q & 1) * 8, odd = mine + W_CODES + r * 1024 + (((4 | (q >> 1)) ^ (r << 1)) << 4) + (q & 1) * 8;
#endif
#pragma unroll
      for (int m = 0; m < 4; m++) {
        u32 x[2][4], y[2][4];  // [token pair][unit]: selectors of the lower and upper channels
#pragma unroll
        for (int p = 0; p < 2; p++) {
#if VB == 4
          u32 a0, a1, b0, b1;
          lds2(a0, a1, (p ? odd : even) + m * 128);
          lds2(b0, b1, (p ? odd : even) + m * 128 + 512);
          x[p][0] = MIX_LOW(a0, b0); y[p][0] = MIX_HIGH(a0, b0);
          x[p][1] = MIX_LOW(a1, b1); y[p][1] = MIX_HIGH(a1, b1);
#else
          u32 at = mine + W_CODES + (16 * r + 2 * m + p) * V_ROW;
          u32 u = lds(at + q * 4), v = lds(at + 8 * V_ROW + q * 4);
          u32 lo = MIX_LOW(u, v), hi = MIX_HIGH(u, v);
          x[p][0] = lo & 0x33333333u; x[p][1] = (lo >> 2) & 0x33333333u;
          y[p][0] = hi & 0x33333333u; y[p][1] = (hi >> 2) & 0x33333333u;
#if VB == 3
          u = lds(at + 32 + (q & 3) * 4) >> (q >> 2); v = lds(at + 8 * V_ROW + 32 + (q & 3) * 4) >> (q >> 2);
          lo = MIX_LOW(u, v); hi = MIX_HIGH(u, v);
          x[p][0] |= (lo << 2) & 0x44444444u; x[p][1] |= lo & 0x44444444u;
          y[p][0] |= (hi << 2) & 0x44444444u; y[p][1] |= hi & 0x44444444u;
#endif
#endif
        }
#pragma unroll
        for (int u = 0; u < 2; u++) {
#define TILES(HALF) { \
          u32 a0, a1, a2, a3, b0, b1, b2, b3; \
          pairs_of<HALF>(v_table, x[0][u], a0, b0); pairs_of<HALF>(v_table, y[0][u], a1, b1); \
          pairs_of<HALF>(v_table, x[1][u], a2, b2); pairs_of<HALF>(v_table, y[1][u], a3, b3); \
          mma(acc[u * 4 + 2 * HALF], a0, a1, a2, a3, weights[2 * m], weights[2 * m + 1]); \
          mma(acc[u * 4 + 2 * HALF + 1], b0, b1, b2, b3, weights[2 * m], weights[2 * m + 1]); }
          TILES(0) TILES(1)
        }
      }

      // -- outliers of values: sums in fixed point ----------------------------------------------------------------
      if (V_ENTRIES > 0) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int e = lane + 32 * i;
          if (i == 3 && from + 96 >= to) break;
          u32 number = lds16(mine + W_VALUES + e * 2);
          add_value(mine, number >> 7 & 63, number & 127, near[i] * heap.factor, is_closed && from + e >= first_entry && from + e < to);
        }
        for (int e = rest + lane; e < to; e += 32) {
          u32 t, d;
          float delta = further(e, t, d);
          if (delta != 0.f) add_value(mine, t, d, delta * heap.factor, true);
        }
      }
      __syncwarp();
      for (int i = lane * 16; i < GN * SCORE_ROW * 4; i += 512)
        asm volatile("st.shared.v4.b32 [%0],{%1,%1,%1,%1};" :: "r"(mine + W_SCORES + i), "r"(0) : "memory");
      __syncwarp();
      ask_values(next_id, next_range);
      id = next_id; count = next_count; head = next_head; range = next_range;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (V_ENTRIES > 0) flush(acc, mine, reciprocal(heap.factor * size), lane);
#pragma unroll
    for (int x = 4; x < 32; x *= 2)
#pragma unroll
      for (int y = 0; y < 2; y++) {
        total[y] += __shfl_xor_sync(FULL, total[y], x);
        zeros[y] += __shfl_xor_sync(FULL, zeros[y], x);
      }
#pragma unroll
    for (int y = 0; y < 2; y++) {
      int g = 2 * r + y;
      long long at = ((long long)program * H + h) * GP + g;
      if (g < G) {
        if (q == 0) { a.part_best[at] = best[y] * unit; a.part_total[at] = total[y] * 0x1p-10f; }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          a.part_out[at * D + out_channel(i, q, 0)] = (acc[i][y] * size + zeros[y]) * 0x1p-10f;
          a.part_out[at * D + out_channel(i, q, 1)] = (acc[i][y + 2] * size + zeros[y]) * 0x1p-10f;
        }
      }
    }
    __syncwarp();
  }
}
