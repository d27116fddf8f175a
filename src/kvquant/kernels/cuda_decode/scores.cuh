// Scores of a block's tokens, but for outliers.
//
// Keys are neither scaled nor rotated. With pair (x, y) of channels scaled by (s, t) and shifted by (u, v), the angle j of
// the token from the block's middle and the query turned back to that (p, q), a score is the sum over pairs of
//   x cos j * s p + y cos j * t q  +  x sin j * s q - y sin j * t p  +  cos j * (u p + v q) + sin j * (u q - v p)
// which are three products for the tensor core: codes' centroids times cosines, times sines, and the angles themselves,
// with queries that carry what does not depend on the token. Two multiplications of two numbers each are all that a pair
// of keys costs beside its look-up. Where half of the pairs turn slowly (prepare.py) theirs cost none, or one of
// eight heads, and no angles.
#pragma once
#include "key_outliers.cuh"

// What two pairs of each lane of a unit are multiplied with: the query, turned back to the block's middle.
struct Turned {
  u32 cosine[2], sine[2], shift[2];
  // ``query_at``: where that of the lane's column is (QueryAt). ``for_place``: the cosine shall be the sine, see be_slow.
  INLINE Turned(const Work& w, int n, int half, u32 query_at, bool for_place = false) {
    u32 query[2], scale[2], zero[2];
    const u32 at = (n * 4 + w.r) * 16 + half * 8;
    load2(query, query_at + half * 8);
    load2(scale, w.s.mine + W_SCALE + at);
    load2(zero, w.s.mine + W_ZERO + at);
#if BF16
    u32 base[2];
    load2(base, w.s.mine + W_BASES + at);
#else  // rounded once: what is lost of a query moves the scores of all tokens alike, and fp16 loses no more itself
    u32 cb[2], sb[2];
    load2(cb, w.s.mine + W_BASES + channel_of(n, w.r, 2 * half) * 4);
    load2(sb, w.s.mine + W_BASES + channel_of(n, w.r, 2 * half) * 4 + 256);
#endif
#pragma unroll
    for (int k = 0; k < 2; k++) {
#if BF16
      const u32 back = half_mul(query[k], low_twice(base[k]));
      const u32 p = half_fma(quarter_turn(query[k]), high_twice(base[k]), back), q = quarter_turn(p);
      cosine[k] = half_mul(for_place ? q : p, scale[k]);
      sine[k] = half_mul(q, scale[k]);
      shift[k] = half_fma(q, high_twice(zero[k]), half_mul(p, low_twice(zero[k])));
#else
      const float x = low_of(query[k]), y = high_of(query[k]), c = as_float(cb[k]), s = as_float(sb[k]);
      const float p = x * c + y * s, q = y * c - x * s;
      cosine[k] = half_pair(p * low_of(scale[k]), q * high_of(scale[k]));
      sine[k] = half_pair(q * low_of(scale[k]), -p * high_of(scale[k]));
      shift[k] = half_pair(low_of(zero[k]) * p + high_of(zero[k]) * q, low_of(zero[k]) * q - high_of(zero[k]) * p);
#endif
    }
  }
  // The scores of a tile's tokens: ``x`` are rows q and q + 8 of one pair, then of the next.
  INLINE void add(float* s, const Work& w, const u32* x, int n, int half, int m) const {
    u32 t[4];
    look4(t, ANGLES_AT + (((n * 4 + m) * 2 + half) * 32 + w.lane) * 16);
    multiply_add(s, t[0], t[1], t[2], t[3], shift[0], shift[1]);
    multiply_add(s, half_mul(x[0], low_twice(t[0])), half_mul(x[1], low_twice(t[1])), half_mul(x[2], low_twice(t[2])),
                 half_mul(x[3], low_twice(t[3])), cosine[0], cosine[1]);
    multiply_add(s, half_mul(x[0], high_twice(t[0])), half_mul(x[1], high_twice(t[1])), half_mul(x[2], high_twice(t[2])),
                 half_mul(x[3], high_twice(t[3])), sine[0], sine[1]);
  }
  // Where pairs turn slowly, a cosine is 1 and a sine the token's place times a slope. A place belongs to a row, so that it
  // need not meet the codes: of a head's two columns the first sums what no place is in, the other what is multiplied with
  // it afterwards (for_place). Eight heads fill the columns, and codes are multiplied. Shifts of all units are added up.
  INLINE void be_slow(const Work& w, int n, int half, u32* shifts) {
    u32 slope[2];  // (1, slope)
    load2(slope, LISTS_AT + 512 + ((n >> 1) * 4 + w.r) * 16 + half * 8);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (EACH == 1)
        cosine[k] = half_mul(cosine[k], __byte_perm(slope[k], 0, w.q & 1 ? 0x3232 : 0x1010));
      else
        sine[k] = half_mul(sine[k], high_twice(slope[k]));
      shifts[k] = half_fma(shift[k], slope[k], shifts[k]);
    }
  }
  INLINE void add_slow(float* s, const u32* x, u32 places) const {
    multiply_add(s, x[0], x[1], x[2], x[3], cosine[0], cosine[1]);
    if (EACH == 2)
      multiply_add(s, half_mul(x[0], low_twice(places)), half_mul(x[1], high_twice(places)),
                   half_mul(x[2], low_twice(places)), half_mul(x[3], high_twice(places)), sine[0], sine[1]);
  }
};

