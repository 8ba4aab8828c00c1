//! A stock gdb on a stock kernel that runs.

use std::process::Command;

use wardian_tests::{Debian, Kernel, has, output, section, well_ended};

use crate::or_skip;

const SCRIPT: &str = r#"
echo "@@ symbols"
grep -E ' (linux_banner|__x64_sys_newuname|jiffies_64|_text)$' /proc/kallsyms
echo "@@ loop"
while [ ! -e /tmp/done ]; do uname > /tmp/name; grep -q Linux /tmp/name || echo "wrong=$(cat /tmp/name)"; sleep 0.02; done &
echo started
read line
touch /tmp/done
wait
echo "@@ after"
dmesg --level emerg,alert,crit,err,warn
echo "clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
"#;

#[test]
fn stock_gdb_on_a_running_kernel() {
    if !has("gdb") {
        return wardian_tests::skip("gdb is not installed");
    }
    let place = tempfile::tempdir().expect("a folder");
    let socket = place.path().join("gdb");
    let guest = or_skip!(Debian::script(Kernel::CloudElf, SCRIPT));
    let vmlinux = guest.kernel_image().to_owned();
    let guest = guest.words("nokaslr").args(&["--cpus", "2", "--gdb", socket.to_str().expect("UTF-8")]);
    let mut machine = guest.build().start();
    machine.wait_for("\nstarted\n");
    let serial = machine.serial();
    let address = |name: &str| {
        let line = section(&serial, "symbols").lines().find(|line| line.ends_with(&format!(" {name}")));
        let word = line.and_then(|line| line.split(' ').next()).unwrap_or_else(|| panic!("no {name}"));
        format!("0x{word}")
    };
    assert_eq!(address("_text"), "0xffffffff81000000", "nokaslr");
    let (uname, banner, jiffies) =
        (address("__x64_sys_newuname"), address("linux_banner"), address("jiffies_64"));
    let session = [
        "set pagination off".to_owned(),
        format!("target remote {}", socket.display()),
        "info threads".to_owned(),
        format!("x/s {banner}"),
        format!("break *{uname}"),
        "continue".to_owned(),
        "printf \"hit %lx cs %x cpl %d\\n\", $rip, $cs, $cs & 3".to_owned(),
        "p $cr0".to_owned(),
        "p $cr4".to_owned(),
        "p $efer".to_owned(),
        "printf \"cr3 %lx\\n\", $cr3".to_owned(),
        "printf \"return %lx\\n\", *(unsigned long *)$rsp".to_owned(),
        format!("x/8xb {uname}"),
        "stepi".to_owned(),
        "printf \"step %lx\\n\", $rip".to_owned(),
        "stepi".to_owned(),
        "stepi".to_owned(),
        "printf \"steps %lx\\n\", $rip".to_owned(),
        "continue".to_owned(),
        "printf \"again %lx\\n\", $rip".to_owned(),
        "delete".to_owned(),
        format!("watch *(unsigned long *){jiffies}"),
        "continue".to_owned(),
        "printf \"watch at %lx\\n\", $rip".to_owned(),
        "delete".to_owned(),
        format!("hbreak *{uname}"),
        "continue".to_owned(),
        "printf \"hardware %lx\\n\", $rip".to_owned(),
        "delete".to_owned(),
        "detach".to_owned(),
    ];
    let mut gdb = Command::new("timeout");
    gdb.args(["100", "gdb", "-nx", "-batch"]);
    for line in &session {
        gdb.args(["-ex", line]);
    }
    let said = output(gdb.arg(&vmlinux)).unwrap_or_else(|error| panic!("{error}"));
    let at = uname.trim_start_matches("0x");
    for want in [
        format!("hit {at} cs 10 cpl 0"),
        format!("again {at}"),
        format!("hardware {at}"),
        "\"Linux version 6".to_owned(),
        "vCPU 1".to_owned(),
        "PG".to_owned(),
        "LMA".to_owned(),
        "return ffffffff81".to_owned(),
        "watch at ffffffff".to_owned(),
        "detached".to_owned(),
    ] {
        assert!(said.contains(&want), "{want:?} is missing:\n{said}");
    }
    let number = |name: &str| {
        let line = said
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("{name}:\n{said}"));
        u64::from_str_radix(line.trim(), 16).expect("a number")
    };
    let start = u64::from_str_radix(at, 16).expect("a number");
    // The function begins with a five-byte nop, where ftrace would put its call.
    assert_eq!(number("step "), start + 5, "{said}");
    assert_ne!(number("steps "), start + 5, "{said}");
    assert_ne!(number("cr3 "), 0);

    // A second debugger, which only looks and goes.
    let mut again = Command::new("timeout");
    again.args(["60", "gdb", "-nx", "-batch", "-ex", &format!("target remote {}", socket.display())]);
    let said = output(again.args(["-ex", &format!("x/s {banner}"), "-ex", "detach"])).expect("gdb");
    assert!(said.contains("\"Linux version 6"), "{said}");

    machine.type_text("\n");
    let ended = machine.end();
    well_ended(&ended);
    assert!(!ended.serial.contains("wrong="));
    assert_eq!(ended.value("clock"), "kvm-clock");
    let after = section(&ended.serial, "after").lines().filter(|line| line.starts_with('[')).count();
    assert!(after <= 1, "only the read-only root disk is worth a line");
    assert!(!socket.exists(), "the socket is removed");
}
