/* What kernel.c and loops.c share. loraformat/arithmetic/compiled.py and products.py describe the arguments. */
#ifndef LORAFORMAT_KERNEL_H
#define LORAFORMAT_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#define VERSION 6 /* of the arguments; as in compiled.py */

#define COLS 16 /* in a block of R; as in factors.py */
#define MOST_RANK 4096 /* with which float32 comes first */

enum type { BF16 = 0, F16 = 1, F32 = 2, F64 = 3 };

/* R in float32, and what is known of it; of a window, which only reads it, and of all others that have the same R. */
struct narrow {
    float *right;    /* (blocks, rank, COLS) */
    float *bound;    /* (blocks, COLS): B of the proof for each column */
    double *squares; /* (rank): the sum of the squares of each row of R; room for rank · COLS while it is made */
    int is_exact;    /* whether all numbers of R are numbers of float32 */
};

/* A tally has four figures: kept, whole, changed, largest. `narrow` is NULL where all is to be computed in float64. */
struct window {
    const uint8_t *raw;
    uint8_t *out;
    const double *left, *right;
    int64_t rank, rows, cols, tile;
    double *tallies;
    const struct narrow *narrow;
};

struct finish {
    const uint8_t *raw;
    uint8_t *out;
    const double *result, *update;
    int64_t rows, cols, tile;
    double *tallies;
};

/* How the codes of a word, or of a byte, follow each other. */
enum order { LOW_FIRST = 0, HIGH_FIRST = 1, ACROSS = 2 };

/* Codes in rows; see loraformat/arithmetic/codes. Scales and zero points are (rows, groups), `zeros` and `index` may be
 * NULL. */
struct codes {
    const uint8_t *packed;
    int64_t row_step, word_step; /* bytes from a row to the next, from a word of 32 bits to the next of the same row */
    int64_t rows, cols, groups;
    int64_t run, first; /* columns that share a scale; the place of the first column among them */
    const int32_t *index;
    const float *table, *scales, *zeros;
    uint8_t *out;
    float factor;
    int bits, order, is_transposed;
    enum type type; /* of the output */
};

/* The functions of one instruction set. */
struct loops {
    void (*narrow)(const double *right, int64_t rank, int64_t cols, struct narrow *into);
    void (*window)(const struct window *, int in, int out);
    void (*product)(const double *left, int64_t rank, const double *right, int64_t rows, int64_t cols, double *out);
    void (*finish)(const struct finish *, int in, int out);
    int (*convert)(const uint8_t *from, int in, uint8_t *to, int out, int64_t count);
    int (*decode)(const struct codes *);
};

extern const struct loops loraformat_avx2, loraformat_avx512, loraformat_neon;

#endif
