// Sums and gathers between the processes of one host, through memory that they share: a round of them takes some
// microseconds, where sockets take some hundred.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "team.h"

// The shared memory: Head, a Mark for each rank, then two rooms of `capacity` bytes for each rank, used by turns. A rank
// writes to a room again only after it has seen everybody's next round, so after everybody has read the last one.
struct alignas(64) Head {
    std::atomic<uint32_t> stopped;
};

struct alignas(64) Mark {
    std::atomic<uint32_t> round;    // how many this rank has written
    std::atomic<uint32_t> waiting;  // ranks that sleep until it changes
};

struct Communicator {
    char* memory;
    int64_t rank, size, capacity, spins;
    double timeout_s;
    uint32_t round;
};

enum { DONE = 0, STOPPED = 1, LATE = 2 };  // a failure is 256 * the rank that was waited for + STOPPED or LATE
static constexpr long NAP_NS = 20'000'000;  // after which a rank that sleeps looks whether the group is stopped

static Head& head_of(Communicator* c) { return *reinterpret_cast<Head*>(c->memory); }
static Mark& mark_of(Communicator* c, long rank) { return reinterpret_cast<Mark*>(c->memory + sizeof(Head))[rank]; }
static char* room_of(Communicator* c, long rank, uint32_t round) {
    return c->memory + sizeof(Head) + c->size * sizeof(Mark) + (2 * rank + (round & 1)) * c->capacity;
}

static double seconds_now() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static bool has_written(Mark& mark, uint32_t round) {
    return static_cast<int32_t>(mark.round.load(std::memory_order_acquire) - round) >= 0;
}

static void publish(Communicator* c) {
    Mark& mark = mark_of(c, c->rank);
    mark.round.store(++c->round, std::memory_order_seq_cst);
    if (mark.waiting.load(std::memory_order_seq_cst))
        syscall(SYS_futex, &mark.round, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

static int await_rank(Communicator* c, long rank) {
    Mark& mark = mark_of(c, rank);
    for (long spin = 0; spin < c->spins; spin++) {
        if (has_written(mark, c->round)) return DONE;
        relax();
    }
    timespec nap{0, NAP_NS};
    for (double deadline = seconds_now() + c->timeout_s;;) {
        mark.waiting.fetch_add(1, std::memory_order_seq_cst);
        uint32_t seen = mark.round.load(std::memory_order_seq_cst);
        if (static_cast<int32_t>(seen - c->round) < 0) syscall(SYS_futex, &mark.round, FUTEX_WAIT, seen, &nap, nullptr, 0);
        mark.waiting.fetch_sub(1, std::memory_order_seq_cst);
        if (has_written(mark, c->round)) return DONE;
        if (head_of(c).stopped.load(std::memory_order_relaxed)) return 256 * rank + STOPPED;
        if (seconds_now() > deadline) return 256 * rank + LATE;
    }
}

static int await_all(Communicator* c) {
    for (long rank = 0; rank < c->size; rank++)
        if (int failure = await_rank(c, rank)) return failure;
    return DONE;
}

extern "C" {

int64_t communicator_bytes(int64_t size, int64_t capacity) { return sizeof(Head) + size * (sizeof(Mark) + 2 * capacity); }

void communicator_stop(Communicator* c) { head_of(c).stopped.store(1, std::memory_order_relaxed); }

// x [count] becomes the sum over the ranks, added up in the order of their numbers: the same bits everywhere.
int communicator_all_reduce(Communicator* c, float* x, int64_t count) {
    int64_t most = c->capacity / sizeof(float);
    for (int64_t at = 0; at < count; at += most) {
        int64_t here = std::min(most, count - at);
        std::memcpy(room_of(c, c->rank, c->round), x + at, here * sizeof(float));
        publish(c);
        if (int failure = await_all(c)) return failure;
        std::memcpy(x + at, room_of(c, 0, c->round - 1), here * sizeof(float));
        for (long rank = 1; rank < c->size; rank++) {
            const float* theirs = reinterpret_cast<const float*>(room_of(c, rank, c->round - 1));
            for (int64_t i = 0; i < here; i++) x[at + i] += theirs[i];
        }
    }
    return DONE;
}

// x [bytes] of each rank -> out [size, bytes], or nothing where out is null.
int communicator_gather(Communicator* c, const char* x, int64_t bytes, char* out) {
    for (int64_t at = 0; at < bytes; at += c->capacity) {
        int64_t here = std::min(c->capacity, bytes - at);
        std::memcpy(room_of(c, c->rank, c->round), x + at, here);
        publish(c);
        if (int failure = await_all(c)) return failure;
        for (long rank = 0; out && rank < c->size; rank++)
            std::memcpy(out + rank * bytes + at, room_of(c, rank, c->round - 1), here);
    }
    return DONE;
}
}
