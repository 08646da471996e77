// x[M,K] @ w[N,K]^T for few rows, as decoding asks for it, in the place of OpenBLAS's cblas_sgemm.
//
// OpenBLAS copies the weights into panels before it multiplies; with a dozen rows the copy takes
// longer than the product. Here the weights are read once, in their order, against rows that stay
// in the first cache. Every other product goes to OpenBLAS. See with.sh.

#include <dlfcn.h>

namespace {

using Gemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int,
                      float, float*, int);

Gemm openblas() {
  static const auto found = reinterpret_cast<Gemm>(dlsym(dlopen(OPENBLAS, RTLD_NOW), "cblas_sgemm"));
  return found;
}

}  // namespace

#ifdef __AVX512F__
#include <immintrin.h>

namespace {

constexpr int ROWS = 48, WIDTH = 4096;  // at most
constexpr int LANES = 16;

__mmask16 lanes(int left) { return left < LANES ? (1u << left) - 1 : 0xffff; }

// R rows of x, packed as [K / 16][R][16] and filled up with zeros, times W rows of w.
template <int R, int W>
void tile(const float* x, const float* w, long stride, int k, float* out, long out_stride) {
  __m512 sums[R][W];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) sums[i][j] = _mm512_setzero_ps();
  for (int at = 0; at < k; at += LANES, x += LANES * R) {
    __m512 weights[W];
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) {
      weights[j] = _mm512_maskz_loadu_ps(lanes(k - at), w + j * stride + at);
      _mm_prefetch(w + (j + W) * stride + at, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const __m512 row = _mm512_load_ps(x + LANES * i);
#pragma GCC unroll 8
      for (int j = 0; j < W; j++) sums[i][j] = _mm512_fmadd_ps(row, weights[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) out[i * out_stride + j] = _mm512_reduce_add_ps(sums[i][j]);
}

int tile_rows(int left) { return left >= 6 ? 6 : left >= 2 ? 2 : 1; }

void pack(const float* x, long stride, int m, int k, float* out) {
  for (int i = 0, r; i < m; i += r) {
    r = tile_rows(m - i);
    for (int at = 0; at < k; at += LANES)
      for (int j = 0; j < r; j++, out += LANES)
        _mm512_store_ps(out, _mm512_maskz_loadu_ps(lanes(k - at), x + (i + j) * stride + at));
  }
}

template <int W>
void column(const float* x, const float* w, long stride, int m, int k, float* out, long out_stride) {
  const long padded = (k + LANES - 1) / LANES * LANES;
  for (int i = 0, r; i < m; i += r, x += r * padded, out += r * out_stride) {
    r = tile_rows(m - i);
    (r == 6 ? tile<6, W> : r == 2 ? tile<2, W> : tile<1, W>)(x, w, stride, k, out, out_stride);
  }
}

bool is_short(int order, int ta, int tb, int m, int n, int k, float alpha, float beta) {
  const bool by_rows = order == 101 && ta == 111 && tb == 112;  // x as it is, w transposed
  return by_rows && m <= ROWS && n >= 64 && k >= 64 && k <= WIDTH && alpha == 1 && beta == 0;
}

void multiply(int m, int n, int k, const float* x, int x_stride, const float* w, int w_stride,
              float* out, int out_stride) {
  alignas(64) static thread_local float packed[ROWS * WIDTH];
  pack(x, x_stride, m, k, packed);
  int j = 0;
  for (; j + 4 <= n; j += 4)
    column<4>(packed, w + long(j) * w_stride, w_stride, m, k, out + j, out_stride);
  for (; j < n; j++)
    column<1>(packed, w + long(j) * w_stride, w_stride, m, k, out + j, out_stride);
}

}  // namespace
#endif

extern "C" void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha,
                            const float* a, int lda, const float* b, int ldb, float beta, float* c,
                            int ldc) {
#ifdef __AVX512F__
  if (is_short(order, ta, tb, m, n, k, alpha, beta)) {
    multiply(m, n, k, a, lda, b, ldb, c, ldc);
    return;
  }
#endif
  openblas()(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
