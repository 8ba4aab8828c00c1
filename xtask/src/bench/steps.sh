#!/bin/bash
# The steps of `cargo xtask bench`, in the order of the functions below: bash steps.sh NAME...
# Before the colon: `gate` for those of `bench boot`; a class for those of the whole bench; `x3`: three times over
# there; `2`: with 2 vCPUs. A name may be followed by `:` and a number of times.
# Runs in a guest or, for comparison, in a chroot of the same root. Each step prints what it computed, and
# nothing that differs between machines: the host compares the sums. Its own clock goes out with the markers.
mkdir -p /tmp/bench /root/bench
cd /tmp/bench || exit 1

# What the steps need, made before the first is timed.
prepare() {
    dd if=/usr/bin/python3 of=data bs=1M skip=1 count=2 2> /dev/null
    for i in 1 2 3 4 5 6 7 8 9 10; do cat data; done > large
    head -c 700000 data > part
    cat > compute.py <<'PY'
import hashlib, json, re
words = {}
for i in range(40000):
    word = "w%d" % (i * 7919 % 5003)
    words[word] = words.get(word, 0) + i
top = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:2000]
text = json.dumps(dict(top))
assert json.loads(text) == dict(top)
digits = re.findall(r'"(w\d+)": (\d+)', text)
x = 0.5
for i in range(150000):
    x = 3.7 * x * (1 - x)
print(len(digits), hashlib.sha256(text.encode()).hexdigest(), "%.12f" % x)
PY
    cat > program.c <<'C'
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
struct node { struct node *left, *right; unsigned key; };
static struct node *insert(struct node *at, struct node *fresh) {
    if (!at) return fresh;
    if (fresh->key < at->key) at->left = insert(at->left, fresh);
    else at->right = insert(at->right, fresh);
    return at;
}
static unsigned depth(const struct node *at) {
    if (!at) return 0;
    unsigned l = depth(at->left), r = depth(at->right);
    return 1 + (l > r ? l : r);
}
static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
int main(void) {
    enum { N = 50000 };
    struct node *root = NULL, *all = calloc(N, sizeof *all);
    double *values = malloc(N * sizeof *values), sum = 0;
    unsigned seed = 12345;
    for (int i = 0; i < N; i++) {
        seed = seed * 1664525u + 1013904223u;
        all[i].key = seed;
        root = insert(root, &all[i]);
        values[i] = sqrt(seed) * 0.25;
    }
    qsort(values, N, sizeof *values, by_value);
    for (int i = 0; i < N; i += 100) sum += values[i];
    char text[64];
    snprintf(text, sizeof text, "depth %u sum %.3f", depth(root), sum);
    printf("%s (%zu)\n", text, strlen(text));
    return 0;
}
C
    cat > regex.pl <<'PL'
my ($lines, $hits, $words) = (0, 0, 0);
my $text = join("\n", map { sprintf("user%d\@host%d.example.org 10.%d.%d.7 GET /p/%d?q=%s", $_, $_ % 97, $_ % 256,
    $_ * 7 % 256, $_, "x" x ($_ % 40)) } 1 .. 12000);
for (split /\n/, $text) {
    $lines++;
    $hits++ if /^user(\d+)\@host(\d*[13579])\.example\.(?:org|com) (\d+)\.(\d+)\.\d+\.7 GET (\/[a-z]+\/\d+)\?q=(x{3,}|)$/;
    $words += () = /\b[a-z]+\d*\b/g;
    s/(\d+)\.(\d+)/$2.$1/g;
}
print "$lines $hits $words\n";
PL
    cat > loop.js <<'JS'
const N = 300000, sieve = new Uint8Array(N + 1);
let primes = 0;
for (let i = 2; i <= N; i++) {
    if (sieve[i]) continue;
    primes++;
    for (let j = i * 2; j <= N; j += i) sieve[j] = 1;
}
let hash = 0;
const objects = [];
for (let i = 0; i < 100000; i++) objects.push({ id: i, name: 'n' + (i % 1000), value: Math.sqrt(i) });
for (const o of objects) hash = (Math.imul(hash, 31) + o.name.length + Math.floor(o.value)) | 0;
const text = JSON.stringify(objects.slice(0, 5000));
console.log(primes, hash, JSON.parse(text).length, text.length);
JS
}

