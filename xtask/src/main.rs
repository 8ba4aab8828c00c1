//! Developer commands: `cargo xtask <command>`.
//!
//! *Comes in*: a command line. *Goes out*: files under the cache (stock guests) or under `target/`, told by
//! path on standard output; progress goes to standard error.
//!
//! **API Boundary:** one module for each command; what several share is in [`run`].
#![forbid(unsafe_code)]

mod bench;
mod guest;
mod guests;
mod lab;
mod lockstep;
mod lockup;
mod profile;
mod run;
mod start;
mod stress;
mod test;
mod throttle;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", about = "Developer commands of Wardian")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure our machine beside QEMU's translator.
    Bench(bench::Args),
    /// Make (once) a stock guest from this machine's own package archive.
    Guest(guest::Args),
    /// Build the bare-metal guests of guests/ into target/guests.
    Guests(guests::Args),
    /// Measure what the machine does to a guest's time.
    Lab(lab::Args),
    /// Step through a bare-metal guest beside QEMU's translator and compare every register.
    Lockstep(lockstep::Args),
    /// Show where our machine's time goes in one step of the bench.
    Profile(profile::Args),
    /// Do the same many times over, to find what fails only now and then.
    Stress(stress::Args),
    /// Boot a stock guest to a shell on this terminal.
    Run(start::Args),
    /// Make what the tests need, then run all of them.
    Test(test::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Bench(args) => bench::main(&args),
        Command::Guest(args) => guest::main(&args),
        Command::Guests(args) => guests::main(&args),
        Command::Lab(args) => lab::main(&args),
        Command::Lockstep(args) => lockstep::main(&args),
        Command::Profile(args) => profile::main(&args),
        Command::Stress(args) => stress::main(&args),
        Command::Run(args) => start::main(&args),
        Command::Test(args) => test::main(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
