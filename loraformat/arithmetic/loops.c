/* The loops of a merge for one instruction set; compiled once for each (hatch_build.py).
 *
 * Each float64 value is one chain of fused multiply-adds in the order of the rank, so that it depends on its row of L, its
 * column of R and its W alone: not on windows, threads or tiles, nor on the instruction set. The compiler makes the fused
 * multiply-adds (-ffp-contract=fast) of every `sum += a * b`; no other expression here may mix a product into a sum,
 * unless the product is exact.
 *
 * Where the output has 16 bits, the chain is computed in float32 first. A value whose float32 sum is farther than a proved
 * bound from the middle between two neighbors rounds as that of float64; the others are computed in float64. The proof is
 * in docs/decisions/0013-float32-first.md. Tallies are sums of float32 numbers there, in bands where that is enough.
 */
#include "codes/convert.h"
#include "codes/round.h"
#include "kernel.h"
#include "narrow.h"
#include "registers.h"

#include <math.h>
#include <stdlib.h>

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || __FINITE_MATH_ONLY__
#error "the order of sums, zeros and NaN matter here: compile without -ffast-math"
#endif

#define SINGLE_PARTS (COLS / SINGLES)
#define SUMS 8 /* sums over a row are made for every 8th column, then added up */
#define SUM_PARTS (SUMS / DOUBLES)
#define PANEL 64    /* rows of a product */
#define BAND 16     /* rows after which it is decided whether float32 first pays */
#define FLUSH 8     /* blocks of columns whose products are summed in float32 */
#define OPEN 4      /* chains in float64 that are computed together */
#define READY 8     /* registers that wait for them before they are, while their columns of R are in the cache */
#define ROUNDOFF 0x1p-24 /* of float32 */
#define MARGIN (1 + 0x1p-9)
#define OUTER 2 /* float32 numbers by which an interval is widened, away from zero and towards it */
#define INNER 3
#define MOST_OPEN 8 /* one block of so many: above this share float32 first does not pay */
/* Where tallies of a band in float32 have their digits: see 0013. */
#define MOST_CANCELED 4
#define LEAST_KEPT 64

#define EXPONENT 0x7ff0000000000000
#define SIGN ((int64_t)1 << 63)
#define NAN_DOUBLE 0x7ff8000000000000

/* Before loops over code that is long: one copy of it is enough. */
#if defined(__clang__)
#define ONE_BY_ONE _Pragma("clang loop unroll(disable)")
#else
#define ONE_BY_ONE _Pragma("GCC unroll 1")
#endif

/* --- float64 ------------------------------------------------------------------------------------------------------ */

struct sums {
    doubles kept[SUM_PARTS], whole[SUM_PARTS], largest[SUM_PARTS];
    longs changed;
};

INLINE doubles read_doubles(const uint8_t *from, enum type type) {
    if (type == F64) return load_doubles(from);
    if (type == F32) return __builtin_convertvector(load_few_singles(from), doubles);
    few_halves half = load_few_halves(from);
    if (type == F16) return __builtin_convertvector(few_singles_of(half), doubles);
    return __builtin_convertvector((few_singles)(__builtin_convertvector(half, few_words) << 16), doubles);
}

/* Values rounded to multiples of the unit in the last place of a type of 16 bits; too large ones stay too large for it. */
INLINE doubles on_grid(doubles exact, enum type type) {
    const double least = type == BF16 ? 0x1p-126 : 0x1p-14, units = type == BF16 ? 0x1.8p45 : 0x1.8p42;
    longs power = (longs)exact & EXPONENT, low = (longs)((doubles){0} + least), high = (longs)((doubles){0} + 0x1p200);
    longs is_low = power < low, is_high = power > high;
    power = (low & is_low) | (power & ~is_low);
    power = (high & is_high) | (power & ~is_high);
    doubles large = (doubles)power * units; /* exact, and so may be fused into the sums */
    doubles rounded = (exact + large) - large;
    return (doubles)((longs)rounded | ((longs)exact & SIGN));
}

