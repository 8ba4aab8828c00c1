/* The small programs of `cargo xtask bench`: steps NAME COUNT. Compiled once, before anything is timed. */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void need(int good, const char *what) {
    if (!good) { perror(what); exit(1); }
}

static void matrix(long count) { /* COUNT products of 256 by 256, two doubles at a time */
    enum { N = 256 };
    static double a[N][N] __attribute__((aligned(16))), b[N][N] __attribute__((aligned(16))),
        c[N][N] __attribute__((aligned(16)));
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) a[i][j] = (i * 7 + j) % 13 - 6, b[i][j] = (i + j * 5) % 11 - 5;
    double trace = 0;
    for (long turn = 0; turn < count; turn++) {
        for (int i = 0; i < N; i++) {
            for (int j = 0; j < N; j += 2) {
                __m128d sum = _mm_setzero_pd();
                for (int k = 0; k < N; k++)
                    sum = _mm_add_pd(sum, _mm_mul_pd(_mm_set1_pd(a[i][k]), _mm_load_pd(&b[k][j])));
                _mm_store_pd(&c[i][j], sum);
            }
        }
        for (int i = 0; i < N; i++) trace += c[i][i] + c[i][(i + turn) % N];
    }
    printf("%.3f\n", trace);
}

static void nbody(long count) { /* COUNT steps of five bodies */
    enum { N = 5 };
    double p[N][3], v[N][3], m[N];
    for (int i = 0; i < N; i++) {
        m[i] = i ? 0.001 * i : 39.0;
        for (int k = 0; k < 3; k++) p[i][k] = i * (k + 1.5) + k, v[i][k] = i * (0.3 - 0.1 * k);
    }
    for (long turn = 0; turn < count; turn++) {
        for (int i = 0; i < N; i++) {
            for (int j = i + 1; j < N; j++) {
                double d[3], square = 0.01;
                for (int k = 0; k < 3; k++) d[k] = p[i][k] - p[j][k], square += d[k] * d[k];
                double pull = 0.001 / (square * sqrt(square));
                for (int k = 0; k < 3; k++) v[i][k] -= d[k] * m[j] * pull, v[j][k] += d[k] * m[i] * pull;
            }
        }
        for (int i = 0; i < N; i++)
            for (int k = 0; k < 3; k++) p[i][k] += 0.001 * v[i][k];
    }
    printf("%.9f %.9f\n", p[1][0], v[4][2]);
}

static void getppids(long count) {
    long same = 0, parent = getppid();
    while (count-- > 0) same += syscall(SYS_getppid) == parent;
    printf("%ld\n", same);
}

static void children(long count, char *program) { /* fork and wait; with a program also exec */
    long good = 0;
    while (count-- > 0) {
        pid_t child = fork();
        need(child >= 0, "fork");
        if (child == 0) {
            if (program) execl(program, program, (char *)NULL);
            _exit(program ? 1 : 0);
        }
        int status = 1;
        waitpid(child, &status, 0);
        good += status == 0;
    }
    printf("%ld\n", good);
}

static void pingpong(long count) { /* a byte there and back between two processes */
    int there[2], back[2];
    char byte = 0;
    need(pipe(there) == 0 && pipe(back) == 0, "pipe");
    pid_t child = fork();
    need(child >= 0, "fork");
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1) {
            byte++;
            if (write(back[1], &byte, 1) != 1) break;
        }
        _exit(0);
    }
    for (long i = 0; i < count; i++)
        need(write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1, "pipe");
    close(there[1]);
    waitpid(child, NULL, 0);
    printf("%ld %d\n", count, byte);
}

static atomic_uint turn;
static long turns;
static void *player(void *which) { /* waits for its turn, gives it to the other */
    unsigned mine = which != NULL;
    for (long i = 0; i < turns; i++) {
        unsigned now;
        while (((now = atomic_load(&turn)) & 1) != mine) syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, now, NULL);
        atomic_fetch_add(&turn, 1);
        syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, 1);
    }
    return NULL;
}
static void futex(long count) {
    pthread_t other;
    turns = count;
    need(pthread_create(&other, NULL, player, &turn) == 0, "thread");
    player(NULL);
    pthread_join(other, NULL);
    printf("%u\n", atomic_load(&turn));
}

static void faults(long count) { /* 16 MiB mapped, each page touched, unmapped */
    unsigned long sum = 0;
    while (count-- > 0) {
        enum { SIZE = 16 << 20 };
        char *at = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        need(at != MAP_FAILED, "mmap");
        madvise(at, SIZE, MADV_NOHUGEPAGE);
        for (long i = 0; i < SIZE; i += 4096) at[i] = 1, sum += (unsigned char)at[i + 1] + 1;
        munmap(at, SIZE);
    }
    printf("%lu\n", sum);
}

static void copy(long count) { /* COUNT times 16 MiB */
    enum { SIZE = 16 << 20 };
    char *from = malloc(SIZE), *to = malloc(SIZE);
    need(from && to, "malloc");
    memset(from, 7, SIZE), memset(to, 1, SIZE);
    for (long i = 0; i < count; i++) {
        from[i * 4097 % SIZE] = (char)i;
        memcpy(to, from, SIZE);
        __asm__ volatile("" : : "r"(to) : "memory");
    }
    printf("%d\n", to[(count - 1) * 4097 % SIZE]);
}

static void clocks(long count) {
    struct timespec now, last = {0, 0};
    long back = 0;
    while (count-- > 0) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        back += now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec);
        last = now;
    }
    printf("%ld\n", back);
}

static void blocks(long count, const char *file, int writes) { /* 4 KiB anywhere in 256 MiB, by direct I/O */
    int fd = open(file, O_RDWR | O_DIRECT);
    need(fd >= 0, file);
    char *at = aligned_alloc(4096, 4096);
    need(at != NULL, "malloc");
    memset(at, 5, 4096);
    unsigned seed = 12345;
    for (long i = 0; i < count; i++) {
        seed = seed * 1664525u + 1013904223u;
        off_t place = (off_t)(seed >> 8) % 65536 * 4096;
        need((writes ? pwrite(fd, at, 4096, place) : pread(fd, at, 4096, place)) == 4096, "block");
    }
    need(!writes || fdatasync(fd) == 0, "fdatasync");
    printf("%ld\n", count);
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    const char *name = argv[1];
    long count = atol(argv[2]);
    if (!strcmp(name, "matrix")) matrix(count);
    else if (!strcmp(name, "nbody")) nbody(count);
    else if (!strcmp(name, "getppid")) getppids(count);
    else if (!strcmp(name, "forkwait")) children(count, NULL);
    else if (!strcmp(name, "exec")) children(count, "/bin/true");
    else if (!strcmp(name, "pingpong")) pingpong(count);
    else if (!strcmp(name, "futex")) futex(count);
    else if (!strcmp(name, "fault")) faults(count);
    else if (!strcmp(name, "copy")) copy(count);
    else if (!strcmp(name, "clock")) clocks(count);
    else if (!strcmp(name, "randread") && argc > 3) blocks(count, argv[3], 0);
    else if (!strcmp(name, "randwrite") && argc > 3) blocks(count, argv[3], 1);
    else return 2;
    return 0;
}
