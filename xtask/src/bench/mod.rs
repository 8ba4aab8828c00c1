//! `cargo xtask bench`: our machine beside QEMU's translator and this machine itself.
//!
//! *Comes in*: the stock guest, our program, QEMU. *Goes out*: a table on standard output, figures as JSON, a
//! chart; of `bench boot`, an exit status that tells whether the floors are kept.
//!
//! **Architecture Invariant:** all machines run the same kernel, initial RAM disk, command line and script on
//! copies of the same disk, in turn (A B A B), so that what the host does meanwhile meets them alike.

mod chart;
mod counters;
pub mod footprint;
mod native;
pub mod programs;
mod progress;
mod promise;
pub mod report;
pub mod steps;
mod table;
pub mod vm;
mod whole;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use self::report::{BOOT, MEMORY_CPUS, Report, Row};
use self::steps::Measured;
use self::vm::{Machine, Ran, Vmm};
use crate::run::{Step, need, output, which};

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// Without a subcommand: the whole bench.
    #[command(flatten)]
    whole: whole::Whole,
}

#[derive(Subcommand)]
enum What {
    /// Boot of the stock guest and programs in it, beside QEMU's translator (tcg).
    Boot(Boot),
}

#[derive(clap::Args)]
struct Boot {
    /// How often each machine runs.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Write all figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// vCPUs (memory is measured with 2 all the same).
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Only this step beside the boot; may be repeated. `boot`: no step at all.
    #[arg(long, value_name = "STEP")]
    only: Vec<String>,
    /// The steps on this machine as well, in a chroot (needs root).
    #[arg(long)]
    native: bool,
    /// Do not measure memory.
    #[arg(long)]
    no_footprint: bool,
    #[command(flatten)]
    options: vm::Options,
    /// Keep the console of each run in this folder.
    #[arg(long, value_name = "FOLDER")]
    logs: Option<PathBuf>,
}

pub fn main(args: &Args) -> Result<()> {
    let Some(What::Boot(args)) = &args.what else { return whole::main(&args.whole) };
    let all: Vec<steps::Step> = steps::all().into_iter().filter(|step| step.gate).collect();
    let steps = chosen(&all, &args.only)?;
    need(&[("qemu-system-x86_64", "qemu-system-x86"), ("debugfs", "e2fsprogs")])?;
    let qemu = which("qemu-system-x86_64").context("qemu-system-x86_64 is missing")?;
    let bench = Bench::prepare(args, &steps, qemu)?;
    let report = bench.all()?;
    print!("{report}");
    if let Some(file) = &args.json {
        fs::write(file, serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("Cannot write {}", file.display()))?;
    }
    if !report.faults.is_empty() {
        bail!("{} runs or steps failed", report.faults.len());
    }
    let missed: Vec<&str> =
        report.floors.iter().filter(|floor| !floor.kept).map(|floor| floor.what.as_str()).collect();
    if !missed.is_empty() {
        bail!("Floors missed: {}", missed.join("; "));
    }
    Ok(())
}

/// Those of `all` that are asked for; all of them unless any is.
fn chosen<'a>(all: &'a [steps::Step], only: &[String]) -> Result<Vec<&'a steps::Step>> {
    for name in only.iter().filter(|name| *name != BOOT) {
        if !all.iter().any(|step| step.name == name) {
            let names: Vec<&str> = all.iter().map(|step| step.name).collect();
            bail!("There is no step {name}; there are {BOOT}, {}", names.join(", "));
        }
    }
    Ok(all.iter().filter(|step| only.is_empty() || only.iter().any(|name| name == step.name)).collect())
}

/// The folder beside the guest's disk where the disks of a bench lie, and the lock that keeps it to one.
fn place(disk: &Path) -> Result<(PathBuf, File)> {
    let place = disk.with_file_name("bench");
    fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
    let lock = File::create(place.join("lock"))?;
    lock.lock().context("Cannot lock the place of the benchmark")?;
    Ok((place, lock))
}

/// The first line that a program tells of its version.
fn version(program: &Path) -> Result<String> {
    let told = output(Command::new(program).arg("--version"))?;
    Ok(told.lines().next().unwrap_or_default().trim().to_owned())
}

/// Puts the file `from` into the disk image.
fn write_into(disk: &Path, from: &Path, to: &str) -> Result<()> {
    // debugfs splits its commands at blanks unless they are quoted.
    let write = format!("write \"{}\" {to}", from.display());
    output(Command::new("debugfs").args(["-w", "-R", &write]).arg(disk))?;
    Ok(())
}

/// The place of the script in the guest's root.
pub const SCRIPT: &str = "/root/bench.sh";

struct Bench<'a> {
    args: &'a Boot,
    steps: &'a [&'a steps::Step],
    guest: vm::Guest,
    place: PathBuf,
    wardian: Vmm,
    qemu: Vmm,
    qemu_version: String,
    /// Held as long as the place is in use.
    _lock: File,
}

/// What the row of the boot is.
const BOOT_WHAT: &str = "start of the process to the guest's init script";

/// All that came of the runs.
#[derive(Default)]
struct Runs {
    native: Vec<Measured>,
    qemu: Vec<Measured>,
    wardian: Vec<Measured>,
    faults: Vec<String>,
}

