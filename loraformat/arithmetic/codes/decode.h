/* Codes of a few bits as the numbers that they mean: (table[code] - zero) · scale · factor, rounded to float32 each time;
 * then once to the type of the output, while they are in the cache of the processor.
 *
 * loraformat/arithmetic/codes/__init__.py describes the arguments. Where a code has at most 4 bits, the 16 numbers of a run
 * of codes with one scale are computed once and looked up for each code: the same numbers by construction. round.h does so
 * with numbers that are rounded to 16 bits.
 */
#ifndef LORAFORMAT_DECODE_H
#define LORAFORMAT_DECODE_H

#include "../kernel.h"
#include "../registers.h"

#define NUMBERS 16 /* that codes of at most 4 bits can mean */
#define CHUNK 128  /* columns that are decoded of each row before the next ones */
#define ACROSS_ROWS 8 /* that share a word */
#define TILE_ROWS 32 /* of a transposed output */

typedef VECTOR(uint64_t, WIDTH) long_words;

/* Columns from `col` up to `stop` that are decoded at once: they share a scale, that of `group`, unless each has its own. */
struct run {
    int64_t col, stop, group;
};

INLINE struct run run_from(const struct codes *k, int64_t col, int64_t group) {
    int64_t stop = k->cols < col + CHUNK ? k->cols : col + CHUNK;
    int64_t end = k->index ? stop : (group + 1) * k->run - k->first;
    return (struct run){col, end < stop ? end : stop, group};
}

INLINE struct run first_run(const struct codes *k) { return run_from(k, 0, k->index ? 0 : k->first / k->run); }

/* By a comparison: a division for each run takes as long as to decode it. */
INLINE struct run next_run(const struct codes *k, struct run run) {
    int is_whole = !k->index && run.stop == (run.group + 1) * k->run - k->first;
    return run_from(k, run.stop, run.group + is_whole);
}

/* A byte of a row: words of 32 bits may lie apart. */
INLINE const uint8_t *byte_of(const struct codes *k, const uint8_t *row, int64_t number) {
    return row + (number >> 2) * k->word_step + (number & 3);
}

INLINE uint32_t code_at(const struct codes *k, const uint8_t *row, int64_t col) {
    int64_t bit = col * k->bits, byte = bit >> 3;
    int shift = (int)(bit & 7);
    if (k->order == HIGH_FIRST) shift ^= 4;
    uint32_t value = *byte_of(k, row, byte) >> shift;
    if (shift + k->bits > 8) value |= (uint32_t)*byte_of(k, row, byte + 1) << (8 - shift);
    return value & ((1u << k->bits) - 1);
}

/* The codes of 4 bits of a register, from a column on that is a multiple of their count. */
INLINE ints nibbles_at(const struct codes *k, const uint8_t *row, int64_t col, int is_apart) {
    uint64_t packed = 0;
    if (is_apart && DOUBLES > 4) {
        memcpy(&packed, row + (col >> 3) * k->word_step, 4);
        memcpy((uint8_t *)&packed + 4, row + ((col >> 3) + 1) * k->word_step, 4);
    } else {
        memcpy(&packed, is_apart ? byte_of(k, row, col >> 1) : row + (col >> 1), DOUBLES);
    }
    long_words shifts, bytes;
    for (int lane = 0; lane < DOUBLES; lane++) shifts[lane] = 8 * lane;
    bytes = ((long_words){0} + packed) >> shifts;
    long_words low = bytes & 15, high = bytes >> 4 & 15;
    return k->order == HIGH_FIRST ? (ints)(high | low << 32) : (ints)(low | high << 32);
}

/* What all codes of at most 4 bits mean under one scale, in registers: read back from memory right after it was written
 * number by number, the table would have to wait for all of its stores. */
INLINE void numbers_of(const struct codes *k, int64_t row, int64_t group, singles *numbers) {
    int64_t at = row * k->groups + group;
    float scale = k->scales[at], zero = k->zeros ? k->zeros[at] : 0;
    for (int part = 0; part < NUMBERS / SINGLES; part++)
        numbers[part] = (load_singles(k->table + part * SINGLES) - zero) * scale * k->factor;
}

INLINE float number_of(const singles *numbers, uint32_t code) { return numbers[code / SINGLES][code % SINGLES]; }

