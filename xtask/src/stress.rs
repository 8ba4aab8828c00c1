//! `cargo xtask stress`: the stock guest booted many times in a row, with a look at what it says each time.
//!
//! *Comes in*: the stock guest, our program. *Goes out*: a line for each boot and a summary on standard output,
//! the consoles of failures in a folder, an exit status that tells whether there was none.

mod mixed;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use crate::bench::vm::{self, Machine, Ran, Vmm};
use crate::run::{Step, need, repository};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Boots with a short script, then powers off; the root disk stays from boot to boot.
    Boot(Boot),
    /// All kinds of work in one machine for a long time; its memory must not grow.
    Mixed(mixed::Mixed),
}

#[derive(clap::Args)]
struct Boot {
    /// Boots for each number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Numbers of vCPUs.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,4")]
    cpus: Vec<u32>,
    /// Write files in each boot and compare their sums in the next.
    #[arg(long)]
    disk: bool,
    /// Guest RAM.
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: String,
    /// Seconds that one boot may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    limit: u64,
    /// Use this program instead of building one.
    #[arg(long, value_name = "PATH")]
    wardian: Option<PathBuf>,
    /// One more argument for `wardian run`; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    wardian_arg: Vec<String>,
    /// Where the consoles of failures go [default: target/stress].
    #[arg(long, value_name = "FOLDER")]
    logs: Option<PathBuf>,
}

/// What each boot does; the number of vCPUs is put in for `@CPUS@`.
const SCRIPT: &str = "\
set -e
uname -a
test $(nproc) = @CPUS@
test \"$(python3 -c 'print(sum(i * i for i in range(20000)))')\" = 2666466670000
test \"$(hello32)\" = 'hello from 32 bits'
seq 20000 | sort -R | sort -n | sha256sum | grep -q ^f6351f5e && echo sorted
if dmesg -l emerg,alert,crit,err | grep .; then exit 9; fi
";
/// Sums from the last boot first, if there was one, then new files.
const DISK: &str = "\
mkdir -p /root/stress
cd /root/stress
if [ -f sums ]; then sha256sum --quiet -c sums && echo STRESS-SAME; fi
for i in 1 2 3 4; do head -c 3000000 /dev/urandom > file.$i; done
sha256sum file.* > sums
sync
";
/// What that prints when the files of the last boot are whole.
const SAME: &str = "STRESS-SAME";

/// After so many failures in a row there is nothing rare to look for.
const HOPELESS: u32 = 5;

pub fn main(args: &Args) -> Result<()> {
    match &args.what {
        What::Boot(args) => boots(args),
        What::Mixed(args) => mixed::main(args),
    }
}

fn boots(args: &Boot) -> Result<()> {
    need(&[("e2fsck", "e2fsprogs")])?;
    let guest = vm::guest()?;
    let mut extra = vec!["--no-reboot".to_owned()];
    extra.extend(args.wardian_arg.iter().cloned());
    let vmm = Vmm::Wardian { program: vm::wardian(args.wardian.as_deref())?, args: extra };
    let logs = match &args.logs {
        Some(logs) => logs.clone(),
        None => logs()?,
    };
    fs::create_dir_all(&logs).with_context(|| format!("Cannot create {}", logs.display()))?;
    let place = guest.disk.with_file_name("stress");
    fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
    let lock = File::create(place.join("lock"))?;
    lock.lock().context("Cannot lock the place of the stress test")?;
    let disk = place.join("root.img");

    let mut failures = 0;
    for &cpus in &args.cpus {
        let step = Step::begin("Copy of the disk");
        vm::copy_disk(&guest.disk, &disk)?;
        step.end();
        let mut script = SCRIPT.replace("@CPUS@", &cpus.to_string());
        if args.disk {
            script.push_str(DISK);
        }
        let machine = Machine {
            kernel: guest.kernel.clone(),
            initrd: guest.initrd.clone(),
            disk: disk.clone(),
            // A panic ends the machine at once: as a reset.
            cmdline: format!("{} panic=-1 {}", guest.cmdline, vm::run_parameter(&script)),
            memory: args.memory.clone(),
            cpus,
        };
        let mut boots = Times::default();
        let mut fresh = true;
        let mut in_a_row = 0;
        for number in 1..=args.count {
            let ran = vm::run(&vmm, &machine, Duration::from_secs(args.limit), None)?;
            let mut faults = faults(&ran);
            if args.disk && !fresh && !ran.lines.iter().any(|line| line.text.contains(SAME)) {
                faults.push("the files of the last boot are gone or differ".to_owned());
            }
            fresh = false;
            let boot = ran.lines.iter().find(|line| line.text.contains("WARDIAN-INIT")).map(|line| line.at);
            boots.boot.extend(boot);
            boots.all.push(ran.took);
            let shown =
                boot.map_or_else(|| "never".to_owned(), |boot| format!("{:.2} s", boot.as_secs_f64()));
            println!(
                "{cpus} vCPUs, boot {number} of {}: init {shown}, end {:.2} s{}",
                args.count,
                ran.took.as_secs_f64(),
                if faults.is_empty() { "" } else { "  FAILED" }
            );
            if faults.is_empty() {
                in_a_row = 0;
            } else {
                failures += 1;
                in_a_row += 1;
                let file = logs.join(format!("{cpus}-vcpus-boot-{number}.log"));
                let told = faults.join("\n");
                fs::write(&file, format!("{}\n--- faults\n{told}\n", ran.log()))?;
                println!("{told}\nconsole: {}", file.display());
                // The next boot does not start from what a failed one left.
                vm::copy_disk(&guest.disk, &disk)?;
                fresh = true;
                if in_a_row == HOPELESS {
                    println!("{HOPELESS} failures in a row: no more with {cpus} vCPUs");
                    break;
                }
            }
        }
        println!("{cpus} vCPUs: init {}; end {}", shown(&mut boots.boot), shown(&mut boots.all));
        failures += u32::from(!clean(&disk)?);
    }
    fs::remove_file(&disk)?;
    if failures > 0 {
        bail!("{failures} failures; consoles in {}", logs.display());
    }
    println!("No failure");
    Ok(())
}

