//! `cargo xtask lab lockup`: what makes a guest complain of lockups, and whether the doctor knows why.
//!
//! *Comes in*: the stock guest, a kernel module that spins, our program. *Goes out*: a table of cells on standard
//! output, JSON, consoles and events in a folder, an exit status that tells whether every cell is as it should be.
//!
//! **Architecture Invariant:** a guest complains where it spins itself, and nowhere else.

mod judge;
mod machine;

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::ValueEnum;
use rustix::process::Signal;
use serde::Serialize;

use self::judge::{Complaint, Expected, Said};
use self::machine::{Machine, Makings};
use crate::bench::vm;
use crate::guest::spin;
use crate::run::{Step, repository};
use crate::throttle::Throttle;

#[derive(clap::Args)]
pub struct Args {
    /// Shorter stops, and watchdogs that bark sooner: less than two minutes.
    #[arg(long)]
    quick: bool,
    /// Only these cells [default: all].
    #[arg(long, value_name = "CELL,...", value_enum, value_delimiter = ',')]
    cells: Vec<Cell>,
    /// Minutes of overcommit [default: 10; quick: 0.2].
    #[arg(long, value_name = "N")]
    minutes: Option<f64>,
    /// Where results go [default: target/lab/lockup].
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Use this program instead of building one.
    #[arg(long, value_name = "PATH")]
    wardian: Option<PathBuf>,
}

/// What is done to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Cell {
    /// The machine is paused.
    Pause,
    /// The whole process is stopped.
    Stop,
    /// It gets 5 % of a processor.
    Throttle,
    /// Four vCPUs compute for each processor.
    Overcommit,
    /// The guest's kernel spins with interrupts on.
    Spin,
    /// The guest's kernel spins with interrupts off.
    MaskedSpin,
}

const ALL: [Cell; 6] =
    [Cell::Pause, Cell::Stop, Cell::Throttle, Cell::Overcommit, Cell::Spin, Cell::MaskedSpin];

/// vCPUs of each guest.
const CPUS: usize = 2;
/// vCPUs for each processor of the host.
const OVERCOMMIT: usize = 4;

impl Cell {
    fn name(self) -> &'static str {
        match self {
            Cell::Pause => "pause",
            Cell::Stop => "stop",
            Cell::Throttle => "throttle",
            Cell::Overcommit => "overcommit",
            Cell::Spin => "spin",
            Cell::MaskedSpin => "masked-spin",
        }
    }

    /// Whose doing it is.
    fn expected(self) -> Expected {
        let host = |causes| Expected { complaints: &[], causes, allowed: &["steal"] };
        match self {
            Cell::Pause => host(&["paused"]),
            Cell::Stop => host(&["stopped"]),
            Cell::Throttle | Cell::Overcommit => host(&["steal"]),
            Cell::Spin => Expected {
                complaints: &[Complaint::SoftLockup, Complaint::RcuStall],
                causes: &["spin"],
                allowed: &["steal"],
            },
            Cell::MaskedSpin => Expected {
                complaints: &[Complaint::SoftLockup, Complaint::RcuStall],
                causes: &["masked-spin"],
                allowed: &["steal"],
            },
        }
    }
}

/// What came of a cell.
#[derive(Serialize)]
struct Outcome {
    cell: Cell,
    /// How long it was done, in seconds.
    seconds: f64,
    /// By guest.
    said: Vec<Said>,
    faults: Vec<String>,
}

pub fn main(args: &Args) -> Result<()> {
    let out = args.out.clone().unwrap_or_else(|| {
        let target = std::env::var_os("CARGO_TARGET_DIR");
        target.map_or_else(|| repository().join("target"), PathBuf::from).join("lab/lockup")
    });
    std::fs::create_dir_all(&out)?;
    let makings = Makings {
        wardian: vm::wardian(args.wardian.as_deref())?,
        guest: vm::guest()?,
        module: spin::module()?,
        out: out.clone(),
        quick: args.quick,
    };
    let minutes = args.minutes.unwrap_or(if args.quick { 0.2 } else { 10.0 });
    let cells = if args.cells.is_empty() { &ALL[..] } else { &args.cells };
    let mut outcomes = Vec::new();
    for cell in cells {
        let step = Step::begin(cell.name());
        outcomes.push(run(&makings, *cell, Duration::from_secs_f64(minutes * 60.0)));
        step.end();
    }
    std::fs::write(out.join("lockup.json"), serde_json::to_string_pretty(&outcomes)?)?;
    print!("{}", table(&outcomes));
    println!("\nJSON, consoles, events: {}", out.display());
    let bad = outcomes.iter().filter(|outcome| !outcome.faults.is_empty()).count();
    if bad > 0 {
        bail!("{bad} cells are not as they should be");
    }
    Ok(())
}

