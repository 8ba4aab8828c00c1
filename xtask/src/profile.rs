//! `cargo xtask profile STEP`: where our machine's time goes while the stock guest runs one step of the bench.
//!
//! *Comes in*: the stock guest, our program, `perf` with its software clock (hardware counters are not needed). *Goes
//! out*: on standard output the shares of translated code, translation, TLB refills, instructions run by helpers, exits
//! and device threads, the hottest functions, and what the engine counted over the whole run.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::bench::vm::{self, Machine, Vmm};
use crate::bench::{SCRIPT, programs, steps};
use crate::run::{Step, need, output};

#[derive(clap::Args)]
pub struct Args {
    /// Step of the bench (see `cargo xtask bench boot --help`); `boot`: the boot itself.
    #[arg(value_name = "STEP")]
    step: String,
    /// vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// How often the step is run.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
    /// Functions to list.
    #[arg(long, value_name = "N", default_value_t = 25)]
    top: usize,
    /// Use this program instead of building one.
    #[arg(long, value_name = "PATH")]
    wardian: Option<PathBuf>,
}

const BOOT: &str = "boot";

pub fn main(args: &Args) -> Result<()> {
    let known = steps::all();
    if args.step != BOOT && !known.iter().any(|step| step.name == args.step) {
        let names: Vec<&str> = known.iter().map(|step| step.name).collect();
        bail!("There is no step {}; there are {BOOT}, {}", args.step, names.join(", "));
    }
    need(&[("perf", "linux-perf"), ("debugfs", "e2fsprogs")])?;
    let guest = vm::guest()?;
    let program = vm::wardian(args.wardian.as_deref())?;
    let place = guest.disk.with_file_name(format!("profile.{}", std::process::id()));
    fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
    let done = profile(args, &guest, program, &place);
    fs::remove_dir_all(&place)?;
    done
}

fn profile(args: &Args, guest: &vm::Guest, program: PathBuf, place: &Path) -> Result<()> {
    let [disk, data, stats] = ["disk.img", "perf.data", "stats.json"].map(|name| place.join(name));
    vm::copy_disk(&guest.disk, &disk)?;
    programs::fit(guest, &disk)?;
    let times = if args.step == BOOT { 0 } else { args.times };
    let step = vec![args.step.as_str(); times as usize].join(" ");
    let machine = Machine {
        kernel: guest.kernel.clone(),
        initrd: guest.initrd.clone(),
        disk,
        cmdline: format!("{} {}", guest.cmdline, vm::run_parameter(&format!("exec bash {SCRIPT} {step}"))),
        memory: "512M".to_owned(),
        cpus: args.cpus,
    };
    let more = vec!["--stats-json".to_owned(), stats.display().to_string()];
    let mut command = Vmm::Wardian { program, args: more }.command(&machine, false);
    let told = Step::begin(format!("Running {}", args.step));
    run(&mut command, times, &data)?;
    told.end();
    let samples = output(Command::new("perf").args(["script", "-F", "comm,ip,sym,dso", "-i"]).arg(&data))?;
    print!("{}", Shares::of(&samples).table(args.top));
    if let Ok(json) = fs::read_to_string(&stats) {
        println!("\nCounted from start to end:\n{json}");
    }
    Ok(())
}

/// Runs the machine; `perf` watches it from the first of `times` steps to the end of the last, or without any from the
/// start to the init script.
fn run(command: &mut Command, times: u32, data: &Path) -> Result<()> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let pid = child.id();
    let mut left = times;
    let mut watcher = if times == 0 { Some(watch(pid, data)?) } else { None };
    let stdout = child.stdout.take().context("No console")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        let Some((_, word)) = line.split_once(vm::MARKER) else { continue };
        if word.starts_with("BEGIN") && left == times {
            watcher = watcher.map_or_else(|| watch(pid, data), Ok).map(Some)?;
        }
        left = left.saturating_sub(u32::from(word.starts_with("END")));
        if left == 0 && (word.starts_with("END") || word.starts_with("INIT")) {
            stop(watcher.take())?;
        }
    }
    stop(watcher.take())?;
    let status = child.wait()?;
    if !status.success() || !data.exists() {
        bail!("the machine ended with {status} before there was anything to see");
    }
    Ok(())
}

