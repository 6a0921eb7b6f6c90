/* Codes as numbers that are rounded to 16 bits, and the way of all numbers into the output.
 *
 * Under one scale a code means one number: what few codes can mean is rounded once and looked up for each of them.
 */
#ifndef LORAFORMAT_ROUND_H
#define LORAFORMAT_ROUND_H

#include "../kernel.h"
#include "../registers.h"
#include "convert.h"
#include "decode.h"

#include <stdlib.h>

#define BYTES 256       /* numbers that codes of 8 bits can mean */
#define MOST_TABLES 512 /* of so many numbers, one for each group of columns: 270 kB */
#define AT_ONCE 32      /* codes of 4 bits that are looked up together */
#define SIDE 8          /* of a square of numbers that is transposed in registers */

/* The 16 numbers of a run in 16 bits: their low bytes, and their high ones. */
struct sixteen {
    octets low, high;
    int are_finite;
};

INLINE struct sixteen sixteen_of(const struct codes *k, int64_t row, int64_t group, enum type type) {
    singles numbers[NUMBERS / SINGLES];
    few_octets low[NUMBERS / SINGLES], high[NUMBERS / SINGLES];
    uint16_t exponent = type == BF16 ? EXPONENT_BF16 : EXPONENT_F16;
    VECTOR(int16_t, WIDTH / 2) is_open = {0};
    numbers_of(k, row, group, numbers);
    for (int part = 0; part < NUMBERS / SINGLES; part++) {
        halves half = rounded(numbers[part], type);
        is_open |= (half & exponent) == exponent;
        low[part] = __builtin_convertvector(half, few_octets);
        high[part] = __builtin_convertvector(half >> 8, few_octets);
    }
    longs wide = (longs)__builtin_convertvector(is_open, ints);
    return (struct sixteen){octets_of(low), octets_of(high), !any(wide)};
}

INLINE uint8_t *put(uint8_t *out, uint16_t number) {
    memcpy(out, &number, 2);
    return out + 2;
}

INLINE uint16_t half_at(const struct sixteen *n, uint32_t code) {
    return (uint16_t)(n->low[code] | n->high[code] << 8);
}

/* 16 codes, one a byte. */
INLINE uint8_t *put_sixteen(uint8_t *out, const struct sixteen *n, octets codes) {
    octets low = look_up_octets(n->low, codes), high = look_up_octets(n->high, codes);
    octets first = low_in_turn(low, high), second = high_in_turn(low, high);
    STORE(out, first);
    STORE(out + 16, second);
    return out + 32;
}

/* Columns `col` to `stop` of one row, which share a scale, in 4 bits. */
INLINE void round_nibbles(const struct codes *k, const uint8_t *row, int64_t col, int64_t stop, const struct sixteen *n,
                          uint8_t *out, int is_apart) {
    for (; col < stop && col % 8; col++) out = put(out, half_at(n, code_at(k, row, col)));
    for (; col + AT_ONCE <= stop; col += AT_ONCE) {
        octets packed;
        if (is_apart) {
            uint32_t word[4];
            for (int at = 0; at < 4; at++) memcpy(word + at, row + ((col >> 3) + at) * k->word_step, 4);
            packed = (octets)(VECTOR(uint32_t, 16)){word[0], word[1], word[2], word[3]};
        } else {
            packed = load_octets(row + (col >> 1));
        }
        octets low = packed & 15, high = packed >> 4;
        octets first = k->order == HIGH_FIRST ? high : low, second = k->order == HIGH_FIRST ? low : high;
        out = put_sixteen(out, n, low_in_turn(first, second));
        out = put_sixteen(out, n, high_in_turn(first, second));
    }
    for (; col < stop; col++) out = put(out, half_at(n, code_at(k, row, col)));
}

/* What codes of 8 bits mean under one scale. */
struct byte_table {
    uint32_t scale, zero; /* their bits */
    int is_made;
    uint16_t numbers[BYTES];
};

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The table of a group: that of the last row, unless its scale is another. */
INLINE const uint16_t *bytes_of(const struct codes *k, int64_t row, int64_t group, enum type type, struct byte_table *tables) {
    int64_t at = row * k->groups + group;
    float scale = k->scales[at], zero = k->zeros ? k->zeros[at] : 0;
    struct byte_table *table = tables + group;
    if (table->is_made && table->scale == bits_of(scale) && table->zero == bits_of(zero)) return table->numbers;
    for (int code = 0; code < BYTES; code += SINGLES) {
        halves half = rounded((load_singles(k->table + code) - zero) * scale * k->factor, type);
        STORE(table->numbers + code, half);
    }
    table->scale = bits_of(scale), table->zero = bits_of(zero), table->is_made = 1;
    return table->numbers;
}

