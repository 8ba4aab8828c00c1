# Runs inside the lab's Debian, as root, from the lab's disk at /lab: cases that say on the console how they went.
# A case is told as "LAB case NAME STATUS SECONDS"; a measurement as "LAB value NAME NUMBER UNIT".
export LC_ALL=C
cd /lab || exit 1
while read -r module; do insmod "modules/$module" || exit 1; done < modules.list
[ -c /dev/kvm ] || exit 1
mkdir -p /tmp/out
now() { date +%s.%N; }
since() { echo "$1 $(now)" | awk '{printf "%.2f", $2 - $1}'; }

# case NAME WANTED COMMAND...: runs it, its output in a file; good if its status is WANTED and no line says FAIL.
case_of() {
    name=$1 wanted=$2
    shift 2
    start=$(now)
    "$@" > "/tmp/out/$name" 2>&1 < /dev/null
    status=$?
    if [ $status = "$wanted" ] && ! grep -q FAIL "/tmp/out/$name"; then status=ok; fi
    echo "LAB case $name $status $(since "$start")"
    if [ $status != ok ]; then
        grep FAIL "/tmp/out/$name" | sed "s/^FAIL /LAB fail $name /"
        tail -n 5 "/tmp/out/$name" | sed 's/^/LAB out /'
    fi
    [ $status = ok ]
}

machine() { timeout 150 ./wardian run "$@"; }

# guest CPUS SCRIPT WORDS...: the stock guest with SCRIPT run inside and more WORDS on its command line.
guest() {
    cpus=$1 script=$(echo "$2" | base64 -w0)
    shift 2
    machine --cpus "$cpus" --memory 384M --kernel vmlinuz --initrd initrd.img --no-reboot \
        --disk /dev/vdc,format=raw --cmdline "$* panic=-1 wardian.run=$script" $OPTIONS
}

# tells NAME TEXT: the output of case NAME has a line with TEXT.
tells() {
    if grep -q -- "$2" "/tmp/out/$1"; then echo "LAB case $1:$3 ok 0"; else
        echo "LAB case $1:$3 missing 0"
        tail -n 25 "/tmp/out/$1" | sed 's/^/LAB out /'
    fi
}

INSIDE='nproc | sed "s/^/cpus /"
cat /sys/devices/system/clocksource/clocksource0/current_clocksource | sed "s/^/clocksource /"
grep "^cpu " /proc/stat
echo written > /root/lab-file && sync && cat /root/lab-file | sed "s/^/disk /"
sha256sum /usr/bin/python3 | cut -c1-64 | sed "s/^/sum /"
dmesg -l emerg,alert,crit,err | sed "s/^/COMPLAINT /"
'

doctor() {
    case_of doctor 0 ./wardian doctor
    sed 's/^/LAB out /' /tmp/out/doctor
    tells doctor 'auto takes kvm' hardware
    ./wardian doctor --json | tr -d '\n' | sed 's/^/LAB doctor /'
    echo
}

conformance() {
    for engine in $ENGINES; do
        for path in guests/*; do
            # What is known to be wrong with the lab's processor the guests know themselves.
            case_of "$engine-${path#guests/}" 1 machine --engine "$engine" --kernel "$path" --cpus 2 \
                --memory 256M --debug-exit --no-reboot --serial stdio --cmdline 'cpus=2 processor=tcg'
        done
    done
}

boots() {
    OPTIONS='--engine kvm --serial stdio --console none'
    case_of boot-1 0 guest 1 "$INSIDE" console=ttyS0
    tells boot-1 'cpus 1' cpus
    tells boot-1 'clocksource kvm-clock' clock
    tells boot-1 'disk written' disk
    tells boot-1 'WARDIAN-EXIT 0' end
    # Something else wants the processors meanwhile: the guest sees it as stolen time, the eighth number.
    timeout 60 sh -c 'while :; do :; done' &
    OPTIONS='--engine kvm --serial none --console stdio'
    case_of boot-2 0 guest 2 "$INSIDE" console=hvc0
    kill $!
    tells boot-2 'cpus 2' cpus
    tells boot-2 'clocksource kvm-clock' clock
    tells boot-2 'disk written' disk
    tells boot-2 '^cpu  [0-9]* [0-9]* [0-9]* [0-9]* [0-9]* [0-9]* [0-9]* [1-9]' steal
    sed -n 's/^cpu  /LAB out stat of the guest: /p' /tmp/out/boot-2
    # The same command line, without an engine: the doctor's verdict.
    OPTIONS='--serial stdio --console none'
    case_of boot-auto 0 guest 1 "echo auto" console=ttyS0
    tells boot-auto 'Engine kvm' engine
}

refusals() {
    mv /dev/kvm /dev/kvm.away
    case_of no-device 10 machine --engine kvm --kernel guests/hello
    tells no-device 'There is no /dev/kvm' words
    mv /dev/kvm.away /dev/kvm
    chmod 600 /dev/kvm
    case_of no-permission 10 setpriv --reuid 65534 --clear-groups ./wardian run --engine kvm --kernel guests/hello
    tells no-permission 'No permission to open /dev/kvm' words
    case_of no-feature 2 machine --engine kvm --cpu host,+avx512f,+gfni --kernel guests/hello
    tells no-feature 'avx512f, gfni' words
}

figures() { python3 figures.py "$ROUNDS"; }

for part in $PARTS; do $part; done
echo LAB end
