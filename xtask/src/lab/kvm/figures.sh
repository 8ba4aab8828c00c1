# Figures of the lab: our machine and QEMU's on the same KVM, the same kernel and initial RAM disk.

# time_to_init OUT COMMAND...: seconds from the start of the process to the line of the guest's init.
time_to_init() {
    out=$1
    shift
    start=$(now)
    timeout 100 "$@" < /dev/null 2> /tmp/out/stderr | tee "$out" | while read -r line; do
        case $line in *WARDIAN-INIT*) since "$start" ; break ;; esac
    done
    cat > /dev/null
}

qemu() {
    machine=$1
    shift
    qemu/lib/ld-linux-x86-64.so.2 --library-path qemu/lib qemu/qemu -L qemu -nodefaults -no-user-config \
        -display none -serial stdio -no-reboot -accel kvm -cpu host -M "$machine" -m 384M \
        -kernel vmlinuz -initrd initrd.img -drive file=/dev/vdc,format=raw,if=none,id=root "$@"
}

figures() {
    end=$(echo true | base64 -w0)
    words="console=ttyS0 quiet panic=-1 wardian.run=$end"
    cat wardian vmlinuz initrd.img qemu/qemu qemu/lib/* > /dev/null
    for round in 1 2 3; do
        seconds=$(time_to_init /tmp/out/figure ./wardian run --engine kvm --memory 384M --kernel vmlinuz \
            --initrd initrd.img --disk /dev/vdc,format=raw --no-reboot --serial stdio --cmdline "$words")
        echo "LAB value init-wardian ${seconds:-none} s"
        seconds=$(time_to_init /tmp/out/figure qemu microvm,pit=on,pic=on,rtc=on,isa-serial=on -append "$words" \
            -device virtio-blk-device,drive=root)
        echo "LAB value init-microvm ${seconds:-none} s"
        [ -n "$seconds" ] || tail -n 5 /tmp/out/stderr /tmp/out/figure | sed 's/^/LAB out /'
        seconds=$(time_to_init /tmp/out/figure qemu pc -append "$words" -device virtio-blk-pci,drive=root)
        echo "LAB value init-pc ${seconds:-none} s"
        [ -n "$seconds" ] || tail -n 5 /tmp/out/stderr /tmp/out/figure | sed 's/^/LAB out /'
    done
    first_instruction
    overhead
}

# From the start of the process to the first line of a guest that does nothing else.
first_instruction() {
    for round in 1 2 3 4 5; do
        ./wardian run --engine kvm --kernel guests/hello --memory 64M --debug-exit --no-reboot --serial none \
            --stats-json /tmp/out/stats.json > /dev/null 2>&1 < /dev/null
        sed -n 's/.*"first_instruction_ns": \([0-9]*\).*/LAB value first-instruction \1 ns/p' /tmp/out/stats.json
    done
}

# Private memory of the process but guest RAM, while the guest runs.
overhead() {
    sleep_inside=$(echo 'sleep 20' | base64 -w0)
    ./wardian run --engine kvm --memory 384M --kernel vmlinuz --initrd initrd.img --disk /dev/vdc,format=raw \
        --no-reboot --serial stdio --cmdline "console=ttyS0 quiet wardian.run=$sleep_inside" \
        > /tmp/out/overhead 2>&1 < /dev/null &
    pid=$!
    for _ in $(seq 100); do
        grep -q WARDIAN-INIT /tmp/out/overhead && break
        sleep 1
    done
    sleep 3
    awk '/^[0-9a-f]+-/ {ram = /wardian-guest/} /^(Private_Clean|Private_Dirty):/ && !ram {kb += $2}
        END {print "LAB value overhead " kb " KiB"}' "/proc/$pid/smaps"
    kill "$pid"
    wait "$pid"
}