/* Stores values rounded to the nearest, ties to even, every NaN as the same; gives back what it stored. */
INLINE doubles write_doubles(uint8_t *into, enum type type, doubles exact) {
    if (type == BF16 || type == F16) exact = on_grid(exact, type);
    exact = choose_doubles(exact == exact, exact, (doubles)((longs){0} + NAN_DOUBLE));
    if (type == F64) {
        STORE(into, exact);
        return exact;
    }
    few_singles single = __builtin_convertvector(exact, few_singles);
    if (type == F32) {
        STORE(into, single);
    } else if (type == BF16) {
        few_halves half = __builtin_convertvector((few_words)single >> 16, few_halves);
        STORE(into, half);
    } else {
        few_halves half = few_halves_of(single);
        STORE(into, half);
        single = few_singles_of(half);
    }
    return __builtin_convertvector(single, doubles);
}

/* COLS columns of one row: updates in `delta`, sums with the base in `sum`, base at `raw`, result to `out`. */
INLINE void finish_block(const doubles *delta, const doubles *sum, const uint8_t *raw, enum type in, uint8_t *out,
                         enum type to, struct sums *sums) {
    for (int part = 0; part < DOUBLE_PARTS; part++) {
        const uint8_t *from = raw + part * DOUBLES * size_of(in);
        uint8_t *into = out + part * DOUBLES * size_of(to);
        doubles base = read_doubles(from, in), update = delta[part];
        doubles written = write_doubles(into, to, sum ? sum[part] : base + update);
        if (in == to) {
            /* The very bits of the base: -0, and what a NaN carries, would not come through an addition. */
            longs same = (longs)(update == 0) | (longs)(base != base);
            if (__builtin_expect(any(same), 0)) {
                for (int lane = 0; lane < DOUBLES; lane++)
                    if (same[lane]) memcpy(into + lane * size_of(to), from + lane * size_of(in), size_of(to));
                written = choose_doubles(same, base, written);
            }
        }
        doubles change = choose_doubles(base - base == 0, written - base, (doubles){0});
        doubles size = (doubles)((longs)update & ~SIGN);
        int place = part % SUM_PARTS;
        sums->kept[place] += change * update;
        sums->whole[place] += update * update;
        sums->largest[place] = choose_doubles(size > sums->largest[place], size, sums->largest[place]);
        sums->changed -= (longs)(change != 0);
    }
}

/* The same for the last `there` columns of a row, at most COLS. What fills the others up changes no sum. */
INLINE void finish_columns(const doubles *delta, const doubles *sum, const uint8_t *raw, enum type in, uint8_t *out,
                           enum type to, int64_t there, struct sums *sums) {
    uint8_t from[COLS * 8] = {0}, into[COLS * 8];
    int is_whole = there >= COLS;
    if (!is_whole) memcpy(from, raw, there * size_of(in));
    finish_block(delta, sum, is_whole ? raw : from, in, is_whole ? out : into, to, sums);
    if (!is_whole) memcpy(out, into, there * size_of(to));
}

/* Sums of one row added to a tally. */
INLINE void add_sums(const struct sums *sums, double *tally) {
    for (int lane = 0; lane < DOUBLES; lane++) tally[2] += (double)sums->changed[lane];
    for (int part = 0; part < SUM_PARTS; part++)
        for (int lane = 0; lane < DOUBLES; lane++) {
            double size = sums->largest[part][lane];
            tally[0] += sums->kept[part][lane];
            tally[1] += sums->whole[part][lane];
            tally[3] = size > tally[3] ? size : tally[3];
        }
}

/* Chains of `rows` rows, at most DOUBLE_ROWS, for a block of columns. */
INLINE void chains(int rows, const double *left, int64_t rank, const double *right, doubles (*delta)[DOUBLE_PARTS]) {
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < DOUBLE_PARTS; part++) delta[row][part] = (doubles){0};
    for (int64_t k = 0; k < rank; k++, right += COLS)
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < DOUBLE_PARTS; part++)
                delta[row][part] += load_doubles(right + part * DOUBLES) * left[row * rank + k];
}

