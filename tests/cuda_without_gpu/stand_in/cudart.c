// The CUDA runtime of a GPU that computes nothing.
//
// Device memory is reserved address space: it counts, and pages appear when the host writes to
// them, so that a tensor can be read back if it was copied to the device. Kernels are counted and
// not run. Everything else answers at once.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <cuda_runtime_api.h>
#undef cudaGetDeviceProperties

#include "counters.h"

// ---- Counters -----------------------------------------------------------------------------------

static const char *counter_names[N_COUNTERS] = {
    "kernels", "triton", "gemms", "to_host", "to_device", "syncs",
    "allocations", "all_reduces", "all_reduced_bytes", "broadcasts",
};
static long long counters[N_COUNTERS];
static void (*on_sync)(const char *);  // a Python function that looks up who waits
static __thread int in_callback;

void stand_in_add(enum counter which, long long amount) { counters[which] += amount; }

long long stand_in_count(const char *name) {
    for (int i = 0; i < N_COUNTERS; i++)
        if (strcmp(name, counter_names[i]) == 0) return counters[i];
    return -1;
}

void stand_in_reset(void) { memset(counters, 0, sizeof counters); }

void stand_in_on_sync(void (*callback)(const char *)) { on_sync = callback; }

static void count_sync(enum counter which, const char *name) {
    counters[which]++;
    if (on_sync == NULL || in_callback) return;
    in_callback = 1;
    on_sync(name);
    in_callback = 0;
}

// ---- The device ---------------------------------------------------------------------------------

typedef struct {
    int capability;  // 80 for compute capability 8.0
    const char *name;
    int multiprocessors, shared_per_block, shared_per_multiprocessor, threads_per_multiprocessor;
    int l2_bytes, bus_bits;
} Model;

static const Model models[] = {
    {80, "NVIDIA A100-SXM4-40GB", 108, 166912, 167936, 2048, 41943040, 5120},
    {86, "NVIDIA RTX A5000", 64, 101376, 102400, 1536, 6291456, 384},
    {90, "NVIDIA H100 80GB HBM3", 132, 232448, 233472, 2048, 52428800, 5120},
};
static const Model *model = &models[0];
static size_t total_bytes = 40000000000, used_bytes;
static int n_devices = 1;
static __thread int current_device;

// Device memory: a part of the address space that nothing else uses.
#define ARENA ((char *)0x300000000000ull)
#define ARENA_BYTES (1ull << 44)
#define LARGEST_COPY (1 << 20)  // larger copies are counted and not made
static char *next_address;

static void start(void) {
    static int started;
    if (started) return;
    started = 1;

    const char *value = getenv("STAND_IN_SM");
    for (size_t i = 0; value && i < sizeof models / sizeof *models; i++)
        if (models[i].capability == atoi(value)) model = &models[i];
    if ((value = getenv("STAND_IN_GB"))) total_bytes = (size_t)(atof(value) * 1e9);
    if ((value = getenv("STAND_IN_DEVICES"))) n_devices = atoi(value);

    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    if (mmap(ARENA, ARENA_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0) != ARENA) {
        perror("stand-in: address space");
        abort();
    }
    next_address = ARENA + (1 << 21);
}

static int on_device(const void *pointer) {
    return (char *)pointer >= ARENA && (char *)pointer < ARENA + ARENA_BYTES;
}

cudaError_t cudaGetDeviceCount(int *count) { start(); *count = n_devices; return 0; }
cudaError_t cudaGetDevice(int *device) { start(); *device = current_device; return 0; }
cudaError_t cudaSetDevice(int device) { start(); current_device = device; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return 0; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    start();
    memset(p, 0, sizeof *p);
    strcpy(p->name, model->name);
    p->major = model->capability / 10;
    p->minor = model->capability % 10;
    p->totalGlobalMem = total_bytes;
    p->multiProcessorCount = model->multiprocessors;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = model->shared_per_block;
    p->sharedMemPerMultiprocessor = model->shared_per_multiprocessor;
    p->maxThreadsPerMultiProcessor = model->threads_per_multiprocessor;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = model->l2_bytes;
    p->memoryBusWidth = model->bus_bits;
    p->unifiedAddressing = p->managedMemory = p->canMapHostMemory = p->concurrentKernels = 1;
    p->asyncEngineCount = 3;
    return 0;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    start();
    switch ((int)attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = model->capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = model->capability % 10; break;
        case cudaDevAttrMultiProcessorCount: *value = model->multiprocessors; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = model->threads_per_multiprocessor; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = model->shared_per_block; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = model->shared_per_multiprocessor; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
        case cudaDevAttrL2CacheSize: *value = model->l2_bytes; break;
        case cudaDevAttrGlobalMemoryBusWidth: *value = model->bus_bits; break;
        case cudaDevAttrClockRate: *value = 1410000; break;
        case cudaDevAttrMemoryClockRate: *value = 1215000; break;
        case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrUnifiedAddressing: *value = 1; break;
        default: *value = 0;
    }
    return 0;
}

// ---- Memory -------------------------------------------------------------------------------------

