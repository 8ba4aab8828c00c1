//! The whole bench: every class of work, natively, in QEMU and in ours, in turn.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::counters::{self, Counters};
use super::footprint::Peak;
use super::progress::Progress;
use super::report::{self, BOOT, MEMORY_CPUS};
use super::steps::{self, Step};
use super::table::{self, Table, Work};
use super::vm::{self, Machine, Ran, Vmm};
use super::{BOOT_WHAT, Runs, SCRIPT, chart, chosen, load, native, place, programs, promise, version};
use crate::run::{self, need, output, repository, which};

#[derive(clap::Args)]
pub struct Whole {
    /// How often each machine runs; fewer than 3 tell little.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only this row beside the boot; may be repeated. `boot`: nothing else.
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Fail when a promise is not kept.
    #[arg(long)]
    check: bool,
    /// Go on with the bench that was broken off, if it was of the same program, rows and options.
    #[arg(long)]
    resume: bool,
    /// Figures as JSON [default: target/bench/bench.json].
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The chart [default: target/bench/bench.svg].
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Not on this machine itself (which needs root).
    #[arg(long)]
    no_native: bool,
    /// Without the run more for each row that counts what the engine did, and those that measure memory.
    #[arg(long)]
    no_counters: bool,
    #[command(flatten)]
    options: vm::Options,
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
    need(&[("qemu-system-x86_64", "qemu-system-x86")])?;
    let qemu = which("qemu-system-x86_64").context("qemu-system-x86_64 is missing")?;
    let guest = vm::guest()?;
    let options = &args.options;
    let program = vm::wardian(options.wardian.as_deref())?;
    let (place, lock) = place(&guest.disk)?;
    let told = format!("{} (tcg, {}, -cpu max)", version(&qemu)?, options.qemu_machine);
    let what = identity(&program, &steps, options, &told)?;
    let mut progress = Progress::open(place.join("progress.json"), what, args.resume);
    if args.resume {
        println!("{} runs are known already", progress.len());
    }
    let bench = Bench {
        args,
        wardian: Vmm::Wardian { program, args: options.wardian_arg.clone() },
        qemu: Vmm::Qemu { program: qemu, machine: options.qemu_machine.clone() },
        disks: [place.join("ours.img"), place.join("qemu.img")],
        root: place.join("root"),
        guest,
        place,
        _lock: lock,
    };
    let mut table = bench.all(&steps, told, &mut progress)?;
    table.promises = promise::promises(&table, args.only.is_empty());
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
    progress.finish()?;
    if !table.faults.is_empty() {
        bail!("{} runs or steps failed", table.faults.len());
    }
    let missed = table.promises.iter().filter(|promise| !promise.kept).count();
    if args.check && missed > 0 {
        bail!("{missed} promises are not kept");
    }
    Ok(())
}

/// What tells whether figures of a bench that was broken off belong to this one.
fn identity(program: &Path, steps: &[&Step], options: &vm::Options, qemu: &str) -> Result<String> {
    let sum = output(Command::new("sha256sum").arg(program))?;
    let rows: Vec<String> = steps.iter().map(|step| told(step)).collect();
    let vm::Options { memory, wardian_arg, .. } = options;
    Ok(format!("{sum}{rows:?} {memory} {wardian_arg:?} {qemu} {}{}", steps::SCRIPT, steps::PROGRAMS))
}

/// A row as the script is told of it.
fn told(step: &Step) -> String {
    if step.times == 1 { step.name.to_owned() } else { format!("{}:{}", step.name, step.times) }
}

/// Rows that run one after the other in one machine: those of a class with as many vCPUs.
fn groups<'a>(steps: &[&'a Step]) -> Vec<(u32, Vec<&'a Step>)> {
    let mut groups: Vec<(u32, Vec<&Step>)> = Vec::new();
    for &step in steps {
        match groups.iter_mut().find(|(cpus, group)| *cpus == step.cpus && group[0].class == step.class) {
            Some((_, group)) => group.push(step),
            None => groups.push((step.cpus, vec![step])),
        }
    }
    if groups.iter().all(|(cpus, _)| *cpus > 1) {
        // The row of the boot is that with 1 vCPU.
        groups.push((1, Vec::new()));
    }
    groups
}