/* `rows` rows from `row` on, computed in float64; their sums added to a tally. */
INLINE void rows_in_double(int rows, const struct window *w, int64_t row, enum type in, enum type to, double *tally) {
    struct sums sums[DOUBLE_ROWS];
    memset(sums, 0, rows * sizeof *sums);
    const double *right = w->right;
    for (int64_t col = 0; col < w->cols; col += COLS, right += w->rank * COLS) {
        doubles delta[DOUBLE_ROWS][DOUBLE_PARTS];
        chains(rows, w->left + row * w->rank, w->rank, right, delta);
        ONE_BY_ONE
        for (int each = 0; each < rows; each++) {
            int64_t at = (row + each) * w->cols + col;
            finish_columns(delta[each], NULL, w->raw + at * size_of(in), in, w->out + at * size_of(to), to,
                           w->cols - col, sums + each);
        }
    }
    for (int each = 0; each < rows; each++) add_sums(sums + each, tally);
}

/* --- float32 first ------------------------------------------------------------------------------------------------ */

/* A band of L in float32, R likewise, and what bounds the error of a product: row_bound[i] · narrow->bound[j]. */
struct singles {
    const struct narrow *narrow;
    float *left; /* (rank, BAND) */
    float row_bound[BAND];
    double terms; /* the sum of the squares of all terms of the products of the band */
};

struct single_sums {
    singles kept[SINGLE_PARTS], sizes[SINGLE_PARTS], whole[SINGLE_PARTS], largest[SINGLE_PARTS];
    ints place[SINGLE_PARTS]; /* of the largest: its block of columns */
    ints changed;
    double total_kept[COLS], total_sizes[COLS], total_whole[COLS];
    /* What float64 made of values that the bound left open. */
    double corrected_kept, corrected_changed;
};

/* Of one band: a tally, what `kept` would be if no two of its terms canceled, and where the largest update is. */
struct band {
    double tally[4], sizes;
    float largest;
    int64_t row, col;
};

/* Where in a band values are left open: places of a row that fill a register of float64. */
struct queue {
    int64_t length, blocks; /* waiting; all that ever had a value left open */
    struct {
        int64_t row, col;
        struct single_sums *sums;
    } items[READY + SINGLE_ROWS * DOUBLE_PARTS];
};

/* Rows of L made ready as a band. */
INLINE void narrow_band(const struct window *w, int64_t row, int64_t stop, struct singles *s) {
    double weighted_squares[BAND] = {0};
    memset(s->left, 0, w->rank * BAND * sizeof(float));
    s->terms = 0;
    for (int64_t k = 0; k < w->rank; k++) {
        double weight = roundings(k, w->rank), squares = 0;
        for (int64_t each = 0; each < stop - row; each++) {
            double value = w->left[(row + each) * w->rank + k], weighted = weight * value;
            weighted_squares[each] += weighted * value;
            squares += value * value;
            s->left[k * BAND + each] = (float)value;
        }
        s->terms += squares * s->narrow->squares[k];
    }
    for (int each = 0; each < BAND; each++) s->row_bound[each] = bound_of(weighted_squares[each], ROUNDOFF * MARGIN);
}

/* The first lanes of a register; of a whole one by instructions, not by a call. */
INLINE void copy_lanes(uint8_t *to, const uint8_t *from, int64_t lanes, int64_t size) {
    if (lanes == DOUBLES)
        memcpy(to, from, DOUBLES * size);
    else
        memcpy(to, from, lanes * size);
}

/* A register of values in float64, from `col` on: W + update, rounded, to where its float32 form stands. */
INLINE void settle_one(const struct window *w, int64_t row, int64_t col, doubles update, enum type in, enum type to,
                       struct single_sums *sums) {
    int64_t at = row * w->cols + col, there = w->cols - col < DOUBLES ? w->cols - col : DOUBLES;
    uint8_t from[DOUBLES * 4] = {0}, before[DOUBLES * 2] = {0}, after[DOUBLES * 2];
    copy_lanes(from, w->raw + at * size_of(in), there, size_of(in));
    copy_lanes(before, w->out + at * 2, there, 2);
    doubles base = read_doubles(from, in), written = write_doubles(after, to, base + update);
    if (in == to) {
        longs same = (longs)(update == 0);
        for (int lane = 0; lane < DOUBLES; lane++)
            if (same[lane]) memcpy(after + lane * 2, from + lane * 2, 2);
        written = choose_doubles(same, base, written);
    }
    copy_lanes(w->out + at * 2, after, there, 2);
    doubles first = read_doubles(before, to);
    if (!any((longs)(written != first))) return;
    for (int lane = 0; lane < there; lane++) {
        sums->corrected_kept += (written[lane] - first[lane]) * update[lane];
        sums->corrected_changed += (written[lane] != base[lane]) - (first[lane] != base[lane]);
    }
}

