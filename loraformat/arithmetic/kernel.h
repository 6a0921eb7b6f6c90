/* What kernel.c and loops.c share. loraformat/arithmetic/compiled.py and products.py describe the arguments. */
#ifndef LORAFORMAT_KERNEL_H
#define LORAFORMAT_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#define VERSION 3 /* of the arguments; as in compiled.py */

enum type { BF16 = 0, F16 = 1, F32 = 2, F64 = 3 };

/* A tally has four figures: kept, whole, changed, largest. */
struct window {
    const uint8_t *raw;
    uint8_t *out;
    const double *left, *right;
    int64_t rank, rows, cols, tile;
    double *tallies;
};

struct finish {
    const uint8_t *raw;
    uint8_t *out;
    const double *result, *update;
    int64_t rows, cols, tile;
    double *tallies;
};

/* The functions of one instruction set. */
struct loops {
    void (*window)(const struct window *, int in, int out);
    void (*product)(const double *left, int64_t rank, const double *right, int64_t rows, int64_t cols, double *out);
    void (*finish)(const struct finish *, int in, int out);
};

extern const struct loops loraformat_avx2, loraformat_avx512, loraformat_neon;

#endif
