//! What the rows need besides the stock guest: the script, small programs, a key, 7-Zip.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{SCRIPT, steps, write_into};
use crate::guest::archive;
use crate::run::{Step, need, output};

/// Files to be put into a guest's disk.
pub struct Programs {
    files: Vec<(PathBuf, &'static str)>,
}

impl Programs {
    /// Makes them in the folder `place`, or finds them there.
    ///
    /// # Errors
    /// When a host program is missing, or the package archive cannot be reached.
    pub fn make(place: &Path) -> Result<Programs> {
        need(&[
            ("debugfs", "e2fsprogs"),
            ("gcc", "gcc"),
            ("openssl", "openssl"),
            ("apt-get", "apt"),
            ("dpkg-deb", "dpkg"),
        ])?;
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
        let places =
            [("steps.sh", SCRIPT), ("steps", "/root/steps"), ("key", "/root/key"), ("7zz", "/root/7zz")];
        Ok(Programs { files: places.map(|(name, to)| (at(name), to)).to_vec() })
    }

    /// Puts them into the disk image.
    ///
    /// # Errors
    /// When that fails.
    pub fn fit(&self, disk: &Path) -> Result<()> {
        self.files.iter().try_for_each(|(from, to)| write_into(disk, from, to))
    }
}
