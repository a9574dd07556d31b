/*
 * What the libraries of the stand-in share: the device's books, and the board on which a test reads
 * them and orders failures. All of it lives in libcuda (device.c); the others link to that.
 */
#ifndef STANDIN_H
#define STANDIN_H

#include <stddef.h>
#include <stdint.h>

#define STANDIN_OWNERS 64
#define STANDIN_CALLS 256

/* What one process holds. A process that has ended holds nothing, whatever its line says. */
struct standin_owner {
    int64_t pid;       /* 0: the line is free */
    int64_t used;      /* bytes of the device */
    int64_t reserved;  /* bytes of addresses */
    int64_t pinned;    /* bytes of host memory that are registered or allocated as pinned */
    int64_t handles;   /* pieces of physical memory that nobody has released */
    int64_t streams;   /* streams of the driver's that nobody has destroyed */
};

struct standin_count {
    char name[56];
    int64_t calls;
};

/*
 * The board: a file that all processes have mapped, named by FAKEGPU_BOARD. board.py has the same
 * layout. A test orders a failure by writing its name and code first, and `fails_in` last.
 */
struct standin_board {
    int64_t total;      /* bytes of the device */
    int64_t others;     /* bytes that some other process is said to hold: a test sets it */
    int64_t fails_in;   /* the how many-th call from now on fails; 0: none does */
    int64_t fail_code;  /* what it returns */
    int64_t failed;     /* how many calls have failed by order */
    char fail_name[56]; /* the function's name as the library exports it */
    struct standin_owner owners[STANDIN_OWNERS];
    int64_t names; /* how many of `calls` are in use */
    struct standin_count calls[STANDIN_CALLS];
};

/* One function's place on the board; `__func__` names it. */
struct standin_place {
    struct standin_count *count;
};

/* Counts a call; returns an error if a test wants it to fail, and 0 otherwise. */
int standin_call(struct standin_place *place, const char *name);

/* First line of a function that is counted and can be told to fail. */
#define CALL()                                              \
    do {                                                    \
        static struct standin_place place_;                 \
        int failure_ = standin_call(&place_, __func__);     \
        if (failure_) return failure_;                      \
    } while (0)

/* The books of this process. */
enum standin_book { STANDIN_USED, STANDIN_RESERVED, STANDIN_PINNED, STANDIN_HANDLES, STANDIN_STREAMS };
void standin_book(enum standin_book which, int64_t change);

int standin_take(size_t bytes); /* 1 if the device had so much free; it is this process's now */
void standin_info(size_t *free_bytes, size_t *total_bytes);
void standin_context(void); /* this process has a context from now on, which takes some memory */

/* Memory of the device that stays where it is, as cudaMalloc gives it. NULL: there is no room. */
void *standin_allocate(size_t bytes);
int standin_free(void *address); /* 0 if there was such a piece */

/* Host memory that is pinned. Both return 0 if that was right. */
int standin_pin(void *address, size_t bytes);
int standin_unpin(void *address);

/* A stream. Work is done at once, so all that one has is whether it is being captured. */
struct standin_stream {
    int is_capturing;
    int priority;
    uint64_t capture;
};

/* The address of a function of the driver by its name; one that does nothing, if there is none. */
void *standin_entry(const char *name);

#endif
