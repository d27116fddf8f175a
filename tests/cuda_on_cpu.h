// What words.cuh has, without a GPU: lanes are fibers of one thread, which take turns at what a warp does together.
//
// Lanes run in one order or another, and asynchronous copies come at once or only when they are waited for: what depends
// on either gives another result. A warp whose lanes wait for each other at different places is an error.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

typedef uint32_t u32;
typedef unsigned long long u64;
typedef uint16_t u16;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct Index { int x; };

#define INLINE inline
#define ALL_LANES 0xffffffffu
#define INFINITE INFINITY
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n)

namespace host {

struct Copy { u32 to; const void* from; int bytes; };

struct Lane {
  ucontext_t context;
  std::vector<char> stack;
  int thread = 0;
  bool done = false;
  std::deque<std::vector<Copy>> groups;  // of copies that were asked for, the last one still open
};

struct Meeting {  // of the lanes of a warp, or of all
  int arrived = 0, generation = 0, line = 0;
  u32 given[1024][12], got[1024][4];
};

struct Machine {
  unsigned char shared[1 << 18];
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<Meeting> warps;
  Meeting all;
  ucontext_t main;
  Lane* current = nullptr;
  bool late = false;  // copies come when they are waited for
  int block = 0, blocks = 1;
  bool moved = false;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "CUDA on a CPU: %s\n", why);
  std::abort();
}

inline void yield() { swapcontext(&machine.current->context, &machine.main); }

inline void meet(Meeting& at, int size, int line, const std::function<void()>& together) {
  if (at.arrived && at.line != line) fail("lanes of a warp wait for each other at different places");
  at.line = line;
  const int generation = at.generation;
  machine.moved = true;
  if (++at.arrived == size) {
    together();
    at.arrived = 0;
    at.generation++;
  } else {
    while (at.generation == generation) yield();
  }
}

inline Meeting& warp() { return machine.warps[machine.current->thread / 32]; }
inline int lane() { return machine.current->thread % 32; }

inline void land(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) std::memcpy(machine.shared + c.to, c.from, c.bytes);
}
inline void ask(u32 to, const void* from, int bytes) {
  if (to % bytes || (uintptr_t)from % bytes) fail("a copy that is not aligned");
  if (to + bytes > sizeof machine.shared) fail("a copy outside of shared memory");
  auto& groups = machine.current->groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, bytes});
  if (!machine.late) std::memcpy(machine.shared + to, from, bytes);
}
inline void wait(int left) {  // until so many groups that were closed may still be on their way
  auto& groups = machine.current->groups;
  while ((int)groups.size() > left + 1) {
    if (machine.late) land(groups.front());
    groups.pop_front();
  }
}

inline void arrive() {  // all groups, and the one that is open
  for (auto& group : machine.current->groups)
    if (machine.late) land(group);
  machine.current->groups.clear();
}

template <class T> T& at(u32 address) {
  if (address % sizeof(T) || address + sizeof(T) > sizeof machine.shared) fail("an address that is not there");
  return *reinterpret_cast<T*>(machine.shared + address);
}

}  // namespace host

#define threadIdx (Index{host::machine.current->thread})
#define blockIdx (Index{host::machine.block})
#define gridDim (Index{host::machine.blocks})
#define __cvta_generic_to_shared(memory) 1024
extern unsigned char memory[];

using std::fabs;
INLINE int min(int a, int b) { return a < b ? a : b; }
INLINE int max(int a, int b) { return a > b ? a : b; }

INLINE int anew(int x) { return x; }
INLINE void stay_a_branch() {}
INLINE u32 bits_of(u32 x, u32 y, u32 mask) { return (x & mask) | (y & ~mask); }
INLINE float as_float(u32 x) { float r; std::memcpy(&r, &x, 4); return r; }
INLINE u32 as_word(float x) { u32 r; std::memcpy(&r, &x, 4); return r; }
INLINE u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> (4 * i) & 15, byte = both >> (8 * (s & 7)) & 255;
    r |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return r;
}