/* The columns of a run in one row, rounded; whether they are finite. `tables` may be NULL. */
INLINE int round_run(const struct codes *k, int64_t row, struct run run, uint8_t *out, enum type type,
                     struct byte_table *tables) {
    const uint8_t *packed = k->packed + row * k->row_step;
    int is_apart = k->word_step != 4;
    int64_t count = run.stop - run.col;
    if (k->bits == 4 && !k->index) {
        struct sixteen numbers = sixteen_of(k, row, run.group, type);
        if (is_apart)
            round_nibbles(k, packed, run.col, run.stop, &numbers, out, 1);
        else
            round_nibbles(k, packed, run.col, run.stop, &numbers, out, 0);
        return numbers.are_finite || are_finite(out, type, count);
    }
    if (k->bits == 8 && !k->index && tables) {
        const uint16_t *numbers = bytes_of(k, row, run.group, type, tables);
        uint8_t *into = out;
        if (is_apart)
            for (int64_t col = run.col; col < run.stop; col++) into = put(into, numbers[*byte_of(k, packed, col)]);
        else
            for (int64_t col = run.col; col < run.stop; col++) into = put(into, numbers[packed[col]]);
        return are_finite(out, type, count);
    }
    float strip[CHUNK + 16];
    decode_run(k, row, run, strip);
    return convert((const uint8_t *)strip, F32, out, type, count);
}

/* Byte `b` of 16 words, for each of the four. Putting one half of all bytes between those of the other moves the highest
 * bit of every place to the end; after four times the place of the byte in its word comes first. */
INLINE void planes_of(const struct codes *k, const uint8_t *packed, octets *planes) {
    for (int part = 0; part < 4; part++, packed += 4 * k->word_step) {
        uint32_t word[4];
        for (int at = 0; at < 4; at++) memcpy(word + at, packed + at * k->word_step, 4);
        planes[part] = (octets)(VECTOR(uint32_t, 16)){word[0], word[1], word[2], word[3]};
    }
    for (int turn = 0; turn < 4; turn++) {
        octets first = planes[0], second = planes[1];
        planes[0] = low_in_turn(first, planes[2]), planes[1] = high_in_turn(first, planes[2]);
        planes[2] = low_in_turn(second, planes[3]), planes[3] = high_in_turn(second, planes[3]);
    }
}

/* Rows whose codes share words, as decode_across. */
INLINE int round_across(const struct codes *k, int64_t row, struct run run, uint8_t *out, enum type type) {
    static const int shifts[ACROSS_ROWS] = {0, 16, 4, 20, 8, 24, 12, 28};
    const uint8_t *packed = k->packed + row / ACROSS_ROWS * 4;
    struct sixteen numbers[ACROSS_ROWS];
    int64_t col = run.col, step = k->cols * 2;
    int is_finite = 1;
    for (int each = 0; each < ACROSS_ROWS; each++) numbers[each] = sixteen_of(k, row + each, run.group, type);
    for (; col + 16 <= run.stop; col += 16) {
        octets planes[4];
        planes_of(k, packed + col * k->word_step, planes);
        for (int each = 0; each < ACROSS_ROWS; each++) {
            octets plane = planes[shifts[each] / 8];
            put_sixteen(out + each * step + (col - run.col) * 2, numbers + each, shifts[each] & 4 ? plane >> 4 : plane & 15);
        }
    }
    for (; col < run.stop; col++) {
        uint32_t word;
        memcpy(&word, packed + col * k->word_step, 4);
        for (int each = 0; each < ACROSS_ROWS; each++)
            put(out + each * step + (col - run.col) * 2, half_at(numbers + each, word >> shifts[each] & 15));
    }
    for (int each = 0; each < ACROSS_ROWS; each++)
        is_finite &= numbers[each].are_finite || are_finite(out + each * step, type, run.stop - run.col);
    return is_finite;
}