/* Every value of the queue, OPEN registers at a time; R is taken in float32, which is nearer, where it is the same. */
INLINE void settle_from(const struct window *w, const struct singles *s, int is_exact, struct queue *queue, enum type in,
                        enum type to) {
    for (int64_t low = 0; low < queue->length; low += OPEN) {
        const double *left[OPEN];
        int64_t right[OPEN];
        doubles sums[OPEN] = {{0}}, update[OPEN];
        for (int each = 0; each < OPEN; each++) {
            int64_t item = low + each < queue->length ? low + each : low, col = queue->items[item].col;
            left[each] = w->left + queue->items[item].row * w->rank;
            right[each] = col / COLS * COLS * w->rank + col % COLS;
        }
        for (int64_t k = 0; k < w->rank; k++)
            for (int each = 0; each < OPEN; each++) {
                int64_t at = right[each] + k * COLS;
                doubles value = is_exact ? __builtin_convertvector(load_few_singles(s->narrow->right + at), doubles)
                                         : load_doubles(w->right + at);
                sums[each] += value * left[each][k];
            }
        memcpy(update, sums, sizeof update); /* `sums` stay in registers */
        for (int each = 0; each < OPEN && low + each < queue->length; each++)
            settle_one(w, queue->items[low + each].row, queue->items[low + each].col, update[each], in, to,
                       queue->items[low + each].sums);
    }
    queue->length = 0;
}

static __attribute__((noinline)) void settle(const struct window *w, const struct singles *s, struct queue *queue,
                                             enum type in, enum type to) {
    if (s->narrow->is_exact)
        settle_from(w, s, 1, queue, in, to);
    else
        settle_from(w, s, 0, queue, in, to);
}

/* The registers of a block in which values are open are queued. */
INLINE void leave_open(const ints *is_open, int64_t row, int64_t col, int64_t cols, struct single_sums *sums,
                       struct queue *queue) {
    int32_t lanes[COLS];
    queue->blocks++;
    memcpy(lanes, is_open, sizeof lanes);
    for (int first = 0; first < COLS && col + first < cols; first += DOUBLES) {
        int32_t is_any = 0;
        for (int lane = 0; lane < DOUBLES; lane++) is_any |= lanes[first + lane];
        if (!is_any) continue;
        queue->items[queue->length].row = row;
        queue->items[queue->length].col = col + first;
        queue->items[queue->length++].sums = sums;
    }
}

/* COLS columns of one row, whose float32 products are in `delta`. */
INLINE void finish_single_block(const struct window *w, int64_t row, int64_t col, const singles *delta,
                                const uint8_t *raw, enum type in, uint8_t *out, enum type to, float row_bound,
                                const float *column_bound, struct single_sums *sums, struct queue *queue) {
    singles base[SINGLE_PARTS], written[SINGLE_PARTS];
    ints is_open[SINGLE_PARTS], any_open = {0};
    for (int part = 0; part < SINGLE_PARTS; part++) {
        base[part] = read_singles(raw + part * SINGLES * size_of(in), in);
        singles sum = base[part] + delta[part], error = load_singles(column_bound + part * SINGLES) * row_bound;
        error = (singles)((ints)error | ((ints)sum & INT32_MIN));
        ints outer = (ints)(sum + error) + OUTER, inner = (ints)(sum - error) - INNER;
        if (to == BF16) {
            outer += 0x8000, inner += 0x8000;
            is_open[part] = (outer ^ inner) & ~0xffff;
            written[part] = (singles)(outer & ~0xffff);
        } else {
            halves first = halves_of((singles)outer), second = halves_of((singles)inner);
            /* Zeros, and the number next to them, are never taken: their sign and their neighbors need more care. */
            halves is_half_open = (first ^ second) | (halves)((first & 0x7fff) < 2);
            is_open[part] = (ints)__builtin_convertvector(is_half_open, words);
            written[part] = singles_of(first);
        }
        any_open |= is_open[part];
    }
    if (__builtin_expect(any((longs)any_open), 0)) leave_open(is_open, row, col, w->cols, sums, queue);
    for (int part = 0; part < SINGLE_PARTS; part++) {
        halves half = to == BF16 ? __builtin_convertvector((words)written[part] >> 16, halves) : halves_of(written[part]);
        STORE(out + part * SINGLES * 2, half);
        singles change = written[part] - base[part], size = (singles)((ints)delta[part] & INT32_MAX);
        ints is_larger = size > sums->largest[part];
        sums->kept[part] += change * delta[part];
        sums->whole[part] += delta[part] * delta[part];
        if (in != to) sums->sizes[part] += (singles)((ints)(change * delta[part]) & INT32_MAX);
        sums->largest[part] = choose_singles(is_larger, size, sums->largest[part]);
        sums->place[part] = (is_larger & (int32_t)(col / COLS)) | (sums->place[part] & ~is_larger);
        sums->changed -= (ints)(change != 0);
    }
}

