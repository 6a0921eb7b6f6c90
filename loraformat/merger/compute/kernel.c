/* Windows of plain products in one pass: W + L·R in float64, rounded once, and what became of L·R.
 *
 * Each value is one chain of fused multiply-adds in the order of the rank, so that it depends on nothing but its row of L,
 * its column of R and its W: not on windows, threads or tiles, nor on which of the two forms below a processor runs. Sums
 * over a row are made for every 8th column, then added up, then row by row.
 *
 * Called by loraformat/merger/compute/kernel.py, which describes the arguments; compiled by hatch_build.py.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VERSION 2

int loraformat_kernel_version(void) { return VERSION; }

#if defined(__x86_64__)
#include <immintrin.h>

#define COLS 16
#define SUMS 8
#define TYPES 3
#define INLINE static inline __attribute__((always_inline))
#define CUT 45            /* bits of a float64 that bfloat16 does not have */
#define NOT_FINITE 0x99   /* of vfpclass: quiet NaN, infinities, signalling NaN */
#define NOT_NORMAL 0xbf   /* and zeros and subnormal numbers */
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define ARGUMENTS                                                                                                      \
    const uint8_t *raw, int in_type, uint8_t *out, int out_type, const double *left, long rank, const double *right,   \
        long rows, long cols, long tile, double *tallies

enum type { BF16 = 0, F16 = 1, F32 = 2 };

INLINE size_t size_of(enum type type) { return type == F32 ? 4 : 2; }

/* The functions called `odd` give float32 with the last bit set where it is not exact, taken towards zero: what has 24
 * bits so rounds to 8 or 11 bits as the float64 does. Through the nearest float32 it would be rounded twice. Those called
 * `write` store values rounded to the nearest, ties to even, and give back what they stored. Those called `write_normal`
 * do so for bfloat16 in fewer steps, and tell whether all results are normal numbers; if not, what they stored is wrong. */

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

INLINE __m512d read_512(const void *from, enum type type) {
    if (type == F32) return _mm512_cvtps_pd(_mm256_loadu_ps((const float *)from));
    __m128i half = _mm_loadu_si128((const __m128i *)from);
    if (type == F16) return _mm512_cvtps_pd(_mm256_cvtph_ps(half));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
}

INLINE __m256 odd_512(__m512d exact) {
    __m256 near = _mm512_cvtpd_ps(exact);
    __m512d back = _mm512_cvtps_pd(near);
    __mmask8 is_beyond = _mm512_cmp_pd_mask(_mm512_abs_pd(back), _mm512_abs_pd(exact), _CMP_GT_OQ);
    __mmask8 is_inexact = _mm512_cmp_pd_mask(back, exact, _CMP_NEQ_UQ);
    __m256i bits = _mm256_castps_si256(near), one = _mm256_set1_epi32(1);
    bits = _mm256_mask_sub_epi32(bits, is_beyond, bits, one);
    return _mm256_castsi256_ps(_mm256_mask_or_epi32(bits, is_inexact, bits, one));
}

INLINE __m512d write_512(void *to, enum type type, __m512d exact) {
    if (type == F32) {
        __m256 single = _mm512_cvtpd_ps(exact);
        _mm256_storeu_ps((float *)to, single);
        return _mm512_cvtps_pd(single);
    }
    __m256 odd = odd_512(exact);
    if (type == F16) {
        __m128i half = _mm256_cvtps_ph(odd, NEAREST);
        _mm_storeu_si128((__m128i *)to, half);
        return _mm512_cvtps_pd(_mm256_cvtph_ps(half));
    }
    __m256i bits = _mm256_castps_si256(odd), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last), 16);
    bits = _mm256_mask_mov_epi32(bits, _mm256_cmp_ps_mask(odd, odd, _CMP_UNORD_Q), _mm256_set1_epi32(0x7fc0));
    _mm_storeu_si128((__m128i *)to, _mm256_cvtepi32_epi16(bits));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}

INLINE int write_normal_512(void *to, __m512d exact, __m512d *written) {
    __m512i bits = _mm512_castpd_si512(exact);
    __m512i last = _mm512_and_si512(_mm512_srli_epi64(bits, CUT), _mm512_set1_epi64(1));
    bits = _mm512_add_epi64(_mm512_add_epi64(bits, _mm512_set1_epi64((1L << (CUT - 1)) - 1)), last);
    *written = _mm512_castsi512_pd(_mm512_and_si512(bits, _mm512_set1_epi64(~((1L << CUT) - 1))));
    __m256 single = _mm512_cvtpd_ps(*written);
    _mm_storeu_si128((__m128i *)to, _mm256_cvtepi32_epi16(_mm256_srli_epi32(_mm256_castps_si256(single), 16)));
    return _mm256_fpclass_ps_mask(single, NOT_NORMAL) == 0;
}

INLINE int is_usual_512(__m512d base, __m512d delta) {
    return (_mm512_fpclass_pd_mask(base, NOT_FINITE) | _mm512_cmp_pd_mask(delta, _mm512_setzero_pd(), _CMP_EQ_OQ)) == 0;
}

INLINE __m512d largest_512(__m512d known, __m512d value) { return _mm512_max_pd(known, _mm512_abs_pd(value)); }

INLINE __m512d where_finite_512(__m512d base, __m512d value) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(base - base, _mm512_setzero_pd(), _CMP_EQ_OQ), value);
}

INLINE unsigned unchanged_512(__m512d base, __m512d delta) {
    return _mm512_cmp_pd_mask(delta, _mm512_setzero_pd(), _CMP_EQ_OQ) | _mm512_cmp_pd_mask(base, base, _CMP_UNORD_Q);
}

