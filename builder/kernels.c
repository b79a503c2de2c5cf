/* The inner loops of merging. kernels.py has each again in numpy, with the same bits.

   Every sum has one order, whatever the processor: fp32 sums run over the inputs, fp64 sums over LANES lanes of a
   block, which are then folded in halves. Build with -ffp-contract=off: a fused multiply-add rounds once, not twice. -fno-trapping-math lets comparisons
   be vectorised and changes no result. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

#define LANES 64
#define BLOCK 4096
#define SHORT 48
#define DIGITS 4
#define DIGIT 256

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* An unsigned number that is ordered as the floats are, -0 below 0. */
static inline uint32_t key_of(float value) {
    uint32_t bits = to_bits(value);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* bfloat16 to float32; 0 when one of them is NaN or inf. */
WIDE int load_bf16(const uint16_t *stored, float *values, int64_t count) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)stored[i] << 16;
        bad |= (bits & 0x7F800000u) == 0x7F800000u;
        values[i] = from_bits(bits);
    }
    return !bad;
}

/* Whether all are finite. */
WIDE int all_finite(const float *values, int64_t count) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++) bad |= (to_bits(values[i]) & 0x7F800000u) == 0x7F800000u;
    return !bad;
}

/* float32 to bfloat16, to nearest, ties to even; 0 when one of them is or becomes NaN or inf. */
WIDE int store_bf16(const float *values, uint16_t *stored, int64_t count) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = to_bits(values[i]);
        uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
        bad |= (bits & 0x7F800000u) == 0x7F800000u;
        bad |= (rounded & 0x7F800000u) == 0x7F800000u;
        stored[i] = (uint16_t)(rounded >> 16);
    }
    return !bad;
}

/* sum_i c_i x_i, in the order of i. */
WIDE void combine(const float *const *inputs, const float *factors, int64_t inputs_count, float *out, int64_t count) {
    const float *first = inputs[0];
    float factor = factors[0];
    for (int64_t i = 0; i < count; i++) out[i] = factor * first[i];
    for (int64_t m = 1; m < inputs_count; m++) {
        const float *input = inputs[m];
        factor = factors[m];
        for (int64_t i = 0; i < count; i++) out[i] = out[i] + factor * input[i];
    }
}

/* The same of bfloat16 inputs, a stretch that stays in the cache after another; 0 when one of them holds NaN or inf. */
WIDE int combine_bf16(
    const uint16_t *const *inputs, const float *factors, int64_t inputs_count, float *out, int64_t count) {
    uint32_t bad = 0;
    for (int64_t start = 0; start < count; start += 1024) {
        int64_t size = count - start < 1024 ? count - start : 1024;
        float *sums = out + start;
        for (int64_t m = 0; m < inputs_count; m++) {
            const uint16_t *input = inputs[m] + start;
            float factor = factors[m];
            if (m == 0)
                for (int64_t i = 0; i < size; i++) {
                    uint32_t bits = (uint32_t)input[i] << 16;
                    bad |= (bits & 0x7F800000u) == 0x7F800000u;
                    sums[i] = factor * from_bits(bits);
                }
            else
                for (int64_t i = 0; i < size; i++) {
                    uint32_t bits = (uint32_t)input[i] << 16;
                    bad |= (bits & 0x7F800000u) == 0x7F800000u;
                    sums[i] = sums[i] + factor * from_bits(bits);
                }
        }
    }
    return !bad;
}

/* a - b */
WIDE void subtract(const float *a, const float *b, float *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = a[i] - b[i];
}

static inline double folded(double *lanes) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

/* Dot products of blocks of BLOCK elements, in fp64; the last block is as if filled up with zeros. */
WIDE void dots(const float *a, const float *b, int64_t count, double *sums) {
    for (int64_t start = 0; start < count; start += BLOCK) {
        double lanes[LANES] = {0};
        int64_t stop = start + BLOCK < count ? start + BLOCK : count, i = start;
        for (; i + LANES <= stop; i += LANES)
            for (int lane = 0; lane < LANES; lane++) lanes[lane] += (double)a[i + lane] * (double)b[i + lane];
        for (int lane = 0; i < stop; i++, lane++) lanes[lane] += (double)a[i] * (double)b[i];
        sums[start / BLOCK] = folded(lanes);
    }
}