fn watch(pid: u32, data: &Path) -> Result<Child> {
    Command::new("perf")
        .args(["record", "-q", "-e", "cpu-clock", "-F", "4000", "-p", &pid.to_string(), "-o"])
        .arg(data)
        .stderr(Stdio::null())
        .spawn()
        .context("Cannot start perf")
}

fn stop(watcher: Option<Child>) -> Result<()> {
    if let Some(mut watcher) = watcher {
        output(Command::new("kill").args(["-INT", &watcher.id().to_string()]))?;
        watcher.wait()?;
    }
    Ok(())
}

/// Where samples fell.
#[derive(Default)]
struct Shares {
    all: u64,
    parts: BTreeMap<String, u64>,
    functions: BTreeMap<String, u64>,
}

/// What a vCPU's thread does in function `symbol`, by the path of its module in the engine.
const PARTS: [(&str, &str); 9] = [
    ("iced_x86", "translation: decoding"),
    ("engine_soft::translate", "translation"),
    ("engine_soft::emit", "translation"),
    ("engine_soft::decode", "translation"),
    ("engine_soft::blocks", "finding blocks"),
    ("engine_soft::mmu", "page walks, TLB refill and flush"),
    ("engine_soft::access", "memory accesses of helpers, slow path"),
    ("engine_soft::sys", "instructions run by helpers"),
    ("engine_soft", "run loop and state of the engine"),
];

fn part(thread: &str, symbol: &str, object: &str) -> String {
    if !thread.starts_with("vcpu") {
        return format!("thread {thread}");
    }
    if object.contains("wardian-code") {
        return "translated code and thunks".to_owned();
    }
    if object.contains("kernel") {
        return "the host's kernel".to_owned();
    }
    let known = PARTS.iter().find(|(module, _)| symbol.contains(module));
    match known {
        Some((_, part)) => (*part).to_owned(),
        None if symbol.contains("wardian_") => "exits: machine and devices".to_owned(),
        None => "libraries (copying, allocation)".to_owned(),
    }
}

impl Shares {
    /// Of lines `thread address symbol (object)`, as `perf script` tells them.
    fn of(samples: &str) -> Shares {
        let mut shares = Shares::default();
        for line in samples.lines() {
            // The object's name may end with "(deleted)".
            let at = line.find(" (/").or_else(|| line.find(" (["));
            let Some((front, object)) = at.map(|at| line.split_at(at)) else { continue };
            let mut words = front.split_whitespace();
            let (Some(thread), Some(_)) = (words.next(), words.next()) else { continue };
            let symbol = words.collect::<Vec<_>>().join(" ");
            shares.all += 1;
            *shares.parts.entry(part(thread, &symbol, object)).or_default() += 1;
            let function = if object.contains("wardian-code") { "(translated code)" } else { &symbol };
            *shares.functions.entry(function.to_owned()).or_default() += 1;
        }
        shares
    }

    fn table(&self, top: usize) -> String {
        let mut text = format!("{} samples\n", self.all);
        for (title, counts, most) in [("part", &self.parts, usize::MAX), ("function", &self.functions, top)] {
            text.push_str(&format!("\n share  {title}\n"));
            let mut sorted: Vec<_> = counts.iter().collect();
            sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            for (name, count) in sorted.into_iter().take(most) {
                let share = 100.0 * *count as f64 / self.all.max(1) as f64;
                text.push_str(&format!("{share:5.1} %  {name}\n"));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::Shares;

    #[test]
    fn samples_by_part() {
        let shares = Shares::of(
            "vcpu0  7f00 [unknown] (/memfd:wardian-code (deleted))\n\
             vcpu0      55aa <wardian_engine_soft::vcpu::SoftVcpu as wardian_cpu::Vcpu>::run (/tmp/wardian)\n\
             vcpu0  55ab wardian_engine_soft::sys::string::run (/tmp/wardian)\n\
             vcpu0  55ac wardian_chipset::hpet::Hpet::read (/tmp/wardian)\n\
             blk:0  ffff finish_task_switch ([kernel.kallsyms])\n\
             nothing\n",
        );
        assert_eq!(shares.all, 5);
        for part in [
            "translated code and thunks",
            "run loop and state of the engine",
            "instructions run by helpers",
            "exits: machine and devices",
            "thread blk:0",
        ] {
            assert_eq!(shares.parts.get(part), Some(&1), "{part}");
        }
        assert!(shares.table(1).contains(" 20.0 %  thread blk:0"));
    }
}
