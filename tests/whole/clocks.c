// Two threads, each on a vCPU of its own, look whether CLOCK_MONOTONIC ever goes back from one to the other.
// The first one also rings the doorbell with CLOCK_REALTIME every 5 ms. Argument: seconds of CLOCK_MONOTONIC.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>
#include <time.h>

static _Atomic int64_t latest;
static _Atomic long backwards, readings;
static int64_t until;

static int64_t now(clockid_t id)
{
	struct timespec t;
	clock_gettime(id, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void ring(uint32_t number)
{
	uint64_t value = now(CLOCK_REALTIME);
	outl(value, 0x5c0);
	outl(value >> 32, 0x5c0);
	outl(number, 0x5c4);
}

static void *look(void *cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET((intptr_t)cpu, &set);
	sched_setaffinity(0, sizeof set, &set);
	int64_t last = 0, next = 0;
	uint32_t rings = 0;
	if (!cpu && ioperm(0x5c0, 8, 1))
		exit(3);
	while (last < until) {
		int64_t seen = atomic_load(&latest);
		last = now(CLOCK_MONOTONIC);
		readings++;
		if (last < seen)
			backwards++;
		while (seen < last && !atomic_compare_exchange_weak(&latest, &seen, last))
			;
		if (!cpu && last >= next) {
			ring(++rings);
			next = last + 5000000;
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	pthread_t other;
	if (argc < 2)
		return 2;
	until = now(CLOCK_MONOTONIC) + atoll(argv[1]) * 1000000000LL;
	puts("clocks run");
	fflush(stdout);
	pthread_create(&other, 0, look, (void *)1);
	look(0);
	pthread_join(other, 0);
	printf("backwards=%ld\nreadings=%ld\n", backwards, readings);
	return 0;
}
