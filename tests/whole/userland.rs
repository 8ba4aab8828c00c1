//! Real programs compute what they should.

use wardian_tests::{Debian, Ended, Kernel, section};

use crate::or_skip;

/// Runs a script with 2 vCPUs; each `step NAME COMMAND…` in it makes a section with the command's output and,
/// at its end, its status.
fn steps(script: &str) -> Result<Ended, String> {
    let head = "cd /tmp\nstep() { echo \"@@ $1\"; shift; \"$@\" 2>&1; echo \"status $?\"; }\n";
    let guest = Debian::script(Kernel::Cloud, &format!("{head}{script}"))?;
    Ok(guest.args(&["--cpus", "2", "--memory", "1G"]).run())
}

fn check(ended: &Ended, name: &str, want: &str) {
    assert_eq!(section(&ended.serial, name), format!("{want}\nstatus 0\n"), "{name}");
}

#[test]
fn interpreters_and_a_database() {
    let ended = or_skip!(steps(
        r#"
step python python3 -c '
import hashlib, math, struct, threading, zlib
print(sum(i * i for i in range(300000)), 3**200 % 10**20)
print(repr(0.1 + 0.2), repr(math.sin(1e6)), repr(math.exp(-3.3)), repr(math.pow(2.5, 0.7)))
print(hashlib.sha256(b"wardian" * 10000).hexdigest()[:24], zlib.crc32(bytes(range(256)) * 4096))
print(struct.unpack("<f", struct.pack("<f", 1 / 3))[0], float("inf") > 1e308, int(-7.9))
total = []
workers = [threading.Thread(target=lambda n=n: total.append(sum(range(n * 1000)))) for n in range(8)]
[w.start() for w in workers]; [w.join() for w in workers]
print(sum(total))
try:
    1 / 0
except ZeroDivisionError as error:
    print(error)'
step perl perl -e '$s += $_ * $_ for 1..200000; print "$s\n"; $_ = "abcabc" x 3; print s/b(c)/X$1/gr, "\n";
    printf "%.12f %s\n", atan2(1, 3), join ",", map { sprintf "%b", $_ } 5..8'
step sqlite sqlite3 :memory: '
    create table t(a integer, b text);
    with recursive c(x) as (values(1) union all select x + 1 from c where x < 30000)
        insert into t select x * 7919 % 30011, hex(x) from c;
    create index i on t(b);
    select sum(a), count(distinct b), max(b), total(a * 0.5) from t where b > "3";
    select group_concat(a) from (select a from t order by a desc limit 3);'
step node node -e '
    const fib = n => n < 2 ? n : fib(n - 1) + fib(n - 2);
    let h = 0; for (let i = 0; i < 20000000; i++) h = (h * 31 + i) | 0;
    let x = 0; for (let i = 1; i < 2000000; i++) x += Math.sqrt(i) / (i + 0.5);
    const big = (2n ** 521n - 1n) % 1000000007n;
    const map = new Map(); for (let i = 0; i < 200000; i++) map.set("k" + i % 977, i);
    console.log([fib(25), h, x.toFixed(9), big, map.get("k5")].join(" "));
    console.log(require("crypto").createHash("sha256").update("x".repeat(100000)).digest("hex").slice(0, 24));'
"#
    ));
    check(
        &ended,
        "python",
        "8999955000050000 2182994384699044001\n\
         0.30000000000000004 -0.34999350217129294 0.036883167401240015 1.8991444823309347\n\
         35a872f5e1ba241dfdcc7dd2 80798773\n\
         0.3333333432674408 True -7\n\
         69986000\n\
         division by zero",
    );
    check(
        &ended,
        "perl",
        "2666686666700000\n\
         aXcaXcaXcaXcaXcaXc\n\
         0.321750554397 101,110,111,1000",
    );
    check(
        &ended,
        "sqlite",
        "450150380|30000|39393939|225075190.0\n\
         30010,30009,30008",
    );
    check(
        &ended,
        "node",
        "75025 1818990208 2825.899915469 213363749 199313\n\
         d69e68988157833272305aaf",
    );
}

/// Integer, floating-point (SSE and x87), 64-bit division, variadic and indirect calls, signals, `setjmp`.
const PROGRAM: &str = r#"
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static sigjmp_buf back;
static void on_fault(int number) { siglongjmp(back, number); }
static int by_value(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }
int main(void) {
    unsigned hash = 2166136261u;
    for (int i = 0; i < 1000000; i++) hash = (hash ^ (i & 255)) * 16777619u;
    double sum = 0;
    for (int i = 1; i < 200000; i++) sum += sqrt(i) / (i + 1.0);
    long double third = 1.0L / 3;
    unsigned long long wide = 0x123456789abcdefULL, part = wide / 1000003 + wide % 999983;
    int numbers[1000];
    for (int i = 0; i < 1000; i++) numbers[i] = i * 7919 % 1009;
    qsort(numbers, 1000, sizeof *numbers, by_value);
    char text[64];
    snprintf(text, sizeof text, "%s-%d-%.3e", "text", -42, 12345.678);
    printf("%u %.6f %.18Lf %llu %d %s\n", hash, sum, third, part, numbers[500], text);
    signal(SIGSEGV, on_fault);
    signal(SIGFPE, on_fault);
    signal(SIGILL, on_fault);
    volatile int zero = 0, *nowhere = 0;
    int got = sigsetjmp(back, 1);
    if (!got) zero = 7777777 / zero;
    printf("signal %d\n", got);
    got = sigsetjmp(back, 1);
    if (!got) *nowhere = 1;
    printf("signal %d\n", got);
    got = sigsetjmp(back, 1);
    if (!got) __asm__ volatile("ud2");
    printf("signal %d\n", got);
    printf("%d bits\n", (int)sizeof(void *) * 8);
    return 0;
}
"#;