/* Columns `col` to `stop` of one row, which share a scale, in 4 bits. */
INLINE void decode_nibbles(const struct codes *k, const uint8_t *row, int64_t col, int64_t stop, const singles *numbers,
                           float *out, int is_apart) {
    for (; col < stop && col % SINGLES; col++) *out++ = number_of(numbers, code_at(k, row, col));
    for (; col + SINGLES <= stop; col += SINGLES, out += SINGLES) {
        singles found = look_up(numbers, nibbles_at(k, row, col, is_apart));
        STORE(out, found);
    }
    for (; col < stop; col++) *out++ = number_of(numbers, code_at(k, row, col));
}

INLINE void decode_bytes(const struct codes *k, const uint8_t *row, int64_t col, int64_t stop, float scale, float zero,
                         float *out, int is_apart) {
    const float *restrict table = k->table;
    float *restrict into = out, factor = k->factor;
    for (; col < stop; col++) *into++ = (table[is_apart ? *byte_of(k, row, col) : row[col]] - zero) * scale * factor;
}

/* The same of any width; a scale for each column by its index. */
static void decode_indexed(const struct codes *k, const uint8_t *packed, int64_t row, int64_t col, int64_t stop, float *out) {
    const float *scales = k->scales + row * k->groups, *zeros = k->zeros ? k->zeros + row * k->groups : NULL;
    for (; col < stop; col++) {
        int32_t group = k->index[col];
        *out++ = (k->table[code_at(k, packed, col)] - (zeros ? zeros[group] : 0)) * scales[group] * k->factor;
    }
}

static void decode_run(const struct codes *k, int64_t row, struct run run, float *out) {
    const uint8_t *packed = k->packed + row * k->row_step;
    int is_apart = k->word_step != 4;
    int64_t col = run.col, stop = run.stop, at = row * k->groups + run.group;
    if (k->index) {
        decode_indexed(k, packed, row, col, stop, out);
        return;
    }
    if (k->bits == 8) {
        float zero = k->zeros ? k->zeros[at] : 0;
        if (is_apart)
            decode_bytes(k, packed, col, stop, k->scales[at], zero, out, 1);
        else
            decode_bytes(k, packed, col, stop, k->scales[at], zero, out, 0);
        return;
    }
    singles numbers[NUMBERS / SINGLES];
    numbers_of(k, row, run.group, numbers);
    if (k->bits != 4)
        for (; col < stop; col++) *out++ = number_of(numbers, code_at(k, packed, col));
    else if (is_apart)
        decode_nibbles(k, packed, col, stop, numbers, out, 1);
    else
        decode_nibbles(k, packed, col, stop, numbers, out, 0);
}

/* Rows whose codes share words: code k of a word belongs to row `places[k]` of eight. Rows of `out` are `step` apart. */
static void decode_across(const struct codes *k, int64_t row, struct run run, float *out, int64_t step) {
    static const int shifts[ACROSS_ROWS] = {0, 16, 4, 20, 8, 24, 12, 28};
    singles numbers[ACROSS_ROWS][NUMBERS / SINGLES];
    const uint8_t *packed = k->packed + row / ACROSS_ROWS * 4;
    int64_t col = run.col, stop = run.stop;
    for (int each = 0; each < ACROSS_ROWS; each++) numbers_of(k, row + each, run.group, numbers[each]);
    for (; col + SINGLES <= stop; col += SINGLES) {
        uint32_t lanes[SINGLES];
        words all;
        for (int lane = 0; lane < SINGLES; lane++) memcpy(lanes + lane, packed + (col + lane) * k->word_step, 4);
        memcpy(&all, lanes, sizeof all);
        for (int each = 0; each < ACROSS_ROWS; each++) {
            singles found = look_up(numbers[each], (ints)(all >> shifts[each] & 15));
            STORE(out + each * step + col - run.col, found);
        }
    }
    for (; col < stop; col++) {
        uint32_t word;
        memcpy(&word, packed + col * k->word_step, 4);
        for (int each = 0; each < ACROSS_ROWS; each++)
            out[each * step + col - run.col] = number_of(numbers[each], word >> shifts[each] & 15);
    }
}

#endif
