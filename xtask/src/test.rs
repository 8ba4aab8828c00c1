//! `cargo xtask test`: everything that the tests need, then all of them.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::guest::{self, Kernel};
use crate::guests;
use crate::run::{is_root, need, repository, which};

/// Host programs that tests compare with or drive; a test without its program says that it is skipped.
const TOOLS: [(&str, &str); 4] =
    [("curl", "curl"), ("qemu-img", "qemu-utils"), ("iasl", "acpica-tools"), ("gdb", "gdb")];

#[derive(clap::Args)]
pub struct Args {
    /// Only make what the tests need.
    #[arg(long)]
    prepare: bool,
    /// Arguments for `cargo test` instead of `--workspace`, after `--`.
    #[arg(last = true)]
    cargo: Vec<String>,
}

pub fn main(args: &Args) -> Result<()> {
    if is_root() {
        need(&TOOLS)?;
    } else {
        for (program, package) in TOOLS.iter().filter(|(program, _)| which(program).is_none()) {
            eprintln!("{program} is missing: its tests will be skipped (package {package})");
        }
    }
    guests::build(&[])?;
    guest::debian(Kernel::Cloud)?;
    guest::kernel(Kernel::Full)?;
    if args.prepare {
        return Ok(());
    }
    if !args.cargo.is_empty() {
        return cargo_test(&args.cargo);
    }
    cargo_test(&["--workspace", "--exclude", "wardian-tests"])?;
    // Whole machines one after the other: each has the processors for itself.
    cargo_test(&["--package", "wardian-tests", "--", "--test-threads=1"])
}

fn cargo_test<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let status =
        cargo.current_dir(repository()).arg("test").args(args).status().context("Cannot start cargo")?;
    if !status.success() {
        bail!("Tests failed");
    }
    Ok(())
}
