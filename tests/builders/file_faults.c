/* A file system that lacks something, by LD_PRELOAD: the calls fail for files under FAULT_DIR.
 *
 * FAULT names what it lacks: `locks` (flock and fcntl locks: ENOLCK), `sync` (fsync of folders:
 * EINVAL), `maps` (shared mmap: ENODEV) or `space` (ENOSPC). FAULT_SPACE is
 * `NUMBER:BYTES`: so many bytes can be written until the number changes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int lacks(const char *what, int fd) {
    const char *fault = getenv("FAULT"), *folder = getenv("FAULT_DIR");
    char link[64], path[4096];
    if (!fault || !folder || strcmp(fault, what)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return !strncmp(path, folder, strlen(folder));
}

/* How many of n bytes still fit, or -1 for none. */
static ssize_t room(int fd, size_t n) {
    static long left, known = -1;
    long number, space;
    if (!n || !lacks("space", fd)) return n;
    sscanf(getenv("FAULT_SPACE"), "%ld:%ld", &number, &space);
    if (number != known) left = space, known = number;
    if (!left) {
        errno = ENOSPC;
        return -1;
    }
    if (n > (size_t)left) n = left;
    left -= n;
    return n;
}

int flock(int fd, int how) {
    if (!lacks("locks", fd)) return REAL(flock)(fd, how);
    errno = ENOLCK;
    return -1;
}

static int no_lock(int fd, int command) {
    int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK
                || command == F_OFD_SETLKW;
    if (!locks || !lacks("locks", fd)) return 0;
    errno = ENOLCK;
    return 1;
}

#define FCNTL(name)                                              \
    int name(int fd, int command, ...) {                         \
        va_list rest;                                            \
        va_start(rest, command);                                 \
        void *value = va_arg(rest, void *);                      \
        va_end(rest);                                            \
        return no_lock(fd, command) ? -1 : REAL(name)(fd, command, value); \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

int fsync(int fd) {
    struct stat facts;
    if (!lacks("sync", fd) || fstat(fd, &facts) || !S_ISDIR(facts.st_mode)) return REAL(fsync)(fd);
    errno = EINVAL;
    return -1;
}

#define MMAP(name, offset_t)                                                            \
    void *name(void *at, size_t n, int protect, int flags, int fd, offset_t offset) {   \
        if (fd >= 0 && (flags & MAP_TYPE) != MAP_PRIVATE && lacks("maps", fd)) {        \
            errno = ENODEV;                                                             \
            return MAP_FAILED;                                                          \
        }                                                                               \
        return REAL(name)(at, n, protect, flags, fd, offset);                           \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

ssize_t write(int fd, const void *data, size_t n) {
    ssize_t fits = room(fd, n);
    return fits < 0 ? -1 : REAL(write)(fd, data, fits);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    ssize_t fits = room(fd, n);
    return fits < 0 ? -1 : REAL(pwrite)(fd, data, fits, at);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    ssize_t fits = room(fd, n);
    return fits < 0 ? -1 : REAL(pwrite64)(fd, data, fits, at);
}

ssize_t writev(int fd, const struct iovec *parts, int n_parts) {
    return n_parts ? write(fd, parts[0].iov_base, parts[0].iov_len) : 0;
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    ssize_t fits = room(out, n);
    return fits < 0 ? -1 : REAL(copy_file_range)(in, from, out, to, fits, flags);
}

#define SENDFILE(name, offset_t)                                    \
    ssize_t name(int out, int in, offset_t *from, size_t n) {       \
        ssize_t fits = room(out, n);                                \
        return fits < 0 ? -1 : REAL(name)(out, in, from, fits);     \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)