/* The same for the last columns of a row, at most COLS. What fills the others up is 1, to which nothing is added. */
INLINE void finish_single_columns(const struct window *w, const struct singles *s, int64_t row, int64_t col,
                                  const singles *delta, enum type in, enum type to, struct single_sums *sums,
                                  struct queue *queue) {
    int64_t at = row * w->cols + col, there = w->cols - col;
    const uint8_t *raw = w->raw + at * size_of(in), *from = raw;
    uint8_t *out = w->out + at * 2, *into = out, old[COLS * 4], new[COLS * 2];
    if (there < COLS) {
        uint32_t one = in == BF16 ? 0x3f80 : in == F16 ? 0x3c00 : 0x3f800000;
        for (int place = 0; place < COLS; place++) memcpy(old + place * size_of(in), &one, size_of(in));
        memcpy(old, raw, there * size_of(in));
        from = old, into = new;
    }
    finish_single_block(w, row, col, delta, from, in, into, to, s->row_bound[row % BAND], s->narrow->bound + col, sums,
                        queue);
    if (there < COLS) memcpy(out, new, there * 2);
}

/* float32 sums of some blocks into float64. */
INLINE void flush(struct single_sums *sums) {
    for (int place = 0; place < COLS; place++) {
        sums->total_kept[place] += (double)sums->kept[place / SINGLES][place % SINGLES];
        sums->total_sizes[place] += (double)sums->sizes[place / SINGLES][place % SINGLES];
        sums->total_whole[place] += (double)sums->whole[place / SINGLES][place % SINGLES];
    }
    memset(sums->kept, 0, sizeof sums->kept);
    memset(sums->sizes, 0, sizeof sums->sizes);
    memset(sums->whole, 0, sizeof sums->whole);
}

/* Sums of one row added to its band; whether they are finite. If not, a value is not, and nothing is added. */
INLINE int add_single_sums(const struct single_sums *sums, int64_t row, struct band *band) {
    double kept = sums->corrected_kept, sizes = 0, whole = 0, changed = sums->corrected_changed;
    float largest = 0;
    int64_t col = 0;
    for (int place = 0; place < COLS; place++) {
        float size = sums->largest[place / SINGLES][place % SINGLES];
        int64_t at = (int64_t)sums->place[place / SINGLES][place % SINGLES] * COLS + place;
        kept += sums->total_kept[place];
        sizes += sums->total_sizes[place];
        whole += sums->total_whole[place];
        if (size > largest || (size == largest && at < col)) largest = size, col = at;
    }
    for (int lane = 0; lane < SINGLES; lane++) changed += sums->changed[lane];
    if (!(kept - kept == 0)) return 0;
    band->tally[0] += kept;
    band->tally[1] += whole;
    band->tally[2] += changed;
    band->sizes += sizes;
    if (largest > band->largest) band->largest = largest, band->row = row, band->col = col;
    return 1;
}

