// From codes to pairs of centroids, and the tables for it.
#pragma once
#include "layout.cuh"

// Two centroids for each byte of a selector, whose nibbles are codes. All 256 pairs of sixteen centroids are a table in
// shared memory: rows 256 bytes apart, 32 columns for keys and 32 for values, so that no two lanes meet in a bank, and
// an address takes one instruction. Up to eight centroids fit four registers, their low bytes and their high bytes.
template <int BITS> struct Table {
  u32 column;
  INLINE Table(const Shared& s, int lane, int side) : column(TABLE_AT + 128 * side + lane * 4) {}
};
struct Bytes {
  u32 x[4];
  // Two copies of each: what the compiler knew to be the same for all lanes it would keep where PRMT cannot read it.
  INLINE Bytes(const Shared& s, int lane, int side) { load4(x, s.lists + 512 + 32 * side + (lane & 1) * 16); }
};
template <> struct Table<3> : Bytes { using Bytes::Bytes; };
template <> struct Table<2> : Bytes { using Bytes::Bytes; };

// The pairs of the lower (HALF 0) or the upper two bytes.
template <int HALF> INLINE void pairs_of(const Table<4>& table, u32 selector, u32& a, u32& b) {
  a = look(__byte_perm(table.column, selector, 0x3240 + HALF * 0x20));
  b = look(__byte_perm(table.column, selector, 0x3250 + HALF * 0x20));
}
template <int HALF> INLINE void pairs_of(const Bytes& table, u32 selector, u32& a, u32& b) {
  if (HALF) selector >>= 16;
  const u32 low = permuted(table.x[0], table.x[1], selector), high = permuted(table.x[2], table.x[3], selector);
  a = permuted(low, high, 0x5140);
  b = permuted(low, high, 0x7362);
}

// Nibbles of two tokens' words: the lower ones of each byte, or the upper ones.
INLINE u32 lower_nibbles(u32 u, u32 v) { return (u & 0x0F0F0F0Fu) | (v << 4 & 0xF0F0F0F0u); }
INLINE u32 upper_nibbles(u32 u, u32 v) { return (u >> 4 & 0x0F0F0F0Fu) | (v & 0xF0F0F0F0u); }

// What all warps share, by all of them: tables, angles in the order of the tensor core's operands, and for outliers where
// a channel's and a token's part of them lie.
INLINE void fill_tables(const Shared& s, const float* key_centroids, const float* value_centroids, const float* cosine,
                        const float* sine) {
  const int threads = 32 * WARPS;
  for (int i = threadIdx.x; i < TABLE_BYTES / 4; i += threads) {
    const bool values = i & 32;
    const float* centroids = values ? value_centroids : key_centroids;
    const int count = 1 << (values ? VB : KB), low = i >> 6 & 15, high = i >> 10;
    store(TABLE_AT + i * 4, low < count && high < count ? half_pair(centroids[low], centroids[high]) : 0);
  }
  if (threadIdx.x < 16) {
    const bool values = threadIdx.x & 8, upper = threadIdx.x & 2;
    const float* centroids = values ? value_centroids : key_centroids;
    const int bits = values ? VB : KB, first = threadIdx.x & 1 ? 4 : 0;
    u32 word = 0;
    for (int i = 0; i < 4; i++)
      if (bits < 4 && first + i < 1 << bits) word |= (half_pair(centroids[first + i], 0.f) >> (8 * upper) & 255) << (8 * i);
    store(s.lists + 512 + threadIdx.x * 4, word);
  }
  for (int i = threadIdx.x; i < BS * 64; i += threads) {
    // Four words of a lane are one operand: both rows of one pair of channels, then of the next.
    const int k = (i >> 1 & 1) | (i >> 7 & 1) << 1, token = (i >> 4 & 7) * 8 + (i >> 8 & 3) * 2 + (i & 1);
    const int at = token * 64 + channel_of(i >> 10, i >> 2 & 3, k);
    store(s.angles + i * 4, half_pair(cosine[at], sine[at]));
  }
  if (threadIdx.x < 64) {
    int n, r, k;
    place_of(threadIdx.x, n, r, k);
    store(s.lists + threadIdx.x * 4, (n * 4096 + (k >> 1) * 512 + r * 16 + (k & 1) * 8) | (n * 64 + r * 16 + k * 4) << 16);
    const int t = threadIdx.x;
    store(s.lists + 256 + t * 4, (t >> 1 & 3) * 1024 + (t >> 3) * 64 + (t & 1) * 4);
  }
}