/* Dot products of rows, each summed block by block. */
WIDE void row_dots(const float *a, const float *b, int64_t rows, int64_t columns, double *sums) {
    for (int64_t row = 0; row < rows; row++, a += columns, b += columns) {
        sums[row] = 0;
        for (int64_t start = 0; start < columns; start += BLOCK) {
            double sum;
            dots(a + start, b + start, columns - start < BLOCK ? columns - start : BLOCK, &sum);
            sums[row] += sum;
        }
    }
}

/* Adds to sums[pair][column] the dot products of the columns of two inputs, row after row; pairs are indices of inputs.
   Tile by tile: widened once for all pairs, and packed, since rows of a power of two would evict each other.
   0 when there is no memory. */
WIDE int column_dots(const float *const *inputs, int64_t inputs_count, const int64_t *pairs, int64_t pairs_count,
                     int64_t rows, int64_t columns, double *sums) {
    enum { HIGH = 16, ACROSS = 64 };
    double(*tiles)[HIGH][ACROSS] = aligned_alloc(64, inputs_count * sizeof *tiles);
    if (!tiles) return 0;
    for (int64_t left = 0; left < columns; left += ACROSS) {
        int64_t width = columns - left < ACROSS ? columns - left : ACROSS;
        if (width < ACROSS) memset(tiles, 0, inputs_count * sizeof *tiles);
        for (int64_t top = 0; top < rows; top += HIGH) {
            int64_t height = rows - top < HIGH ? rows - top : HIGH;
            for (int64_t m = 0; m < inputs_count; m++) {
                const float *input = inputs[m] + top * columns + left;
                for (int64_t row = 0; row < height; row++, input += columns)
                    for (int64_t i = 0; i < width; i++) tiles[m][row][i] = input[i];
            }
            for (int64_t pair = 0; pair < pairs_count; pair++) {
                double *out = sums + pair * columns + left, lanes[ACROSS] = {0};
                double(*a)[ACROSS] = __builtin_assume_aligned(tiles[pairs[2 * pair]], 64);
                double(*b)[ACROSS] = __builtin_assume_aligned(tiles[pairs[2 * pair + 1]], 64);
                for (int64_t i = 0; i < width; i++) lanes[i] = out[i];
                for (int64_t row = 0; row < height; row++)
                    for (int i = 0; i < ACROSS; i++) lanes[i] += a[row][i] * b[row][i];
                for (int64_t i = 0; i < width; i++) out[i] = lanes[i];
            }
        }
    }
    free(tiles);
    return 1;
}

/* Sums of magnitudes of blocks, in fp64. */
WIDE void magnitudes(const float *a, int64_t count, double *sums) {
    for (int64_t start = 0; start < count; start += BLOCK) {
        double lanes[LANES] = {0};
        int64_t stop = start + BLOCK < count ? start + BLOCK : count, i = start;
        for (; i + LANES <= stop; i += LANES)
            for (int lane = 0; lane < LANES; lane++) lanes[lane] += (double)fabsf(a[i + lane]);
        for (int lane = 0; i < stop; i++, lane++) lanes[lane] += (double)fabsf(a[i]);
        sums[start / BLOCK] = folded(lanes);
    }
}

/* Sums of magnitudes of rows, each summed block by block. */
WIDE void row_magnitudes(const float *a, int64_t rows, int64_t columns, double *sums) {
    for (int64_t row = 0; row < rows; row++, a += columns) {
        sums[row] = 0;
        for (int64_t start = 0; start < columns; start += BLOCK) {
            double sum;
            magnitudes(a + start, columns - start < BLOCK ? columns - start : BLOCK, &sum);
            sums[row] += sum;
        }
    }
}

/* Adds to counts[2][65536] how often each upper half of a key occurs. `magnitude` drops the signs first.
   Two tables: neighbours that fall into one bin do not wait for each other. */
void count_upper(const float *values, int64_t count, int magnitude, int64_t *counts) {
    uint32_t drop = magnitude ? 0x7FFFFFFFu : 0xFFFFFFFFu;
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
        counts[key_of(from_bits(to_bits(values[i]) & drop)) >> 16]++;
        counts[65536 + (key_of(from_bits(to_bits(values[i + 1]) & drop)) >> 16)]++;
    }
    for (; i < count; i++) counts[key_of(from_bits(to_bits(values[i]) & drop)) >> 16]++;
}

