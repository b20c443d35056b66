// sanitizer.h: what the shim tells AddressSanitizer; nothing in a build without it.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

#if defined(__SANITIZE_ADDRESS__)

inline constexpr bool kAddressSanitizer = true;

inline void sanitizer_poison(const void* address, size_t bytes) { __asan_poison_memory_region(address, bytes); }
inline void sanitizer_unpoison(const void* address, size_t bytes) { __asan_unpoison_memory_region(address, bytes); }
inline void sanitizer_start_switch(void** save, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(save, bottom, bytes);
}
inline void sanitizer_finish_switch(void* saved, const void** old_bottom, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(saved, old_bottom, old_bytes);
}

#else

inline constexpr bool kAddressSanitizer = false;

inline void sanitizer_poison(const void*, size_t) {}
inline void sanitizer_unpoison(const void*, size_t) {}
inline void sanitizer_start_switch(void**, const void*, size_t) {}
inline void sanitizer_finish_switch(void*, const void**, size_t*) {}

#endif

}  // namespace cuda_on_cpu
