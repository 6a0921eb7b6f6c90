/* Codes of a few bits as the numbers that they mean: (table[code] - zero) · scale · factor, rounded to float32 each time.
 *
 * loraformat/arithmetic/codes/__init__.py describes the arguments. Where a code has at most 4 bits, the 16 numbers of a run
 * of codes with one scale are computed once and looked up for each code: the same numbers by construction.
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

/* What all codes of at most 4 bits mean under one scale. */
INLINE void numbers_of(const struct codes *k, int64_t row, int64_t group, float *numbers) {
    int64_t at = row * k->groups + group;
    float scale = k->scales[at], zero = k->zeros ? k->zeros[at] : 0;
    for (int code = 0; code < NUMBERS; code++) numbers[code] = (k->table[code] - zero) * scale * k->factor;
}

/* Columns `col` to `stop` of one row, which share a scale, in 4 bits. */
INLINE void decode_nibbles(const struct codes *k, const uint8_t *row, int64_t col, int64_t stop, const float *numbers,
                           float *out, int is_apart) {
    singles table[NUMBERS / SINGLES];
    memcpy(table, numbers, sizeof table);
    for (; col < stop && col % SINGLES; col++) *out++ = numbers[code_at(k, row, col)];
    for (; col + SINGLES <= stop; col += SINGLES, out += SINGLES) {
        singles found = look_up(table, nibbles_at(k, row, col, is_apart));
        STORE(out, found);
    }
    for (; col < stop; col++) *out++ = numbers[code_at(k, row, col)];
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

static void decode_run(const struct codes *k, int64_t row, int64_t col, int64_t stop, float *out) {
    const uint8_t *packed = k->packed + row * k->row_step;
    int is_apart = k->word_step != 4;
    if (k->index) {
        decode_indexed(k, packed, row, col, stop, out);
        return;
    }
    int64_t group = (k->first + col) / k->run, at = row * k->groups + group;
    if (k->bits == 8) {
        float zero = k->zeros ? k->zeros[at] : 0;
        if (is_apart)
            decode_bytes(k, packed, col, stop, k->scales[at], zero, out, 1);
        else
            decode_bytes(k, packed, col, stop, k->scales[at], zero, out, 0);
        return;
    }
    float numbers[NUMBERS];
    numbers_of(k, row, group, numbers);
    if (k->bits != 4)
        for (; col < stop; col++) *out++ = numbers[code_at(k, packed, col)];
    else if (is_apart)
        decode_nibbles(k, packed, col, stop, numbers, out, 1);
    else
        decode_nibbles(k, packed, col, stop, numbers, out, 0);
}

/* Rows whose codes share words: code k of a word belongs to row `places[k]` of eight. */
static void decode_across(const struct codes *k, int64_t row, int64_t col, int64_t stop) {
    static const int shifts[ACROSS_ROWS] = {0, 16, 4, 20, 8, 24, 12, 28};
    float numbers[ACROSS_ROWS][NUMBERS];
    const uint8_t *packed = k->packed + row / ACROSS_ROWS * 4;
    float *out = k->out + row * k->cols;
    for (int each = 0; each < ACROSS_ROWS; each++) numbers_of(k, row + each, (k->first + col) / k->run, numbers[each]);
    for (; col + SINGLES <= stop; col += SINGLES) {
        uint32_t lanes[SINGLES];
        words all;
        for (int lane = 0; lane < SINGLES; lane++) memcpy(lanes + lane, packed + (col + lane) * k->word_step, 4);
        memcpy(&all, lanes, sizeof all);
        for (int each = 0; each < ACROSS_ROWS; each++) {
            singles table[NUMBERS / SINGLES];
            for (int part = 0; part < NUMBERS / SINGLES; part++) table[part] = load_singles(numbers[each] + part * SINGLES);
            singles found = look_up(table, (ints)(all >> shifts[each] & 15));
            STORE(out + each * k->cols + col, found);
        }
    }
    for (; col < stop; col++) {
        uint32_t word;
        memcpy(&word, packed + col * k->word_step, 4);
        for (int each = 0; each < ACROSS_ROWS; each++) out[each * k->cols + col] = numbers[each][word >> shifts[each] & 15];
    }
}

/* Columns of some rows, by which rows of the output are filled. */
static void decode_transposed(const struct codes *k, int64_t row, int64_t rows, int64_t col, int64_t stop) {
    float tile[TILE_ROWS][CHUNK + 16];
    for (int64_t each = 0; each < rows; each++) decode_run(k, row + each, col, stop, tile[each]);
    for (int64_t at = 0; at < stop - col; at++) {
        float *out = k->out + (col + at) * k->rows + row;
        if (rows == TILE_ROWS)
            for (int each = 0; each < TILE_ROWS; each++) out[each] = tile[each][at];
        else
            for (int64_t each = 0; each < rows; each++) out[each] = tile[each][at];
    }
}

/* Where the columns end that share a scale with `col`, and are decoded at once. */
INLINE int64_t end_of_run(const struct codes *k, int64_t col) {
    int64_t stop = k->cols < col + CHUNK ? k->cols : col + CHUNK;
    int64_t end = k->index ? stop : ((k->first + col) / k->run + 1) * k->run - k->first;
    return end < stop ? end : stop;
}

/* A chunk of columns of all rows, then the next: words that lie apart stay in the cache for their neighbors. */
static void decode(const struct codes *k) {
    int64_t height = k->order == ACROSS ? ACROSS_ROWS : k->is_transposed ? TILE_ROWS : 1;
    if (k->word_step == 4 && k->order != ACROSS && !k->is_transposed) {
        for (int64_t row = 0; row < k->rows; row++)
            for (int64_t col = 0, stop; col < k->cols; col = stop)
                stop = end_of_run(k, col), decode_run(k, row, col, stop, k->out + row * k->cols + col);
        return;
    }
    for (int64_t col = 0, stop; col < k->cols; col = stop) {
        stop = end_of_run(k, col);
        for (int64_t row = 0; row < k->rows; row += height) {
            if (k->order == ACROSS)
                decode_across(k, row, col, stop);
            else if (k->is_transposed)
                decode_transposed(k, row, k->rows - row < height ? k->rows - row : height, col, stop);
            else
                decode_run(k, row, col, stop, k->out + row * k->cols + col);
        }
    }
}

#endif