// Places of a tile's tokens in the block, from -1 to 1, by those of tile 0: sixteenths further, eighths or fourths.
INLINE u32 places_of(u32 first, int m) {
  const u32 one = PAIRS_APART ? 0x34003400u : EVERY_SECOND ? 0x30003000u : 0x2C002C00u;
  return m ? half_add(first, one + (m / 2) * 0x04000400u + (m / 3) * 0x02000200u) : first;
}

// Where the query of a lane's column is; for every second column nothing is, but of slow pairs (be_slow).
struct QueryAt {
  u32 own, nothing;
  bool odd;
  INLINE QueryAt(const Work& w, int n) {
    const u32 rows = w.s.mine + W_QUERY;
    own = rows + (EACH == 1 ? w.q >> 1 & (GN - 1) : w.q & (GN - 1)) * QUERY_ROW + (n * 4 + w.r) * 16;
    nothing = rows + 256 + 8;  // not in the banks of what others load
    odd = EACH == 1 && w.q & 1;
  }
  // Of unit j of two.
  INLINE u32 of(int j, bool slow) const { return odd && !slow ? nothing : own + 64 * j; }
};

// Units n and n + 1: their part of the scores of all tokens. ``places`` are of tile 0.
template <bool SLOW>
INLINE void add_scores(float (*s)[4], const Work& w, const Table<KB>& table, const KeyCodes& codes, int n, u32 places,
                       u32* shifts) {
  const QueryAt at(w, n);
#if KB == 2
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    const Turned first(w, n, half, at.of(0, false));
    Turned second(w, n + 1, half, at.of(1, SLOW), SLOW && EACH == 1 && w.q & 1);
    if (SLOW) second.be_slow(w, n + 1, half, shifts);
#pragma unroll
    for (int m = 0; m < 4; m++) {
      u32 x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; i++) table.look_up(codes.selector(2 * m + (i & 1), 0), 2 * half + (i >> 1), x[i], y[i]);
      first.add(s[m], w, x, n, half, m);
      if (SLOW)
        second.add_slow(s[m], y, places_of(places, m));
      else
        second.add(s[m], w, y, n + 1, half, m);
    }
  }
#else
#pragma unroll
  for (int j = 0; j < 2; j++) {
    u32 c[8];
#pragma unroll
    for (int i = 0; i < 8; i++) c[i] = codes.selector(i, j);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Turned turned(w, n + j, half, at.of(j, SLOW && j), SLOW && j && EACH == 1 && w.q & 1);
      if (SLOW && j) turned.be_slow(w, n + j, half, shifts);
#pragma unroll
      for (int m = 0; m < 4; m++) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 2; i++) table.look_up(c[2 * m + i], half, x[i], x[2 + i]);
        if (SLOW && j)
          turned.add_slow(s[m], x, places_of(places, m));
        else
          turned.add(s[m], w, x, n + j, half, m);
      }
    }
  }
#endif
}

// All units' part of the scores. Not unrolled: the loop over blocks shall fit what caches instructions.
template <bool SLOW>
INLINE void add_all_scores(float (*s)[4], const Work& w, const Table<KB>& table, KeyCodes& codes) {
  // Anew, or what is made of it stays in registers.
  const u32 places = SLOW && EACH == 2 ? load(LISTS_AT + 640 + w.q * 4) : 0;
  u32 shifts[2] = {0, 0};
#pragma unroll 1
  for (int n = 0; n < 4; n += 2) {
    add_scores<SLOW>(s, w, table, codes, n, places, shifts);
    if (n == 0) {
      stay_a_branch();
      codes.turn();
    }
  }
  if (SLOW) {
    const u32 column = w.q & 1 ? 0xFFFF0000u : 0x0000FFFFu;
#pragma unroll
    for (int m = 0; m < 4; m++)
      if (EACH == 1) {
        multiply_add(s[m], 0x3C003C00u, 0x3C003C00u, 0x3C003C00u, 0x3C003C00u, shifts[0] & column, shifts[1] & column);
      } else {  // (1, place) for each pair
        const u32 both = places_of(places, m);
        const u32 x = __byte_perm(both, 0x3C00, 0x1054), y = __byte_perm(both, 0x3C00, 0x3254);
        multiply_add(s[m], x, y, x, y, shifts[0], shifts[1]);
      }
  }
}
