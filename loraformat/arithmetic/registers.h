/* The registers of one instruction set: their width, and the few operations that vector extensions lack. */
#ifndef LORAFORMAT_REGISTERS_H
#define LORAFORMAT_REGISTERS_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 64
#define TABLE loraformat_avx512
#define DOUBLE_ROWS 8  /* rows that are computed together, so many that their sums fit into the registers */
#define SINGLE_ROWS 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define WIDTH 32
#define TABLE loraformat_avx2
#define DOUBLE_ROWS 3
#define SINGLE_ROWS 6
#elif defined(__aarch64__)
#include <arm_neon.h>
#define WIDTH 16
#define TABLE loraformat_neon
#define DOUBLE_ROWS 3
#define SINGLE_ROWS 6
#else
#error "compile with the options of hatch_build.py"
#endif

#define DOUBLES (WIDTH / 8) /* in a register */
#define SINGLES (WIDTH / 4)

#define VECTOR(element, nbytes) element __attribute__((vector_size(nbytes)))
typedef VECTOR(double, WIDTH) doubles;
typedef VECTOR(int64_t, WIDTH) longs;
typedef VECTOR(float, WIDTH) singles;
typedef VECTOR(int32_t, WIDTH) ints;
typedef VECTOR(uint32_t, WIDTH) words;
typedef VECTOR(uint16_t, WIDTH / 2) halves;
/* As many as there are doubles in a register. */
typedef VECTOR(float, WIDTH / 2) few_singles;
typedef VECTOR(uint32_t, WIDTH / 2) few_words;
typedef VECTOR(uint16_t, WIDTH / 4) few_halves;
/* As many as there are float32 numbers in a register, and 16 of them. */
typedef VECTOR(uint8_t, WIDTH / 4) few_octets;
typedef VECTOR(uint8_t, 16) octets;

/* Loads and stores of any alignment. */
#define LOAD(type)                                                                                                     \
    INLINE type load_##type(const void *from) {                                                                        \
        type value;                                                                                                    \
        memcpy(&value, from, sizeof value);                                                                            \
        return value;                                                                                                  \
    }
LOAD(doubles) LOAD(singles) LOAD(ints) LOAD(halves) LOAD(few_singles) LOAD(few_halves) LOAD(octets)
#undef LOAD
#define STORE(to, value) memcpy(to, &(value), sizeof(value))

INLINE singles singles_of(halves values);         /* float16 to float32 */
INLINE halves halves_of(singles values);          /* and back, to the nearest, ties to even */
INLINE few_singles few_singles_of(few_halves values);
INLINE few_halves few_halves_of(few_singles values);
INLINE int any(longs mask);                       /* whether any bit is set */
INLINE singles look_up(const singles *table, ints places); /* numbers of a table of 16 */
INLINE octets look_up_octets(octets table, octets places); /* bytes of a table of 16 */
INLINE octets low_in_turn(octets first, octets second);    /* the first 8 bytes of both: one of each in turn */
INLINE octets high_in_turn(octets first, octets second);   /* their last 8 bytes */
INLINE octets low_pairs_in_turn(octets first, octets second); /* the same of pairs of bytes, 4 of each */
INLINE octets high_pairs_in_turn(octets first, octets second);