/// Where consoles go unless it is told.
fn logs() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let logs = target.map_or_else(|| repository().join("target"), PathBuf::from).join("stress");
    fs::create_dir_all(&logs).with_context(|| format!("Cannot create {}", logs.display()))?;
    Ok(logs)
}

#[derive(Default)]
struct Times {
    /// Start of the process to the init script.
    boot: Vec<Duration>,
    /// To the end of the process.
    all: Vec<Duration>,
}

fn shown(times: &mut [Duration]) -> String {
    times.sort();
    match times {
        [] => "never".to_owned(),
        [min, ..] => {
            let [min, median, max] = [*min, times[times.len() / 2], times[times.len() - 1]];
            let [min, median, max] = [min, median, max].map(|time| time.as_secs_f64());
            format!("min {min:.2}, median {median:.2}, max {max:.2} s")
        }
    }
}

/// Whether the file system of the disk is whole after the guests.
fn clean(disk: &Path) -> Result<bool> {
    let out = Command::new("e2fsck").args(["-f", "-n"]).arg(disk).output().context("Cannot start e2fsck")?;
    if !out.status.success() {
        println!("e2fsck, {}:\n{}", out.status, String::from_utf8_lossy(&out.stdout));
    }
    Ok(out.status.success())
}

/// What is wrong with a run.
fn faults(ran: &Ran) -> Vec<String> {
    let mut faults = Vec::new();
    match ran.status {
        None => faults.push("out of time".to_owned()),
        Some(status) if !status.success() => {
            faults.push(format!("the process ended with {status}"));
            faults.extend(ran.messages.lines().last().map(str::to_owned));
        }
        Some(_) => {}
    }
    let exit = ran.lines.iter().find_map(|line| line.text.split_once("WARDIAN-EXIT ").map(|(_, rest)| rest));
    match exit.and_then(|rest| rest.split(' ').next()) {
        None => faults.push("the script never ended".to_owned()),
        Some("0") => {}
        Some(status) => faults.push(format!("the script ended with {status}")),
    }
    faults.extend(ran.lines.iter().filter(|line| bad(&line.text)).map(|line| line.text.clone()));
    faults
}

/// Whether a good machine's kernel would not say this line.
fn bad(line: &str) -> bool {
    const BAD: [&str; 16] = [
        "soft lockup",
        "hard LOCKUP",
        "BUG:",
        "kernel BUG",
        "Oops",
        "WARNING:",
        "Call Trace",
        "Kernel panic",
        "blocked for more than",
        "general protection fault",
        "segfault at",
        "trap invalid opcode",
        "clocksource: Marking",
        "I/O error",
        "EXT4-fs error",
        "nobody cared",
    ];
    BAD.iter().any(|bad| line.contains(bad)) || line.contains("rcu") && line.contains("stall")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_lines() {
        for line in [
            "[   30.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [swapper/1:0]",
            "[   30.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[   30.1] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "[    1.1] WARNING: CPU: 0 PID: 1 at kernel/time/clockevents.c:38",
            "[    1.1] python3[99]: segfault at 0 ip 00007f sp 00007f error 4",
            "[    1.1] Oops: 0000 [#1] PREEMPT SMP",
        ] {
            assert!(bad(line), "{line}");
        }
        for line in [
            "[    0.0] rcu: Preemptible hierarchical RCU implementation.",
            "[    0.0] rcu: RCU calculated value of scheduler-enlistment delay is 25 jiffies.",
            "[    0.0] printk: debug: ignoring loglevel setting.",
        ] {
            assert!(!bad(line), "{line}");
        }
    }

    #[test]
    fn faults_of_a_run() {
        let ran = |texts: &[&str], status: Option<i32>| Ran {
            lines: texts
                .iter()
                .map(|text| vm::Line { at: Duration::ZERO, cpu: None, text: (*text).to_owned() })
                .collect(),
            messages: String::new(),
            status: status.map(std::os::unix::process::ExitStatusExt::from_raw),
            took: Duration::ZERO,
            samples: Vec::new(),
        };
        assert!(faults(&ran(&["WARDIAN-INIT 1.0", "WARDIAN-EXIT 0 2.0"], Some(0))).is_empty());
        assert_eq!(faults(&ran(&["WARDIAN-EXIT 9 2.0"], Some(0))), ["the script ended with 9"]);
        assert_eq!(faults(&ran(&["WARDIAN-EXIT 0 2.0", "Call Trace:"], Some(0))), ["Call Trace:"]);
        assert_eq!(faults(&ran(&[], None)), ["out of time", "the script never ended"]);
        assert_eq!(faults(&ran(&["WARDIAN-EXIT 0 2.0"], Some(0x600))).len(), 1);
    }

    #[test]
    fn scripts_fit_the_command_line() {
        // COMMAND_LINE_SIZE of Linux on x86 is 2048.
        assert!(vm::run_parameter(&format!("{SCRIPT}{DISK}")).len() < 2048 - 100);
    }

    #[test]
    fn times_in_short() {
        let mut times = [3, 1, 2].map(Duration::from_secs);
        assert_eq!(shown(&mut times), "min 1.00, median 2.00, max 3.00 s");
        assert_eq!(shown(&mut []), "never");
    }
}
