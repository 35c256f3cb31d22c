// Calls that were bound once and are made many times: a planned step's calls run one after another without Python.
// Each is a function, its arguments as words, and a caller that knows the function's signature.
#include <time.h>

#include <cstring>
#include <utility>

#include "common.hpp"

namespace brim {
namespace {

union Word {
    void* p;
    i64 i;
    float f;
    double d;
};

template <class T>
T read(const Word& word);
template <>
void* read(const Word& word) { return word.p; }
template <>
i64 read(const Word& word) { return word.i; }
template <>
float read(const Word& word) { return word.f; }
template <>
double read(const Word& word) { return word.d; }

using Caller = void (*)(void* function, const Word* words);

template <class... A, std::size_t... n>
void call(void* function, const Word* words, std::index_sequence<n...>) {
    reinterpret_cast<void (*)(A...)>(function)(read<A>(words[n])...);
}

template <class... A>
void caller(void* function, const Word* words) {
    call<A...>(function, words, std::index_sequence_for<A...>{});
}

using p = void*;
using i = i64;
using f = float;
using d = double;

struct Signature {
    const char* letters;  // as in native.py: p pointer, i 64-bit integer, f float, d double
    Caller caller;
};

const Signature signatures[] = {
    {"p", caller<p>},
    {"pi", caller<p, i>},
    {"pp", caller<p, p>},
    {"pii", caller<p, i, i>},
    {"ppi", caller<p, p, i>},
    {"ppp", caller<p, p, p>},
    {"piii", caller<p, i, i, i>},
    {"ppii", caller<p, p, i, i>},
    {"pppi", caller<p, p, p, i>},
    {"pppp", caller<p, p, p, p>},
    {"piiii", caller<p, i, i, i, i>},
    {"ppiii", caller<p, p, i, i, i>},
    {"pppii", caller<p, p, p, i, i>},
    {"ppppp", caller<p, p, p, p, p>},
    {"ppiiid", caller<p, p, i, i, i, d>},
    {"ppiiif", caller<p, p, i, i, i, f>},
    {"pppiii", caller<p, p, p, i, i, i>},
    {"ppppii", caller<p, p, p, p, i, i>},
    {"pppiiif", caller<p, p, p, i, i, i, f>},
    {"pppiiii", caller<p, p, p, i, i, i, i>},
    {"ppppiiii", caller<p, p, p, p, i, i, i, i>},
    {"pppppiiiii", caller<p, p, p, p, p, i, i, i, i, i>},
    {"pppppiiiiii", caller<p, p, p, p, p, i, i, i, i, i, i>},
    {"ppppppdpdiid", caller<p, p, p, p, p, p, d, p, d, i, i, d>},
    {"ppppppiiiifi", caller<p, p, p, p, p, p, i, i, i, i, f, i>},
    {"pppppppiiiif", caller<p, p, p, p, p, p, p, i, i, i, i, f>},
    {"pppppppdiid", caller<p, p, p, p, p, p, p, d, i, i, d>},
    {"pppppppppdiid", caller<p, p, p, p, p, p, p, p, p, d, i, i, d>},
    {"ppppppdpdiiid", caller<p, p, p, p, p, p, d, p, d, i, i, i, d>},
    {"pppppppdppiid", caller<p, p, p, p, p, p, p, d, p, p, i, i, d>},
    {"ppppppppdpdiid", caller<p, p, p, p, p, p, p, p, d, p, d, i, i, d>},
    {"pppppppppdppiid", caller<p, p, p, p, p, p, p, p, p, d, p, p, i, i, d>},
    {"pppppppdpdiid", caller<p, p, p, p, p, p, p, d, p, d, i, i, d>},
    {"pppppppdpdiiid", caller<p, p, p, p, p, p, p, d, p, d, i, i, i, d>},
    {"ppppppppdppiiid", caller<p, p, p, p, p, p, p, p, d, p, p, i, i, i, d>},
    {"pppppppdppiiid", caller<p, p, p, p, p, p, p, d, p, p, i, i, i, d>},
};

constexpr i64 kNoticeNanoseconds = 20 * 1000 * 1000;

i64 now_nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return i64(t.tv_sec) * 1000000000 + t.tv_nsec;
}

struct Bound {
    Caller caller;
    void* function;
    const Word* words;
};

thread_local bool stopped = false;

}  // namespace

void stop_calls() { stopped = true; }

}  // namespace brim

// The caller of functions of a signature; null where the table above lacks it.
BRIM_EXPORT void* brim_caller(const char* letters) {
    for (const brim::Signature& one : brim::signatures)
        if (std::strcmp(one.letters, letters) == 0) return reinterpret_cast<void*>(one.caller);
    return nullptr;
}

// Makes calls in order and returns how many: all, or fewer once they have taken kNoticeNanoseconds, so that Python can
// look for Ctrl-C. Where call n asks to stop, it is the last and -1 - n is returned.
BRIM_EXPORT brim::i64 brim_run(const brim::Bound* calls, brim::i64 count) {
    const brim::i64 start = brim::now_nanoseconds();
    brim::stopped = false;
    for (brim::i64 n = 0; n < count;) {
        calls[n].caller(calls[n].function, calls[n].words);
        if (brim::stopped) return -1 - n;
        if (++n < count && brim::now_nanoseconds() - start > brim::kNoticeNanoseconds) return n;
    }
    return count;
}