/* Chains of `rows` rows, at most SINGLE_ROWS, for a block of columns. */
INLINE void single_chains(int rows, const float *left, int64_t rank, const float *right,
                          singles (*delta)[SINGLE_PARTS]) {
    singles sums[SINGLE_ROWS][SINGLE_PARTS];
    for (int64_t low = 0; low == 0 || low < rank; low += LINK) {
        int64_t high = low + LINK < rank ? low + LINK : rank;
        for (int each = 0; each < rows; each++)
            for (int part = 0; part < SINGLE_PARTS; part++) sums[each][part] = (singles){0};
        for (int64_t k = low; k < high; k++)
            for (int each = 0; each < rows; each++)
                for (int part = 0; part < SINGLE_PARTS; part++)
                    sums[each][part] += load_singles(right + k * COLS + part * SINGLES) * left[k * BAND + each];
        for (int each = 0; each < rows; each++)
            for (int part = 0; part < SINGLE_PARTS; part++)
                delta[each][part] = low ? delta[each][part] + sums[each][part] : sums[each][part];
    }
}

/* `rows` rows from `row` on, all of one band. */
INLINE void rows_in_single(int rows, const struct window *w, const struct singles *s, int64_t row, enum type in,
                           enum type to, struct band *band, struct queue *queue) {
    struct single_sums sums[SINGLE_ROWS];
    memset(sums, 0, rows * sizeof *sums);
    const float *right = s->narrow->right, *left = s->left + row % BAND;
    int64_t until_flush = FLUSH;
    for (int64_t col = 0; col < w->cols; col += COLS, right += w->rank * COLS) {
        singles delta[SINGLE_ROWS][SINGLE_PARTS];
        single_chains(rows, left, w->rank, right, delta);
        if (queue->length >= READY) settle(w, s, queue, in, to);
        ONE_BY_ONE
        for (int each = 0; each < rows; each++)
            finish_single_columns(w, s, row + each, col, delta[each], in, to, sums + each, queue);
        if (--until_flush == 0 || col + COLS >= w->cols) {
            for (int each = 0; each < rows; each++) flush(sums + each);
            until_flush = FLUSH;
        }
    }
    settle(w, s, queue, in, to);
    for (int each = 0; each < rows; each++)
        if (!add_single_sums(sums + each, row + each, band)) rows_in_double(1, w, row + each, in, to, band->tally);
}

/* --- windows ------------------------------------------------------------------------------------------------------ */

/* Of a band in float32: the next one too; float64 from the next one on; float64 for this one and all others. */
enum verdict { GO_ON, DONE, REDO };

/* Whether the sums of a band are as near to those of float64 as six digits need: neither the terms of the updates nor
 * those of `kept` cancel. */
INLINE int has_digits(const struct singles *s, const struct band *band, double values, enum type in, enum type to) {
    if (!(s->terms <= MOST_CANCELED * band->tally[1])) return 0;
    return in == to || band->tally[0] * band->tally[0] * values >= LEAST_KEPT * band->sizes * band->sizes;
}

/* The largest update of a band as float64 has it. */
INLINE double largest_of(const struct window *w, const struct band *band) {
    const double *left = w->left + band->row * w->rank;
    const double *right = w->right + band->col / COLS * COLS * w->rank + band->col % COLS;
    double sum = 0;
    for (int64_t k = 0; k < w->rank; k++) sum += right[k * COLS] * left[k];
    sum = fabs(sum);
    return sum > band->tally[3] ? sum : band->tally[3];
}

/* Rows of one band. If its sums lack digits, it is as if nothing had been done. */
INLINE enum verdict band_in_single(const struct window *w, struct singles *s, int64_t row, int64_t stop, enum type in,
                                   enum type to, double *tally) {
    struct queue queue;
    struct band band;
    int64_t rows = stop - row, blocks = rows * ((w->cols + COLS - 1) / COLS);
    queue.length = queue.blocks = 0;
    memset(&band, 0, sizeof band);
    narrow_band(w, row, stop, s);
    for (; row + SINGLE_ROWS <= stop; row += SINGLE_ROWS) rows_in_single(SINGLE_ROWS, w, s, row, in, to, &band, &queue);
    for (; row + 4 <= stop; row += 4) rows_in_single(4, w, s, row, in, to, &band, &queue);
    for (; row < stop; row++) rows_in_single(1, w, s, row, in, to, &band, &queue);
    if (!has_digits(s, &band, (double)(rows * w->cols), in, to)) return REDO;
    double largest = band.largest > 0 ? largest_of(w, &band) : band.tally[3];
    for (int figure = 0; figure < 3; figure++) tally[figure] += band.tally[figure];
    tally[3] = largest > tally[3] ? largest : tally[3];
    return queue.blocks * MOST_OPEN <= blocks ? GO_ON : DONE;
}

