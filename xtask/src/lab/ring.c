/*
 * Rings Wardian's doorbell once a second for so many seconds (or, with 0, until killed): what the skew lab
 * runs in a Linux guest. Usage: ring SECONDS
 *
 * Values of a record: 0, CLOCK_REALTIME, CLOCK_BOOTTIME, nanoseconds that the ring before took,
 * CLOCK_MONOTONIC. A clock of coarse steps is read at a step.
 */
#include <cpuid.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>
#include <time.h>

enum { VALUE = 0x5c0, RING = 0x5c4, TRIES = 4, UNDISTURBED_NS = 60000 };

static uint64_t tsc(void) {
    uint32_t low, high;
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static uint64_t now(clockid_t clock) {
    struct timespec at;
    clock_gettime(clock, &at);
    return (uint64_t)at.tv_sec * 1000000000 + (uint64_t)at.tv_nsec;
}

static void send(uint64_t value) {
    outl((uint32_t)value, VALUE);
    outl((uint32_t)(value >> 32), VALUE);
}

int main(int argc, char **argv) {
    uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
    unsigned int khz, b, c, d;
    struct timespec step;
    __cpuid(0x40000010, khz, b, c, d);
    if (khz == 0) {
        fprintf(stderr, "ring: the machine does not say how fast its time-stamp counter is\n");
        return 1;
    }
    if (iopl(3)) {
        perror("ring: iopl");
        return 1;
    }
    clock_getres(CLOCK_MONOTONIC, &step);
    /* The time-stamp counter ends it: the clocks are what is in question. */
    uint64_t end = tsc() + seconds * 1000 * khz, trip = 0;
    uint32_t sequence = 0;
    for (int last = 0; !last;) {
        last = seconds && tsc() >= end;
        for (int tries = 0; tries < TRIES; tries++) {
            uint64_t before, at = now(CLOCK_MONOTONIC);
            if (step.tv_nsec > 100000)
                for (uint64_t first = at; (at = now(CLOCK_MONOTONIC)) == first;)
                    ;
            before = tsc();
            send(0);
            send(now(CLOCK_REALTIME));
            send(now(CLOCK_BOOTTIME));
            send(trip);
            send(now(CLOCK_MONOTONIC));
            outl(sequence++, RING);
            trip = (tsc() - before) * 1000000 / khz;
            /* How long the last one took is told by one more. */
            if (trip <= UNDISTURBED_NS && !(last && tries == 0))
                break;
        }
        if (!last) {
            /* More often towards the end: one of them will meet no backlog of ticks. */
            int soon = seconds && tsc() + 1000ULL * khz >= end;
            struct timespec rest = {!soon, soon ? 100000000 : 0};
            nanosleep(&rest, NULL);
        }
    }
    return 0;
}
