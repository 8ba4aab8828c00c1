//! Stock kernels boot, see the machine as it is, complain of nothing, and power off.

use wardian_tests::{Debian, Ended, Kernel, findings, section};

use crate::or_skip;

const LOOK: &str = r#"
echo "@@ look"
uname -a
echo "processors=$(nproc)"
echo "clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "clocks=$(cat /sys/devices/system/clocksource/clocksource0/available_clocksource)"
echo "random=$(cat /sys/class/misc/hw_random/rng_current)"
# Every processor takes timer interrupts, works, and can be interrupted by the others.
for cpu in $(seq 0 $(($(nproc) - 1))); do
    echo "sum$cpu=$(taskset -c $cpu sh -c 'seq 1 20000 | sha256sum | cut -c1-16')"
done
sleep 0.3
echo "@@ interrupts"
cat /proc/interrupts
echo "@@ dmesg"
dmesg -x
"#;

/// What every boot must show.
fn looks_well(ended: &Ended, processors: u32) {
    assert_eq!(ended.value("processors"), processors.to_string());
    let clocks = ended.value("clocks");
    assert_eq!(ended.value("clock"), "kvm-clock", "of {clocks}");
    for clock in ["tsc", "hpet", "acpi_pm"] {
        assert!(clocks.split(' ').any(|name| name == clock), "no clock {clock} among {clocks}");
    }
    assert!(ended.value("random").starts_with("virtio_rng"), "{}", ended.value("random"));
    let sums: Vec<_> = (0..processors).map(|cpu| ended.value(&format!("sum{cpu}"))).collect();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");

    let look = section(&ended.serial, "look");
    assert!(look.starts_with("Linux wardian ") && look.contains("x86_64"), "{look}");

    let interrupts = section(&ended.serial, "interrupts");
    let counts = |line: &str| -> Vec<u64> {
        line.split_whitespace().skip(1).take(processors as usize).filter_map(|n| n.parse().ok()).collect()
    };
    let local = interrupts.lines().find(|l| l.trim_start().starts_with("LOC:")).expect("local timers");
    assert!(counts(local).iter().all(|n| *n > 0), "a processor without timer interrupts: {local}");
    let disk: Vec<&str> = interrupts.lines().filter(|l| l.contains("virtio0-")).collect();
    assert_eq!(disk.len(), processors as usize + 1, "a vector for each queue and one more: {disk:?}");
    assert!(disk.iter().all(|line| line.contains("PCI-MSI")), "{disk:?}");
    let requests: u64 = disk.iter().filter(|l| l.contains("req")).flat_map(|line| counts(line)).sum();
    assert!(requests > 0, "{disk:?}");
    for name in ["ERR:", "MIS:"] {
        let line = interrupts.lines().find(|l| l.trim_start().starts_with(name)).expect(name);
        assert!(line.ends_with(" 0"), "{line}");
    }

    let dmesg = section(&ended.serial, "dmesg");
    assert!(dmesg.contains("Linux version") && dmesg.contains("kvm-clock"), "dmesg is whole");
    let found: Vec<String> = findings(dmesg).into_iter().map(|found| found.line).collect();
    assert!(found.is_empty(), "a good machine would not say:\n{}", found.join("\n"));
}

fn boots(kernel: Kernel, processors: u32) {
    let guest = or_skip!(Debian::script(kernel, LOOK));
    let ended = guest.args(&["--cpus", &processors.to_string(), "--memory", "1G"]).run();
    looks_well(&ended, processors);
}

#[test]
fn cloud_kernel_with_1_vcpu() {
    boots(Kernel::Cloud, 1);
}

#[test]
fn cloud_kernel_with_2_vcpus() {
    boots(Kernel::Cloud, 2);
}

#[test]
fn cloud_kernel_with_4_vcpus() {
    boots(Kernel::Cloud, 4);
}

#[test]
fn vmlinux_by_its_pvh_note() {
    boots(Kernel::CloudElf, 2);
}

#[test]
fn full_kernel() {
    boots(Kernel::Full, 2);
}

#[test]
fn ten_boots_in_a_row() {
    let script = "echo \"processors=$(nproc)\"";
    for boot in 0..10 {
        let processors = [1, 2, 4][boot % 3];
        let guest = or_skip!(Debian::script(Kernel::Cloud, script));
        let ended = guest.args(&["--cpus", &processors.to_string(), "--memory", "512M"]).run();
        assert_eq!(ended.value("processors"), processors.to_string(), "boot {boot}");
    }
}

#[test]
fn memory_of_several_sizes() {
    // Below the hole for devices only, and above it as well.
    for (size, least, most) in [("256M", 150_000, 262_144), ("5G", 4_800_000, 5_242_880)] {
        let script = "echo \"kib=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)\"";
        let ended = or_skip!(Debian::script(Kernel::Cloud, script)).args(&["--memory", size]).run();
        let kib: u64 = ended.value("kib").parse().expect("a number");
        assert!((least..=most).contains(&kib), "{size} are {kib} KiB to the guest");
    }
}

#[test]
fn reset_starts_anew_and_ends_with_its_status_if_told_so() {
    let ended = or_skip!(Debian::script(Kernel::Cloud, "reboot")).build().run();
    assert_eq!(ended.code(), Some(4), "--no-reboot");
    assert_eq!(ended.serial.matches("WARDIAN-INIT").count(), 1);
}