impl Bench<'_> {
    fn all(&self, steps: &[&Step], qemu: String, progress: &mut Progress) -> Result<Table> {
        let before = load();
        self.set_up()?;
        let mut runs = Runs::default();
        for turn in 1..=self.args.rounds {
            for (cpus, group) in groups(steps) {
                self.round(&mut runs, progress, turn, cpus, &group)?;
            }
        }
        let mut works = vec![Work {
            row: runs.row(BOOT, BOOT_WHAT),
            class: "boot".to_owned(),
            cpus: 1,
            ..Work::default()
        }];
        works.extend(steps.iter().map(|step| Work {
            row: runs.row(step.name, step.what),
            class: step.class.unwrap_or_default().to_owned(),
            cpus: step.cpus,
            ..Work::default()
        }));
        let mut faults = std::mem::take(&mut runs.faults);
        faults.extend(report::differing(&[
            ("native", &runs.native),
            ("QEMU", &runs.qemu),
            ("ours", &runs.wardian),
        ]));
        let mut footprint = BTreeMap::new();
        if !self.args.no_counters {
            self.count(&mut works, steps, &mut faults)?;
            footprint = self.footprint()?;
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
            memory: self.args.options.memory.clone(),
            rounds: self.args.rounds,
            load: [before, load()],
            means: table::means(&works),
            works,
            footprint,
            promises: Vec::new(),
            faults,
        })
    }

    /// The disks with script and programs in them, and the root to change into.
    fn set_up(&self) -> Result<()> {
        let step = run::Step::begin("Programs and disks");
        let [ours, qemus] = &self.disks;
        vm::copy_disk(&self.guest.disk, ours)?;
        programs::fit(&self.guest, ours)?;
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
    fn round(
        &self,
        runs: &mut Runs,
        progress: &mut Progress,
        turn: u32,
        cpus: u32,
        group: &[&Step],
    ) -> Result<()> {
        let [ours, qemus] = &self.disks;
        let names: Vec<String> = group.iter().map(|step| told(step)).collect();
        let class = group.first().and_then(|step| step.class).unwrap_or(BOOT);
        let mut one = |who: &str, ran: &dyn Fn() -> Result<Ran>| -> Result<steps::Measured> {
            let told = format!("{who}, {class}, {cpus} vCPU, round {turn}");
            progress.run(&told, || {
                let step = run::Step::begin(&*told);
                let ran = ran()?;
                step.end();
                let mut measured = steps::measure(&ran.lines);
                let before = runs.faults.len();
                runs.check(&told, &ran, &measured);
                if cpus > 1 {
                    // The row of the boot is that with 1 vCPU.
                    measured.boot = None;
                }
                Ok((measured, runs.faults.len() == before))
            })
        };
        let limit = self.args.options.limit();
        let qemu = one("QEMU", &|| vm::run(&self.qemu, &self.machine(qemus, cpus, &names), limit, None))?;
        let wardian =
            one("ours", &|| vm::run(&self.wardian, &self.machine(ours, cpus, &names), limit, None))?;
        let native = if self.args.no_native || names.is_empty() {
            None
        } else {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            Some(one("native", &|| {
                vm::run_command(&mut native::command(&self.root, SCRIPT, &names, cpus), limit, None)
            })?)
        };
        runs.qemu.push(qemu);
        runs.wardian.push(wardian);
        runs.native.extend(native);
        Ok(())
    }

    fn machine(&self, disk: &Path, cpus: u32, names: &[String]) -> Machine {
        let script = vm::run_parameter(&format!("exec bash {SCRIPT} {}", names.join(" ")));
        Machine {
            kernel: self.guest.kernel.clone(),
            initrd: self.guest.initrd.clone(),
            disk: disk.to_owned(),
            cmdline: format!("{} {script}", self.guest.cmdline),
            memory: self.args.options.memory.clone(),
            cpus,
        }
    }

    /// The most memory that each machine takes beside guest RAM while it compiles.
    fn footprint(&self) -> Result<BTreeMap<&'static str, Peak>> {
        let mut peaks = BTreeMap::new();
        for (name, vmm, disk) in
            [("QEMU", &self.qemu, &self.disks[1]), ("ours", &self.wardian, &self.disks[0])]
        {
            let step = run::Step::begin(format!("{name}, memory"));
            let machine = self.machine(disk, MEMORY_CPUS, &["gcc".to_owned()]);
            peaks.extend(
                vm::run(vmm, &machine, self.args.options.limit(), Some(vm::SAMPLE))?
                    .peak()
                    .map(|peak| (name, peak)),
            );
            step.end();
        }
        Ok(peaks)
    }

    /// What the engine counts in each row; in that of the boot, all that a run without rows does.
    fn count(&self, works: &mut [Work], steps: &[&Step], faults: &mut Vec<String>) -> Result<()> {
        let Vmm::Wardian { program, args } = &self.wardian else { return Ok(()) };
        let file = self.place.join("stats.json");
        let mut args = args.clone();
        args.extend(["--stats-json".to_owned(), file.display().to_string()]);
        let vmm = Vmm::Wardian { program: program.clone(), args };
        let mut counted = |cpus: u32, names: &[String]| -> Result<Counters> {
            let machine = self.machine(&self.disks[0], cpus, names);
            let ran = vm::run(&vmm, &machine, self.args.options.limit(), None)?;
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
            work.counters = match steps.iter().find(|step| step.name == work.row.name) {
                None => base.clone(),
                Some(step) => counters::beyond(&counted(work.cpus, &[told(step)])?, base),
            };
        }
        step.end();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_by_class() {
        let all: Vec<Step> = steps::all().into_iter().filter(|step| step.class.is_some()).collect();
        let rows: Vec<&Step> = all.iter().collect();
        let groups = groups(&rows);
        assert_eq!(groups.iter().map(|(_, group)| group.len()).sum::<usize>(), rows.len());
        for (cpus, group) in &groups {
            assert!(group.iter().all(|step| step.cpus == *cpus && step.class == group[0].class));
        }
        // COMMAND_LINE_SIZE of Linux on x86 is 2048.
        let longest = groups.iter().map(|(_, group)| {
            let names: Vec<String> = group.iter().map(|step| told(step)).collect();
            vm::run_parameter(&format!("exec bash {SCRIPT} {}", names.join(" "))).len()
        });
        assert!(longest.max().is_some_and(|longest| longest < 1900));
        let two: Vec<&Step> = rows.iter().copied().filter(|step| step.cpus == 2).collect();
        assert_eq!(super::groups(&two).last().map(|(cpus, group)| (*cpus, group.len())), Some((1, 0)));
    }
}