/* Adds to counts[0][65536] how often each lower half of a key occurs below one upper half. */
WIDE void count_lower(const float *values, int64_t count, int magnitude, uint32_t upper, int64_t *counts) {
    enum { STEP = 32 };
    uint32_t drop = magnitude ? 0x7FFFFFFFu : 0xFFFFFFFFu;
    for (int64_t start = 0; start < count; start += STEP) {
        int64_t width = count - start < STEP ? count - start : STEP;
        uint32_t keys[STEP], found = 0;
        for (int64_t i = 0; i < width; i++) {
            keys[i] = key_of(from_bits(to_bits(values[start + i]) & drop));
            found |= keys[i] >> 16 == upper;
        }
        if (!found) continue; /* most steps: one bin holds few of all values */
        for (int64_t i = 0; i < width; i++)
            if (keys[i] >> 16 == upper) counts[keys[i] & 0xFFFF]++;
    }
}

/* mask = key > cut, and for the first `room` of those equal to it. Returns how many equal ones there were. */
WIDE int64_t top(const float *values, int64_t count, int magnitude, uint32_t cut, int64_t room, uint8_t *mask) {
    enum { STEP = 256 };
    uint32_t drop = magnitude ? 0x7FFFFFFFu : 0xFFFFFFFFu;
    int64_t equal = 0;
    for (int64_t start = 0; start < count; start += STEP) {
        int64_t width = count - start < STEP ? count - start : STEP;
        uint32_t keys[STEP], here = 0;
        for (int64_t i = 0; i < width; i++) {
            keys[i] = key_of(from_bits(to_bits(values[start + i]) & drop));
            here += keys[i] == cut;
        }
        uint8_t *out = mask + start;
        if (equal + here <= room)
            for (int64_t i = 0; i < width; i++) out[i] = keys[i] >= cut;
        else if (equal >= room)
            for (int64_t i = 0; i < width; i++) out[i] = keys[i] > cut;
        else
            for (int64_t i = 0, seen = equal; i < width; i++) {
                out[i] = keys[i] > cut || (keys[i] == cut && seen < room);
                seen += keys[i] == cut;
            }
        equal += here;
    }
    return equal;
}

/* Zero where the mask is. */
WIDE void masked(const float *restrict values, const uint8_t *restrict mask, float *restrict out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = from_bits(to_bits(values[i]) & (0u - mask[i]));
}