impl<'a> Bench<'a> {
    fn prepare(args: &'a Boot, steps: &'a [&'a steps::Step], qemu: PathBuf) -> Result<Bench<'a>> {
        let guest = vm::guest()?;
        let program = vm::wardian(args.options.wardian.as_deref())?;
        let version = version(&qemu)?;
        let (place, lock) = place(&guest.disk)?;
        if let Some(logs) = &args.logs {
            fs::create_dir_all(logs).with_context(|| format!("Cannot create {}", logs.display()))?;
        }
        Ok(Bench {
            args,
            steps,
            qemu_version: format!("{version} (tcg, {}, -cpu max)", args.options.qemu_machine),
            wardian: Vmm::Wardian { program, args: args.options.wardian_arg.clone() },
            qemu: Vmm::Qemu { program: qemu, machine: args.options.qemu_machine.clone() },
            guest,
            place,
            _lock: lock,
        })
    }

    fn all(&self) -> Result<Report> {
        let load = load();
        let step = Step::begin("Copies of the disk");
        let script = self.place.join("steps.sh");
        fs::write(&script, steps::SCRIPT)?;
        let [ours, qemus] = [self.place.join("ours.img"), self.place.join("qemu.img")];
        vm::copy_disk(&self.guest.disk, &ours)?;
        write_into(&ours, &script, SCRIPT)?;
        vm::copy_disk(&ours, &qemus)?;
        let root = self.place.join("root");
        if self.args.native {
            native::extract(&ours, &root)?;
        }
        step.end();

        let mut runs = Runs::default();
        for turn in 1..=self.args.runs {
            let told = |what: &str| format!("{what}, run {turn} of {}", self.args.runs);
            let (ran, measured) = self.run(&told("QEMU"), &self.qemu, &qemus, self.args.cpus, false)?;
            runs.check(&format!("QEMU, run {turn}"), &ran, &measured);
            runs.qemu.push(measured);
            let (ran, measured) = self.run(&told("ours"), &self.wardian, &ours, self.args.cpus, false)?;
            runs.check(&format!("ours, run {turn}"), &ran, &measured);
            runs.wardian.push(measured);
            if self.args.native {
                let step = Step::begin(told("native"));
                let names: Vec<&str> = self.steps.iter().map(|step| step.name).collect();
                let ran = vm::run_command(
                    &mut native::command(&root, SCRIPT, &names, self.args.cpus),
                    self.args.options.limit(),
                    None,
                )?;
                step.end();
                let measured = self.measured("native", &ran)?;
                runs.check(&format!("native, run {turn}"), &ran, &measured);
                runs.native.push(measured);
            }
        }
        let mut footprint = BTreeMap::new();
        if !self.args.no_footprint {
            for (name, vmm, disk) in [("QEMU", &self.qemu, &qemus), ("ours", &self.wardian, &ours)] {
                let told = format!("{name}, memory");
                let (ran, measured) = self.run(&told, vmm, disk, MEMORY_CPUS, true)?;
                runs.check(&told, &ran, &measured);
                footprint.extend(ran.peak().map(|peak| (name, peak)));
            }
        }
        for file in [&ours, &qemus] {
            fs::remove_file(file)?;
        }
        if self.args.native {
            fs::remove_dir_all(&root)?;
        }
        let rows = self.rows(&runs);
        let mut faults = runs.faults;
        faults.extend(report::differing(&[
            ("native", &runs.native),
            ("QEMU", &runs.qemu),
            ("ours", &runs.wardian),
        ]));
        Ok(Report {
            linux: self.guest.version.clone(),
            qemu: self.qemu_version.clone(),
            memory: self.args.options.memory.clone(),
            cpus: self.args.cpus,
            runs: self.args.runs,
            load: [load, self::load()],
            floors: report::floors(&rows, footprint.get("ours")),
            rows,
            footprint,
            faults,
        })
    }

    fn rows(&self, runs: &Runs) -> Vec<Row> {
        std::iter::once((BOOT, BOOT_WHAT))
            .chain(self.steps.iter().map(|step| (step.name, step.what)))
            .map(|(name, what)| runs.row(name, what))
            .collect()
    }

    fn run(&self, told: &str, vmm: &Vmm, disk: &Path, cpus: u32, sample: bool) -> Result<(Ran, Measured)> {
        let names: Vec<&str> = self.steps.iter().map(|step| step.name).collect();
        let machine = Machine {
            kernel: self.guest.kernel.clone(),
            initrd: self.guest.initrd.clone(),
            disk: disk.to_owned(),
            cmdline: format!(
                "{} {}",
                self.guest.cmdline,
                vm::run_parameter(&format!("exec bash {SCRIPT} {}", names.join(" ")))
            ),
            memory: self.args.options.memory.clone(),
            cpus,
        };
        let step = Step::begin(told);
        let ran = vm::run(vmm, &machine, self.args.options.limit(), sample.then_some(vm::SAMPLE))?;
        step.end();
        let measured = self.measured(told, &ran)?;
        Ok((ran, measured))
    }

    fn measured(&self, told: &str, ran: &Ran) -> Result<Measured> {
        if let Some(logs) = &self.args.logs {
            let name = told.replace([',', ' '], "-");
            fs::write(logs.join(format!("{name}.log")), ran.log())?;
        }
        Ok(steps::measure(&ran.lines))
    }
}

impl Runs {
    fn row(&self, name: &str, what: &str) -> Row {
        Row {
            name: name.to_owned(),
            what: what.to_owned(),
            native: report::pick(&self.native, name),
            qemu: report::pick(&self.qemu, name),
            wardian: report::pick(&self.wardian, name),
        }
    }

    fn check(&mut self, told: &str, ran: &Ran, measured: &Measured) {
        if let Err(error) = ran.check() {
            self.faults.push(format!("{told}: {error:#}"));
        }
        for step in &measured.failed {
            self.faults.push(format!("{told}: {step} failed in the guest"));
        }
    }
}

/// Load average of the last minute.
fn load() -> f64 {
    let told = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    told.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}
