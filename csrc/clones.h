// Marks a function that is compiled for several instruction sets; the machine's best is taken at load time.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FASTSDS_X86_CLONES
#define FASTSDS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSDS_CLONES
#endif
