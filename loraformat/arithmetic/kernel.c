/* Which of the compiled loops this processor runs, and the functions that Python calls.
 *
 * loops.c is compiled once for each instruction set of a machine; this file for every processor of it. The choice is made
 * here, by cpuid: musl, macOS and Windows have no ifunc.
 */
#include "kernel.h"

#include <stdlib.h>

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>

#define FMA (1u << 12)
#define OSXSAVE (1u << 27)
#define AVX (1u << 28)
#define F16C (1u << 29)
#define AVX2 (1u << 5)
#define AVX512 (1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) /* F, DQ, BW, VL */
#define YMM_STATE 0x06u                                     /* the system saves registers of 256 bits */
#define ZMM_STATE 0xe6u

static int width_of_processor(void) {
    unsigned a, b, c, d, state, high, needed = FMA | OSXSAVE | AVX | F16C;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
    __asm__("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
    if ((state & YMM_STATE) != YMM_STATE || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & AVX2)) return 0;
    return (b & AVX512) == AVX512 && (state & ZMM_STATE) == ZMM_STATE ? 512 : 256;
}

static const struct loops *loops_of(int width) { return width == 512 ? &loraformat_avx512 : &loraformat_avx2; }

/* Rounding to the nearest, and subnormal numbers as they are: a library that was built with -ffast-math may have changed
 * either for the thread that loaded it. */
#define USUAL_CONTROL 0x1f80u
static unsigned usual_control(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(USUAL_CONTROL);
    return before;
}
static void restore_control(unsigned before) { _mm_setcsr(before); }

#elif defined(__aarch64__)

static int width_of_processor(void) { return 128; }

static const struct loops *loops_of(int width) { return (void)width, &loraformat_neon; }

static uint64_t usual_control(void) {
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return before;
}
static void restore_control(uint64_t before) { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }

#else
#error "no instruction set for this machine"
#endif

API int loraformat_kernel_version(void) { return VERSION; }

/* 512, 256 or 128: the width of the registers for which there is code that this processor runs; 0: none. */
API int loraformat_kernel_width(void) { return width_of_processor(); }

/* Whether windows of this rank into this type want R in float32 as well. */
API int loraformat_kernel_narrows(int64_t rank, int out_type) {
    return rank > 0 && rank <= MOST_RANK && (out_type == BF16 || out_type == F16);
}

/* Fills the arrays of `struct narrow`; gives back its `is_exact`. */
API int loraformat_kernel_narrow(int width, const double *right, int64_t rank, int64_t cols, float *narrow_right,
                                 float *bound, double *squares) {
    struct narrow narrow = {narrow_right, bound, squares, 0};
    __typeof__(usual_control()) before = usual_control();
    loops_of(width)->narrow(right, rank, cols, &narrow);
    restore_control(before);
    return narrow.is_exact;
}

/* `narrow_right` and what belongs to it are those of `loraformat_kernel_narrow`, or NULL for float64 alone. */
API void loraformat_kernel_window_of(int width, const void *raw, int in, void *out, int out_type, const double *left,
                                     int64_t rank, const double *right, float *narrow_right, float *bound,
                                     double *squares, int is_exact, int64_t rows, int64_t cols, int64_t tile,
                                     double *tallies) {
    struct narrow narrow = {narrow_right, bound, squares, is_exact};
    struct window window = {raw, out, left, right, rank, rows, cols, tile, tallies, narrow_right ? &narrow : NULL};
    __typeof__(usual_control()) before = usual_control();
    loops_of(width)->window(&window, in, out_type);
    restore_control(before);
}

/* The same for whoever computes one window only: R in float32 is made for it, and float64 does without where it cannot. */
API void loraformat_kernel_window(int width, const void *raw, int in, void *out, int out_type, const double *left,
                                  int64_t rank, const double *right, int64_t rows, int64_t cols, int64_t tile,
                                  double *tallies) {
    size_t blocks = (cols + COLS - 1) / COLS, numbers = blocks * COLS;
    int is_narrow = loraformat_kernel_narrows(rank, out_type) && numbers && rows, is_exact = 0;
    float *narrow_right = is_narrow ? malloc(numbers * rank * sizeof(float)) : NULL;
    float *bound = is_narrow ? malloc(numbers * sizeof(float)) : NULL;
    double *squares = is_narrow ? malloc(rank * COLS * sizeof(double)) : NULL;
    is_narrow = narrow_right && bound && squares;
    if (is_narrow) is_exact = loraformat_kernel_narrow(width, right, rank, cols, narrow_right, bound, squares);
    loraformat_kernel_window_of(width, raw, in, out, out_type, left, rank, right, is_narrow ? narrow_right : NULL, bound,
                                squares, is_exact, rows, cols, tile, tallies);
    free(narrow_right), free(bound), free(squares);
}

API void loraformat_kernel_product(int width, const double *left, int64_t rank, const double *right, int64_t rows,
                                   int64_t cols, double *out) {
    __typeof__(usual_control()) before = usual_control();
    loops_of(width)->product(left, rank, right, rows, cols, out);
    restore_control(before);
}

API void loraformat_kernel_finish(int width, const void *raw, int in, void *out, int out_type, const double *result,
                                  const double *update, int64_t rows, int64_t cols, int64_t tile, double *tallies) {
    struct finish finish = {raw, out, result, update, rows, cols, tile, tallies};
    __typeof__(usual_control()) before = usual_control();
    loops_of(width)->finish(&finish, in, out_type);
    restore_control(before);
}

/* Whether all that was written is finite. */
API int loraformat_kernel_convert(int width, const void *from, int in, void *to, int out_type, int64_t count) {
    __typeof__(usual_control()) before = usual_control();
    int is_finite = loops_of(width)->convert(from, in, to, out_type, count);
    restore_control(before);
    return is_finite;
}

/* Whether all that was rounded is finite. */
API int loraformat_kernel_decode(int width, const void *packed, int64_t row_step, int64_t word_step, int bits, int order,
                                  int64_t rows, int64_t cols, const float *table, const float *scales, const float *zeros,
                                  int64_t groups, int64_t run, int64_t first, const int32_t *index, float factor,
                                  int is_transposed, void *out, int out_type) {
    struct codes codes = {packed, row_step, word_step, rows, cols, groups, run, first, index, table, scales, zeros, out,
                          factor, bits, order, is_transposed, out_type};
    __typeof__(usual_control()) before = usual_control();
    int is_finite = loops_of(width)->decode(&codes);
    restore_control(before);
    return is_finite;
}
