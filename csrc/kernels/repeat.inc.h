// Loops whose bounds and indices are constants. See kernels.inc.h for why all is unnamed here.
#pragma once

#if defined(_MSC_VER)
#define RIVER_INLINE [[msvc::forceinline]]
#define RIVER_UNROLL
#else
#define RIVER_INLINE __attribute__((always_inline))
#define RIVER_UNROLL _Pragma("GCC unroll 8")
#endif

namespace river {
namespace {

// Calls body.operator()<0>() ... <Count - 1>(). Unlike in a loop, which a compiler unrolls too late
// to see it, an array that is indexed with these constants is kept in registers.
template <int Count, class Body>
RIVER_INLINE inline void repeat(Body body) {
  if constexpr (Count > 0) {
    repeat<Count - 1>(body);
    body.template operator()<Count - 1>();
  }
}

// Calls body.operator()<min(count, Limit)>(): a number of rows as a constant.
template <int Limit, class Body>
inline void with_count(int count, Body body) {
  if constexpr (Limit > 1) {
    if (count < Limit) {
      with_count<Limit - 1>(count, body);
      return;
    }
  }
  body.template operator()<Limit>();
}

}  // namespace
}  // namespace river
