/*
 * libcuda: contexts, virtual memory, copies, streams, modules. Kernels are loaded and never run.
 *
 * Physical memory is a memory file, reserved addresses are a mapping that nobody may touch, and a
 * mapping of the file takes its place. So a touch of memory that is not there ends the process.
 * Calls in a wrong order are errors, as with the real driver.
 */
#define _GNU_SOURCE
#include "standin.h"

#include <cuda.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#undef cuGetProcAddress /* the header gives the plain names to later versions; we define both */

#define STEP ((size_t)2 << 20)
#define RESERVED (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

static char the_context;
static __thread CUcontext current;

/* --- the device and its context ---------------------------------------------------------------- */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) {
    *device = number;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int room, CUdevice device) {
    snprintf(name, room, "stand-in for an NVIDIA H200");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    memset(uuid, 7, sizeof *uuid);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char *name, int room, CUdevice device) {
    snprintf(name, room, "0000:00:04.0");
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *total, CUdevice device) {
    size_t unused;
    standin_info(&unused, total);
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t *unused, size_t *total) {
    CALL();
    standin_context();
    standin_info(unused, total);
    return CUDA_SUCCESS;
}

/* Those of an H200, as far as anybody asks; whatever else it is asked for, it can do. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED: *value = 0; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    CALL();
    standin_context();
    *context = (CUcontext)&the_context;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *is_active) {
    *flags = 0;
    *is_active = 1;
    return CUDA_SUCCESS;
}

/* A thread without a context gets the runtime's: torch has made one before we are asked. */
CUresult cuCtxGetCurrent(CUcontext *context) {
    CALL();
    if (!current) current = (CUcontext)&the_context;
    *context = current;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    CALL();
    current = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (context) *context = (CUcontext)&the_context;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
    CALL();
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory"
            : error                           ? "an error of the stand-in"
                                              : "no error";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error ? "CUDA_ERROR_OF_THE_STAND_IN" : "CUDA_SUCCESS";
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *result) {
    *function = standin_entry(name);
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

/* --- virtual memory ---------------------------------------------------------------------------- */

/* A piece of physical memory; it goes once it is released and mapped nowhere. */
struct physical {
    int file;
    size_t bytes;
    int mappings;
    int is_released;
};

/* A range of reserved addresses, or of them a mapping. */
struct range {
    uintptr_t start;
    size_t bytes;
    struct physical *memory;
};

struct ranges {
    struct range *all;
    size_t count, room;
};

static struct ranges reservations, mappings;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add(struct ranges *to, struct range range) {
    if (to->count == to->room) {
        to->room = to->room ? 2 * to->room : 256;
        to->all = realloc(to->all, to->room * sizeof *to->all);
        if (!to->all) abort();
    }
    to->all[to->count++] = range;
}

/* The first range that has one of these bytes. */
static struct range *overlapping(struct ranges *in, CUdeviceptr start, size_t bytes) {
    for (size_t i = 0; i < in->count; i++) {
        struct range *range = &in->all[i];
        if (start < range->start + range->bytes && range->start < start + bytes) return range;
    }
    return NULL;
}

/* The range that is these very bytes. */
static struct range *exactly(struct ranges *in, CUdeviceptr start, size_t bytes) {
    struct range *found = overlapping(in, start, bytes);
    return found && found->start == start && found->bytes == bytes ? found : NULL;
}

static void forget(struct ranges *in, struct range *range) { *range = in->all[--in->count]; }

static void collect(struct physical *memory) {
    if (!memory->is_released || memory->mappings) return;
    close(memory->file);
    standin_book(STANDIN_USED, -(int64_t)memory->bytes);
    standin_book(STANDIN_HANDLES, -1);
    free(memory);
}

CUresult cuMemGetAllocationGranularity(size_t *step, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags flags) {
    CALL();
    *step = STEP;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *start, size_t bytes, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
    CALL();
    if (!bytes || bytes % STEP) return CUDA_ERROR_INVALID_VALUE;
    void *place = mmap(NULL, bytes, PROT_NONE, RESERVED, -1, 0);
    if (place == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    add(&reservations, (struct range){(uintptr_t)place, bytes, NULL});
    pthread_mutex_unlock(&lock);
    standin_book(STANDIN_RESERVED, (int64_t)bytes);
    *start = (CUdeviceptr)place;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr start, size_t bytes) {
    CALL();
    pthread_mutex_lock(&lock);
    struct range *range = exactly(&reservations, start, bytes);
    int is_right = range && !overlapping(&mappings, start, bytes);
    if (is_right) {
        forget(&reservations, range);
        munmap((void *)start, bytes);
        standin_book(STANDIN_RESERVED, -(int64_t)bytes);
    }
    pthread_mutex_unlock(&lock);
    return is_right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* With FAKEGPU_DIRTY new memory is not zero: nobody may rely on that it is. */
static void soil(struct physical *memory) {
    if (!getenv("FAKEGPU_DIRTY")) return;
    void *place = mmap(NULL, memory->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory->file, 0);
    if (place == MAP_FAILED) abort();
    memset(place, 0xaa, memory->bytes);
    munmap(place, memory->bytes);
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes,
                     const CUmemAllocationProp *properties, unsigned long long flags) {
    CALL();
    if (!bytes || bytes % STEP) return CUDA_ERROR_INVALID_VALUE;
    if (!standin_take(bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    struct physical *memory = calloc(1, sizeof *memory);
    memory->file = memfd_create("device memory", MFD_CLOEXEC);
    memory->bytes = bytes;
    if (memory->file < 0 || ftruncate(memory->file, (off_t)bytes)) abort();
    soil(memory);
    standin_book(STANDIN_HANDLES, 1);
    *handle = (CUmemGenericAllocationHandle)memory;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    CALL();
    struct physical *memory = (struct physical *)handle;
    if (memory->is_released) return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    memory->is_released = 1;
    collect(memory);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr start, size_t bytes, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
    CALL();
    struct physical *memory = (struct physical *)handle;
    pthread_mutex_lock(&lock);
    struct range *addresses = overlapping(&reservations, start, bytes);
    int is_right = addresses && addresses->start <= start &&
                   start + bytes <= addresses->start + addresses->bytes &&
                   offset + bytes <= memory->bytes && !overlapping(&mappings, start, bytes);
    if (is_right) {
        void *place = mmap((void *)start, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->file,
                           (off_t)offset);
        if (place == MAP_FAILED) abort();
        add(&mappings, (struct range){start, bytes, memory});
        memory->mappings++;
    }
    pthread_mutex_unlock(&lock);
    return is_right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemSetAccess(CUdeviceptr start, size_t bytes, const CUmemAccessDesc *access,
                        size_t count) {
    CALL();
    pthread_mutex_lock(&lock);
    int is_right = exactly(&mappings, start, bytes) != NULL;
    if (is_right && mprotect((void *)start, bytes, PROT_READ | PROT_WRITE)) abort();
    pthread_mutex_unlock(&lock);
    return is_right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemUnmap(CUdeviceptr start, size_t bytes) {
    CALL();
    pthread_mutex_lock(&lock);
    struct range *range = exactly(&mappings, start, bytes);
    int is_right = range != NULL;
    if (is_right) {
        struct physical *memory = range->memory;
        forget(&mappings, range);
        void *place = mmap((void *)start, bytes, PROT_NONE, RESERVED | MAP_FIXED, -1, 0);
        if (place == MAP_FAILED) abort();
        memory->mappings--;
        collect(memory);
    }
    pthread_mutex_unlock(&lock);
    return is_right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* --- other memory ------------------------------------------------------------------------------ */

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    CALL();
    *address = (CUdeviceptr)standin_allocate(bytes);
    return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    CALL();
    return standin_free((void *)address) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
    CALL();
    return standin_pin(address, bytes) ? CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED : CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void *address) {
    CALL();
    return standin_unpin(address) ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED : CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = address;
    else
        *(int *)value = CU_MEMORYTYPE_DEVICE;
    return CUDA_SUCCESS;
}

/* --- copies, which are done at once ------------------------------------------------------------- */

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    CALL();
    memcpy((void *)to, from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    CALL();
    memcpy(to, (void *)from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    CALL();
    memcpy((void *)to, from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    CALL();
    memcpy(to, (void *)from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    CALL();
    memset((void *)to, value, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    CALL();
    memset((void *)to, value, bytes);
    return CUDA_SUCCESS;
}

/* --- streams ----------------------------------------------------------------------------------- */

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    CALL();
    *stream = calloc(1, sizeof(struct standin_stream));
    standin_book(STANDIN_STREAMS, 1);
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    CALL();
    free(stream);
    standin_book(STANDIN_STREAMS, -1);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
    CALL();
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

/* --- modules: loaded, never run ------------------------------------------------------------------ */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = calloc(1, 16);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count,
                            CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}

CUresult cuModuleUnload(CUmodule module) {
    free(module);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = calloc(1, 16);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetGlobal_v2(CUdeviceptr *address, size_t *bytes, CUmodule module,
                              const char *name) {
    static char zeros[4096];
    *address = (CUdeviceptr)zeros;
    if (bytes) *bytes = sizeof zeros;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
                                                                  : 0;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function,
                                      const CUlaunchConfig *config) {
    *count = 66;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int block,
                                                     size_t shared) {
    *count = 2;
    return CUDA_SUCCESS;
}
