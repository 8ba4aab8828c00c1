//! The command line: parse, call, print.
#![forbid(unsafe_code)]

mod args;
mod detach;
mod doctor;
mod remote;
mod run;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use clap_complete::CompleteEnv;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};

fn main() -> ExitCode {
    // A shell asks what can be typed: `source <(COMPLETE=bash wardian)`.
    CompleteEnv::with_factory(Cli::command).complete();
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("WARDIAN_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    ExitCode::from(match cli.command {
        Command::Run(run) => run::run(*run).unwrap_or_else(|error| {
            complain(&error);
            error.status()
        }),
        Command::Doctor(args) => doctor::main(&args),
        Command::Remote(command) => remote::run(command).unwrap_or_else(|error| {
            complain(&error);
            error.status()
        }),
    })
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
