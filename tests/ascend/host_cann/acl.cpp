// The acl half of the stand-in: a runtime whose device memory is host memory, with streams and events that are always
// done, and the capture state of aclgraph.
//
// Only names and signatures matter for the ABI, so the declarations are our own. Symbols that torch_npu needs and that
// are not here are stubs that return 0 (see build.py).

#include <time.h>

#include <cstdarg>
#include <cstring>
#include <string>

#include "host_cann.h"

bool host_cann_debug() {
  static const bool on = getenv("HOST_CANN_DEBUG") && atoi(getenv("HOST_CANN_DEBUG"));
  return on;
}

extern "C" {
static thread_local int g_dev = -1;
static int g_handles[4096];
static int g_nh = 0;
static void* handle() { return &g_handles[__sync_fetch_and_add(&g_nh, 1) % 4096]; }
int aclInit(const char* p) {
  LOG("aclInit %s", p ? p : "-");
  return 0;
}
int aclrtGetDeviceCount(uint32_t* n) {
  const char* e = getenv("HOST_CANN_DEVICES");
  *n = e ? atoi(e) : 1;
  return 0;
}
int aclrtGetDevice(int32_t* d) {
  if (g_dev < 0) return 107002;
  *d = g_dev;
  return 0;
}
int aclrtSetDevice(int32_t d) {
  g_dev = d;
  return 0;
}
int aclrtGetCurrentContext(void** c) {
  static int ctx;
  *c = &ctx;
  return 0;
}
static int amalloc(void** p, size_t n) {
  *p = nullptr;
  size_t m = ((n + 32) + 511) / 512 * 512;
  return posix_memalign(p, 512, m) ? 207001 : 0;
}
int aclrtMalloc(void** p, size_t n, int) { return amalloc(p, n); }
int aclrtMallocAlign32(void** p, size_t n, int) { return amalloc(p, n); }
int aclrtMallocHost(void** p, size_t n) { return amalloc(p, n); }
int aclrtMallocHostWithCfg(void** p, size_t n, void*) { return amalloc(p, n); }
int aclrtFree(void* p) {
  free(p);
  return 0;
}
int aclrtFreeHost(void* p) {
  free(p);
  return 0;
}
int aclrtMemcpy(void* d, size_t, const void* s, size_t n, int) {
  if (n) memmove(d, s, n);
  return 0;
}
int aclrtMemcpyAsync(void* d, size_t, const void* s, size_t n, int, void*) {
  if (n) memmove(d, s, n);
  return 0;
}
int aclrtMemset(void* d, size_t, int32_t v, size_t n) {
  if (n) memset(d, v, n);
  return 0;
}
int aclrtMemsetAsync(void* d, size_t, int32_t v, size_t n, void*) {
  if (n) memset(d, v, n);
  return 0;
}
int aclrtGetMemInfo(int, size_t* f, size_t* t) {
  *f = *t = size_t(16) << 30;
  return 0;
}
const char* aclrtGetSocName() {
  const char* e = getenv("HOST_CANN_SOC");
  return e ? e : "Ascend910B3";
}
int aclrtCreateStream(void** s) {
  *s = handle();
  return 0;
}
int aclrtCreateStreamWithConfig(void** s, uint32_t, uint32_t) {
  *s = handle();
  return 0;
}
int aclrtCreateEventExWithFlag(void** e, uint32_t) {
  *e = handle();
  return 0;
}
int aclrtCreateEventWithFlag(void** e, uint32_t) {
  *e = handle();
  return 0;
}
int aclrtQueryEventStatus(void*, int* st) {
  *st = 1;
  return 0;
}
int aclrtQueryEventWaitStatus(void*, int* st) {
  *st = 0;
  return 0;
}
int aclrtStreamQuery(void*, int* st) {
  *st = 0;
  return 0;
}
int aclrtEventElapsedTime(float* ms, void*, void*) {
  *ms = 0.01f;
  return 0;
}
int aclrtStreamGetId(void* s, int32_t* id) {
  *id = int32_t((int*)s - g_handles);
  return 0;
}
// AI cores of the SoC; each has two vector cores.
static int64_t cores(bool vector) { return (strcmp(aclrtGetSocName(), "Ascend910B3") ? 24 : 20) * (vector ? 2 : 1); }
int64_t host_cann_vector_cores() { return cores(true); }
int aclrtGetDeviceInfo(uint32_t, int attribute, int64_t* v) {
  *v = cores(attribute == 201);
  return 0;
}
int aclrtGetDeviceResLimit(int32_t, int type, uint32_t* v) {
  *v = cores(type == 1);
  return 0;
}
int aclrtGetStreamResLimit(void*, int type, uint32_t* v) {
  *v = cores(type == 1);
  return 0;
}
int aclrtDeviceCanAccessPeer(int32_t* c, int32_t, int32_t) {
  *c = 0;
  return 0;
}
int aclrtGetPrimaryCtxState(int32_t, uint32_t* f, int32_t* a) {
  if (f) *f = 0;
  if (a) *a = 1;
  return 0;
}
int aclrtGetSysParamOpt(int, int64_t* v) {
  *v = 0;
  return 0;
}
// Capture: Python registers callbacks that record and replay (eager_kernels.py).
typedef int (*graph_callback)(int what, void* model);  // what: 0 begin, 1 end, 2 execute, 3 destroy
typedef void (*launch_callback)(host_cann_kernel kernel, void* arguments);
typedef void (*allocation_callback)(const void* address, void** base, uint64_t* bytes);
static graph_callback g_gcb = nullptr;
static launch_callback g_lcb = nullptr;
static allocation_callback g_acb = nullptr;
static void* g_cap = nullptr;
static std::string g_error;
void host_cann_set_callbacks(graph_callback graph, launch_callback launch, allocation_callback allocation) {
  g_gcb = graph;
  g_lcb = launch;
  g_acb = allocation;
}
void host_cann_set_error(const char* message) { g_error = message; }
int host_cann_capture_launch(host_cann_kernel kernel, void* arguments) {
  if (!g_cap || !g_lcb) return 0;
  g_lcb(kernel, arguments);
  return 1;
}
void host_cann_allocation(const void* address, void** base, uint64_t* bytes) {
  if (g_acb) g_acb(address, base, bytes);
}
int aclmdlRICaptureBegin(void*, int) {
  LOG("aclmdlRICaptureBegin");
  g_cap = handle();
  if (g_gcb) g_gcb(0, g_cap);
  return 0;
}
int aclmdlRICaptureEnd(void*, void** m) {
  LOG("aclmdlRICaptureEnd");
  *m = g_cap;
  if (g_gcb) g_gcb(1, g_cap);
  g_cap = nullptr;
  return 0;
}
int aclmdlRIExecuteAsync(void* m, void*) {
  LOG("aclmdlRIExecuteAsync %p (replay)", m);
  return g_gcb ? g_gcb(2, m) : 0;
}
int aclmdlRIDestroy(void* m) {
  LOG("aclmdlRIDestroy");
  if (g_gcb) g_gcb(3, m);
  return 0;
}
int aclmdlRICaptureGetInfo(void*, int* st, void** m) {
  *st = g_cap ? 1 : 0;
  *m = g_cap;
  return 0;
}
int aclmdlRIGetId(void* m, uint32_t* id) {
  *id = uint32_t((int*)m - g_handles);
  return 0;
}
int aclmdlRICaptureTaskGrpEnd(void*, void** h) {
  *h = handle();
  return 0;
}
void* aclopCreateAttr() { return handle(); }
void* aclCreateTensorDesc(int, int, const int64_t*, int) { return handle(); }
void* aclCreateDataBuffer(void*, size_t) { return handle(); }
const char* aclGetRecentErrMsg() { return g_error.c_str(); }
const char* aclrtGetSocVersion() { return aclrtGetSocName(); }
void* acltdtCreateDataset() { return handle(); }
void* acltdtCreateChannelWithCapacity(uint32_t, const char*, size_t) { return handle(); }
int acltdtReceiveTensor(const void*, void*, int32_t) {
  struct timespec t{1, 0};
  nanosleep(&t, 0);
  return 0;
}
struct aclCANNPackageVersion {
  char version[128];
  char majorVersion[64];
  char minorVersion[64];
  char releaseVersion[64];
  char patchVersion[64];
  char reserved[128];
};
int aclsysGetCANNVersion(int name, aclCANNPackageVersion* v) {
  const char* e = getenv("HOST_CANN_VERSION");
  memset(v, 0, sizeof *v);
  snprintf(v->version, 128, "%s", e ? e : "8.5.0");
  return 0;
}
int aclsysGetVersionStr(char*, char* v) {
  const char* e = getenv("HOST_CANN_VERSION");
  strcpy(v, e ? e : "8.5.0");
  return 0;
}
size_t aclGetCompileoptSize(int) { return 256; }
int aclGetCompileopt(int, char* v, size_t n) {
  if (n) v[0] = 0;
  return 0;
}
// secure_c
int strcpy_s(char* d, size_t m, const char* s) {
  if (strlen(s) + 1 > m) return 1;
  strcpy(d, s);
  return 0;
}
int vsnprintf_s(char* d, size_t m, size_t, const char* f, va_list a) { return vsnprintf(d, m, f, a); }
int snprintf_s(char* d, size_t m, size_t, const char* f, ...) {
  va_list a;
  va_start(a, f);
  int r = vsnprintf(d, m, f, a);
  va_end(a);
  return r;
}

void* host_cann_alloc(uint64_t n) {
  void* p;
  amalloc(&p, n);
  return p;
}
}
