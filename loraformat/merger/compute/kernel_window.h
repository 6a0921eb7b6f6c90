/* The loops of kernel.c for one width of register, included once for each. Before it are defined
 *   NAME(x)  x with a suffix of its own
 *   VECTOR   LANES doubles in a register, with the operators of C
 *   AT_ONCE  rows of one product, so many that its sums fit into the registers
 * and the functions
 *   NAME(read), NAME(write), NAME(largest), NAME(nonzero)
 *   NAME(where_finite)  the second value where the first is finite, else 0
 *   NAME(unchanged)     one bit for each lane whose base is not a number or whose delta is zero
 *   NAME(is_usual)      whether every base is finite and no delta is zero
 *   NAME(write_normal)
 */
#define VECTORS (COLS / LANES)
typedef VECTOR NAME(unaligned) __attribute__((aligned(8)));

/* Sums of one row, for every SUMSth column. */
struct NAME(sums) {
    VECTOR kept[SUMS / LANES], whole[SUMS / LANES], largest[SUMS / LANES];
    long changed;
};

/* A register of results, whatever they are, at `into`; gives back what became of the base, which stands at `from`. */
INLINE VECTOR NAME(finish_any)(const uint8_t *from, enum type in, uint8_t *into, enum type to, VECTOR base,
                               VECTOR delta) {
    VECTOR written = NAME(write)(into, to, base + delta);
    unsigned same = in == to ? NAME(unchanged)(base, delta) : 0;
    /* The very bits of the base: -0, and what a NaN carries, would not come through an addition. */
    for (int lane = 0; same; lane++, same >>= 1)
        if (same & 1) memcpy(into + lane * size_of(to), from + lane * size_of(in), size_of(to));
    return NAME(where_finite)(base, written - base);
}

static __attribute__((noinline, cold)) VECTOR NAME(finish_unusual)(const uint8_t *from, enum type in, uint8_t *into,
                                                                   VECTOR base, VECTOR delta) {
    return NAME(finish_any)(from, in, into, BF16, base, delta);
}

/* COLS columns of one row: product in `delta`, base at `raw`, result to `out`. */
INLINE void NAME(finish)(const VECTOR *delta, const void *raw, enum type in, void *out, enum type to,
                         struct NAME(sums) *sums) {
    for (int part = 0; part < VECTORS; part++) {
        const uint8_t *from = (const uint8_t *)raw + part * LANES * size_of(in);
        uint8_t *into = (uint8_t *)out + part * LANES * size_of(to);
        VECTOR base = NAME(read)(from, in), written, change;
        if (to != BF16)
            change = NAME(finish_any)(from, in, into, to, base, delta[part]);
        else if (NAME(write_normal)(into, base + delta[part], &written) & NAME(is_usual)(base, delta[part]))
            change = written - base;
        else
            change = NAME(finish_unusual)(from, in, into, base, delta[part]);
        int place = part % (SUMS / LANES);
        sums->kept[place] += change * delta[part];
        sums->whole[place] += delta[part] * delta[part];
        sums->largest[place] = NAME(largest)(sums->largest[place], delta[part]);
        sums->changed += NAME(nonzero)(change);
    }
}

/* The same where only `there` columns are left. */
INLINE void NAME(finish_end)(const VECTOR *delta, const void *raw, enum type in, void *out, enum type to, long there,
                             struct NAME(sums) *sums) {
    uint8_t from[COLS * 4] = {0}, into[COLS * 4];
    memcpy(from, raw, there * size_of(in));
    NAME(finish)(delta, from, in, into, to, sums);
    memcpy(out, into, there * size_of(to));
}

/* `rows` rows, at most AT_ONCE; `raw`, `out` and `left` begin at the first. */
INLINE void NAME(rows)(int rows, const uint8_t *raw, enum type in, uint8_t *out, enum type to, const double *left,
                       long rank, const double *right, long cols, struct NAME(sums) *sums) {
    memset(sums, 0, rows * sizeof *sums);
    for (long col = 0; col < cols; col += COLS, right += rank * COLS) {
        VECTOR delta[AT_ONCE][VECTORS];
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < VECTORS; part++) delta[row][part] = (VECTOR){0};
        for (long k = 0; k < rank; k++) {
            const NAME(unaligned) *values = (const NAME(unaligned) *)(right + k * COLS);
            for (int row = 0; row < rows; row++)
                for (int part = 0; part < VECTORS; part++) delta[row][part] += values[part] * left[row * rank + k];
        }
        for (int row = 0; row < rows; row++) {
            const void *from = raw + (row * cols + col) * size_of(in);
            void *into = out + (row * cols + col) * size_of(to);
            if (col + COLS <= cols)
                NAME(finish)(delta[row], from, in, into, to, sums + row);
            else
                NAME(finish_end)(delta[row], from, in, into, to, cols - col, sums + row);
        }
    }
}

/* The sums of rows, in order, added to a tally: kept, whole, changed, largest. */
INLINE void NAME(add)(const struct NAME(sums) *sums, int rows, double *tally) {
    for (int row = 0; row < rows; row++) {
        tally[2] += (double)sums[row].changed;
        for (int part = 0; part < SUMS / LANES; part++)
            for (int lane = 0; lane < LANES; lane++) {
                double size = sums[row].largest[part][lane];
                tally[0] += sums[row].kept[part][lane];
                tally[1] += sums[row].whole[part][lane];
                tally[3] = size > tally[3] ? size : tally[3];
            }
    }
}

INLINE void NAME(tiles)(const uint8_t *raw, enum type in, uint8_t *out, enum type to, const double *left, long rank,
                        const double *right, long rows, long cols, long tile, double *tallies) {
    struct NAME(sums) sums[AT_ONCE];
    for (long low = 0; low < rows; low += tile, tallies += 4) {
        long high = low + tile < rows ? low + tile : rows, row = low;
        tallies[0] = tallies[1] = tallies[2] = tallies[3] = 0;
        for (; row + AT_ONCE <= high; row += AT_ONCE) {
            NAME(rows)(AT_ONCE, raw + row * cols * size_of(in), in, out + row * cols * size_of(to), to,
                       left + row * rank, rank, right, cols, sums);
            NAME(add)(sums, AT_ONCE, tallies);
        }
        for (; row < high; row++) {
            NAME(rows)(1, raw + row * cols * size_of(in), in, out + row * cols * size_of(to), to, left + row * rank,
                       rank, right, cols, sums);
            NAME(add)(sums, 1, tallies);
        }
    }
}

/* One copy of the loops for each pair of types, so that nothing is decided inside of them. */
#define COPY(in, to)                                                                                                   \
    case in * TYPES + to: NAME(tiles)(raw, in, out, to, left, rank, right, rows, cols, tile, tallies); break;
static void NAME(window)(ARGUMENTS) {
    switch (in_type * TYPES + out_type) {
        COPY(BF16, BF16) COPY(BF16, F16) COPY(BF16, F32)
        COPY(F16, BF16) COPY(F16, F16) COPY(F16, F32)
        COPY(F32, BF16) COPY(F32, F16) COPY(F32, F32)
    }
}
#undef COPY
#undef VECTORS
#undef AT_ONCE
#undef LANES
#undef VECTOR
#undef NAME