fn run(makings: &Makings, cell: Cell, overcommit: Duration) -> Outcome {
    let (long, spin) = if makings.quick { (6, 7) } else { (30, 25) };
    // The watchdogs and the doctor have had their say after so long.
    let settle = Duration::from_secs(if makings.quick { 4 } else { 25 });
    let long = Duration::from_secs(long);
    let done = match cell {
        Cell::Pause => one(makings, cell, true, "", |machine| {
            machine.signal(Signal::USR1)?;
            sleep(long);
            machine.signal(Signal::USR2)
        }),
        Cell::Stop => one(makings, cell, true, "", |machine| {
            machine.signal(Signal::STOP)?;
            sleep(long);
            machine.signal(Signal::CONT)
        }),
        Cell::Throttle => one(makings, cell, true, "", |machine| {
            let throttle = Throttle::share(Duration::from_millis(100), 0.05)?;
            throttle.add(machine.id())?;
            let throttle = machine.throttle.insert(throttle);
            sleep(long * 2);
            throttle.lift()
        }),
        Cell::Overcommit => many(makings, cell, overcommit),
        Cell::Spin | Cell::MaskedSpin => {
            let masked = u8::from(cell == Cell::MaskedSpin);
            let script =
                format!("taskset -c 1 insmod /tmp/spin.ko seconds={spin} masked={masked}\necho LAB-SPUN");
            one(makings, cell, false, &script, |machine| {
                machine.go_on()?;
                machine.wait_for("LAB-SPUN", Duration::from_secs(spin + 60))
            })
        }
    };
    // `one` and `many` end the guests after they have settled.
    let (seconds, said, mut faults) = match done.and_then(|machines| machines.settle(settle)) {
        Ok((seconds, said)) => (seconds, said, Vec::new()),
        Err(error) => (0.0, Vec::new(), vec![format!("{error:#}")]),
    };
    faults.extend(said.iter().flat_map(|said| said.faults(&cell.expected())));
    let wanted = |had: usize, what: &str| (had != 1).then(|| format!("{had} events of {what}, not one"));
    match (cell, said.first()) {
        (Cell::Pause, Some(said)) => faults.extend(wanted(said.pauses, "a pause")),
        (Cell::Stop, Some(said)) => faults.extend(wanted(said.stops, "a stop")),
        _ => {}
    }
    Outcome { cell, seconds, said, faults }
}

/// Guests to whom it was done.
struct Done {
    machines: Vec<Machine>,
    took: Duration,
}

impl Done {
    fn settle(self, settle: Duration) -> Result<(f64, Vec<Said>)> {
        sleep(settle);
        let ended: Result<Vec<Said>> = self
            .machines
            .into_iter()
            .map(|machine| machine.end().map(|(console, events)| Said::read(&console, &events)))
            .collect();
        Ok((self.took.as_secs_f64(), ended?))
    }
}

fn one(
    makings: &Makings,
    cell: Cell,
    busy: bool,
    script: &str,
    act: impl FnOnce(&mut Machine) -> Result<()>,
) -> Result<Done> {
    let mut machine = makings.start(cell.name(), busy, script)?;
    // The guest is at its work, and the doctor has seen it.
    sleep(Duration::from_secs(2));
    let began = Instant::now();
    act(&mut machine)?;
    let took = began.elapsed();
    if script.is_empty() {
        machine.go_on()?;
    }
    Ok(Done { machines: vec![machine], took })
}

fn many(makings: &Makings, cell: Cell, long: Duration) -> Result<Done> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut machines = Vec::new();
    for number in 0..(cores * OVERCOMMIT).div_ceil(CPUS) {
        machines.push(makings.start(&format!("{}-{number}", cell.name()), true, "")?);
    }
    let began = Instant::now();
    sleep(long);
    let took = began.elapsed();
    for machine in &mut machines {
        machine.go_on()?;
    }
    Ok(Done { machines, took })
}

fn table(outcomes: &[Outcome]) -> String {
    let mut text =
        format!("{:<12} {:>6}  {:<34} {:<34} ok\n", "cell", "s", "the guest says", "the doctor says");
    for outcome in outcomes {
        let mut guest: Vec<String> = Vec::new();
        for complaint in [
            Complaint::SoftLockup,
            Complaint::HardLockup,
            Complaint::RcuStall,
            Complaint::HungTask,
            Complaint::Clock,
            Complaint::SlowClock,
        ] {
            let count =
                outcome.said.iter().flat_map(|said| &said.complaints).filter(|c| c.0 == complaint).count();
            if count > 0 {
                guest.push(format!("{count} {complaint:?}"));
            }
        }
        let mut causes = std::collections::BTreeMap::<&str, usize>::new();
        for (cause, count) in outcome.said.iter().flat_map(|said| &said.causes) {
            *causes.entry(cause).or_default() += count;
        }
        let doctor: Vec<String> = causes.iter().map(|(cause, count)| format!("{count} {cause}")).collect();
        let or_nothing = |all: Vec<String>| if all.is_empty() { "-".to_owned() } else { all.join(", ") };
        text += &format!(
            "{:<12} {:>6.1}  {:<34} {:<34} {}\n",
            outcome.cell.name(),
            outcome.seconds,
            or_nothing(guest),
            or_nothing(doctor),
            if outcome.faults.is_empty() { "yes" } else { "NO" }
        );
        for fault in &outcome.faults {
            text += &format!("{:<20}{fault}\n", "");
        }
    }
    text
}
