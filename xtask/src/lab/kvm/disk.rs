//! The disk that carries everything into the lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::peers;
use crate::guest::{Told, modules};
use crate::run::{Step, which};

const SCRIPT: &str = include_str!("lab.sh");
const FIGURES: &str = include_str!("figures.py");

/// What it carries.
pub struct Content<'a> {
    pub wardian: &'a Path,
    pub guests: &'a [PathBuf],
    /// The kernel whose `kvm_amd` is loaded.
    pub modules: &'a Told,
    /// The stock guest.
    pub kernel: &'a Told,
    /// QEMU as well, to measure beside.
    pub peers: bool,
}

/// Writes the image.
///
/// # Errors
/// When something is missing or cannot be copied.
pub fn make(image: &Path, step: &Step, content: &Content<'_>) -> Result<()> {
    let tree = tempfile::tempdir().context("Cannot make a folder")?;
    let to = |name: &str| tree.path().join(name);
    let copy = |from: &Path, name: &str| {
        fs::copy(from, to(name)).map(drop).with_context(|| format!("Cannot copy {}", from.display()))
    };
    for folder in ["guests", "modules"] {
        fs::create_dir(to(folder))?;
    }
    fs::write(to("lab.sh"), SCRIPT)?;
    fs::write(to("figures.py"), FIGURES)?;
    copy(content.wardian, "wardian")?;
    copy(&content.kernel.kernel, "vmlinuz")?;
    copy(&content.kernel.initrd, "initrd.img")?;
    for guest in content.guests {
        let name = guest.file_name().and_then(|name| name.to_str()).context("A guest without a name")?;
        // `tick` runs until it is told how long; the lab of clocks is its own.
        if name != "tick" {
            copy(guest, &format!("guests/{name}"))?;
        }
    }
    let mut list = String::new();
    for (name, bytes) in modules(content.modules, &["kvm_amd"])? {
        fs::write(to(&format!("modules/{name}")), bytes)?;
        list.push_str(&name);
        list.push('\n');
    }
    fs::write(to("modules.list"), list)?;
    if content.peers {
        peers::copy(&to("qemu"))?;
    }
    step.say("mke2fs");
    if image.exists() {
        fs::remove_file(image)?;
    }
    let mke2fs = which("mke2fs").context("mke2fs is missing")?;
    step.run(
        Command::new(mke2fs)
            .args(["-q", "-t", "ext4", "-m", "0", "-d"])
            .arg(tree.path())
            .arg(image)
            .arg("256M"),
    )
}
