"""A CUDA runtime library of a few lines of C, which works on the memory of the CPU."""

import subprocess

_CUDART = r"""
#include <stdlib.h>
#include <string.h>
typedef void* P;
static long live = 0;
long allocations(void) { return live; }
int cudaMalloc(P* p, size_t n) { *p = malloc(n); live++; return *p ? 0 : 2; }
int cudaFree(P p) { free(p); live--; return 0; }
int cudaMemcpyAsync(P a, P b, size_t n, int kind, P s) {
  if (kind != 1 && kind != 2) return 21;
  memcpy(a, b, n);
  return s == (P)7 ? 0 : 400;
}
int cudaStreamCreate(P* s) { *s = (P)7; live++; return 0; }
int cudaStreamSynchronize(P s) { return s == (P)7 ? 0 : 400; }
int cudaStreamDestroy(P s) { live--; return s == (P)7 ? 0 : 400; }
int cudaDeviceGetAttribute(int* v, int what, int device) {
  *v = what == 75 ? 8 : 7;
  return what == 75 || what == 76 ? 0 : 1;
}
int cudaStreamBeginCapture(P s, int mode) { return s == (P)7 ? 0 : 400; }
int cudaStreamEndCapture(P s, P* g) { *g = (P)8; return 0; }
int cudaGraphInstantiateWithFlags(P* e, P g, unsigned long long f) {
  *e = (P)9;
  return g == (P)8 ? 0 : 1;
}
static long launched = 0;
long launches(void) { return launched; }
int cudaGraphLaunch(P e, P s) { launched++; return e == (P)9 && s == (P)7 ? 0 : 1; }
const char* cudaGetErrorString(int c) { return "an error of the double"; }
"""


def compile_cudart(folder):
    """A library with the functions of CUDA's runtime that works on the CPU's memory."""
    source, library = folder / "cudart.c", folder / "libcudart_double.so"
    source.write_text(_CUDART)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    return library
