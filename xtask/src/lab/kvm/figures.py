"""Figures of the lab: our machine and QEMU's on the same KVM, with the same kernel and initial RAM disk.

Run inside the lab, in its folder. Says each figure as "LAB value NAME NUMBER UNIT".
"""
import base64, os, subprocess, sys, threading, time

ROUNDS = int(sys.argv[1])
WORDS = "console=ttyS0 quiet panic=-1 wardian.run="
END = base64.b64encode(b"true").decode()
SLEEP = base64.b64encode(b"sleep 60").decode()
KERNEL = ["vmlinuz", "initrd.img"]


def say(*words):
    print("LAB", *words, flush=True)


def wardian(script):
    return ["./wardian", "run", "--engine", "kvm", "--memory", "384M", "--kernel", KERNEL[0], "--initrd", KERNEL[1],
            "--disk", "/dev/vdc,format=raw", "--no-reboot", "--serial", "stdio", "--cmdline", WORDS + script]


def qemu(machine, disk):
    return ["qemu/lib/ld-linux-x86-64.so.2", "--library-path", "qemu/lib", "qemu/qemu", "-L", "qemu", "-nodefaults",
            "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-accel", "kvm", "-cpu", "host",
            "-M", machine, "-m", "384M", "-kernel", KERNEL[0], "-initrd", KERNEL[1], "-append", WORDS + END,
            "-drive", "file=/dev/vdc,format=raw,if=none,id=root", "-device", disk + ",drive=root"]


def until(command, mark, limit=100):
    """Starts a program; seconds until its output has the mark, and the program."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    alarm = threading.Timer(limit, child.kill)
    alarm.start()
    seen, took = b"", None
    while took is None:
        more = os.read(child.stdout.fileno(), 4096)
        if not more:
            break
        seen += more
        if mark in seen:
            took = time.perf_counter() - began
    alarm.cancel()
    if took is None:
        for line in seen[-2000:].decode(errors="replace").splitlines()[-8:]:
            say("out", line)
    return took, child


def end(child):
    child.kill()
    child.stdout.close()
    child.wait()


def private(pid):
    """KiB of private memory but guest RAM."""
    kib, ram = 0, False
    for line in open(f"/proc/{pid}/smaps"):
        first = line.split()[0]
        if not first.endswith(":"):
            ram = "wardian-guest" in line
        elif first in ("Private_Clean:", "Private_Dirty:") and not ram:
            kib += int(line.split()[1])
    return kib


machines = {
    "init-wardian": wardian(END),
    "init-wardian-large-pages": wardian(END),
    "init-microvm": qemu("microvm,pcie=on", "virtio-blk-pci"),
    "init-pc": qemu("pc", "virtio-blk-pci"),
}
# Everything is in the page cache before the first is measured.
for folder, _, names in os.walk("."):
    for name in names:
        open(os.path.join(folder, name), "rb").read()
HUGE = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
for _ in range(ROUNDS):
    for name, command in machines.items():
        # Large pages for shared memory; QEMU's memory is private and has them in any case.
        open(HUGE, "w").write("advise" if "large" in name else "never")
        took, child = until(command, b"WARDIAN-INIT")
        end(child)
        say("value", name, f"{took:.3f}" if took else "none", "s")
open(HUGE, "w").write("never")
for _ in range(ROUNDS + 4):
    # The guest's first words come some thousand instructions after its first one.
    took, child = until(["./wardian", "run", "--engine", "kvm", "--kernel", "guests/hello", "--memory", "64M", "--debug-exit",
                         "--no-reboot", "--serial", "none"], b"hello")
    end(child)
    say("value", "start-to-guest", f"{took * 1000:.1f}" if took else "none", "ms")
    took, child = until(["./wardian", "--version"], b"wardian")
    end(child)
    say("value", "start-alone", f"{took * 1000:.1f}" if took else "none", "ms")
# What our machine's boot is made of.
subprocess.run([*wardian(END), "--stats"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open("/tmp/out/stats", "w"))
for line in open("/tmp/out/stats"):
    say("out", line.rstrip())
took, child = until(wardian(SLEEP), b"WARDIAN-INIT")
time.sleep(1)
say("value", "overhead", private(child.pid), "KiB")
end(child)
