/* Runs the compiled loops on cases from stdin, for machines on which Python does not run: results to stdout.
 *
 * A case: eight int64 (operation, type of W, type of the output, rows, rank, columns, bytes of W, bytes of the output),
 * then W, the left factor, the right factor in blocks. Operation 0: a window; 1: the product.
 * Operation 2 decodes: (2, bits, order, rows, groups, columns, bytes of the codes, bytes of the output), then (step of
 * rows, step of words, run, first, transposed, whether there are zero points, whether there is an index, 0), codes, table,
 * scales, zero points, index. Operation 3 converts: (3, type, type of the output, 0, 0, count, bytes, bytes of the output).
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

int loraformat_kernel_width(void);
void loraformat_kernel_window(int, const void *, int, void *, int, const double *, int64_t, const double *, int64_t,
                              int64_t, int64_t, double *);
void loraformat_kernel_product(int, const double *, int64_t, const double *, int64_t, int64_t, double *);

int loraformat_kernel_convert(int, const void *, int, void *, int, int64_t);
int loraformat_kernel_decode(int, const void *, int64_t, int64_t, int, int, int64_t, int64_t, const float *, const float *,
                             const float *, int64_t, int64_t, int64_t, const int32_t *, float, int, void *, int);
#define F32 2

static void *taken(size_t nbytes) {
    void *found = malloc(nbytes + 1);
    if (!found || fread(found, 1, nbytes, stdin) != nbytes) exit(1);
    return found;
}

static void decoded(int width, const int64_t *head) {
    int64_t *more = taken(8 * sizeof *more), grid = head[3] * head[4] * 4;
    void *codes = taken(head[6]), *table = taken(256 * 4), *scales = taken(grid);
    void *zeros = more[5] ? taken(grid) : NULL, *index = more[6] ? taken(head[5] * 4) : NULL;
    float *out = calloc(head[7] + 1, 1);
    loraformat_kernel_decode(width, codes, more[0], more[1], head[1], head[2], head[3], head[5], table, scales, zeros,
                             head[4], more[2], more[3], index, 0.75f, more[4], out, F32);
    fwrite(out, 1, head[7], stdout);
    free(more), free(codes), free(table), free(scales), free(zeros), free(index), free(out);
}

static void converted(int width, const int64_t *head) {
    void *raw = taken(head[6]), *out = calloc(head[7] + 1, 1);
    char is_finite = loraformat_kernel_convert(width, raw, head[1], out, head[2], head[5]);
    fwrite(out, 1, head[7], stdout);
    fwrite(&is_finite, 1, 1, stdout);
    free(raw), free(out);
}

int main(void) {
    int64_t head[8];
#ifdef _WIN32
    _setmode(0, _O_BINARY), _setmode(1, _O_BINARY);
#endif
    int width = loraformat_kernel_width();
    if (!width) return 2;
    while (fread(head, sizeof *head, 8, stdin) == 8) {
        if (head[0] > 1) {
            (head[0] == 2 ? decoded : converted)(width, head);
            continue;
        }
        int64_t rows = head[3], rank = head[4], cols = head[5], tiles = (rows + 63) / 64;
        void *raw = taken(head[6]);
        double *left = taken(rows * rank * 8), *right = taken((cols + 15) / 16 * 16 * rank * 8);
        char *out = calloc(head[7] + 1, 1);
        double *tallies = calloc(tiles * 4 + 1, 8);
        if (head[0] == 1)
            loraformat_kernel_product(width, left, rank, right, rows, cols, (double *)out);
        else
            loraformat_kernel_window(width, raw, head[1], out, head[2], left, rank, right, rows, cols, 64, tallies);
        fwrite(out, 1, head[7], stdout);
        fwrite(tallies, 8, tiles * 4, stdout);
        free(raw), free(left), free(right), free(out), free(tallies);
    }
    return 0;
}