INLINE float half_float(u16 x) { _Float16 h; std::memcpy(&h, &x, 2); return (float)h; }
INLINE u16 half_bits(double x) { _Float16 h = (_Float16)x; u16 r; std::memcpy(&r, &h, 2); return r; }
INLINE float low_of(u32 a) { return half_float((u16)a); }
INLINE float high_of(u32 a) { return half_float((u16)(a >> 16)); }
INLINE u32 half_pair(float low, float high) { return half_bits(low) | (u32)half_bits(high) << 16; }
INLINE u32 half_mul(u32 a, u32 b) {
  return half_bits((double)low_of(a) * low_of(b)) | (u32)half_bits((double)high_of(a) * high_of(b)) << 16;
}
INLINE u32 half_add(u32 a, u32 b) {
  return half_bits((double)low_of(a) + low_of(b)) | (u32)half_bits((double)high_of(a) + high_of(b)) << 16;
}
INLINE u32 half_fma(u32 a, u32 b, u32 c) {
  return half_bits((double)low_of(a) * low_of(b) + low_of(c)) |
         (u32)half_bits((double)high_of(a) * high_of(b) + high_of(c)) << 16;
}
INLINE u32 low_twice(u32 a) { return (a & 0xffff) * 0x10001u; }
INLINE u32 high_twice(u32 a) { return (a >> 16) * 0x10001u; }
INLINE u32 quarter_turn(u32 a) { return (a >> 16 | a << 16) ^ 0x80000000u; }
INLINE float fast_exp2(float x) { return std::exp2(x); }
INLINE float reciprocal(float x) { return 1.f / x; }
INLINE float log_2(float x) { return std::log2(x); }
INLINE float power_of_two(float x) { return as_float((as_word(x) & 0x7f800000u) + 0x01000000u); }
INLINE int to_int(float x) {
  return std::isnan(x) ? 0 : (int)std::nearbyint(std::fmin(std::fmax(x, -2147483648.f), 2147483520.f));
}
INLINE float kept(u16 x) {
#if BF16
  return as_float((u32)x << 16);
#else
  return half_float(x);
#endif
}
INLINE float kept_of(u32 two, bool upper) { return kept((u16)(two >> 16 * upper)); }

INLINE u32 load(u32 at) { return host::at<u32>(at); }
INLINE u16 load_half(u32 at) { return host::at<u16>(at); }
INLINE void load2(u32* x, u32 at) { if (at % 8) host::fail("load2"); x[0] = load(at); x[1] = load(at + 4); }
INLINE void load4(u32* x, u32 at) {
  if (at % 16) host::fail("load4");
  for (int i = 0; i < 4; i++) x[i] = load(at + 4 * i);
}
INLINE u32 look(u32 at) { return load(at); }
template <u32 START> INLINE u32 look_at(u32 bytes) { return look(START + bytes); }
INLINE void look2(u32* x, u32 at) { load2(x, at); }
INLINE void look4(u32* x, u32 at) { load4(x, at); }
INLINE void store(u32 at, u32 x) { host::at<u32>(at) = x; }
INLINE void store_half(u32 at, u16 x) { host::at<u16>(at) = x; }
INLINE void store2(u32 at, u32 a, u32 b) {
  if (at % 8) host::fail("store2");
  store(at, a); store(at + 4, b);
}
INLINE void store4(u32 at, u32 a, u32 b, u32 c, u32 d) {
  if (at % 16) host::fail("store4");
  store(at, a); store(at + 4, b); store(at + 8, c); store(at + 12, d);
}
INLINE void add(u32 at, int x) { host::at<int>(at) = (int)((u32)host::at<int>(at) + (u32)x); }

