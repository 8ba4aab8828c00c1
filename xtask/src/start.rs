//! `cargo xtask run debian`: the stock guest, from nothing to a shell on this terminal.
//!
//! Builds `wardian`, makes the guest if it is not made yet, gives it a disk of its own, and becomes
//! `wardian run`: its terminal and its exit status are the command's.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use crate::guest::{self, Kernel};
use crate::run::{Step, repository};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    system: System,
}

#[derive(Subcommand)]
enum System {
    /// Debian: a root shell on the serial console. Ctrl-a x ends the machine, `poweroff` the guest.
    Debian(Debian),
}

#[derive(clap::Args)]
struct Debian {
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Guest RAM, with M or G.
    #[arg(long, default_value = "1G")]
    memory: String,
    /// Which stock kernel.
    #[arg(long, value_enum, default_value_t = Kernel::Cloud)]
    kernel: Kernel,
    /// Throw the machine's disk away and begin with a new one.
    #[arg(long)]
    fresh: bool,
    /// Further options of `wardian run`, after `--`.
    #[arg(last = true)]
    more: Vec<String>,
}

pub fn main(args: &Args) -> Result<()> {
    let System::Debian(debian) = &args.system;
    let wardian = wardian()?;
    let made = guest::debian(debian.kernel)?;
    let disk = own_disk(made.disk.as_deref().context("The guest has no disk")?, debian.fresh)?;
    let mut run = Command::new(wardian);
    run.arg("run").arg("--kernel").arg(&made.kernel).arg("--initrd").arg(&made.initrd);
    run.args(["--cmdline", made.cmdline, "--memory", &debian.memory, "--name", "debian"]);
    run.arg("--cpus").arg(debian.cpus.to_string());
    run.arg("--disk").arg(format!("{},format=raw", disk.display())).args(&debian.more);
    eprintln!("The disk is {}; `poweroff` ends the guest, Ctrl-a x the machine", disk.display());
    Err(run.exec()).context("Cannot start wardian")
}

/// Builds the `wardian` program in release and says where it is.
///
/// # Errors
/// When it does not build.
pub fn wardian() -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(repository()).args(["build", "--release", "--package", "wardian"]);
    if !cargo.status().context("Cannot start cargo")?.success() {
        bail!("Building wardian failed");
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
    Ok(target.join("release/wardian"))
}

/// A copy of the cached disk that the machine may write and that stays from run to run.
fn own_disk(from: &Path, fresh: bool) -> Result<PathBuf> {
    let place = guest::cache()?.join("machines");
    let disk = place.join("debian.img");
    if disk.is_file() && !fresh {
        return Ok(disk);
    }
    fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
    let part = place.join("debian.img.part");
    let step = Step::begin("Copying the disk");
    step.run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(&part))?;
    fs::rename(&part, &disk).with_context(|| format!("Cannot rename {}", part.display()))?;
    step.end();
    Ok(disk)
}