const PROGRAM_SAYS: &str = "3533651717 891.110166 0.333333333333333333 81985461053 506 text--42-1.235e+04\nsignal 8\nsignal 11\nsignal 4";

#[test]
fn compiler_and_what_it_makes() {
    let ended = or_skip!(steps(&format!(
        "cat > a.c <<'END'\n{PROGRAM}END\n
step gcc gcc -O2 -o a64 a.c -lm
step run64 ./a64
step gcc-O0 gcc -O0 -fsanitize=undefined -fno-sanitize=integer-divide-by-zero,null -o a0 a.c -lm
step gcc-avx gcc -O3 -march=native -o avx a.c -lm
step run-avx ./avx
step gcc32 gcc -m32 -msse2 -mfpmath=sse -O2 -o a32 a.c -lm
step run32 ./a32
step gcc-static gcc -m32 -static -O1 -o s32 a.c -lm
step run-static ./s32
step hello32 hello32
"
    )));
    for name in ["gcc", "gcc-avx", "gcc32", "gcc-static"] {
        assert_eq!(section(&ended.serial, name), "status 0\n", "{name}");
    }
    for (name, bits) in [("run64", 64), ("run-avx", 64), ("run32", 32), ("run-static", 32)] {
        check(&ended, name, &format!("{PROGRAM_SAYS}\n{bits} bits"));
    }
    check(&ended, "hello32", "hello from 32 bits");
}

#[test]
fn ciphers_and_compression() {
    let ended = or_skip!(steps(
        r#"
seq 1 200000 > plain
step sums sh -c 'sha256sum plain; sha512sum plain | cut -c1-40; md5sum plain; cksum plain'
step xz sh -c 'xz -6 -T2 -k plain && xz -t plain.xz && xz -dc plain.xz | cmp - plain && xz -dc plain.xz | wc -c'
step gzip sh -c 'gzip -9 < plain | gzip -dc | cmp - plain && gzip -9n < plain | wc -c'
for name in aes-256-cbc aes-128-ctr chacha20 aria-128-cbc; do
    step $name sh -c "openssl enc -$name -pbkdf2 -k key -S 0011223344556677 -in plain -out c &&
        openssl enc -d -$name -pbkdf2 -k key -S 0011223344556677 -in c | cmp - plain && sha256sum < c | cut -c1-32"
done
step digests sh -c 'for d in sha1 sha384 sha3-256 blake2b512 sm3; do openssl dgst -$d -r plain | cut -c1-32; done'
step rsa sh -c 'openssl genrsa -out key.pem 1024 2> /dev/null && openssl dgst -sha256 -sign key.pem -out sig plain &&
    openssl rsa -in key.pem -pubout -out pub.pem 2> /dev/null && openssl dgst -sha256 -verify pub.pem -signature sig plain'
step ec sh -c 'for c in prime256v1 secp384r1; do openssl ecparam -genkey -name $c -out ec.pem && openssl ec -in ec.pem -pubout -out ep.pem 2> /dev/null &&
    openssl dgst -sha256 -sign ec.pem -out es plain && openssl dgst -sha256 -verify ep.pem -signature es plain; done'
step speed openssl speed -mr -seconds 1 sha256
"#
    ));
    check(
        &ended,
        "sums",
        "5af7b95208fdcff454bab3f5eddf567a688a3796c703d4fef91072e38645c062  plain\n\
b5fd978b41dd6da3ce93ced1d2805ffd0f7e238f\n0e10426a1d5bddffcef02f1345787128  plain\n3581800518 1288895 plain",
    );
    check(&ended, "xz", "1288895");
    check(&ended, "gzip", "428549");
    for (name, sum) in [
        ("aes-256-cbc", "fe755729289be6def8b025a0d837e4c5"),
        ("aes-128-ctr", "001c764bea36cc4f3089c7f99fcbb81d"),
        ("chacha20", "b8f54cf4a270f2cb9339d8364a4a737c"),
        ("aria-128-cbc", "b3e9dc188d68362a6dd9efa83969a2a0"),
    ] {
        check(&ended, name, sum);
    }
    check(
        &ended,
        "digests",
        "17454322f38ec2b6b6b43587dee97fca\n3ea94bcd62b06061b55b6a30117a2689\n130b9a214402b48914590ac4553de92f\n\
10ef2fde1f8dbf02798c4eeeeb155958\n88778e723a3fea7e3af180b41790453c",
    );
    check(&ended, "rsa", "Verified OK");
    check(&ended, "ec", "Verified OK\nVerified OK");
    let speed = section(&ended.serial, "speed");
    assert!(speed.contains("+F:") && speed.contains(":sha256:") && speed.ends_with("status 0\n"), "{speed}");
}
