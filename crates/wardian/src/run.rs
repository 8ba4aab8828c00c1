//! `wardian run`.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use wardian_control::{Desk, Directory, PlaceError, Server, ServerError};
use wardian_machine::{Machine, MachineError, Outcome, Seat, Stats, status};

use crate::args::Run;
use crate::{complain, detach};

/// A machine that cannot be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its control socket.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The background.
    #[error("Could not run in the background")]
    Detach(#[source] std::io::Error),
}

impl RunError {
    pub(crate) fn status(&self) -> u8 {
        match self {
            RunError::Machine(error) => error.status(),
            RunError::Server(ServerError::Place(PlaceError::Taken(_) | PlaceError::TooLong(_))) => {
                status::BAD_INPUT
            }
            RunError::Server(_) | RunError::Detach(_) => status::HOST,
        }
    }
}

pub(crate) fn run(run: Run) -> Result<u8, RunError> {
    let detached = run.detach && detach::is_background();
    if run.detach && !detached {
        return detach::start(run.json).map_err(RunError::Detach);
    }
    let log = run.log.clone();
    if detached {
        detach::begin().map_err(RunError::Detach)?;
    }
    let config = run.config().map_err(MachineError::from)?;
    let (print, json) = (config.stats, config.stats_json.clone());
    let named = config.name.is_some();
    let desk = Desk::new();
    let seat = Seat { detached, screen: Some(desk.screen()) };
    let mut machine = Machine::build_at(config, seat)?;
    let events = desk.clone();
    machine.on_event(move |event| {
        events.event(event);
        if event.loud {
            eprintln!("wardian: {}", event.text);
        }
    });
    let json = json.as_deref().map(|path| create(path).map(|file| (path, file))).transpose()?;
    let server = match open(desk, &machine) {
        Ok(server) => Some(server),
        // In the foreground there are other ways to control a machine, if nobody expects it by its name.
        Err(error) if !detached && !named => {
            complain(&error);
            None
        }
        Err(error) => return Err(error.into()),
    };
    eprintln!("wardian: {}", machine.engine_reason());
    if let Some(address) = machine.debugger() {
        eprintln!("wardian: Debuggers may attach at {address}");
    }
    if detached {
        detach::ready(&machine.about().name, log.as_deref()).map_err(RunError::Detach)?;
    }
    let outcome = machine.run();
    if let Some(server) = server {
        server.close(&outcome);
    }
    match &outcome {
        Outcome::PowerOff | Outcome::DebugExit(_) => {}
        Outcome::Failed(error) => complain(error),
        Outcome::Reset | Outcome::TripleFault { .. } | Outcome::Outside => eprintln!("wardian: {outcome}"),
    }
    let stats = machine.stats();
    drop(machine);
    if print {
        eprint!("{}", table(&stats));
    }
    if let Some((path, file)) = json {
        write(path, file, &stats)?;
    }
    Ok(outcome.status())
}

fn open(desk: Desk, machine: &Machine) -> Result<Server, ServerError> {
    desk.open(machine, &Directory::open()?)
}
fn output_error(path: &Path) -> impl Fn(std::io::Error) -> MachineError {
    move |source| MachineError::Output { path: path.to_owned(), source }
}

fn create(path: &Path) -> Result<File, MachineError> {
    File::create(path).map_err(output_error(path))
}

fn write(path: &Path, mut file: File, stats: &Stats) -> Result<(), MachineError> {
    let error = output_error(path);
    serde_json::to_writer_pretty(&file, stats).map_err(|e| error(e.into()))?;
    file.write_all(b"\n").map_err(error)
}

/// The counters for people.
fn table(stats: &Stats) -> String {
    let mut text = format!(
        "wardian: {} on engine {}: {:.3} s of guest time, {} resets\n",
        stats.name,
        stats.engine,
        stats.guest_ns as f64 / 1e9,
        stats.reboots
    );
    for vcpu in &stats.vcpus {
        text += &format!(
            "vCPU {:<9} {:>12} {:>10} {:>9} {:>9} {:>9}\n",
            vcpu.vcpu, "count", "total ms", "p50 us", "p99 us", "max us"
        );
        for exit in &vcpu.exits {
            let us = |ns: u64| ns as f64 / 1e3;
            text += &format!(
                "  {:<12} {:>12} {:>10.1} {:>9.2} {:>9.2} {:>9.1}\n",
                exit.kind,
                exit.count,
                exit.total_ns as f64 / 1e6,
                us(exit.p50_ns),
                us(exit.p99_ns),
                us(exit.max_ns)
            );
        }
        for (name, value) in &vcpu.engine {
            text += &format!("  {name:<24} {value:>20}\n");
        }
    }
    text
}

/// Statuses of clap (2 for usage) and ours agree.
const _: () = assert!(status::BAD_INPUT == 2);
