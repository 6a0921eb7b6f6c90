/* Runs the compiled loops on cases from stdin, for machines on which Python does not run: results to stdout.
 *
 * A case: eight int64 (operation, type of W, type of the output, rows, rank, columns, bytes of W, bytes of the output),
 * then W, the left factor, the right factor in blocks. Operation 0: a window; 1: the product.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int loraformat_kernel_width(void);
void loraformat_kernel_window(int, const void *, int, void *, int, const double *, int64_t, const double *, int64_t,
                              int64_t, int64_t, double *);
void loraformat_kernel_product(int, const double *, int64_t, const double *, int64_t, int64_t, double *);

static void *taken(size_t nbytes) {
    void *found = malloc(nbytes + 1);
    if (!found || fread(found, 1, nbytes, stdin) != nbytes) exit(1);
    return found;
}

int main(void) {
    int64_t head[8];
    int width = loraformat_kernel_width();
    if (!width) return 2;
    while (fread(head, sizeof *head, 8, stdin) == 8) {
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
