// The part of CUDA's driver that tercet/transfer/memory/cuda.py calls, over memory of the host: two GPUs, of which only
// the first reaches itself. Signatures are those of cuda.h, so that a wrong argument is noticed.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int CUresult, CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct { int device; } *CUcontext;
typedef struct { int flags; } *CUstream;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201 };
enum { MOST = 1 << 30, RANGES = 64 };

static int initialised, destroyed, settled;
static __thread CUcontext current;
static struct { CUdeviceptr base; size_t size; int fd; } ranges[RANGES];

#define REQUIRE(condition, code) do { if (!(condition)) return code; } while (0)

static int find(CUdeviceptr address) {
    for (int i = 0; i < RANGES; i++)
        if (ranges[i].size && address >= ranges[i].base && address < ranges[i].base + ranges[i].size) return i;
    return -1;
}

static CUresult map(CUdeviceptr *address, int fd, size_t size) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(at != MAP_FAILED, OUT_OF_MEMORY);
    int i = 0;
    while (ranges[i].size) i++;
    ranges[i].base = *address = (CUdeviceptr)at, ranges[i].size = size, ranges[i].fd = fd;
    return 0;
}

CUresult cuInit(unsigned flags) { initialised = flags == 0; return flags ? INVALID_VALUE : 0; }

CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
                                                                                          : "CUDA_ERROR_INVALID_VALUE";
    return 0;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : NULL;
    return error == OUT_OF_MEMORY ? 0 : INVALID_VALUE;
}

CUresult cuDeviceGetCount(int *count) { REQUIRE(initialised, NOT_INITIALIZED); *count = 2; return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { REQUIRE(initialised, NOT_INITIALIZED); *device = 10 + ordinal; return 0; }

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    memset(uuid, device, sizeof *uuid);
    return 0;
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) { *can = device == peer; return 0; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = malloc(sizeof **context);
    (*context)->device = device;
    return 0;
}

CUresult cuCtxSetCurrent(CUcontext context) { current = context; return 0; }

CUresult cuCtxSynchronize(void) { REQUIRE(current, INVALID_CONTEXT); settled++; return 0; }

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    REQUIRE(current && current->device == 10, INVALID_CONTEXT);
    REQUIRE(size <= MOST, OUT_OF_MEMORY);
    int fd = memfd_create("stub", 0);
    REQUIRE(fd >= 0 && ftruncate(fd, size) == 0, OUT_OF_MEMORY);
    return map(address, fd, size);
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    int i = find(address);
    REQUIRE(i >= 0, INVALID_VALUE);
    *base = ranges[i].base, *size = ranges[i].size;
    return 0;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    REQUIRE(current, INVALID_CONTEXT);
    int i = find(address);
    REQUIRE(i >= 0, INVALID_VALUE);
    memset(handle, 7, sizeof *handle);
    snprintf(handle->reserved, 60, "/proc/%d/fd/%d", getpid(), ranges[i].fd);
    return 0;
}

CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned flags) {
    REQUIRE(current, INVALID_CONTEXT);
    REQUIRE(flags == 1 && handle.reserved[63] == 7, INVALID_VALUE);
    int fd = open(handle.reserved, O_RDWR);
    struct stat found;
    REQUIRE(fd >= 0 && fstat(fd, &found) == 0, INVALID_VALUE);
    return map(address, fd, found.st_size);
}

CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    int i = find(address);
    REQUIRE(i >= 0 && ranges[i].base == address, INVALID_VALUE);
    munmap((void *)address, ranges[i].size);
    close(ranges[i].fd);
    ranges[i].size = 0;
    return 0;
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    REQUIRE(current && flags == 1, INVALID_VALUE);
    *stream = malloc(sizeof **stream);
    (*stream)->flags = flags;
    return 0;
}

CUresult cuStreamDestroy_v2(CUstream stream) { destroyed += stream->flags; free(stream); return 0; }

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    REQUIRE(current, INVALID_CONTEXT);
    REQUIRE(stream->flags == 1 && find(target) >= 0 && find(source) >= 0, INVALID_VALUE);
    memcpy((void *)target, (void *)source, size);
    return 0;
}

int stub_destroyed(void) { return destroyed; }
int stub_settled(void) { return settled; }
