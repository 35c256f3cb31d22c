// Dynamic shared memory under a name of its own type. Static shared memory is not used: the emulation fills dynamic
// memory with NaN and puts a forbidden page behind it, which shows a missing barrier and a wrong size.
#ifndef DYN_SHARED
#define DYN_SHARED(T, name)                                              \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];      \
    T* name = reinterpret_cast<T*>(dynamic_shared)
#endif
