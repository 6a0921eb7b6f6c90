/* Numbers of float32 and of 16 bits, read into registers and rounded from one type to another. */
#ifndef LORAFORMAT_CONVERT_H
#define LORAFORMAT_CONVERT_H

#include "../kernel.h"
#include "../registers.h"

#define NAN_SINGLE 0x7fc00000
#define EXPONENT_SINGLE 0x7f800000
#define EXPONENT_BF16 0x7f80
#define EXPONENT_F16 0x7c00

INLINE int64_t size_of(enum type type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

INLINE singles read_singles(const uint8_t *from, enum type type) {
    if (type == F32) return load_singles(from);
    halves half = load_halves(from);
    if (type == F16) return singles_of(half);
    return (singles)(__builtin_convertvector(half, words) << 16);
}

/* A register of numbers of float32 rounded to a type of 16 bits, every NaN as the same. */
INLINE halves rounded(singles value, enum type out) {
    ints bits = (ints)value, nan = (ints){0} + NAN_SINGLE, is_nan = (ints)(value != value);
    if (out == F16) return halves_of((singles)((bits & ~is_nan) | (nan & is_nan)));
    words nearest = (words)bits + 0x7fff + ((words)bits >> 16 & 1);
    nearest = (nearest & (words)~is_nan) | (words)(nan & is_nan);
    return __builtin_convertvector(nearest >> 16, halves);
}

/* The same for every type, written; gives back whether all are finite. */
INLINE ints convert_singles(singles value, uint8_t *to, enum type out) {
    if (out == F32) {
        ints bits = (ints)value, nan = (ints){0} + NAN_SINGLE, is_nan = (ints)(value != value);
        value = (singles)((bits & ~is_nan) | (nan & is_nan));
        STORE(to, value);
        return ((ints)value & EXPONENT_SINGLE) != EXPONENT_SINGLE;
    }
    halves half = rounded(value, out);
    int32_t exponent = out == BF16 ? EXPONENT_BF16 : EXPONENT_F16;
    STORE(to, half);
    return (__builtin_convertvector(half, ints) & exponent) != exponent;
}

INLINE int converted(const uint8_t *from, enum type in, uint8_t *to, enum type out, int64_t count) {
    ints is_finite = ~(ints){0};
    int64_t low = 0;
    for (; low + SINGLES <= count; low += SINGLES)
        is_finite &= convert_singles(read_singles(from + low * size_of(in), in), to + low * size_of(out), out);
    if (low < count) {
        uint8_t old[WIDTH] = {0}, new[WIDTH];
        memcpy(old, from + low * size_of(in), (count - low) * size_of(in));
        is_finite &= convert_singles(read_singles(old, in), new, out);
        memcpy(to + low * size_of(out), new, (count - low) * size_of(out));
    }
    return !any((longs)~is_finite);
}

/* Whether numbers of 16 bits are finite. */
INLINE int are_finite(const uint8_t *numbers, enum type type, int64_t count) {
    uint16_t exponent = type == BF16 ? EXPONENT_BF16 : EXPONENT_F16, found = 0;
    for (int64_t at = 0; at < count; at++) {
        uint16_t number;
        memcpy(&number, numbers + 2 * at, 2);
        found |= (number & exponent) == exponent;
    }
    return !found;
}

static int convert(const uint8_t *from, int in, uint8_t *to, int out, int64_t count) {
    if (in == F32 && out == BF16) return converted(from, F32, to, BF16, count);
    if (in == F32 && out == F16) return converted(from, F32, to, F16, count);
    return converted(from, in, to, out, count);
}

#endif