#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#if WIDTH == 64
INLINE singles singles_of(halves values) { return (singles)_mm512_cvtph_ps((__m256i)values); }
INLINE halves halves_of(singles values) { return (halves)_mm512_cvtps_ph((__m512)values, NEAREST); }
INLINE few_singles few_singles_of(few_halves values) { return (few_singles)_mm256_cvtph_ps((__m128i)values); }
INLINE few_halves few_halves_of(few_singles values) { return (few_halves)_mm256_cvtps_ph((__m256)values, NEAREST); }
INLINE int any(longs mask) { return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0; }
INLINE singles look_up(const singles *table, ints places) {
    return (singles)_mm512_permutexvar_ps((__m512i)places, (__m512)table[0]);
}
#elif WIDTH == 32
INLINE singles singles_of(halves values) { return (singles)_mm256_cvtph_ps((__m128i)values); }
INLINE halves halves_of(singles values) { return (halves)_mm256_cvtps_ph((__m256)values, NEAREST); }
INLINE few_singles few_singles_of(few_halves values) {
    __m128i wide = _mm_loadl_epi64((const __m128i *)&values);
    return (few_singles)_mm_cvtph_ps(wide);
}
INLINE few_halves few_halves_of(few_singles values) {
    __m128i wide = _mm_cvtps_ph((__m128)values, NEAREST);
    few_halves found;
    memcpy(&found, &wide, sizeof found);
    return found;
}
INLINE int any(longs mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }
INLINE singles look_up(const singles *table, ints places) {
    __m256 low = _mm256_permutevar8x32_ps((__m256)table[0], (__m256i)places);
    __m256 high = _mm256_permutevar8x32_ps((__m256)table[1], (__m256i)places);
    return (singles)_mm256_blendv_ps(low, high, (__m256)(places << 28));
}
#else
INLINE singles singles_of(halves values) { return (singles)vcvt_f32_f16((float16x4_t)values); }
INLINE halves halves_of(singles values) { return (halves)vcvt_f16_f32((float32x4_t)values); }
INLINE few_singles few_singles_of(few_halves values) {
    halves wide = {values[0], values[1]};
    singles found = singles_of(wide);
    return (few_singles){found[0], found[1]};
}
INLINE few_halves few_halves_of(few_singles values) {
    singles wide = {values[0], values[1]};
    halves found = halves_of(wide);
    return (few_halves){found[0], found[1]};
}
INLINE int any(longs mask) { return (mask[0] | mask[1]) != 0; }
INLINE singles look_up(const singles *table, ints places) {
    uint8x16x4_t bytes = {{(uint8x16_t)table[0], (uint8x16_t)table[1], (uint8x16_t)table[2], (uint8x16_t)table[3]}};
    return (singles)vqtbl4q_u8(bytes, (uint8x16_t)(places * 0x04040404 + 0x03020100));
}
#endif

#if defined(__aarch64__)
INLINE octets look_up_octets(octets table, octets places) {
    return (octets)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)places);
}
INLINE octets low_in_turn(octets first, octets second) {
    return (octets)vzip1q_u8((uint8x16_t)first, (uint8x16_t)second);
}
INLINE octets high_in_turn(octets first, octets second) {
    return (octets)vzip2q_u8((uint8x16_t)first, (uint8x16_t)second);
}
INLINE octets low_pairs_in_turn(octets first, octets second) {
    return (octets)vzip1q_u16((uint16x8_t)first, (uint16x8_t)second);
}
INLINE octets high_pairs_in_turn(octets first, octets second) {
    return (octets)vzip2q_u16((uint16x8_t)first, (uint16x8_t)second);
}
#else
INLINE octets look_up_octets(octets table, octets places) {
    return (octets)_mm_shuffle_epi8((__m128i)table, (__m128i)places);
}
INLINE octets low_in_turn(octets first, octets second) {
    return (octets)_mm_unpacklo_epi8((__m128i)first, (__m128i)second);
}
INLINE octets high_in_turn(octets first, octets second) {
    return (octets)_mm_unpackhi_epi8((__m128i)first, (__m128i)second);
}
INLINE octets low_pairs_in_turn(octets first, octets second) {
    return (octets)_mm_unpacklo_epi16((__m128i)first, (__m128i)second);
}
INLINE octets high_pairs_in_turn(octets first, octets second) {
    return (octets)_mm_unpackhi_epi16((__m128i)first, (__m128i)second);
}
#endif

/* Parts of 16 bytes as one, by way of the general registers: what is read back from memory right after it was written in
 * parts has to wait. */
INLINE octets octets_of(const few_octets *parts) {
#if WIDTH == 64
    return parts[0];
#elif WIDTH == 32
    uint64_t each[2];
    memcpy(each, parts, 8), memcpy(each + 1, parts + 1, 8);
    return (octets)(VECTOR(uint64_t, 16)){each[0], each[1]};
#else
    uint32_t each[4];
    for (int part = 0; part < 4; part++) memcpy(each + part, parts + part, 4);
    return (octets)(VECTOR(uint32_t, 16)){each[0], each[1], each[2], each[3]};
#endif
}

/* The first where the mask is set, else the second. */
INLINE doubles choose_doubles(longs mask, doubles yes, doubles no) {
    return (doubles)(((longs)yes & mask) | ((longs)no & ~mask));
}
INLINE singles choose_singles(ints mask, singles yes, singles no) {
    return (singles)(((ints)yes & mask) | ((ints)no & ~mask));
}

#endif