typedef struct { char *address; size_t bytes; } Block;
static Block blocks[200000];
static int n_blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    start();
    bytes = (bytes + 511) & ~511ull;
    *pointer = NULL;
    pthread_mutex_lock(&lock);
    counters[ALLOCATIONS]++;
    int full = used_bytes + bytes > total_bytes || n_blocks == sizeof blocks / sizeof *blocks;
    if (!full) {
        *pointer = next_address;
        next_address += (bytes + (1 << 21) - 1) & ~((1ull << 21) - 1);
        used_bytes += bytes;
        blocks[n_blocks++] = (Block){*pointer, bytes};
    }
    pthread_mutex_unlock(&lock);
    if (next_address > ARENA + ARENA_BYTES) {
        fprintf(stderr, "stand-in: out of address space\n");
        abort();
    }
    return full ? cudaErrorMemoryAllocation : 0;
}

cudaError_t cudaFree(void *pointer) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_blocks; i++) {
        if (blocks[i].address != pointer) continue;
        used_bytes -= blocks[i].bytes;
        madvise(pointer, blocks[i].bytes, MADV_DONTNEED);
        blocks[i] = blocks[--n_blocks];
        break;
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) {
    return cudaMalloc(pointer, bytes);
}
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    return posix_memalign(pointer, 4096, bytes ? bytes : 1) ? cudaErrorMemoryAllocation : 0;
}
cudaError_t cudaFreeHost(void *pointer) { free(pointer); return 0; }
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    return cudaMalloc(pointer, 4096);
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)16;
    return 0;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    start();
    *total = total_bytes;
    *available = total_bytes - used_bytes;
    return 0;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
    memset(a, 0, sizeof *a);
    a->type = on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    a->device = on_device(pointer) ? 0 : -2;
    *(on_device(pointer) ? &a->devicePointer : &a->hostPointer) = (void *)pointer;
    return 0;
}

static void copy(void *to, const void *from, size_t bytes) {
    if (bytes <= LARGEST_COPY) memcpy(to, from, bytes);
    else if (!on_device(to)) memset(to, 0, bytes);
}

cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (on_device(from) && !on_device(to)) count_sync(TO_HOST, "copy to the host");
    else if (on_device(to) && !on_device(from)) counters[TO_DEVICE]++;
    copy(to, from, bytes);
    return 0;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    count_sync(SYNCS, "cudaMemcpy");
    copy(to, from, bytes);
    return 0;
}

cudaError_t cudaMemset(void *pointer, int value, size_t bytes) {
    if (bytes <= LARGEST_COPY) memset(pointer, value, bytes);
    return 0;
}

cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
    counters[KERNELS]++;
    return cudaMemset(pointer, value, bytes);
}

// ---- Streams and events -------------------------------------------------------------------------

static uintptr_t last_stream = 0x1000;
static cudaError_t new_stream(cudaStream_t *stream) {
    *stream = (cudaStream_t)(last_stream += 16);
    return 0;
}
static double *new_event(void) { return calloc(1, sizeof(double)); }
static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

cudaError_t cudaStreamCreate(cudaStream_t *s) { return new_stream(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return new_stream(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    return new_stream(s);
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (count) *count = 0;
    return 0;
}
cudaError_t cudaStreamQuery(cudaStream_t s) { return 0; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    count_sync(SYNCS, "cudaStreamSynchronize");
    return 0;
}
cudaError_t cudaDeviceSynchronize(void) {
    count_sync(SYNCS, "cudaDeviceSynchronize");
    return 0;
}
cudaError_t cudaStreamAddCallback(
    cudaStream_t s, cudaStreamCallback_t callback, void *data, unsigned flags) {
    callback(s, 0, data);
    return 0;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *data) {
    function(data);
    return 0;
}

cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = (cudaEvent_t)new_event(); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    *e = (cudaEvent_t)new_event();
    return 0;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return 0; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { *(double *)e = seconds(); return 0; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
    return cudaEventRecord(e, s);
}
cudaError_t cudaEventQuery(cudaEvent_t e) { return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    count_sync(SYNCS, "cudaEventSynchronize");
    return 0;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    double elapsed = 1000 * (*(double *)to - *(double *)from);
    *ms = elapsed > 1e-3 ? elapsed : 1e-3;
    return 0;
}

// ---- Kernels ------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(
    const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
    counters[KERNELS]++;
    return 0;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) {
    counters[KERNELS]++;
    return 0;
}
cudaError_t __cudaLaunchKernel(
    void *kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
    counters[KERNELS]++;
    return 0;
}
cudaError_t __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return 0; }

static void *fat_binary;
void **__cudaRegisterFatBinary(void *fat) { return &fat_binary; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *s) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *s) {
    *grid = *block = (dim3){1, 1, 1};
    *shared = 0;
    *(void **)s = NULL;
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = model->capability;
    a->maxDynamicSharedSizeBytes = model->shared_per_block;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *f, int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    return 0;
}

// ---- Errors, and the driver's functions ---------------------------------------------------------

const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "out of memory" : "error of the stand-in";
}
const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return 0;
}

static int answer_success(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    static void *driver;
    if (driver == NULL) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    void *found = driver ? dlsym(driver, name) : NULL;
    *function = found ? found : (void *)answer_success;
    if (result) *result = cudaDriverEntryPointSuccess;
    return 0;
}