/* SIDE rows of `tile` as SIDE columns of the output, whose rows are `step` bytes apart. See planes_of. */
INLINE void transpose(const uint16_t (*tile)[CHUNK + 16], int64_t col, uint8_t *out, int64_t step) {
    octets all[SIDE], next[SIDE];
    for (int each = 0; each < SIDE; each++) all[each] = load_octets(tile[each] + col);
    for (int turn = 0; turn < 3; turn++) {
        for (int each = 0; each < SIDE / 2; each++) {
            next[2 * each] = low_pairs_in_turn(all[each], all[each + SIDE / 2]);
            next[2 * each + 1] = high_pairs_in_turn(all[each], all[each + SIDE / 2]);
        }
        for (int each = 0; each < SIDE; each++) all[each] = next[each];
    }
    for (int each = 0; each < SIDE; each++) STORE(out + each * step, all[each]);
}

/* Columns of some rows, by which rows of the output are filled. */
INLINE int round_transposed(const struct codes *k, int64_t row, int64_t rows, struct run run, enum type type,
                            struct byte_table *tables) {
    uint16_t tile[TILE_ROWS][CHUNK + 16];
    int64_t cols = run.stop - run.col, step = k->rows * 2, at = 0;
    uint8_t *out = k->out + run.col * step + row * 2;
    int is_finite = 1;
    for (int64_t each = 0; each < rows; each++)
        is_finite &= round_run(k, row + each, run, (uint8_t *)tile[each], type, tables);
    if (rows == TILE_ROWS)
        for (; at + SIDE <= cols; at += SIDE)
            for (int64_t each = 0; each < TILE_ROWS; each += SIDE)
                transpose((const uint16_t(*)[CHUNK + 16])(tile + each), at, out + at * step + each * 2, step);
    for (; at < cols; at++)
        for (int64_t each = 0; each < rows; each++) put(out + at * step + each * 2, tile[each][at]);
    return is_finite;
}

/* The same in float32. */
static void decode_transposed(const struct codes *k, int64_t row, int64_t rows, struct run run) {
    float tile[TILE_ROWS][CHUNK + 16], line[TILE_ROWS];
    for (int64_t each = 0; each < rows; each++) decode_run(k, row + each, run, tile[each]);
    for (int64_t at = 0; at < run.stop - run.col; at++) {
        if (rows == TILE_ROWS)
            for (int each = 0; each < TILE_ROWS; each++) line[each] = tile[each][at];
        else
            for (int64_t each = 0; each < rows; each++) line[each] = tile[each][at];
        memcpy(k->out + ((run.col + at) * k->rows + row) * 4, line, rows * sizeof(float));
    }
}

/* Columns of as many rows as are decoded together. */
INLINE int decode_rows(const struct codes *k, int64_t row, int64_t rows, struct run run, enum type type,
                       struct byte_table *tables) {
    uint8_t *out = k->out + (row * k->cols + run.col) * size_of(type);
    if (type != F32) {
        if (k->is_transposed) return round_transposed(k, row, rows, run, type, tables);
        return k->order == ACROSS ? round_across(k, row, run, out, type) : round_run(k, row, run, out, type, tables);
    }
    if (k->is_transposed)
        decode_transposed(k, row, rows, run);
    else if (k->order == ACROSS)
        decode_across(k, row, run, (float *)out, k->cols);
    else
        decode_run(k, row, run, (float *)out);
    return 1;
}

/* A chunk of columns of all rows, then the next: words that lie apart stay in the cache for their neighbors. */
INLINE int decode_all(const struct codes *k, enum type type, struct byte_table *tables) {
    int64_t height = k->order == ACROSS ? ACROSS_ROWS : k->is_transposed ? TILE_ROWS : 1;
    struct run first = first_run(k);
    int is_finite = 1;
    if (k->word_step == 4 && height == 1) {
        for (int64_t row = 0; row < k->rows; row++)
            for (struct run run = first; run.col < k->cols; run = next_run(k, run))
                is_finite &= decode_rows(k, row, 1, run, type, tables);
        return is_finite;
    }
    for (struct run run = first; run.col < k->cols; run = next_run(k, run))
        for (int64_t row = 0; row < k->rows; row += height)
            is_finite &= decode_rows(k, row, k->rows - row < height ? k->rows - row : height, run, type, tables);
    return is_finite;
}

/* Gives back whether all numbers are finite after they were rounded to 16 bits. */
static int decode(const struct codes *k) {
    if (k->type == F32) return decode_all(k, F32, NULL);
    int has_tables = k->bits == 8 && !k->index && k->groups <= MOST_TABLES;
    struct byte_table *tables = has_tables ? calloc(k->groups, sizeof *tables) : NULL;
    int is_finite = k->type == BF16 ? decode_all(k, BF16, tables) : decode_all(k, F16, tables);
    free(tables);
    return is_finite;
}

#endif
