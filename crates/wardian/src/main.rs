//! The command line: parse, call, print.
#![forbid(unsafe_code)]

mod args;
mod doctor;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use wardian_machine::{Machine, MachineError, Outcome, Stats, status};

use args::{Cli, Command, Run};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("WARDIAN_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let run = match cli.command {
        Command::Doctor(args) => return ExitCode::from(doctor::main(&args)),
        Command::Run(run) => run,
    };
    ExitCode::from(run_machine(*run).unwrap_or_else(|error| {
        complain(&error);
        error.status()
    }))
}

/// Prints an error with its chain, once. What the chain says twice is said once.
fn complain(error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    eprintln!("wardian: {text}");
}

fn run_machine(run: Run) -> Result<u8, MachineError> {
    let config = run.config()?;
    let (print, json) = (config.stats, config.stats_json.clone());
    let mut machine = Machine::build(config)?;
    machine.on_event(|event| {
        if event.loud {
            eprintln!("wardian: {}", event.text);
        }
    });
    let json = json.as_deref().map(|path| create(path).map(|file| (path, file))).transpose()?;
    eprintln!("wardian: {}", machine.engine_reason());
    if let Some(address) = machine.debugger() {
        eprintln!("wardian: Debuggers may attach at {address}");
    }
    let outcome = machine.run();
    match &outcome {
        Outcome::PowerOff | Outcome::DebugExit(_) => {}
        Outcome::Reset => eprintln!("wardian: The guest asked for a reset"),
        Outcome::TripleFault { vcpu, rip } => {
            eprintln!("wardian: The guest met a triple fault: vCPU {vcpu} at {rip:#x}");
        }
        Outcome::Outside => eprintln!("wardian: Ended from outside"),
        Outcome::Failed(error) => complain(error),
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
