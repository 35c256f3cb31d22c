// Matrix products on tiles of the result, which the team's threads take one by one. A tile is computed by brim's own
// kernels (gemm_tile.cpp; gemm_few.cpp where there are few rows) where the processor has wide registers, else by NumPy's
// OpenBLAS on one thread; then what follows the product runs on it (gemm_epilogue.cpp).
//
// The tiles depend on the shapes alone, so the result does not depend on the number of threads. While the team is at
// work OpenBLAS is held to one thread; before and after, its own threads serve NumPy as the user set them.
#include "gemm_epilogue.hpp"

#include <pthread.h>

#include "team.hpp"

using namespace brim;

namespace {

// CBLAS of a build with 64-bit integers. 101: row-major; 111, 112: as it is, transposed.
using Sgemm = void (*)(int, int, int, i64, i64, i64, float, const float*, i64, const float*, i64, float, float*, i64);
using Dgemm = void (*)(int, int, int, i64, i64, i64, double, const double*, i64, const double*, i64, double, double*, i64);
using SetThreads = void (*)(int);
using GetThreads = int (*)();

Sgemm sgemm = nullptr;
Dgemm dgemm = nullptr;
SetThreads set_blas_threads = nullptr;
GetThreads get_blas_threads = nullptr;

// Holds OpenBLAS to one thread while a product is made; of several at once the last restores what the first found.
class OneBlasThread {
   public:
    OneBlasThread() {
        pthread_mutex_lock(&lock);
        if (users++ == 0) {
            before = get_blas_threads();
            if (before != 1) set_blas_threads(1);
        }
        pthread_mutex_unlock(&lock);
    }
    ~OneBlasThread() {
        pthread_mutex_lock(&lock);
        if (--users == 0 && before != 1) set_blas_threads(before);
        pthread_mutex_unlock(&lock);
    }

   private:
    static pthread_mutex_t lock;
    static int users, before;
};

pthread_mutex_t OneBlasThread::lock = PTHREAD_MUTEX_INITIALIZER;
int OneBlasThread::users = 0, OneBlasThread::before = 1;

#if defined(__AVX512F__)
constexpr bool kOwnIsFaster = true;
#else
constexpr bool kOwnIsFaster = false;
#endif

bool own_kernels() { return kOwnIsFaster || sgemm == nullptr; }

// Packing B costs its transposing, which repays itself with many rows; dot products cost the summing of lanes at their
// ends, which repays itself with long rows.
bool few_rows(const Product& p) {
    if (!p.b_transposed) return p.m <= kFewRows;
    return !p.a_transposed && (p.m <= kFewRows || (kOwnIsFaster && p.m <= kDotRows && p.m * 8 <= p.k));
}

void gemm(const Product& p, i64 m, i64 n, const float* a, const float* b, float* c) {
    if (few_rows(p)) return gemm_few(p, m, n, a, b, c);
    if (own_kernels()) return gemm_tile(p, m, n, a, b, c);
    sgemm(101, p.a_transposed ? 112 : 111, p.b_transposed ? 112 : 111, m, n, p.k, 1, a, p.lda, b, p.ldb, 0, c, p.ldc);
}

void gemm(const Product& p, i64 m, i64 n, const double* a, const double* b, double* c) {
    if (few_rows(p)) return gemm_few(p, m, n, a, b, c);
    if (own_kernels()) return gemm_tile(p, m, n, a, b, c);
    dgemm(101, p.a_transposed ? 112 : 111, p.b_transposed ? 112 : 111, m, n, p.k, 1, a, p.lda, b, p.ldb, 0, c, p.ldc);
}

template <class T>
void tile(const Product& p, T* c, const T* a, const T* b, i64 which_product, i64 which_tile, const Epilogue* epilogue) {
    i64 place[kMaxBatchDims];
    for (i64 axis = kMaxBatchDims - 1; axis >= 0; axis--) {
        const i64 dim = p.batch_shape[axis], at = which_product % dim;
        which_product /= dim;
        place[axis] = at;
        a += at * p.a_step[axis], b += at * p.b_step[axis], c += at * p.c_step[axis];
    }
    const i64 across = ceil_div(p.n, p.tile_n);
    const Range rows = piece_of(p.m, p.tile_m, which_tile / across), columns = piece_of(p.n, p.tile_n, which_tile % across);
    gemm(p, rows.end - rows.begin, columns.end - columns.begin, a + rows.begin * (p.a_transposed ? 1 : p.lda),
         b + columns.begin * (p.b_transposed ? p.ldb : 1), c + rows.begin * p.ldc + columns.begin);
    if (epilogue != nullptr) epilogue->run(place, rows, columns);
}

template <class T>
void all_tiles(T* c, const T* a, const T* b, const Product& p, const Epilogue* epilogue) {
    const i64 tiles = ceil_div(p.m, p.tile_m) * ceil_div(p.n, p.tile_n);
    const i64 total = p.batch * tiles;
    parallel(ceil_div(total, p.per_piece), [&](i64 piece) {
        const Range range = piece_of(total, p.per_piece, piece);
        for (i64 at = range.begin; at < range.end; at++) tile(p, c, a, b, at / tiles, at % tiles, epilogue);
    });
}

template <class T>
void product(T* c, const T* a, const T* b, const i64* plan, const Epilogue* epilogue = nullptr) {
    const Product& p = *reinterpret_cast<const Product*>(plan);
    if (own_kernels()) return all_tiles(c, a, b, p, epilogue);
    OneBlasThread held;
    all_tiles(c, a, b, p, epilogue);
}

}  // namespace

// The functions of the OpenBLAS that NumPy has loaded, as addresses.
BRIM_EXPORT void brim_set_blas(void* s, void* d, void* set_threads, void* get_threads) {
    sgemm = reinterpret_cast<Sgemm>(s);
    dgemm = reinterpret_cast<Dgemm>(d);
    set_blas_threads = reinterpret_cast<SetThreads>(set_threads);
    get_blas_threads = reinterpret_cast<GetThreads>(get_threads);
}

// Whether products are computed by brim's own kernels: decides how large tiles should be.
BRIM_EXPORT void brim_gemm_is_own(i64* answer) { *answer = own_kernels(); }

BRIM_EXPORT void brim_gemm_f32(float* c, const float* a, const float* b, const i64* plan) { product(c, a, b, plan); }

BRIM_EXPORT void brim_gemm_f64(double* c, const double* a, const double* b, const i64* plan) { product(c, a, b, plan); }

// The same with what follows.
BRIM_EXPORT void brim_gemm_epilogue_f32(float* c, const float* a, const float* b, const i64* plan, const i64* epilogue) {
    product(c, a, b, plan, reinterpret_cast<const Epilogue*>(epilogue));
}

BRIM_EXPORT void brim_gemm_epilogue_f64(double* c, const double* a, const double* b, const i64* plan,
                                        const i64* epilogue) {
    product(c, a, b, plan, reinterpret_cast<const Epilogue*>(epilogue));
}
