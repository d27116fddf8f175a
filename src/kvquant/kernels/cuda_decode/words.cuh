// Words of two fp16 numbers, shared memory by address, and the tensor core: one function for each instruction.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define INLINE __device__ __forceinline__
#define ALL_LANES 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)

INLINE float as_float(u32 x) { return __uint_as_float(x); }
INLINE u32 as_word(float x) { return __float_as_uint(x); }
// Keeps the compiler from working out beforehand, for all blocks, what follows from x: that would take a register, or worse.
INLINE int anew(int x) { asm volatile("" : "+r"(x)); return x; }

// Keeps the compiler from carrying out both sides of a condition: words would be selected one by one, whichever it is.
INLINE void stay_a_branch() { asm volatile("" ::: "memory"); }

// Bits of x where the mask has them, else of y: one instruction, where the compiler may make two of what it knows of y.
INLINE u32 bits_of(u32 x, u32 y, u32 mask) {
  u32 r; asm("lop3.b32 %0,%1,%2,%3,0xE4;" : "=r"(r) : "r"(x), "r"(y), "r"(mask)); return r;
}

// -- two fp16 numbers --------------------------------------------------------------------------------------------
INLINE u32 half_mul(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
INLINE u32 half_add(u32 a, u32 b) { u32 r; asm("add.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
INLINE u32 half_fma(u32 a, u32 b, u32 c) {
  u32 r; asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r;
}
// The lower or the upper number twice: an operand's modifier, no instruction of its own.
INLINE u32 low_twice(u32 a) {
  u32 r; asm("{ .reg .b16 l,h; mov.b32 {l,h},%1; mov.b32 %0,{l,l}; }" : "=r"(r) : "r"(a)); return r;
}
INLINE u32 high_twice(u32 a) {
  u32 r; asm("{ .reg .b16 l,h; mov.b32 {l,h},%1; mov.b32 %0,{h,h}; }" : "=r"(r) : "r"(a)); return r;
}
INLINE u32 quarter_turn(u32 a) { return __byte_perm(a, 0, 0x1032) ^ 0x80000000u; }  // (x, y) to (y, -x)
INLINE float low_of(u32 a) {
  float r; asm("{ .reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,l; }" : "=f"(r) : "r"(a)); return r;
}
INLINE float high_of(u32 a) {
  float r; asm("{ .reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,h; }" : "=f"(r) : "r"(a)); return r;
}
INLINE u32 half_pair(float low, float high) {
  u32 r; asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}

// -- fp32 --------------------------------------------------------------------------------------------------------
INLINE float fast_exp2(float x) { float r; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
INLINE float log_2(float x) { float r; asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
INLINE float reciprocal(float x) { float r; asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
INLINE int to_int(float x) { int r; asm("cvt.rni.s32.f32 %0,%1;" : "=r"(r) : "f"(x)); return r; }
INLINE float kept(u16 x) {  // a 16-bit number as the pool stores it
#if BF16
  return as_float((u32)x << 16);
#else
  float r; asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(x)); return r;
#endif
}
INLINE float kept_of(u32 two, bool upper) {  // of two of them
#if BF16
  return as_float(__byte_perm(two, 0, upper ? 0x3244 : 0x1044));
#else
  return upper ? high_of(two) : low_of(two);
#endif
}
// The number is below half of this.
INLINE float power_of_two(float x) { return as_float((as_word(x) & 0x7f800000u) + 0x01000000u); }
// Of numbers that are not negative, over the warp.
INLINE float largest_of_warp(float x) {
  u32 r; asm volatile("redux.sync.max.u32 %0,%1,0xffffffff;" : "=r"(r) : "r"(as_word(x))); return as_float(r);
}
// -- shared memory -----------------------------------------------------------------------------------------------
INLINE u32 load(u32 at) { u32 r; asm volatile("ld.shared.b32 %0,[%1];" : "=r"(r) : "r"(at)); return r; }
INLINE u16 load_half(u32 at) { u16 r; asm volatile("ld.shared.b16 %0,[%1];" : "=h"(r) : "r"(at)); return r; }
INLINE void load2(u32* x, u32 at) { asm volatile("ld.shared.v2.b32 {%0,%1},[%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at)); }
INLINE void load4(u32* x, u32 at) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3},[%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
}
// Of what never changes once the tables are there: the compiler may move these as it likes.
INLINE u32 look(u32 at) { u32 r; asm("ld.shared.b32 %0,[%1];" : "=r"(r) : "r"(at)); return r; }
// From a number of bytes behind a fixed address, which is part of the instruction.
template <u32 START> INLINE u32 look_at(u32 bytes) {
  u32 r; asm("ld.shared.b32 %0,[%1+%2];" : "=r"(r) : "r"(bytes), "n"(START)); return r;
}
INLINE void look2(u32* x, u32 at) { asm("ld.shared.v2.b32 {%0,%1},[%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at)); }
INLINE void look4(u32* x, u32 at) {
  asm("ld.shared.v4.b32 {%0,%1,%2,%3},[%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
}
INLINE void store(u32 at, u32 x) { asm volatile("st.shared.b32 [%0],%1;" ::"r"(at), "r"(x) : "memory"); }
INLINE void store_half(u32 at, u16 x) { asm volatile("st.shared.b16 [%0],%1;" ::"r"(at), "h"(x) : "memory"); }
INLINE void store2(u32 at, u32 a, u32 b) {
  asm volatile("st.shared.v2.b32 [%0],{%1,%2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}
INLINE void store4(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Whole numbers: their sum is the same in whatever order lanes add them.
INLINE void add(u32 at, int x) { asm volatile("red.shared.add.s32 [%0],%1;" ::"r"(at), "r"(x) : "memory"); }

// -- from global memory --------------------------------------------------------------------------------------------
INLINE void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
INLINE void copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(to), "l"(from) : "memory");
}
INLINE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
INLINE void wait_for_older_copies() {  // all groups but the latest have come
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncwarp();
}
INLINE void copies_arrive() {  // all of them
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}
INLINE uint4 stream(const void* p) {
  uint4 r;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3},[%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}
INLINE void put4(float* to, float a, float b, float c, float d) {
  asm volatile("st.global.v4.f32 [%0],{%1,%2,%3,%4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
// This kernel may have started before the one before it ended: now that has, and what it wrote is there.
INLINE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// -- tensor core ---------------------------------------------------------------------------------------------------
// c [16, 8] += a [16, 16] b [16, 8]. Lane 4q + r holds rows q and q + 8 of a and c: of a columns 2r, 2r + 1 (a[0], a[1])
// and those eight further (a[2], a[3]); of c columns 2r and 2r + 1; of b column q, rows as of a's columns.
INLINE void multiply_add(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Of the lane whose number differs in the bits of the mask.
INLINE u32 of_lane_across(u32 x, int mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
// Eight rows and columns of fp16 numbers over the warp: rows in fours of lanes become columns.
INLINE u32 transposed(u32 a) {
  u32 r; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(a)); return r;
}
