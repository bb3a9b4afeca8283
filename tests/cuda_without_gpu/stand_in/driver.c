// libcuda.so.1 of a GPU that computes nothing: what Triton and Inductor's launchers call.
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "counters.h"

// Defined by the runtime, which is loaded first. Without it, only the symbols are needed.
extern int cudaDeviceGetAttribute(int *, int, int) __attribute__((weak));
extern int cudaGetDeviceCount(int *) __attribute__((weak));
extern void stand_in_add(enum counter, long long) __attribute__((weak));

static void *new_handle(void) { return malloc(16); }
static CUresult count_launch(void) {
    if (stand_in_add) stand_in_add(TRITON, 1);
    return 0;
}

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) {
    *count = 1;
    return cudaGetDeviceCount ? cudaGetDeviceCount(count) : 0;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, "stand-in");
    return 0;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = 0;
    return cudaDeviceGetAttribute ? cudaDeviceGetAttribute(value, attribute, device) : 0;
}

CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)32; return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)32;
    return 0;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return 0;
}

CUresult cuModuleLoad(CUmodule *m, const char *path) { *m = new_handle(); return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = new_handle(); return 0; }
CUresult cuModuleLoadDataEx(
    CUmodule *m, const void *image, unsigned count, CUjit_option *options, void **values) {
    *m = new_handle();
    return 0;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
    *f = new_handle();
    return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
    *value = 0;
    if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 32;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
    return 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int block, size_t s) {
    *n = 2;
    return 0;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
    *n = 64;
    return 0;
}

CUresult cuLaunchKernel(
    CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, CUstream stream, void **parameters, void **extra) {
    return count_launch();
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
    return count_launch();
}
CUresult cuLaunchCooperativeKernel(
    CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, CUstream stream, void **parameters) {
    return count_launch();
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)data = pointer;
    else *(int *)data = 0;
    return 0;
}
CUresult cuGetErrorString(CUresult result, const char **text) { *text = "stand-in"; return 0; }
CUresult cuGetErrorName(CUresult result, const char **text) { *text = "stand-in"; return 0; }

static int answer_success(void) { return 0; }
CUresult cuGetProcAddress_v2(
    const char *name, void **function, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *found = driver ? dlsym(driver, name) : NULL;
    *function = found ? found : (void *)answer_success;
    if (result) *result = 0;
    return 0;
}
