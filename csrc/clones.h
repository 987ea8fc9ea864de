// Marks a function that is compiled for several instruction sets; the machine's best is taken at load time.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define FASTSDS_X86_CLONES
#define FASTSDS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // which has no name for a level, and where a fused multiply-add must not become a call
#define FASTSDS_CLONES __attribute__((target_clones("fma", "default")))
#endif
#else
#define FASTSDS_CLONES
#endif