/* What depends on nothing but the tile, so that neither windows nor the instruction set show in the tallies: in which
 * rows float32 comes first, and the order of all sums. */
INLINE void tiles(const struct window *w, enum type in, enum type to) {
    struct singles s = {w->narrow, NULL, {0}, 0};
    if (w->narrow && w->tile % BAND == 0) s.left = malloc(w->rank * BAND * sizeof(float));
    double *tally = w->tallies;
    for (int64_t low = 0; low < w->rows; low += w->tile, tally += 4) {
        int64_t high = low + w->tile < w->rows ? low + w->tile : w->rows, row = low;
        int is_single = s.left != NULL;
        tally[0] = tally[1] = tally[2] = tally[3] = 0;
        while (is_single && row < high) {
            int64_t stop = row + BAND < high ? row + BAND : high;
            enum verdict found = band_in_single(w, &s, row, stop, in, to, tally);
            is_single = found == GO_ON;
            row = found == REDO ? row : stop;
        }
        for (; row + DOUBLE_ROWS <= high; row += DOUBLE_ROWS) rows_in_double(DOUBLE_ROWS, w, row, in, to, tally);
        for (; row < high; row++) rows_in_double(1, w, row, in, to, tally);
    }
    free(s.left);
}

/* A copy of the loops for each usual pair of types, so that nothing is decided inside of them, and one for all others. */
#define COPY(in, to)                                                                                                   \
    case in * 4 + to: tiles(w, in, to); break;
static void window(const struct window *w, int in, int to) {
    switch (in * 4 + to) {
        COPY(BF16, BF16) COPY(F16, F16) COPY(F32, F32)
        default: tiles(w, in, to);
    }
}
#undef COPY

/* Panel by panel of rows: a block of R is used for all rows of it while it is in the cache. */
static void product(const double *left, int64_t rank, const double *right, int64_t rows, int64_t cols, double *out) {
    for (int64_t low = 0; low < rows; low += PANEL) {
        int64_t high = low + PANEL < rows ? low + PANEL : rows;
        for (int64_t col = 0; col < cols; col += COLS) {
            const double *block = right + col * rank;
            size_t nbytes = (col + COLS <= cols ? COLS : cols - col) * sizeof(double);
            doubles delta[DOUBLE_ROWS][DOUBLE_PARTS];
            int64_t row = low;
            for (; row + DOUBLE_ROWS <= high; row += DOUBLE_ROWS) {
                chains(DOUBLE_ROWS, left + row * rank, rank, block, delta);
                for (int each = 0; each < DOUBLE_ROWS; each++)
                    memcpy(out + (row + each) * cols + col, delta[each], nbytes);
            }
            for (; row < high; row++) {
                chains(1, left + row * rank, rank, block, delta);
                memcpy(out + row * cols + col, delta[0], nbytes);
            }
        }
    }
}

static void finish(const struct finish *f, int in, int to) {
    double *tally = f->tallies;
    for (int64_t row = 0; row < f->rows; row++) {
        if (row % f->tile == 0) {
            if (row) tally += 4;
            tally[0] = tally[1] = tally[2] = tally[3] = 0;
        }
        struct sums sums;
        memset(&sums, 0, sizeof sums);
        for (int64_t col = 0; col < f->cols; col += COLS) {
            int64_t at = row * f->cols + col, there = f->cols - col < COLS ? f->cols - col : COLS;
            doubles delta[DOUBLE_PARTS] = {{0}}, sum[DOUBLE_PARTS] = {{0}};
            /* Of a size that is known, so that it is not a call. */
            memcpy(delta, f->update + at, there == COLS ? COLS * sizeof(double) : there * sizeof(double));
            memcpy(sum, f->result + at, there == COLS ? COLS * sizeof(double) : there * sizeof(double));
            finish_columns(delta, sum, f->raw + at * size_of(in), in, f->out + at * size_of(to), to, there, &sums);
        }
        add_sums(&sums, tally);
    }
}

const struct loops TABLE = {narrow, window, product, finish, convert, decode};
