//! The whole bench: every class of work, natively, in QEMU and in ours, in turn.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::counters::{self, Counters};
use super::report::{self, BOOT};
use super::steps::{self, Step};
use super::table::{self, Table, Work};
use super::vm::{self, Machine, Ran, Vmm};
use super::{BOOT_WHAT, Runs, SCRIPT, chart, chosen, load, native, place, version, write_into};
use crate::run::{self, need, output, repository, which};

#[derive(clap::Args)]
pub struct Whole {
    /// How often each machine runs; fewer than 3 tell little.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only this row beside the boot; may be repeated. `boot`: nothing else.
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Guest RAM.
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: String,
    /// Figures as JSON [default: target/bench/bench.json].
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The chart [default: target/bench/bench.svg].
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Not on this machine itself (which needs root).
    #[arg(long)]
    no_native: bool,
    /// Without the run more for each row that counts what the engine did.
    #[arg(long)]
    no_counters: bool,
    /// Use this program instead of building one.
    #[arg(long, value_name = "PATH")]
    wardian: Option<PathBuf>,
    /// One more argument for `wardian run`; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    wardian_arg: Vec<String>,
    /// Machine type of QEMU.
    #[arg(long, value_name = "TYPE", default_value = "q35")]
    qemu_machine: String,
    /// Seconds that one run may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    limit: u64,
}

/// Where things lie while the bench runs.
struct Bench<'a> {
    args: &'a Whole,
    guest: vm::Guest,
    wardian: Vmm,
    qemu: Vmm,
    /// Our disk and QEMU's.
    disks: [PathBuf; 2],
    root: PathBuf,
    place: PathBuf,
    _lock: File,
}

pub fn main(args: &Whole) -> Result<()> {
    let all: Vec<Step> = steps::all().into_iter().filter(|step| step.class.is_some()).collect();
    let steps = chosen(&all, &args.only)?;
    if !args.no_native && !run::is_root() {
        bail!("Running the rows natively needs root, for chroot: run as root or with --no-native");
    }
    need(&[
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("debugfs", "e2fsprogs"),
        ("gcc", "gcc"),
        ("openssl", "openssl"),
    ])?;
    let qemu = which("qemu-system-x86_64").context("qemu-system-x86_64 is missing")?;
    let guest = vm::guest()?;
    let program = vm::wardian(args.wardian.as_deref())?;
    let (place, lock) = place(&guest.disk)?;
    let told = format!("{} (tcg, {}, -cpu max)", version(&qemu)?, args.qemu_machine);
    let bench = Bench {
        args,
        wardian: Vmm::Wardian { program, args: args.wardian_arg.clone() },
        qemu: Vmm::Qemu { program: qemu, machine: args.qemu_machine.clone() },
        disks: [place.join("ours.img"), place.join("qemu.img")],
        root: place.join("root"),
        guest,
        place,
        _lock: lock,
    };
    let table = bench.all(&steps, told)?;
    print!("{table}");
    let folder = repository().join("target/bench");
    for (given, name, text) in [
        (&args.json, "bench.json", serde_json::to_string_pretty(&table)?),
        (&args.svg, "bench.svg", chart::svg(&table)),
    ] {
        let file = given.clone().unwrap_or_else(|| folder.join(name));
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&file, text).with_context(|| format!("Cannot write {}", file.display()))?;
    }
    if !table.faults.is_empty() {
        bail!("{} runs or steps failed", table.faults.len());
    }
    Ok(())
}

