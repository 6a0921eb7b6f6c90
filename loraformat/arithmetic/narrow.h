/* R in float32, and the weighted norms by which docs/decisions/0013-float32-first.md bounds the error of products. */
#ifndef LORAFORMAT_NARROW_H
#define LORAFORMAT_NARROW_H

#include "kernel.h"
#include "registers.h"

#include <math.h>

#define DOUBLE_PARTS (COLS / DOUBLES)
#define LINK 16            /* terms of one chain in float32; the sums of the chains are added up */
#define LEAST_NORM 0x1p-30 /* within these no float32 number overflows, and what underflows is below the bound's margin */
#define MOST_NORM 0x1p30

/* The weighted norm of the proof as a factor of the bound; infinite, so that float64 decides, where float32 may not do. */
INLINE float bound_of(double squares, double factor) {
    double norm = sqrt(squares);
    return norm >= LEAST_NORM && norm <= MOST_NORM ? (float)(norm * factor) : (float)INFINITY;
}

/* How many roundings the product of place k goes through: those of its factors, of its chain, and of the sums of chains. */
INLINE double roundings(int64_t k, int64_t rank) {
    int64_t chain = k / LINK, chains = (rank + LINK - 1) / LINK, end = (chain + 1) * LINK;
    return (double)(2 + (end < rank ? end : rank) - k + chains - (chain ? chain : 1));
}

/* See kernel.h. */
static void narrow(const double *right, int64_t rank, int64_t cols, struct narrow *n) {
    float *into = n->right, *bound = n->bound;
    double *squares = n->squares;
    longs is_inexact = {0};
    memset(squares, 0, rank * COLS * sizeof *squares);
    for (int64_t first = 0; first < cols; first += COLS, bound += COLS) {
        doubles weighted_squares[DOUBLE_PARTS] = {{0}};
        for (int64_t k = 0; k < rank; k++, right += COLS, into += COLS) {
            double weight = roundings(k, rank);
            for (int part = 0; part < DOUBLE_PARTS; part++) {
                double *all = squares + k * COLS + part * DOUBLES;
                doubles value = load_doubles(right + part * DOUBLES), weighted = value * weight, sum = load_doubles(all);
                few_singles single = __builtin_convertvector(value, few_singles);
                weighted_squares[part] += weighted * value;
                sum += value * value;
                is_inexact |= (longs)(__builtin_convertvector(single, doubles) != value);
                STORE(into + part * DOUBLES, single);
                STORE(all, sum);
            }
        }
        /* Columns that are not there have no update, and so no error. */
        for (int col = 0; col < COLS; col++)
            bound[col] = first + col < cols ? bound_of(weighted_squares[col / DOUBLES][col % DOUBLES], 1.0) : 0;
    }
    for (int64_t k = 0; k < rank; k++) {
        double sum = 0;
        for (int col = 0; col < COLS; col++) sum += squares[k * COLS + col];
        squares[k] = sum;
    }
    n->is_exact = !any(is_inexact);
}

#endif
