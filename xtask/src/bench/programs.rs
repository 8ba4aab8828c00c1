//! What the rows need besides the stock guest: the script, small programs, a key, 7-Zip.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::vm::Guest;
use super::{SCRIPT, steps, write_into};
use crate::guest::archive;
use crate::run::{Step, need, output};

/// Puts them into the image `disk`, a copy of the guest's; what takes long to make stays beside the guest.
///
/// # Errors
/// When a host program is missing, or the package archive cannot be reached.
pub fn fit(guest: &Guest, disk: &Path) -> Result<()> {
    need(&[
        ("debugfs", "e2fsprogs"),
        ("gcc", "gcc"),
        ("openssl", "openssl"),
        ("apt-get", "apt"),
        ("dpkg-deb", "dpkg"),
    ])?;
    let place = guest.disk.with_file_name("programs");
    fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
    let lock = File::create(place.join("lock"))?;
    lock.lock().with_context(|| format!("Cannot lock {}", place.display()))?;
    let at = |name: &str| place.join(name);
    fs::write(at("steps.sh"), steps::SCRIPT)?;
    fs::write(at("steps.c"), steps::PROGRAMS)?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-static", "-pthread", "-o"]).arg(at("steps")).arg(at("steps.c")).arg("-lm");
    output(&mut gcc)?;
    if !at("key").is_file() {
        output(Command::new("openssl").arg("genrsa").arg("-out").arg(at("key")).arg("2048"))?;
    }
    if !at("7zz").is_file() {
        let step = Step::begin("Package 7zip");
        let part = at("7zip.part");
        archive::know("7zip", false)?;
        let package = archive::download(&step, "7zip", &part)?;
        step.run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&part))?;
        fs::rename(part.join("usr/bin/7zz"), at("7zz"))?;
        fs::remove_dir_all(&part)?;
        step.end();
    }
    for (name, to) in
        [("steps.sh", SCRIPT), ("steps", "/root/steps"), ("key", "/root/key"), ("7zz", "/root/7zz")]
    {
        write_into(disk, &at(name), to)?;
    }
    Ok(())
}
