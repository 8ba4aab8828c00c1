//! `cargo xtask lab`: measurements of what the machine does to a guest's time.
//!
//! *Comes in*: the bare-metal guest `tick`, Debian's kernel, our program, tick policies and loads. *Goes out*: a
//! table beside the one of 2007, CSV, JSON and a chart in a folder, and with `--check` an exit status that tells
//! whether what SPECIFICATION.md promises holds.
//!
//! **Architecture Invariant:** cells run at the same time only where they are load to each other.
//! **Architecture Invariant:** what was measured once is not measured again in the same folder; a fault is.

mod accounts;
mod cell;
mod chart;
mod check;
mod guest;
mod kvm;
mod load;
mod measure;
mod report;
mod run;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Subcommand;

use self::cell::{Activity, Cell, Device, Guest, Load, Policy, Wanted, batches};
use self::check::Verdict;
use self::guest::Guests;
use self::run::{Outcome, Place};
use crate::lockup;
use crate::run::{Step, repository};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// How far guests' clocks are from the host's, by tick policy, timer, guest and load.
    ///
    /// Each cell is one guest that rings the doorbell of its machine once a second. Without further options
    /// every policy meets every timer, guest and load; what was measured before in the same folder is kept, so
    /// that a run which was interrupted goes on.
    Skew(Skew),
    /// What makes a guest complain of lockups, and whether the doctor knows why.
    Lockup(lockup::Args),
    /// What the lockup doctor and its accounts cost a guest that computes.
    Accounts(accounts::Args),
    /// A true /dev/kvm on any machine: the conformance guests and the stock guest on the KVM engine.
    Kvm(kvm::Args),
}

#[derive(clap::Args)]
struct Skew {
    /// A small part of it in less than six minutes: PIT, bare-metal guests, stops and overcommit.
    #[arg(long)]
    quick: bool,
    /// Length of each cell [default: 60; quick: 10].
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(3..))]
    seconds: Option<u64>,
    /// Tick policies [default: all].
    #[arg(long, value_name = "P,...", value_enum, value_delimiter = ',')]
    policies: Vec<Policy>,
    /// Timers [default: all; quick: pit].
    #[arg(long, value_name = "D,...", value_enum, value_delimiter = ',')]
    devices: Vec<Device>,
    /// Guests [default: all; quick: count, compensate, linux].
    #[arg(long, value_name = "G,...", value_enum, value_delimiter = ',')]
    guests: Vec<Guest>,
    /// What the host does meanwhile [default: all; quick: stop, cpu3].
    #[arg(long, value_name = "L,...", value_enum, value_delimiter = ',')]
    loads: Vec<Load>,
    /// What the guest does beside [default: idle or spin, by the load].
    #[arg(long, value_name = "A,...", value_enum, value_delimiter = ',')]
    activities: Vec<Activity>,
    /// Ticks per second of the bare-metal guests (the RTC takes a power of two).
    #[arg(long, value_name = "HZ", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=1024))]
    hz: u64,
    /// Each cell with so many seeds.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// Where results go, and where those of an earlier run are found [default: target/lab/skew].
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Measure everything anew.
    #[arg(long)]
    fresh: bool,
    /// Fail if what SPECIFICATION.md promises does not hold in these cells.
    #[arg(long)]
    check: bool,
    /// Show what would be measured and how long that takes.
    #[arg(long)]
    dry_run: bool,
    /// Measure nothing: everything that earlier runs left in the folder, in one table.
    #[arg(long)]
    collect: bool,
    /// Use this program instead of building one.
    #[arg(long, value_name = "PATH")]
    wardian: Option<PathBuf>,
    /// One more argument for `wardian run`; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    wardian_arg: Vec<String>,
}

pub fn main(args: &Args) -> Result<()> {
    match &args.what {
        What::Skew(args) => skew(args),
        What::Lockup(args) => lockup::main(args),
        What::Accounts(args) => accounts::main(args),
        What::Kvm(args) => kvm::main(args),
    }
}

