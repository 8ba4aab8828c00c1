//! `cargo xtask guest debian`: a stock guest (kernel, initial RAM disk, root disk) made from the package
//! archive that this machine itself is configured for, by its ordinary clients, and kept in a cache.
//!
//! **Architecture Invariant:** what is in the cache is whole: every artifact is built beside its place and
//! renamed into it. **Architecture Invariant:** no archive host is named here; apt's configuration is asked.

pub mod archive;
mod initrd;
mod kernel;
mod root;
pub mod spin;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use serde::Serialize;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    system: System,
}

#[derive(Subcommand)]
enum System {
    /// Debian: the stock kernel and a root disk with python3, gcc, openssl, sqlite3, perl, nodejs, xz.
    Debian(Debian),
}

#[derive(clap::Args)]
struct Debian {
    /// Which stock kernel.
    #[arg(long, value_enum, default_value_t = Kernel::Cloud)]
    kernel: Kernel,
    /// Make only this kernel with its initial RAM disk, no root disk.
    #[arg(long, value_name = "KERNEL", value_enum, conflicts_with = "kernel")]
    kernel_only: Option<Kernel>,
    /// Make everything anew, from the newest packages.
    #[arg(long)]
    force: bool,
    /// Tell the paths as JSON.
    #[arg(long)]
    json: bool,
}

/// A stock kernel package.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kernel {
    /// linux-image-cloud-amd64.
    Cloud,
    /// linux-image-amd64.
    Full,
}

impl Kernel {
    fn name(self) -> &'static str {
        match self {
            Kernel::Cloud => "cloud",
            Kernel::Full => "full",
        }
    }
    fn package(self) -> &'static str {
        match self {
            Kernel::Cloud => "linux-image-cloud-amd64",
            Kernel::Full => "linux-image-amd64",
        }
    }
}

/// A stock guest that is made.
#[derive(Serialize)]
pub struct Told {
    /// Version of the kernel.
    pub version: String,
    /// bzImage.
    pub kernel: PathBuf,
    /// The same kernel as uncompressed ELF.
    pub vmlinux: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Raw ext4 image; copy it (or open it through an overlay) before writing to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<PathBuf>,
    /// Kernel command line for the serial console.
    pub cmdline: &'static str,
}

/// Makes the Debian guest with `kernel` if it is not made yet.
///
/// # Errors
/// When a host program or a package cannot be had, or this process may not do what it must.
pub fn debian(kernel: Kernel) -> Result<Told> {
    make(&Debian { kernel, kernel_only: None, force: false, json: false })
}

/// Makes the kernel `kind` and its initial RAM disk alone, if they are not made yet.
///
/// # Errors
/// As [`debian`].
pub fn kernel(kind: Kernel) -> Result<Told> {
    make(&Debian { kernel: kind, kernel_only: Some(kind), force: false, json: false })
}

pub fn main(args: &Args) -> Result<()> {
    let System::Debian(debian) = &args.system;
    let told = make(debian)?;
    if debian.json {
        println!("{}", serde_json::to_string_pretty(&told)?);
    } else {
        println!("kernel  {} (Linux {})", told.kernel.display(), told.version);
        println!("vmlinux {}", told.vmlinux.display());
        println!("initrd  {}", told.initrd.display());
        if let Some(disk) = &told.disk {
            println!("disk    {}", disk.display());
        }
        println!("cmdline {}", told.cmdline);
    }
    Ok(())
}

/// Modules of the stock kernel `told`, uncompressed, each after those that it needs: name and content.
///
/// # Errors
/// When they cannot be read.
pub fn modules(told: &Told, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let dir = told.kernel.parent().context("A kernel without a folder")?;
    initrd::modules(&dir.join("modules/lib/modules").join(&told.version), names)
}

fn make(debian: &Debian) -> Result<Told> {
    let place = cache()?.join("guests/debian");
    fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
    // One maker at a time; a second one waits here and then finds everything made.
    let lock = File::create(place.join("lock"))?;
    lock.lock().with_context(|| format!("Cannot lock {}", place.display()))?;

    let kind = debian.kernel_only.unwrap_or(debian.kernel);
    let kernel = kernel::make(&place, kind, debian.force)?;
    let disk = match debian.kernel_only {
        Some(_) => None,
        None => {
            // The disk carries the modules of the cloud kernel, whichever kernel is wanted this time.
            let cloud = kernel::make(&place, Kernel::Cloud, debian.force && kind != Kernel::Cloud)?;
            Some(root::make(&place, &cloud, debian.force)?)
        }
    };
    Ok(Told {
        version: kernel.version.clone(),
        kernel: kernel.dir.join("vmlinuz"),
        vmlinux: kernel.dir.join("vmlinux"),
        initrd: kernel.dir.join("initrd.img"),
        disk,
        cmdline: "console=ttyS0",
    })
}

/// The cache of made things: `$WARDIAN_CACHE` or `/var/tmp/wardian`.
pub fn cache() -> Result<PathBuf> {
    let dir =
        std::env::var_os("WARDIAN_CACHE").map_or_else(|| PathBuf::from("/var/tmp/wardian"), PathBuf::from);
    if !dir.is_absolute() {
        bail!("WARDIAN_CACHE must be an absolute path, not {}", dir.display());
    }
    Ok(dir)
}

/// Makes the folder or file `to` by `make` into a place beside it, then renames it: there is never a half.
fn atomically(to: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = to.file_name().and_then(|n| n.to_str()).context("A cache path without a name")?;
    let part = to.with_file_name(format!("{name}.part"));
    remove(&part)?;
    make(&part)?;
    remove(to)?;
    fs::rename(&part, to).with_context(|| format!("Cannot rename {} to {}", part.display(), to.display()))
}

fn remove(path: &Path) -> Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    gone.with_context(|| format!("Cannot remove {}", path.display()))
}