INLINE int nonzero_512(__m512d value) {
    return __builtin_popcount(_mm512_cmp_pd_mask(value, _mm512_setzero_pd(), _CMP_NEQ_UQ));
}

#define NAME(x) x##_512
#define VECTOR __m512d
#define LANES 8
#define AT_ONCE 8
#include "kernel_window.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

INLINE __m256d read_256(const void *from, enum type type) {
    if (type == F32) return _mm256_cvtps_pd(_mm_loadu_ps((const float *)from));
    __m128i half = _mm_loadl_epi64((const __m128i *)from);
    if (type == F16) return _mm256_cvtps_pd(_mm_cvtph_ps(half));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16)));
}

INLINE __m256d size_256(__m256d value) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), value); }

/* All bits of a lane, or none, in half the width. */
INLINE __m128i lanes_256(__m256d mask) {
    __m128 low = _mm_castpd_ps(_mm256_castpd256_pd128(mask)), high = _mm_castpd_ps(_mm256_extractf128_pd(mask, 1));
    return _mm_castps_si128(_mm_shuffle_ps(low, high, 0x88));
}

INLINE __m128 odd_256(__m256d exact) {
    __m128 near = _mm256_cvtpd_ps(exact);
    __m256d back = _mm256_cvtps_pd(near);
    __m128i is_beyond = lanes_256(_mm256_cmp_pd(size_256(back), size_256(exact), _CMP_GT_OQ));
    __m128i is_inexact = lanes_256(_mm256_cmp_pd(back, exact, _CMP_NEQ_UQ));
    __m128i bits = _mm_add_epi32(_mm_castps_si128(near), is_beyond);
    return _mm_castsi128_ps(_mm_or_si128(bits, _mm_srli_epi32(is_inexact, 31)));
}

INLINE __m256d write_256(void *to, enum type type, __m256d exact) {
    if (type == F32) {
        __m128 single = _mm256_cvtpd_ps(exact);
        _mm_storeu_ps((float *)to, single);
        return _mm256_cvtps_pd(single);
    }
    __m128 odd = odd_256(exact);
    if (type == F16) {
        __m128i half = _mm_cvtps_ph(odd, NEAREST);
        _mm_storel_epi64((__m128i *)to, half);
        return _mm256_cvtps_pd(_mm_cvtph_ps(half));
    }
    __m128i bits = _mm_castps_si128(odd), last = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    bits = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), last), 16);
    bits = _mm_blendv_epi8(bits, _mm_set1_epi32(0x7fc0), _mm_castps_si128(_mm_cmpunord_ps(odd, odd)));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi32(bits, bits));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}

INLINE int write_normal_256(void *to, __m256d exact, __m256d *written) {
    __m256i bits = _mm256_castpd_si256(exact);
    __m256i last = _mm256_and_si256(_mm256_srli_epi64(bits, CUT), _mm256_set1_epi64x(1));
    bits = _mm256_add_epi64(_mm256_add_epi64(bits, _mm256_set1_epi64x((1L << (CUT - 1)) - 1)), last);
    *written = _mm256_castsi256_pd(_mm256_and_si256(bits, _mm256_set1_epi64x(~((1L << CUT) - 1))));
    __m128i single = _mm_castps_si128(_mm256_cvtpd_ps(*written));
    __m128i half = _mm_srli_epi32(single, 16), size = _mm_and_si128(single, _mm_set1_epi32(0x7fffffff));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi32(half, half));
    __m128i is_small = _mm_cmpgt_epi32(_mm_set1_epi32(0x00800000), size);
    __m128i is_large = _mm_cmpgt_epi32(size, _mm_set1_epi32(0x7f7fffff));
    return _mm_movemask_epi8(_mm_or_si128(is_small, is_large)) == 0;
}

INLINE int is_usual_256(__m256d base, __m256d delta) {
    __m256d is_zero = _mm256_cmp_pd(delta, _mm256_setzero_pd(), _CMP_EQ_OQ);
    return _mm256_movemask_pd(_mm256_or_pd(is_zero, _mm256_cmp_pd(base - base, base - base, _CMP_UNORD_Q))) == 0;
}

INLINE __m256d largest_256(__m256d known, __m256d value) { return _mm256_max_pd(known, size_256(value)); }

INLINE __m256d where_finite_256(__m256d base, __m256d value) {
    return _mm256_and_pd(_mm256_cmp_pd(base - base, _mm256_setzero_pd(), _CMP_EQ_OQ), value);
}

INLINE unsigned unchanged_256(__m256d base, __m256d delta) {
    __m256d is_zero = _mm256_cmp_pd(delta, _mm256_setzero_pd(), _CMP_EQ_OQ);
    return (unsigned)_mm256_movemask_pd(_mm256_or_pd(is_zero, _mm256_cmp_pd(base, base, _CMP_UNORD_Q)));
}

INLINE int nonzero_256(__m256d value) {
    return __builtin_popcount((unsigned)_mm256_movemask_pd(_mm256_cmp_pd(value, _mm256_setzero_pd(), _CMP_NEQ_UQ)));
}

#define NAME(x) x##_256
#define VECTOR __m256d
#define LANES 4
#define AT_ONCE 3
#include "kernel_window.h"
#pragma GCC pop_options

/* 512 or 256: the width of the registers for which there is code that this processor runs; 0: none. */
int loraformat_kernel_width(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    int is_wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return is_wide ? 512 : 256;
}

void loraformat_kernel_window(int width, ARGUMENTS) {
    (width == 512 ? window_512 : window_256)(raw, in_type, out, out_type, left, rank, right, rows, cols, tile, tallies);
}

#else

int loraformat_kernel_width(void) { return 0; }

#endif