fn skew(args: &Skew) -> Result<()> {
    let cells = args.cells();
    if cells.is_empty() {
        bail!("No cell makes sense of these policies, devices, guests, loads and activities");
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if args.dry_run {
        let batches = batches(cells, cores);
        for batch in &batches {
            println!("{}", batch.iter().map(Cell::to_string).collect::<Vec<_>>().join("  "));
        }
        let seconds: u64 = batches.iter().map(|batch| length(batch)).sum();
        println!(
            "{} cells in {} turns, {}",
            batches.iter().map(Vec::len).sum::<usize>(),
            batches.len(),
            span(seconds)
        );
        return Ok(());
    }
    let out = args.out.clone().unwrap_or_else(|| {
        let target = std::env::var_os("CARGO_TARGET_DIR");
        target.map_or_else(|| repository().join("target"), PathBuf::from).join("lab/skew")
    });
    let place = Place::new(&out)?;
    let outcomes = if args.collect { place.all()? } else { args.measure(&cells, &place, cores)? };
    report::write(&outcomes, &out)?;
    print!("{}", report::whole(&outcomes));
    println!("\nTable, CSV, JSON, chart: {}/skew.*", out.display());
    if args.check {
        return judge(&outcomes);
    }
    Ok(())
}

impl Skew {
    fn cells(&self) -> Vec<Cell> {
        fn or<'a, T>(given: &'a [T], quick: bool, few: &'a [T], all: &'a [T]) -> &'a [T] {
            match (given.is_empty(), quick) {
                (false, _) => given,
                (true, true) => few,
                (true, false) => all,
            }
        }
        let policies =
            [Policy::Delay, Policy::Replay, Policy::ReplaySlew, Policy::Sync, Policy::LateOne, Policy::Async];
        let devices = [Device::Pit, Device::Rtc, Device::Hpet, Device::Lapic];
        let guests = [
            Guest::Count,
            Guest::Compensate,
            Guest::Linux,
            Guest::LinuxJiffies,
            Guest::LinuxHpet,
            Guest::LinuxPm,
        ];
        let loads = [
            Load::None,
            Load::Cpu2,
            Load::Cpu3,
            Load::Disk,
            Load::Stop,
            Load::Cgroup10,
            Load::Cgroup100,
            Load::Pause,
        ];
        let wanted = Wanted {
            policies: or(&self.policies, self.quick, &policies, &policies),
            devices: or(&self.devices, self.quick, &devices[..1], &devices),
            guests: or(&self.guests, self.quick, &guests[..3], &guests),
            loads: or(&self.loads, self.quick, &[Load::Cpu3, Load::Stop], &loads),
            activities: &self.activities,
            seeds: self.seeds,
            hz: self.hz,
            seconds: self.seconds.unwrap_or(if self.quick { 10 } else { 60 }),
        };
        wanted.cells()
    }

    /// What came of all cells, in their order; those that `place` has already are not run again.
    fn measure(&self, cells: &[Cell], place: &Place, cores: usize) -> Result<Vec<Outcome>> {
        let had = |cell: &Cell| if self.fresh { None } else { place.had(cell) };
        let mut outcomes: Vec<Outcome> = cells.iter().filter_map(had).collect();
        let missing: Vec<Cell> =
            cells.iter().filter(|cell| outcomes.iter().all(|o| o.cell != **cell)).copied().collect();
        if !outcomes.is_empty() {
            eprintln!("{} of {} cells are there from an earlier run", outcomes.len(), cells.len());
        }
        if !missing.is_empty() {
            let linux = Guests::needs_linux(&missing);
            let guests = Guests::prepare(self.wardian.as_deref(), &self.wardian_arg, linux, &place.guests())?;
            let batches = batches(missing, cores);
            let mut left: u64 = batches.iter().map(|batch| length(batch)).sum();
            let began = Instant::now();
            for (number, batch) in batches.iter().enumerate() {
                let names: Vec<String> = batch.iter().map(Cell::to_string).collect();
                let step = Step::begin(format!(
                    "{}/{} ({} to go) {}",
                    number + 1,
                    batches.len(),
                    span(left),
                    names.join(" ")
                ));
                let done = run::batch(&guests, place, batch, cores);
                step.end();
                for outcome in done? {
                    let told = outcome.figures.as_ref().map_or_else(String::new, |f| {
                        format!("{:+.6} s in {:.0} s, {} ppm", f.error, f.seconds, report::ppm(f.ppm))
                    });
                    eprintln!("  {}: {told} {}", outcome.cell, outcome.faults.join("; "));
                    outcomes.push(outcome);
                }
                left = left.saturating_sub(length(batch));
            }
            eprintln!("Measured for {}", span(began.elapsed().as_secs()));
        }
        let order = |outcome: &Outcome| cells.iter().position(|cell| *cell == outcome.cell);
        outcomes.sort_by_key(order);
        Ok(outcomes)
    }
}

/// How long a batch takes: its cells, their start, and the boot of what is load.
fn length(batch: &[Cell]) -> u64 {
    let more = |cell: &Cell| match (cell.guest.is_linux(), cell.load) {
        (true, Load::Cpu2 | Load::Cpu3) => 8,
        (true, _) | (false, Load::Disk) => 4,
        _ => 1,
    };
    batch.iter().map(|cell| cell.seconds + more(cell)).max().unwrap_or(0)
}

fn span(seconds: u64) -> String {
    let span = Duration::from_secs(seconds).as_secs();
    match span {
        0..=119 => format!("{span} s"),
        120..=7199 => format!("{} min", span.div_ceil(60)),
        _ => format!("{} h {} min", span / 3600, span % 3600 / 60),
    }
}

/// Prints what became of each promise.
fn judge(outcomes: &[Outcome]) -> Result<()> {
    let mut broken = 0;
    println!();
    for (what, verdict) in check::all(outcomes) {
        match verdict {
            Verdict::Kept(how) => println!("kept     {what} ({how})"),
            Verdict::Skipped(why) => println!("skipped  {what}: skipped, because {why}"),
            Verdict::Broken(all) => {
                broken += 1;
                println!("BROKEN   {what}");
                all.iter().for_each(|one| println!("         {one}"));
            }
        }
    }
    if broken > 0 {
        bail!("{broken} promises are broken");
    }
    Ok(())
}
