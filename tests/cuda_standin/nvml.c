/* NVML: how many devices there are, and what they are. Error 3 is NVML_ERROR_NOT_SUPPORTED. */
#include "standin.h"

#include <stdio.h>

#define NOT_SUPPORTED 3
#define DEVICE void *

static int the_device;

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }

const char *nvmlErrorString(int error) { return error ? "an error of the stand-in" : "Success"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = 1;
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, DEVICE *device) {
    *device = &the_device;
    return 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, DEVICE *device) {
    *device = &the_device;
    return 0;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, DEVICE *device) {
    *device = &the_device;
    return 0;
}

int nvmlDeviceGetName(DEVICE device, char *name, unsigned room) {
    snprintf(name, room, "stand-in for an NVIDIA H200");
    return 0;
}

int nvmlDeviceGetUUID(DEVICE device, char *uuid, unsigned room) {
    snprintf(uuid, room, "GPU-00000000-0000-0000-0000-000000000000");
    return 0;
}

int nvmlDeviceGetCudaComputeCapability(DEVICE device, int *major, int *minor) {
    *major = 9;
    *minor = 0;
    return 0;
}

int nvmlSystemGetDriverVersion(char *version, unsigned room) {
    snprintf(version, room, "580.0");
    return 0;
}

int nvmlSystemGetCudaDriverVersion(int *version) {
    *version = 13000;
    return 0;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    return nvmlSystemGetCudaDriverVersion(version);
}

/* nvmlMemory_t: total, free, used. */
int nvmlDeviceGetMemoryInfo(DEVICE device, unsigned long long *info) {
    size_t unused, total;
    standin_info(&unused, &total);
    info[0] = total;
    info[1] = unused;
    info[2] = total - unused;
    return 0;
}

int nvmlDeviceGetIndex(DEVICE device, unsigned *index) {
    *index = 0;
    return 0;
}

int nvmlDeviceGetMinorNumber(DEVICE device, unsigned *number) {
    *number = 0;
    return 0;
}

int nvmlDeviceGetP2PStatus(DEVICE one, DEVICE other, int capability, int *status) {
    *status = 0;
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(DEVICE device, unsigned *count, void *processes) {
    *count = 0;
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses(DEVICE device, unsigned *count, void *processes) {
    *count = 0;
    return 0;
}

int nvmlDeviceGetMigMode(DEVICE device, unsigned *current, unsigned *pending) {
    return NOT_SUPPORTED;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetGpuFabricInfoV(void) { return NOT_SUPPORTED; }
