// From codes to pairs of centroids, and the tables for it.
#pragma once
#include "layout.cuh"

// A table in shared memory has a row for each byte, 256 bytes apart: its first half is for keys, the other for values.
// Rows are as many copies as there are banks for, so that no two lanes meet in one, and an address takes one instruction:
// the byte is put between two bytes of where the column is.
template <int BITS> struct Table {
  u32 column;
  INLINE Table(int lane, int side) : column(TABLE_AT + 128 * side + lane * 4) {}
  // Bytes 2 half (+ 1) of a selector, whose nibbles are codes: two centroids each.
  INLINE void look_up(u32 selector, int half, u32& x, u32& y) const {
    x = look(__byte_perm(column, selector, 0x3240 + 0x20 * half));
    y = look(__byte_perm(column, selector, 0x3250 + 0x20 * half));
  }
};
// Byte k of a word of two-bit codes: centroids of its first and third field, and of its second and fourth. Half a warp
// loads eight bytes each at once.
template <> struct Table<2> {
  u32 column;
  INLINE Table(int lane, int side) : column(TABLE_AT + 128 * side + (lane & 15) * 8) {}
  INLINE void look_up(u32 word, int k, u32& x, u32& y) const {
    u32 two[2];
    look2(two, __byte_perm(column, word, 0x3240 + 0x10 * k));
    x = two[0];
    y = two[1];
  }
};

// Nibbles of two tokens' words: the lower ones of each byte, or the upper ones.
INLINE u32 lower_nibbles(u32 u, u32 v) { return (u & 0x0F0F0F0Fu) | (v << 4 & 0xF0F0F0F0u); }
INLINE u32 upper_nibbles(u32 u, u32 v) { return (u >> 4 & 0x0F0F0F0Fu) | (v & 0xF0F0F0F0u); }

// Codes of three bits. A word of third bits belongs to channels of two words of codes, every second bit to each; without the
// others in between, these bits and two lower ones meet in one instruction: the latter are those of 3 in each nibble.
INLINE u32 third_bits(u32 word, int which) { return word >> which & 0x55555555u; }
INLINE u32 three_bits(u32 low, u32 third) { return bits_of(low, third, 0x33333333u); }

// What all warps share, by all of them: what bytes of codes mean. Centroids are a layer's constants, which no kernel in front
// of this one writes, so that they need not be waited for.
INLINE void fill_table(const float* key_centroids, const float* value_centroids) {
#pragma unroll 1
  for (int i = threadIdx.x; i < TABLE_BYTES / 16; i += 32 * WARPS) {  // four columns of a row
    const bool values = i & 8;
    const float* centroids = values ? value_centroids : key_centroids;
    const int bits = values ? VB : KB, row = i >> 4;
    u32 x, y;
    if (bits == 2) {
      x = half_pair(centroids[row & 3], centroids[row >> 4 & 3]);
      y = half_pair(centroids[row >> 2 & 3], centroids[row >> 6]);
    } else {
      const int last = (1 << bits) - 1;
      x = y = half_pair(centroids[min(row & 15, last)], centroids[min(row >> 4, last)]);
    }
    store4(TABLE_AT + i * 16, x, y, x, y);
  }
}
// Places of tokens, the first centroid of values, and for outliers where a channel's and a token's part of the angles lie,
// and a token's number in a row of scores.
INLINE void fill_lists(const float* value_centroids) {
  if (threadIdx.x == 0) store(LEAST_AT, as_word(low_of(half_pair(value_centroids[0], 0.f))));
  if (threadIdx.x < 8) {  // places of two tokens in the block, from -1 to 1
    const int first = token_of(threadIdx.x, 0) - BS / 2, second = token_of(threadIdx.x, 1) - BS / 2;
    store(LISTS_AT + 640 + threadIdx.x * 4, half_pair(first * (2.f / BS), second * (2.f / BS)));
  }
  if (threadIdx.x < 64) {
    int n, r, k;
    place_of(threadIdx.x, n, r, k);
    store(LISTS_AT + threadIdx.x * 4, (n * 4096 + (k >> 1) * 512 + r * 16 + (k & 1) * 8) | (n * 64 + r * 16 + k * 4) << 16);
    const int q = threadIdx.x >> 3, i = threadIdx.x & 7;
    const u32 score = EVERY_SECOND ? (8 * q + i) * 4 << 16 : 0;
    store(LISTS_AT + 256 + token_of(q, i) * 4, ((i >> 1) * 1024 + q * 64 + (i & 1) * 4) | score);
  }
}
// Angles in the order of the tensor core's operands, which the kernel before has made.
INLINE void ask_angles(const unsigned char* angles, const int* slow) {
  for (int i = threadIdx.x; i < ANGLES / 16; i += 32 * WARPS) copy16(ANGLES_AT + i * 16, angles + i * 16);
  if (threadIdx.x < 8) copy16(LISTS_AT + 512 + threadIdx.x * 16, slow + threadIdx.x * 4);
}
