/* The device's books, the board, and failures by order. Part of libcuda. */
#define _GNU_SOURCE
#include "standin.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define STEP (2 * MIB)

static struct standin_board *board;
static struct standin_owner *self;
static int has_context;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t setting_mib(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return (text ? strtoull(text, NULL, 10) : otherwise) * MIB;
}

/* FAKEGPU_FAIL=cuMemMap:3 or cuMemMap:3:2: the third call fails, with code 999 or 2. */
static void order_failure(const char *text) {
    long long at = 0, code = 999;
    if (sscanf(text, "%55[^:]:%lld:%lld", board->fail_name, &at, &code) < 2) {
        fprintf(stderr, "stand-in: FAKEGPU_FAIL is '%s'; it has to be CALL:COUNT[:CODE]\n", text);
        abort();
    }
    board->fail_code = code;
    board->fails_in = at;
}

static void open_board(void) {
    const char *path = getenv("FAKEGPU_BOARD");
    int file = path ? open(path, O_RDWR | O_CREAT, 0600) : memfd_create("board", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, sizeof *board)) {
        fprintf(stderr, "stand-in: the board '%s': %s\n", path ? path : "", strerror(errno));
        abort();
    }
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (board == MAP_FAILED) abort();
    int64_t untold = 0;
    int64_t total = (int64_t)setting_mib("FAKEGPU_MIB", 8192);
    int is_first = __atomic_compare_exchange_n(&board->total, &untold, total, 0, __ATOMIC_SEQ_CST,
                                               __ATOMIC_SEQ_CST);
    const char *failure = getenv("FAKEGPU_FAIL");
    if (is_first && failure) order_failure(failure);
}

static int is_gone(int64_t pid) { return kill((pid_t)pid, 0) && errno == ESRCH; }

/* This process's line: one of its own, one that is free, or that of a process that has ended. */
static void find_line(void) {
    int64_t pid = getpid();
    for (int i = 0; i < STANDIN_OWNERS; i++) {
        struct standin_owner *line = &board->owners[i];
        int64_t there = line->pid;
        if (there && !is_gone(there)) continue;
        if (__atomic_compare_exchange_n(&line->pid, &there, pid, 0, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
            line->used = line->reserved = line->pinned = line->handles = line->streams = 0;
            self = line;
            return;
        }
    }
    fprintf(stderr, "stand-in: more than %d processes use the device\n", STANDIN_OWNERS);
    abort();
}

static void after_fork(void) {
    self = NULL;
    has_context = 0;
}

static void begin(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_board);
    if (!self) {
        pthread_mutex_lock(&lock);
        if (!self) {
            find_line();
            pthread_atfork(NULL, NULL, after_fork);
        }
        pthread_mutex_unlock(&lock);
    }
}

/* --- calls ------------------------------------------------------------------------------------ */

static struct standin_count *count_of(const char *name) {
    for (int64_t i = 0; i < board->names; i++)
        if (!strcmp(board->calls[i].name, name)) return &board->calls[i];
    int64_t place = __atomic_fetch_add(&board->names, 1, __ATOMIC_SEQ_CST);
    if (place >= STANDIN_CALLS) abort();
    strncpy(board->calls[place].name, name, sizeof board->calls[place].name - 1);
    return &board->calls[place];
}

int standin_call(struct standin_place *place, const char *name) {
    begin();
    if (!place->count) place->count = count_of(name);
    __atomic_fetch_add(&place->count->calls, 1, __ATOMIC_SEQ_CST);
    if (board->fails_in <= 0 || strcmp(board->fail_name, name)) return 0;
    if (__atomic_sub_fetch(&board->fails_in, 1, __ATOMIC_SEQ_CST)) return 0;
    __atomic_fetch_add(&board->failed, 1, __ATOMIC_SEQ_CST);
    return (int)board->fail_code;
}

static int nothing(void) { return 0; }

