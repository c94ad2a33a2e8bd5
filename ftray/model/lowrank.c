/* y += (x Aᵀ) B for tokens of many adapters at once, bf16 on CPUs: what reads the weights once and nothing twice.
 *
 * Adapters lie in pools, down [C, rank, in] and up [C, rank, out]. Entry g of `blocks` [groups] is the block of tokens
 * tokens[starts[g]] … tokens[starts[g + 1] - 1]. x [T, in] and y [T, out] are rows without gaps. `inner` is scratch for
 * rank floats of each entry of `tokens`. Sums are in fp32; y is rounded once, to nearest even.
 */
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef uint32_t words __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(64)));
enum { LANES = 16, VALUES = 2 * LANES, CHUNK = 256 };

/* Two values lie in a word, and both become fp32 by one operation each: less than to widen one after the other. */
static inline words load(const bf16 *from) {
    words out;
    memcpy(&out, from, sizeof out);
    return out;
}

static inline floats lower(words pairs) { return (floats)(pairs << 16); }

static inline floats upper(words pairs) { return (floats)(pairs & 0xffff0000u); }

/* In the upper half, to nearest even; NaN stays NaN. */
static inline words rounded(floats value) {
    const words bits = (words)value, nan = (words)((bits & 0x7fffffffu) > 0x7f800000u);
    return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | ((bits | 0x400000u) & nan);
}

static inline void store(bf16 *to, floats low, floats high) {
    const words pairs = (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
    memcpy(to, &pairs, sizeof pairs);
}

static inline float widen(bf16 value) { return lower((words){value})[0]; }

static inline bf16 narrow(float value) { return (bf16)(rounded((floats){value})[0] >> 16); }

static float dot(const bf16 *a, const bf16 *b, int64_t width) {
    floats low = {0}, high = {0};
    int64_t i = 0;
    for (; i + VALUES <= width; i += VALUES) {
        const words x = load(a + i), y = load(b + i);
        low += lower(x) * lower(y);
        high += upper(x) * upper(y);
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += low[lane] + high[lane];
    for (; i < width; i++) sum += widen(a[i]) * widen(b[i]);
    return sum;
}

/* y += weights · rows for `count` vectors of VALUES values; a constant one is held in registers. */
static inline __attribute__((always_inline)) void add(bf16 *y, const bf16 *rows, const float *weights, int64_t rank,
                                                      int64_t out, int count) {
    floats low[CHUNK / VALUES], high[CHUNK / VALUES];
    for (int k = 0; k < count; k++) {
        const words own = load(y + k * VALUES);
        low[k] = lower(own), high[k] = upper(own);
    }
    for (int64_t r = 0; r < rank; r++)
        for (int k = 0; k < count; k++) {
            const words row = load(rows + r * out + k * VALUES);
            low[k] += weights[r] * lower(row);
            high[k] += weights[r] * upper(row);
        }
    for (int k = 0; k < count; k++) store(y + k * VALUES, low[k], high[k]);
}

void ftray_low_rank(const bf16 *x, bf16 *y, const bf16 *down, const bf16 *up, const int32_t *blocks,
                    const int32_t *starts, const int32_t *tokens, float *inner, int64_t groups, int64_t rank,
                    int64_t in, int64_t out) {
    const int64_t chunks = (out + CHUNK - 1) / CHUNK;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t r = 0; r < rank; r++)
                for (int64_t e = starts[g]; e < starts[g + 1]; e++)
                    inner[e * rank + r] = dot(down + (blocks[g] * rank + r) * in, x + tokens[e] * in, in);
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t c = 0; c < chunks; c++)
                for (int64_t e = starts[g]; e < starts[g + 1]; e++) {
                    const bf16 *rows = up + blocks[g] * rank * out;
                    const float *weights = inner + e * rank;
                    bf16 *own = y + tokens[e] * out;
                    const int64_t first = c * CHUNK, end = first + CHUNK < out ? first + CHUNK : out;
                    if (end == first + CHUNK) {
                        add(own + first, rows + first, weights, rank, out, CHUNK / VALUES);
                        continue;
                    }
                    add(own + first, rows + first, weights, rank, out, (int)((end - first) / VALUES));
                    for (int64_t o = end - (end - first) % VALUES; o < end; o++) {
                        float sum = widen(own[o]);
                        for (int64_t r = 0; r < rank; r++) sum += weights[r] * widen(rows[r * out + o]);
                        own[o] = narrow(sum);
                    }
                }
    }
}