impl Bench<'_> {
    fn all(&self, steps: &[&Step], qemu: String) -> Result<Table> {
        let before = load();
        self.set_up()?;
        let mut runs = Runs::default();
        for turn in 1..=self.args.rounds {
            for cpus in [1, 2] {
                let names: Vec<&str> =
                    steps.iter().filter(|step| step.cpus == cpus).map(|step| step.name).collect();
                if !names.is_empty() || cpus == 1 {
                    self.round(&mut runs, turn, cpus, &names)?;
                }
            }
        }
        let mut works = vec![Work {
            row: runs.row(BOOT, BOOT_WHAT),
            class: "boot".to_owned(),
            cpus: 1,
            counters: Counters::new(),
        }];
        works.extend(steps.iter().map(|step| Work {
            row: runs.row(step.name, step.what),
            class: step.class.unwrap_or_default().to_owned(),
            cpus: step.cpus,
            counters: Counters::new(),
        }));
        let mut faults = std::mem::take(&mut runs.faults);
        faults.extend(report::differing(&[
            ("native", &runs.native),
            ("QEMU", &runs.qemu),
            ("ours", &runs.wardian),
        ]));
        if !self.args.no_counters {
            self.count(&mut works, &mut faults)?;
        }
        for disk in &self.disks {
            fs::remove_file(disk)?;
        }
        if !self.args.no_native {
            fs::remove_dir_all(&self.root)?;
        }
        Ok(Table {
            linux: self.guest.version.clone(),
            qemu,
            memory: self.args.memory.clone(),
            rounds: self.args.rounds,
            load: [before, load()],
            means: table::means(&works),
            works,
            faults,
        })
    }

    /// The disks with script, programs and key in them, and the root to change into.
    fn set_up(&self) -> Result<()> {
        let step = run::Step::begin("Programs and disks");
        let at = |name: &str| self.place.join(name);
        fs::write(at("steps.sh"), steps::SCRIPT)?;
        fs::write(at("steps.c"), steps::PROGRAMS)?;
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-static", "-pthread", "-o"]).arg(at("steps")).arg(at("steps.c")).arg("-lm");
        output(&mut gcc)?;
        output(Command::new("openssl").arg("genrsa").arg("-out").arg(at("key")).arg("2048"))?;
        let [ours, qemus] = &self.disks;
        vm::copy_disk(&self.guest.disk, ours)?;
        for (from, to) in [("steps.sh", SCRIPT), ("steps", "/root/steps"), ("key", "/root/key")] {
            write_into(ours, &at(from), to)?;
        }
        vm::copy_disk(ours, qemus)?;
        if !self.args.no_native {
            // What a bench that was broken off left.
            if self.root.exists() {
                fs::remove_dir_all(&self.root)?;
            }
            native::extract(ours, &self.root)?;
        }
        step.end();
        Ok(())
    }

    /// Each machine once.
    fn round(&self, runs: &mut Runs, turn: u32, cpus: u32, names: &[&str]) -> Result<()> {
        let [ours, qemus] = &self.disks;
        let mut one = |who: &str, ran: &dyn Fn() -> Result<Ran>| -> Result<steps::Measured> {
            let told = format!("{who}, {cpus} vCPU, round {turn}");
            let step = run::Step::begin(&*told);
            let ran = ran()?;
            step.end();
            let mut measured = steps::measure(&ran.lines);
            runs.check(&told, &ran, &measured);
            if cpus > 1 {
                // The row of the boot is that with 1 vCPU.
                measured.boot = None;
            }
            Ok(measured)
        };
        let limit = Duration::from_secs(self.args.limit);
        let qemu = one("QEMU", &|| vm::run(&self.qemu, &self.machine(qemus, cpus, names), limit, false))?;
        let wardian =
            one("ours", &|| vm::run(&self.wardian, &self.machine(ours, cpus, names), limit, false))?;
        let native = if self.args.no_native || names.is_empty() {
            None
        } else {
            Some(one("native", &|| {
                vm::run_command(&mut native::command(&self.root, SCRIPT, names, cpus), limit, false)
            })?)
        };
        runs.qemu.push(qemu);
        runs.wardian.push(wardian);
        runs.native.extend(native);
        Ok(())
    }

    fn machine(&self, disk: &Path, cpus: u32, names: &[&str]) -> Machine {
        let script = vm::run_parameter(&format!("exec bash {SCRIPT} {}", names.join(" ")));
        Machine {
            kernel: self.guest.kernel.clone(),
            initrd: self.guest.initrd.clone(),
            disk: disk.to_owned(),
            cmdline: format!("{} {script}", self.guest.cmdline),
            memory: self.args.memory.clone(),
            cpus,
        }
    }

    /// What the engine counts in each row; in that of the boot, all that a run without rows does.
    fn count(&self, works: &mut [Work], faults: &mut Vec<String>) -> Result<()> {
        let Vmm::Wardian { program, args } = &self.wardian else { return Ok(()) };
        let file = self.place.join("stats.json");
        let mut args = args.clone();
        args.extend(["--stats-json".to_owned(), file.display().to_string()]);
        let vmm = Vmm::Wardian { program: program.clone(), args };
        let mut counted = |cpus: u32, names: &[&str]| -> Result<Counters> {
            let machine = self.machine(&self.disks[0], cpus, names);
            let ran = vm::run(&vmm, &machine, Duration::from_secs(self.args.limit), false)?;
            if let Err(error) = ran.check() {
                faults.push(format!("ours, counters of {names:?}: {error:#}"));
                return Ok(Counters::new());
            }
            counters::read(&file)
        };
        let step = run::Step::begin("Counters");
        let mut without: [Option<Counters>; 2] = [None, None];
        for work in works.iter_mut() {
            let base = &mut without[usize::from(work.cpus > 1)];
            let base = match base {
                Some(base) => base,
                None => base.insert(counted(work.cpus, &[])?),
            };
            work.counters = if work.row.name == BOOT {
                base.clone()
            } else {
                counters::beyond(&counted(work.cpus, &[&work.row.name])?, base)
            };
        }
        step.end();
        Ok(())
    }
}
