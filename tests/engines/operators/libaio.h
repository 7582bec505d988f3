// The part of libaio's interface that DeepSpeed's asynchronous files use, by the kernel's own calls (see io_setup(2),
// io_submit(2), io_getevents(2); the structures are those of linux/aio_abi.h on 64-bit little-endian machines). With it
// the operator needs no further package, and the files are written and read as with the library.
#pragma once

#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static_assert(sizeof(void *) == 8 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "another layout of requests");

typedef unsigned long io_context_t;

struct iocb {
    void *data;
    unsigned key, rw_flags;
    short aio_lio_opcode, aio_reqprio;
    int aio_fildes;
    union {
        struct {
            void *buf;
            unsigned long nbytes;
            long long offset, reserved;
            unsigned flags, resfd;
        } c;
    } u;
};

struct io_event {
    void *data;
    struct iocb *obj;
    unsigned long res, res2;
};

static inline int io_queue_init(int depth, io_context_t *context)
{
    *context = 0;
    return syscall(SYS_io_setup, depth, context);
}

static inline int io_queue_release(io_context_t context) { return syscall(SYS_io_destroy, context); }

static inline int io_submit(io_context_t context, long count, struct iocb **requests)
{
    return syscall(SYS_io_submit, context, count, requests);
}

// With no mask of signals, as DeepSpeed calls it.
static inline int io_pgetevents(
    io_context_t context, long least, long most, struct io_event *events, struct timespec *wait, const void *mask)
{
    return mask ? -1 : syscall(SYS_io_getevents, context, least, most, events, wait);
}

static inline void io_prep(struct iocb *request, int opcode, int file, void *buffer, size_t count, long long offset)
{
    memset(request, 0, sizeof(*request));
    request->aio_lio_opcode = opcode;
    request->aio_fildes = file;
    request->u.c.buf = buffer;
    request->u.c.nbytes = count;
    request->u.c.offset = offset;
}

static inline void io_prep_pread(struct iocb *request, int file, void *buffer, size_t count, long long offset)
{
    io_prep(request, 0, file, buffer, count, offset);
}

static inline void io_prep_pwrite(struct iocb *request, int file, void *buffer, size_t count, long long offset)
{
    io_prep(request, 1, file, buffer, count, offset);
}
