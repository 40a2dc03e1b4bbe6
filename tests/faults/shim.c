/* Faults in the file system, for one process: preloaded, it counts the operations that change files under one folder
   and, at the one that was asked for, kills the process, interrupts it, or lets the operation fail.

   The operations are those that CPython and libstdc++ call through the dynamic linker; PyTorch and Lightning write
   through them too. The descriptor's path is looked up each time, so that nothing has to be tracked. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FAIL, FULL, RAISE };

static char prefix[PATH_MAX];
static size_t prefix_length;
static volatile long *counter;
static long target;
static int action;
static int detail; /* errno of FAIL, signal of RAISE */

/* Start counting operations under `folder` (an absolute path); the one numbered `at` (from 1) meets its fate. */
void fault_arm(const char *folder, volatile long *count, long at, int what, int parameter) {
    snprintf(prefix, sizeof prefix, "%s/", folder);
    prefix_length = strlen(prefix);
    counter = count;
    target = at;
    action = what;
    detail = parameter;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

static int inside(const char *path) { return strncmp(path, prefix, prefix_length) == 0; }

static int inside_at(int folder, const char *path) {
    char link[64], resolved[PATH_MAX];
    ssize_t length;
    if (path[0] == '/') return inside(path);
    if (folder == AT_FDCWD) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = readlink(link, resolved, sizeof resolved - 2);
    if (length < 0) return 0;
    resolved[length] = '/';
    resolved[length + 1] = 0;
    return inside(resolved);
}

static int inside_descriptor(int descriptor) {
    char link[64], resolved[PATH_MAX];
    ssize_t length;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, resolved, sizeof resolved - 1);
    if (length < 0) return 0;
    resolved[length] = 0;
    return inside(resolved);
}

/* Whether the operation that is about to happen must fail, with errno set; `grows` says that it needs space. */
static int fails(int grows) {
    long number = __sync_add_and_fetch(counter, 1);
    if (action == FULL && number >= target && grows) {
        errno = ENOSPC;
        return 1;
    }
    if (number != target) return 0;
    if (action == KILL || action == TEAR) {
        kill(getpid(), SIGKILL);
        pause();
    }
    if (action == RAISE) kill(getpid(), detail);
    if (action == FAIL) {
        errno = detail;
        return 1;
    }
    return 0;
}

/* A write that is cut off: half of it reaches the file. */
static int torn(void) { return (action == TEAR || action == FULL) && *counter + 1 == target; }

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(write);
    if (counter && inside_descriptor(descriptor)) {
        if (torn()) real(descriptor, data, size / 2);
        if (fails(1)) return -1;
    }
    return real(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(writev);
    if (counter && inside_descriptor(descriptor)) {
        if (torn() && count) {
            struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
            real(descriptor, &half, 1);
        }
        if (fails(1)) return -1;
    }
    return real(descriptor, parts, count);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list arguments; \
        mode_t mode; \
        REAL(name); \
        va_start(arguments, flags); \
        mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments); \
        if (counter && (flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC)) && inside(path) && fails(flags & O_CREAT)) \
            return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list arguments; \
        mode_t mode; \
        REAL(name); \
        va_start(arguments, flags); \
        mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments); \
        if (counter && (flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC)) && inside_at(folder, path) && \
            fails(flags & O_CREAT)) \
            return -1; \
        return real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define ONE(name, test, grows, parameters, ...) \
    int name parameters { \
        REAL(name); \
        if (counter && (test) && fails(grows)) return -1; \
        return real(__VA_ARGS__); \
    }
ONE(fsync, inside_descriptor(descriptor), 0, (int descriptor), descriptor)
ONE(fdatasync, inside_descriptor(descriptor), 0, (int descriptor), descriptor)
ONE(ftruncate64, inside_descriptor(descriptor), 0, (int descriptor, off64_t size), descriptor, size)
ONE(mkdir, inside(path), 1, (const char *path, mode_t mode), path, mode)
ONE(chmod, inside(path), 0, (const char *path, mode_t mode), path, mode)
ONE(rename, inside(to), 0, (const char *from, const char *to), from, to)
ONE(unlink, inside(path), 0, (const char *path), path)
ONE(unlinkat, inside_at(folder, path), 0, (int folder, const char *path, int flags), folder, path, flags)
ONE(rmdir, inside(path), 0, (const char *path), path)