void *standin_entry(const char *name) {
    void *found = dlsym(RTLD_DEFAULT, name);
    if (!found) {
        char versioned[128];
        snprintf(versioned, sizeof versioned, "%s_v2", name);
        found = dlsym(RTLD_DEFAULT, versioned);
    }
    return found ? found : (void *)nothing;
}

/* --- books ------------------------------------------------------------------------------------ */

void standin_book(enum standin_book which, int64_t change) {
    begin();
    int64_t *books[] = {&self->used, &self->reserved, &self->pinned, &self->handles, &self->streams};
    __atomic_fetch_add(books[which], change, __ATOMIC_SEQ_CST);
}

static size_t used_by_all(void) {
    int64_t used = board->others;
    for (int i = 0; i < STANDIN_OWNERS; i++) {
        struct standin_owner *line = &board->owners[i];
        if (line->pid && line->used && !is_gone(line->pid)) used += line->used;
    }
    return (size_t)used;
}

void standin_context(void) {
    begin();
    pthread_mutex_lock(&lock);
    if (!has_context) {
        has_context = 1;
        self->used += (int64_t)setting_mib("FAKEGPU_CONTEXT_MIB", 512);
    }
    pthread_mutex_unlock(&lock);
}

/* Two processes that take at the same instant may take too much: no test does that. */
int standin_take(size_t bytes) {
    standin_context();
    pthread_mutex_lock(&lock);
    int fits = used_by_all() + bytes <= (size_t)board->total;
    if (fits) self->used += (int64_t)bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}

void standin_info(size_t *free_bytes, size_t *total_bytes) {
    begin();
    size_t used = used_by_all();
    *total_bytes = (size_t)board->total;
    *free_bytes = used < *total_bytes ? *total_bytes - used : 0;
}

/* --- pieces of memory, by address --------------------------------------------------------------- */

struct piece {
    char *address;
    size_t bytes;
};

struct pieces {
    struct piece *all;
    size_t count, room;
};

static struct pieces allocated, pinned;

static void add(struct pieces *to, void *address, size_t bytes) {
    pthread_mutex_lock(&lock);
    if (to->count == to->room) {
        to->room = to->room ? 2 * to->room : 256;
        to->all = realloc(to->all, to->room * sizeof *to->all);
        if (!to->all) abort();
    }
    to->all[to->count++] = (struct piece){address, bytes};
    pthread_mutex_unlock(&lock);
}

/* Forgets the piece that begins there; returns its bytes, 0 if there is none. */
static size_t take_out(struct pieces *from, void *address) {
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < from->count && !bytes; i++)
        if (from->all[i].address == (char *)address) {
            bytes = from->all[i].bytes;
            from->all[i] = from->all[--from->count];
        }
    pthread_mutex_unlock(&lock);
    return bytes;
}

/* Shared, so that a process's anonymous memory is that of the host alone. */
void *standin_allocate(size_t bytes) {
    bytes = (bytes + STEP - 1) / STEP * STEP;
    if (!standin_take(bytes)) return NULL;
    void *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) {
        standin_book(STANDIN_USED, -(int64_t)bytes);
        return NULL;
    }
    add(&allocated, address, bytes);
    return address;
}

int standin_free(void *address) {
    size_t bytes = take_out(&allocated, address);
    if (!bytes) return 1;
    munmap(address, bytes);
    standin_book(STANDIN_USED, -(int64_t)bytes);
    return 0;
}

int standin_pin(void *address, size_t bytes) {
    size_t known = take_out(&pinned, address);
    add(&pinned, address, known ? known : bytes);
    if (known) return 1;
    standin_book(STANDIN_PINNED, (int64_t)bytes);
    return 0;
}

int standin_unpin(void *address) {
    size_t bytes = take_out(&pinned, address);
    standin_book(STANDIN_PINNED, -(int64_t)bytes);
    return bytes == 0;
}