/* Two numbers a step of the SplitMix64 sequence of `key` (Steele et al. 2014): the lower half of step i is number 2i. */
static inline uint64_t random_pair(uint64_t key, uint64_t step) {
    uint64_t z = key + (step + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

/* The numbers `start` .. `start` + DRAWS - 1 of the sequence, of which `start` is even. */
#define DRAWS 256
static inline void draw(uint64_t key, uint64_t start, uint32_t *numbers) {
    for (int i = 0; i < DRAWS / 2; i++) {
        uint64_t pair = random_pair(key, start / 2 + (uint64_t)i);
        numbers[2 * i] = (uint32_t)pair;
        numbers[2 * i + 1] = (uint32_t)(pair >> 32);
    }
}

/* mask = random < p 2^32 */
WIDE void bernoulli(uint64_t key, uint64_t start, double p, uint8_t *restrict mask, int64_t count) {
    uint32_t numbers[DRAWS], odd = start & 1;
    uint64_t below = (uint64_t)(p * 4294967296.0);
    for (int64_t i = -(int64_t)odd; i < count; i += DRAWS) {
        draw(key, start + (uint64_t)i, numbers);
        int64_t first = i < 0 ? 1 : 0, width = count - i < DRAWS ? count - i : DRAWS;
        for (int64_t j = first; j < width; j++) mask[i + j] = numbers[j] < below;
    }
}

/* The same with low + rank * step as each element's own p. */
WIDE void bernoulli_by_rank(uint64_t key, uint64_t start, const int32_t *restrict ranks, double low, double step,
                            uint8_t *restrict mask, int64_t count) {
    uint32_t numbers[DRAWS], odd = start & 1;
    for (int64_t i = -(int64_t)odd; i < count; i += DRAWS) {
        draw(key, start + (uint64_t)i, numbers);
        int64_t first = i < 0 ? 1 : 0, width = count - i < DRAWS ? count - i : DRAWS;
        for (int64_t j = first; j < width; j++)
            mask[i + j] = numbers[j] < (low + (double)ranks[i + j] * step) * 4294967296.0;
    }
}

/* Short rows: every pair is compared. */
static void ranks_of_short(const float *values, int64_t rows, int64_t columns, int32_t *out) {
    for (int64_t row = 0; row < rows; row++, values += columns, out += columns)
        for (int64_t i = 0; i < columns; i++) {
            out[i] = 0;
            for (int64_t j = 0; j < columns; j++) {
                float own = fabsf(values[i]), other = fabsf(values[j]);
                out[i] += other < own || (other == own && j > i);
            }
        }
}

/* Each element's rank by magnitude in its row, from 0; of equal ones the first is the largest. 0: out of memory. */
int ranks(const float *values, int64_t rows, int64_t columns, int32_t *out) {
    if (columns <= SHORT) {
        ranks_of_short(values, rows, columns, out);
        return 1;
    }
    uint64_t *from = malloc((size_t)columns * 2 * sizeof *from), *to = from + columns;
    if (!from) return 0;
    for (int64_t row = 0; row < rows; row++, values += columns, out += columns) {
        uint32_t counts[DIGITS][DIGIT] = {{0}};
        for (int64_t i = 0; i < columns; i++) {
            /* Backwards, and the sort is stable: of equal ones the last comes first. */
            int64_t index = columns - 1 - i;
            uint32_t key = to_bits(values[index]) & 0x7FFFFFFFu;
            from[i] = (uint64_t)key << 32 | (uint64_t)index;
            counts[0][key & 255]++;
            counts[1][key >> 8 & 255]++;
            counts[2][key >> 16 & 255]++;
            counts[3][key >> 24]++;
        }
        for (int digit = 0; digit < DIGITS; digit++) {
            int shift = 32 + 8 * digit;
            if (counts[digit][from[0] >> shift & (DIGIT - 1)] == columns) continue; /* all share this digit */
            uint32_t place = 0;
            for (int i = 0; i < DIGIT; i++) {
                uint32_t here = counts[digit][i];
                counts[digit][i] = place;
                place += here;
            }
            for (int64_t i = 0; i < columns; i++) to[counts[digit][from[i] >> shift & (DIGIT - 1)]++] = from[i];
            uint64_t *swap = from;
            from = to;
            to = swap;
        }
        for (int64_t i = 0; i < columns; i++) out[(uint32_t)from[i]] = (int32_t)i;
    }
    free(from < to ? from : to);
    return 1;
}

/* Elect a sign by sum_i votes_i d_i, 0 counting as +; sum w_i d_i over those that agree, divided by the sum of their
   w_i when `normalize` (TIES, arXiv 2306.01708). An input agrees when votes_i d_i has the elected sign. Weights that
   cancel are no divisor. */
WIDE void consensus(const float *const *deltas, const float *weights, const float *votes, int64_t inputs_count,
                    int normalize, float *out, int64_t count) {
    enum { STEP = 256 };
    float elected[STEP], total[STEP], divisor[STEP], nothing = 0.0f;
    for (int64_t m = 0; m < inputs_count; m++) nothing = nothing + fabsf(weights[m]);
    nothing = nothing * 1e-6f;
    for (int64_t start = 0; start < count; start += STEP) {
        int64_t width = count - start < STEP ? count - start : STEP;
        for (int64_t i = 0; i < width; i++) elected[i] = votes[0] * deltas[0][start + i];
        for (int64_t m = 1; m < inputs_count; m++) {
            const float *delta = deltas[m] + start;
            for (int64_t i = 0; i < width; i++) elected[i] = elected[i] + votes[m] * delta[i];
        }
        for (int64_t i = 0; i < width; i++) {
            elected[i] = elected[i] >= 0.0f ? 1.0f : -1.0f;
            total[i] = divisor[i] = 0.0f;
        }
        for (int64_t m = 0; m < inputs_count; m++) {
            const float *delta = deltas[m] + start;
            float weight = weights[m], vote = votes[m];
            for (int64_t i = 0; i < width; i++) {
                float agreement = vote * delta[i] * elected[i];
                total[i] = total[i] + (agreement > 0.0f ? weight * delta[i] : 0.0f);
                divisor[i] = divisor[i] + (agreement > 0.0f ? weight : 0.0f);
            }
        }
        if (normalize)
            for (int64_t i = 0; i < width; i++)
                out[start + i] = total[i] / (fabsf(divisor[i]) <= nothing ? 1.0f : divisor[i]);
        else
            for (int64_t i = 0; i < width; i++) out[start + i] = total[i];
    }
}
