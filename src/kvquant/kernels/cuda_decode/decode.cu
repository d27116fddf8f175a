// Decode attention straight from packed blocks for Hopper: one query per sequence, its blocks shared among warps.
//
// The sums of triton_kernels/decode.py, laid out for what bounds them: instructions (numbers: triton_kernels/attention.py
// and launch.py), and here what caches those. On an H200, eight sequences of 32K tokens at 3 bits, a call of a form
// before this one takes as long without its look-ups or angles (2% more or less), 23% less without outliers, 16% and 31%
// less without the sums of values or scores. A warp takes a run of blocks (shares.py) of one (sequence, KV head) by itself:
// nothing waits for another warp, and what is done once per block is done by one warp. All warps of a multiprocessor share
// tables, so that what two codes mean takes two instructions (look_up.cuh).
//
// Weights are relative to a largest score that may be exceeded by 2^SLACK before sums are scaled anew, which is rare then.
// A value's range belongs to its token and goes into the weight.
//
// What is known of a block or share and looked at once lies in shared memory: with twelve warps a thread has 168
// registers, and one that goes to local memory and back was seen to cost one to three hundredths of the time.
#include "scores.cuh"
#include "values.cuh"

#define SLACK 4.f
#define WEIGHT_BITS 10.f  // weights are at most 2^(10 + SLACK), relative to Seen::size: fp16 holds smaller ones so
#define LOG2E 1.4426950408889634f

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) decode(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Work w;
  w.lane = lane;
  const int q = w.q = lane >> 2, r = w.r = lane & 3;
  w.s = shared_of((u32)__cvta_generic_to_shared(memory), warp);
  const u32 mine = w.s.mine;
  const int head = EACH == 1 ? r & (GN - 1) : 2 * r;  // and the next one of two
  const u32 scores = mine + W_SCORES + (SCORE_ROW(head) + (PAIRS_APART ? token_of(q, 0) : 8 * q)) * 4;
  for (int i = lane * 4; i < W_BYTES; i += 128) store(mine + i, 0);
  fill_table(a.key_centroids, a.value_centroids);
  __syncwarp();
  wait_for_kernel_before();
  const bool slow = BF16 && a.slow[32] != 0;  // fp16 would lose by it

  // The first share: which it is, its blocks, what they are.
  int place = 0;  // of sixteen, where a block's description is
  KeyCodes codes;
#pragma unroll 1
  for (int step = 0; step < 3; step++) {
    if (step == 0 && lane == 0) w.ask_share(a, warp * gridDim.x + blockIdx.x);
    if (step == 1) ask_angles(a.angles, a.slow);
    if (step > 0 && w.number(NEXT_HEAD) >= 0) {
      if (step == 1) {
        w.ask_numbers(a, place, 0, true);
        w.ask_head(a);
      } else {
        w.ask_description(a, place, 0, true);
        const Block block = {w.number_at(place), K_BASE, 0, 0, 0};  // what there is without a description
        ask_keys(a, w, codes, w.next_begin(), w.number(NEXT_HEAD), block);
      }
    }
    copies_arrive();
  }
  if (w.number(NEXT_HEAD) >= 0) {
    const Block block = w.block_at(place);
    if (block.count > K_BASE) ask_key_entries(a, w, (u64)block.id * a.H + w.number(NEXT_HEAD), block);
    copies_end();
    ask_values(a, w, w.number(NEXT_HEAD), w.block_at(place));
    copies_end();
  }
  fill_lists(a.value_centroids);
  __syncthreads();

  while (w.number(NEXT_HEAD) >= 0) {
    wait_for_older_copies();  // of what the share's scores need
    int column = w.take_next(), known = 0;  // of what comes after these eight blocks: its share, numbers, descriptions
    Seen seen;
    for (; column < w.number(END); column++) {
      const int end = w.number(END), left = min(8 - (place & 7), end - column);
      const bool share_ends = column + left == end;
      int next = 0;  // who is done takes what is left
      if (lane == 0 && left <= 2 && known == 0 && share_ends) next = atomicAdd(a.taken, 1);

      // -- scores: row q (+ 8) of tile m is token_of(q, 2m (+ 1)), columns 2r and 2r + 1 are the lane's ----------------
      wait_for_older_copies();  // of keys
      if (K_BASE > 0) add_keys_of_block(a, w, w.block_at(place));
      if (left <= 2) {
        if (known == 0 && share_ends && lane == 0) w.ask_share(a, next + gridDim.x * WARPS);
        known = max(known, 1);
        if (left == 1)
          for (; known < 3; known++) {
            copies_arrive();
            if (share_ends && w.number(NEXT_HEAD) < 0) break;
            if (known == 1)
              w.ask_numbers(a, place & 8 ^ 8, column + 1, share_ends);
            else
              w.ask_description(a, place & 8 ^ 8, column + 1, share_ends);
          }
        copies_end();
      }
      float all[4][4] = {};
      const Table<KB> k_table(lane, 0);
      codes.load_words(w);
      if (slow)
        add_all_scores<true>(all, w, k_table, codes);
      else
        add_all_scores<false>(all, w, k_table, codes);
      __syncwarp();
      const int place_after = left > 1 ? place + 1 : place & 8 ^ 8;
      if (left == 1) copies_arrive();
      int column_after = column + 1, head_after = w.h;
      if (column_after == end) {
        column_after = w.next_begin();
        head_after = w.number(NEXT_HEAD);
        if (head_after >= 0) w.ask_head(a);
      }
      if (head_after >= 0) ask_keys(a, w, codes, column_after, head_after, w.block_at(place_after));
      copies_end();
      const float score_unit = w.real(SCORE_UNIT), unit = HAS_SOFTCAP ? 1.f : score_unit;
      const int first_slot = w.first_slot(a, column), end_slot = w.end_slot(column);
      const bool whole = first_slot <= 0 && end_slot >= BS;
      float s[8][EACH];  // of this lane's tokens
#pragma unroll
      for (int t = 0; t < 8; t++)
#pragma unroll
        for (int x = 0; x < EACH; x++) s[t][x] = all[t >> 1][2 * (t & 1) + x];
      if (EACH == 1 && slow) {  // see Turned::be_slow
        const float first = token_of(q, 0) * (2.f / BS) - 1.f;
#pragma unroll
        for (int t = 0; t < 8; t++) s[t][0] += all[t >> 1][2 * (t & 1) + 1] * (first + token_of(0, t) * (2.f / BS));
      }
      if (K_BASE > 0) {
        const float back = reciprocal(score_unit * SCORE_FRACTION);
#pragma unroll
        for (int x = 0; x < EACH; x++)
#pragma unroll
          for (int t = 0; t < 8; t += 4) {
            u32 word[4];
            load_scores(word, scores, x, t);
#pragma unroll
            for (int i = 0; i < 4; i++) s[t + i][x] += (float)(int)word[i] * back;
          }
      }
      if (HAS_SOFTCAP) {  // tanh through exp, which keeps its sign at both ends
#pragma unroll
        for (int i = 0; i < 8 * EACH; i++) {
          const float x = s[i / EACH][i % EACH] * score_unit, decay = fast_exp2(fabsf(x / a.softcap) * (-2.f * LOG2E));
          s[i / EACH][i % EACH] = copysignf(LOG2E * a.softcap * (1.f - decay) / (1.f + decay), x);
        }
      }
      if (!whole) {
#pragma unroll
        for (int i = 0; i < 8 * EACH; i++) {
          const int token = token_of(q, i / EACH);
          if (token < first_slot || token >= end_slot) s[i / EACH][i % EACH] = -INFINITE;
        }
      }

      // -- weights -----------------------------------------------------------------------------------------------
      float most[EACH];
#pragma unroll
      for (int x = 0; x < EACH; x++) {
        most[x] = s[0][x];
#pragma unroll
        for (int t = 1; t < 8; t++) most[x] = fmaxf(most[x], s[t][x]);
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
      load_ranges(scale, mine + W_RANGES, q);
      load_ranges(zero, mine + W_RANGES + 128, q);
#pragma unroll
      for (int i = 0; i < 8; i++) largest = fmaxf(largest, scale[i]);
      float differences[NEAR], difference = 0.f;
      bool further = false;
      if (V_ENTRIES > 0) {
        const Block block = w.block_at(place);
        const float least = as_float(load(LEAST_AT));
#pragma unroll
        for (int i = 0; i < NEAR; i++)
          differences[i] = i < 3 || has_fourth(block) ? near_difference(w.s, lane, i, block, least) : 0.f;
        if (first_slot > 0) {
          stay_a_branch();
#pragma unroll
          for (int i = 0; i < NEAR; i++)
            if (near_is_hidden(w.s, lane, i, first_slot)) differences[i] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < NEAR; i++) difference = fmaxf(difference, fabsf(differences[i]));
        further = FurtherValues::there(block);
        if (further) difference = fmaxf(difference, FurtherValues(a, w, block, column).largest(a));
      }
      bool outgrown = largest > seen.size;
#pragma unroll
      for (int x = 0; x < EACH; x++) outgrown |= (most[x] - seen.best[x]) * unit > SLACK;
      const bool heap_is_full = V_ENTRIES > 0 && (difference > w.real(HEAP_MOST) || (column & 15) == 0);
      if (__any_sync(ALL_LANES, outgrown || heap_is_full)) {
        if (V_ENTRIES > 0 && w.real(HEAP_MOST) > 0.f) empty_heap(seen.sums, mine, w.real(HEAP_FACTOR), lane);
#pragma unroll
        for (int i = 4; i < 32; i *= 2)
#pragma unroll
          for (int x = 0; x < EACH; x++) most[x] = fmaxf(most[x], __shfl_xor_sync(ALL_LANES, most[x], i));
        largest = largest_of_warp(largest);
        seen.scale_anew(most, largest, unit);
        if (V_ENTRIES > 0) {
          const float limit = limit_of_heap(difference);
          __syncwarp();
          w.keep(HEAP_MOST, as_word(limit));
          w.keep(HEAP_FACTOR, as_word(64.f * reciprocal(limit) * seen.size));
          __syncwarp();
        }
      }
      const float bits = WEIGHT_BITS - log_2(seen.size);
#pragma unroll
      for (int x = 0; x < EACH; x++) {
        const float shift = bits - (seen.best[x] == -INFINITE ? 0.f : seen.best[x]) * unit;
#pragma unroll
        for (int t = 0; t < 8; t++) {
          const float p = s[t][x] = fast_exp2(s[t][x] * unit + shift);
          seen.total[x] += p;
          seen.zeros[x] += p * zero[t];
        }
        if (V_ENTRIES > 0)
#pragma unroll
          for (int t = 0; t < 8; t += 4)
            store_weights(scores, x, t, as_word(s[t][x]), as_word(s[t + 1][x]), as_word(s[t + 2][x]), as_word(s[t + 3][x]));
      }
      u32 weights[4 * EACH];  // of columns q: a head's, or of a head the even tokens' and then the odd ones'
#pragma unroll
      for (int i = 0; i < 4 * EACH; i++) {
        const int t = EACH == 1 ? 2 * i : i, u = EACH == 1 ? t + 1 : t;
        weights[i] = transposed(half_pair(s[t][0] * scale[t], s[u][EACH - 1] * scale[u]));
      }

      // -- values: row q (+ 8) of tile i is a channel, two tokens a word ----------------------------------------------
      const Table<VB> v_table(lane, 1);
#pragma unroll 1
      for (int tiles = 0; tiles < 2; tiles++) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
          const bool even = EACH == 2 || !(q & 1), odd = EACH == 2 || q & 1;
          const u32 both[2] = {even ? weights[EACH * m] : 0, odd ? weights[EACH * (m + 1) - 1] : 0};
          add_values(seen.sums, w, v_table, 2 * tiles + m, both);
        }
#pragma unroll
        for (int i = 0; i < 2 * EACH; i++) weights[i] = weights[i + 2 * EACH];
      }
      if (V_ENTRIES > 0) {
        __syncwarp();
        const float factor = w.real(HEAP_FACTOR);
        add_near<3>(w.s, lane, 0, differences, factor);
        if (has_fourth(w.block_at(place))) add_near<1>(w.s, lane, 3, differences, factor);
        if (further) FurtherValues(a, w, w.block_at(place), column).add(a, factor);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < SCORE_WORDS * 4; i += 512)
        if (i + lane * 16 < SCORE_WORDS * 4) store4(mine + W_SCORES + i + lane * 16, 0, 0, 0, 0);
      if (left == 2 && !(share_ends && w.number(NEXT_HEAD) < 0)) {
        w.ask_numbers(a, place & 8 ^ 8, column + 2, share_ends);
        known = 2;
      }
      const int h_after = column + 1 < end ? w.h : w.number(NEXT_HEAD);
      if (h_after >= 0) ask_values(a, w, h_after, w.block_at(place_after));
      copies_end();
      place = place_after;
      if (left == 1) known = 0;
      __syncwarp();
    }
    const float heap = V_ENTRIES > 0 ? reciprocal(w.real(HEAP_FACTOR)) : 0.f;
    store_part(a, w, seen, w.number(PART), HAS_SOFTCAP ? 1.f : w.real(SCORE_UNIT), heap);
    __syncwarp();
  }
}