step_python3() { # gate: python3: start, dictionaries, sorting, JSON, regex, floats
    python3 compute.py
}
step_gcc() { # gate user: gcc -O2 of a small program, and a run of it
    gcc -O2 -o program program.c -lm && ./program
}
step_start() { # gate kernel x2: ten python3 starts
    for i in 1 2 3 4 5 6 7 8 9 10; do python3 -c "print($i)"; done
}
step_openssl() { # gate: openssl: SHA-256 of 20 MB, AES-256-CTR of 20 MB
    openssl dgst -sha256 -r large
    openssl enc -aes-256-ctr -K 00 -iv 00 -in large 2> /dev/null | cksum
}
step_sqlite() { # gate user x4: sqlite3: 50,000 inserts, an index, queries
    rm -f base.db
    sqlite3 base.db "CREATE TABLE t(a INTEGER, b TEXT); BEGIN;
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000)
        INSERT INTO t SELECT i * 7919 % 10007, 'text ' || i FROM n; COMMIT; CREATE INDEX ta ON t(a);
        SELECT count(*), sum(a), max(b) FROM t WHERE a BETWEEN 100 AND 9000;
        SELECT sum(length(b)) FROM t WHERE b LIKE '%9%';"
}
step_perl() { # gate user x3: perl: regular expressions over 12,000 lines
    perl regex.pl
}
step_node() { # gate user: node: start and JIT-compiled loops
    node loop.js
}
step_xz() { # gate user x4: xz -3 of 0.7 MB and back
    xz -3 -T1 -c part > part.xz && xz -dc part.xz | cksum && cksum < part.xz
}
step_fork() { # gate: 300 times fork, exec and wait
    i=0
    while [ $i -lt 300 ]; do
        /bin/true
        i=$((i + 1))
    done
    echo $i
}
step_shell() { # gate user x2: dash: 200,000 turns of a loop
    sh -c 'i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done; echo $i'
}
step_syscall() { # gate: dd: 300,000 system calls
    dd if=/dev/zero of=/dev/null bs=1 count=150000 2> /dev/null
    echo done
}
step_pipe() { # gate: bytes through three processes by pipes
    head -c 100000000 /dev/zero | tr '\0' 'a' | cksum
}
step_disk() { # gate: root disk: 64 MB written and flushed, then read by direct I/O
    dd if=/dev/zero of=/root/bench/disk bs=1M count=64 conv=fdatasync 2> /dev/null &&
        dd if=/root/bench/disk of=/dev/null bs=64k iflag=direct 2> /dev/null && echo read
    rm -f /root/bench/disk
}

# The rest is of the whole bench alone; /root/steps is steps.c, compiled, /root/key an RSA key, /root/7zz of 7-Zip.
step_dict() { # user: python3: 800,000 turns of a loop over a dictionary
    python3 -c 'd = {}
for i in range(800000):
    k = i * 7919 % 5003
    d[k] = d.get(k, 0) + i
print(len(d), sum(d.values()))'
}
step_sha256() { # user: openssl: SHA-256 of 240 MB
    for i in 1 2 3 4 5 6 7 8 9 10 11 12; do cat large; done | openssl dgst -sha256 -r
}
step_rsa() { # user x5: openssl: check of an RSA key of 2048 bits, a signature
    openssl rsa -in /root/key -check -noout && openssl dgst -sha256 -sign /root/key part | cksum
}
step_7z() { # user x2: 7-Zip: LZMA2 of 2 MB and back
    /root/7zz a -txz -mx=3 -mmt=1 -si -so x < data > data.xz 2> /dev/null && cksum < data.xz &&
        /root/7zz e -txz -mmt=1 -si -so < data.xz 2> /dev/null | cksum
}
step_copy() { # user: memcpy, 400 times 16 MiB
    /root/steps copy 400
}
step_matrix() { # float: 60 SSE2 products of 256 by 256 doubles
    /root/steps matrix 60
}
step_nbody() { # float: n-body, four million steps
    /root/steps nbody 4000000
}
step_getppid() { # kernel: three million getppid
    /root/steps getppid 3000000
}
step_forkwait() { # kernel: 4000 times fork and wait
    /root/steps forkwait 4000
}
step_exec() { # kernel: 500 times /bin/true
    /root/steps exec 500
}
step_pingpong() { # kernel: 50,000 times there and back by pipes
    /root/steps pingpong 50000
}
step_fault() { # kernel: 160,000 page faults (mmap, touch, munmap)
    /root/steps fault 40
}
step_clock() { # system: ten million clock_gettime
    /root/steps clock 10000000
}
step_futex() { # system 2: 20,000 times there and back between two threads by futex
    /root/steps futex 20000
}
step_pair() { # float 2: two n-body jobs of four million steps at once
    /root/steps nbody 4000000 > second &
    /root/steps nbody 4000000
    wait $! && cat second
}
step_build() { # user 2: two compilations as in gcc at once
    gcc -O2 -o program2 program.c -lm > second 2>&1 && ./program2 >> second &
    gcc -O2 -o program program.c -lm && ./program
    wait $! && cat second
}
step_write() { # disk: 256 MiB written in order and flushed
    dd if=/dev/zero of=/root/bench/disk bs=1M count=256 conv=fdatasync 2> /dev/null && echo written
}
step_read() { # disk x4: 256 MiB read in order by direct I/O
    dd if=/root/bench/disk of=/dev/null bs=256k iflag=direct 2> /dev/null && echo read
}
step_randread() { # disk: 20,000 times 4 KiB read anywhere by direct I/O
    /root/steps randread 20000 /root/bench/disk
}
step_randwrite() { # disk: 10,000 times 4 KiB written anywhere by direct I/O, flushed
    /root/steps randwrite 10000 /root/bench/disk
}

prepare
# What the disk's steps use, whichever of them are asked for.
case " $* " in
    *" read"* | *" rand"*)
        dd if=/dev/zero of=/root/bench/disk bs=1M count=256 conv=fdatasync 2> /dev/null
        ;;
esac
for word in "$@"; do
    name=${word%:*} status=0 times=1
    [ "$name" = "$word" ] || times=${word#*:}
    echo "WARDIAN-BEGIN $name $EPOCHREALTIME"
    for ((turn = 0; turn < times && status == 0; turn++)); do
        "step_$name" || status=$?
    done > out 2>&1
    echo "WARDIAN-END $name $EPOCHREALTIME $status"
    read -r sum rest < <(cksum < out)
    echo "WARDIAN-SUM $name $sum"
    [ $status = 0 ] || cat out
done
