//! The guests of the lab and the command that starts one.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cpio::newc::{self, Builder};

use super::cell::{Cell, Load, Policy, word};
use super::load;
use crate::bench::vm;
use crate::guest::{self, Kernel};
use crate::guests;
use crate::run::{Step, need};

/// The program that rings in a Linux guest.
const RING: &str = include_str!("ring.c");
/// The first program of a Linux guest.
const INIT: &str = include_str!("init.sh");
/// Bytes of a Linux guest's disk: more than its memory.
const DISK: u64 = 512 << 20;
/// Readers of a disk that is load.
const READERS: u32 = 8;

/// What cells are made from.
pub struct Guests {
    wardian: PathBuf,
    more: Vec<String>,
    tick: PathBuf,
    linux: Option<Linux>,
    place: PathBuf,
}

struct Linux {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Guests {
    /// Builds what is needed; files that are made for all cells go to `place`.
    ///
    /// # Errors
    /// When something cannot be built.
    pub fn prepare(wardian: Option<&Path>, more: &[String], linux: bool, place: &Path) -> Result<Guests> {
        need(&[("taskset", "util-linux"), ("setpriv", "util-linux")])?;
        let wardian = vm::wardian(wardian)?;
        let step = Step::begin("Building the tick guest");
        let made = guests::build(&["tick".to_owned()])?;
        step.end();
        let linux = linux.then(|| make_linux(place)).transpose()?;
        let tick = made.into_iter().next().context("The tick guest was not made")?;
        Ok(Guests { wardian, more: more.to_vec(), tick, linux, place: place.to_owned() })
    }

    /// The command that runs the guest of `cell`, which rings into `rings`, on `core` alone, if given.
    ///
    /// # Errors
    /// When the guest's disk cannot be made, or Linux is not prepared.
    pub fn command(&self, cell: &Cell, rings: &Path, core: Option<usize>) -> Result<Command> {
        let mut command = self.pinned(core);
        command.arg("--doorbell").arg(rings);
        if cell.guest.is_linux() {
            let dd = if cell.load == Load::Disk { READERS } else { 0 };
            let spin = u32::from(cell.activity == super::cell::Activity::Spin);
            self.linux_args(&mut command, cell.guest.parameters(cell.device), cell.seconds, dd, spin)?;
        } else {
            command.arg("--kernel").arg(&self.tick).args(["--memory", "64M", "--serial", "none"]);
            command.arg("--debug-exit").arg("--cmdline").arg(format!(
                "device={} hz={} mode={} load={} seconds={}",
                word(&cell.device),
                cell.hz,
                word(&cell.guest),
                word(&cell.activity),
                cell.seconds
            ));
        }
        if cell.policy != Policy::Default {
            command.arg("--timer-policy").arg(word(&cell.policy));
        }
        Ok(command)
    }

    /// A Linux guest that reads its disk until it is killed.
    ///
    /// # Errors
    /// As [`Guests::command`].
    pub fn reader(&self, core: Option<usize>) -> Result<Command> {
        let mut command = self.pinned(core);
        self.linux_args(&mut command, "", 0, READERS, 0)?;
        command.arg("--doorbell").arg("/dev/null");
        Ok(command)
    }

    fn pinned(&self, core: Option<usize>) -> Command {
        let mut command = load::leashed(core);
        command.arg(&self.wardian).arg("run").arg("--no-reboot").args(&self.more);
        command
    }

    fn linux_args(&self, command: &mut Command, more: &str, seconds: u64, dd: u32, spin: u32) -> Result<()> {
        let linux = self.linux.as_ref().context("No Linux guest was prepared")?;
        command.arg("--kernel").arg(&linux.kernel).arg("--initrd").arg(&linux.initrd);
        command.args(["--memory", "256M", "--cmdline"]).arg(format!(
            "console=ttyS0 panic=-1 rdinit=/lab lab.seconds={seconds} lab.dd={dd} lab.spin={spin} {more}"
        ));
        if dd > 0 {
            let disk = self.place.join("disk.img");
            if !disk.is_file() {
                make_disk(&disk)?;
            }
            command.arg("--disk").arg(format!("{},readonly,format=raw", disk.display()));
        }
        Ok(())
    }

    /// Whether a Linux guest is needed for the cells.
    pub fn needs_linux(cells: &[Cell]) -> bool {
        cells.iter().any(|cell| cell.guest.is_linux() || cell.load == Load::Disk)
    }
}

/// Debian's kernel and its initial RAM disk with our programs in it.
fn make_linux(place: &Path) -> Result<Linux> {
    need(&[("gcc", "gcc")])?;
    let told = guest::kernel(Kernel::Cloud)?;
    let source = place.join("ring.c");
    let ring = place.join("ring");
    fs::write(&source, RING)?;
    crate::run::output(Command::new("gcc").args(["-static", "-O2", "-Wall", "-o"]).arg(&ring).arg(&source))?;
    // A second archive behind the first: its files come in addition.
    let initrd = place.join("initrd.img");
    let mut out = Vec::new();
    for (inode, name, content) in [(1, "lab", INIT.as_bytes().to_vec()), (2, "ring", fs::read(&ring)?)] {
        let file = Builder::new(name).ino(inode).mode(0o100_755).nlink(1);
        let mut file = file.write(&mut out, u32::try_from(content.len())?);
        file.write_all(&content)?;
        file.finish()?;
    }
    newc::trailer(&mut out)?;
    let mut all = fs::read(&told.initrd).with_context(|| format!("Cannot read {}", told.initrd.display()))?;
    all.resize(all.len().next_multiple_of(4), 0);
    all.extend(out);
    fs::write(&initrd, all)?;
    Ok(Linux { kernel: told.kernel, initrd })
}

/// A disk whose blocks are there.
fn make_disk(to: &Path) -> Result<()> {
    let step = Step::begin("Making a disk to read");
    let part = to.with_extension("part");
    let mut file = File::create(&part)?;
    let mut block = vec![0u8; 1 << 20];
    for number in 0..DISK >> 20 {
        block.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at as u64 * 31 + number) as u8);
        file.write_all(&block)?;
    }
    fs::rename(&part, to)?;
    step.end();
    Ok(())
}