INLINE void copy16(u32 to, const void* from) { host::ask(to, from, 16); }
INLINE void copy4(u32 to, const void* from) { host::ask(to, from, 4); }
INLINE void copies_end() {
  auto& groups = host::machine.current->groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
INLINE void put4(float* to, float a, float b, float c, float d) {
  if ((uintptr_t)to % 16) host::fail("put4");
  to[0] = a; to[1] = b; to[2] = c; to[3] = d;
}
INLINE uint4 stream(const void* p) { uint4 r; std::memcpy(&r, p, 16); return r; }

#define __syncwarp() host::meet(host::warp(), 32, __LINE__, [] {})
#define __syncthreads() host::meet(host::machine.all, 32 * WARPS, __LINE__, [] {})
#define wait_for_older_copies() (host::wait(1), __syncwarp())
#define copies_arrive() (host::arrive(), __syncwarp())
#define wait_for_kernel_before()

// Every lane gives words and gets some that ``together`` makes of all lanes' words.
template <class F> INLINE void exchange(int line, const u32* given, int n, u32* got, int m, F together) {
  host::Meeting& at = host::warp();
  const int lane = host::lane();
  std::memcpy(at.given[lane], given, 4 * n);
  host::meet(at, 32, line, [&] { together(at); });
  std::memcpy(got, at.got[lane], 4 * m);
}
INLINE float shuffle_xor(int line, float x, int mask) {
  u32 word = as_word(x), got;
  exchange(line, &word, 1, &got, 1, [mask](host::Meeting& at) { for (int i = 0; i < 32; i++) at.got[i][0] = at.given[i ^ mask][0]; });
  return as_float(got);
}
INLINE bool any_lane(int line, bool x) {
  u32 word = x, got;
  exchange(line, &word, 1, &got, 1, [](host::Meeting& at) {
    u32 any = 0;
    for (int i = 0; i < 32; i++) any |= at.given[i][0];
    for (int i = 0; i < 32; i++) at.got[i][0] = any;
  });
  return got;
}
INLINE float largest_word(int line, float x) {
  u32 word = as_word(x), got;
  exchange(line, &word, 1, &got, 1, [](host::Meeting& at) {
    u32 most = 0;
    for (int i = 0; i < 32; i++) most = at.given[i][0] > most ? at.given[i][0] : most;
    for (int i = 0; i < 32; i++) at.got[i][0] = most;
  });
  return as_float(got);
}
#define __shfl_xor_sync(lanes, x, mask) shuffle_xor(__LINE__, x, mask)
#define of_lane_across(x, mask) as_word(shuffle_xor(__LINE__, as_float(x), mask))
#define __any_sync(lanes, x) any_lane(__LINE__, x)
#define largest_of_warp(x) largest_word(__LINE__, x)
INLINE int atomicAdd(int* p, int x) { const int old = *p; *p += x; return old; }

INLINE void multiply_add(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 given[10] = {a0, a1, a2, a3, b0, b1, as_word(c[0]), as_word(c[1]), as_word(c[2]), as_word(c[3])};
  u32 got[4];
  exchange(-1, given, 10, got, 4, [](host::Meeting& at) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const int q = lane / 4, r = lane % 4;
      const u32* w = at.given[lane];
      for (int i = 0; i < 4; i++)
        for (int x = 0; x < 2; x++) a[q + 8 * (i & 1)][2 * r + 8 * (i >> 1) + x] = x ? high_of(w[i]) : low_of(w[i]);
      for (int i = 0; i < 2; i++)
        for (int x = 0; x < 2; x++) b[2 * r + 8 * i + x][q] = x ? high_of(w[4 + i]) : low_of(w[4 + i]);
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
        float sum = as_float(at.given[lane][6 + i]);
        for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
        at.got[lane][i] = as_word(sum);
      }
  });
  for (int i = 0; i < 4; i++) c[i] = as_float(got[i]);
}
INLINE u32 transposed(u32 x) {
  u32 got;
  exchange(-2, &x, 1, &got, 1, [](host::Meeting& at) {
    u16 m[8][8];
    for (int i = 0; i < 32; i++) {
      m[i / 4][2 * (i % 4)] = (u16)at.given[i][0];
      m[i / 4][2 * (i % 4) + 1] = (u16)(at.given[i][0] >> 16);
    }
    for (int i = 0; i < 32; i++) at.got[i][0] = m[2 * (i % 4)][i / 4] | (u32)m[2 * (i % 4) + 1][i / 4] << 16;
  });
  return got;
}

// Runs ``kernel`` of an argument for every block of a grid, one after the other.
template <class Argument>
void run_on_cpu(void (*kernel)(Argument), const Argument& argument, int blocks, int order, bool late) {
  using namespace host;
  static const Argument* given;
  static void (*entry)(Argument);
  given = &argument;
  entry = kernel;
  machine.late = late;
  machine.blocks = blocks;
  for (machine.block = 0; machine.block < blocks; machine.block++) {
    std::memset(machine.shared, 0xA5, sizeof machine.shared);
    machine.lanes.clear();
    machine.warps.assign(WARPS, Meeting());
    machine.all = Meeting();
    for (int i = 0; i < 32 * WARPS; i++) {
      machine.lanes.push_back(std::make_unique<Lane>());
      Lane& one = *machine.lanes.back();
      one.thread = i;
      one.stack.resize(1 << 16);
      getcontext(&one.context);
      one.context.uc_stack.ss_sp = one.stack.data();
      one.context.uc_stack.ss_size = one.stack.size();
      one.context.uc_link = &machine.main;
      makecontext(&one.context, +[] { entry(*given); machine.current->done = true; machine.moved = true; }, 0);
    }
    u32 state = order;
    for (bool left = true; left;) {
      left = machine.moved = false;
      const int n = 32 * WARPS, first = order < 2 ? 0 : (state = state * 1664525u + 1013904223u) % n;
      for (int i = 0; i < n; i++) {
        const int k = order == 1 ? n - 1 - i : (first + i) % n;
        if (machine.lanes[k]->done) continue;
        left = true;
        machine.current = machine.lanes[k].get();
        swapcontext(&machine.main, &machine.current->context);
      }
      if (left && !machine.moved) fail("lanes wait for each other for ever");
    }
  }
}
