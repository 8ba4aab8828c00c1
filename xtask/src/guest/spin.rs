//! A kernel module that spins, for tests of what watches for that.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Kernel, archive, atomically, cache, kernel};
use crate::run::{Step, need};

const SOURCE: &str = include_str!("spin.c");

/// The module for the cloud kernel, as a raw disk.
pub struct Module {
    pub disk: PathBuf,
    /// Bytes of the disk that are the module; zeros follow.
    pub len: u64,
}

/// Makes the module if it is not made yet.
///
/// # Errors
/// When a package or a host program cannot be had.
pub fn module() -> Result<Module> {
    let place = cache()?.join("guests/debian");
    fs::create_dir_all(&place)?;
    let lock = File::create(place.join("lock"))?;
    lock.lock().with_context(|| format!("Cannot lock {}", place.display()))?;
    let version = kernel::make(&place, Kernel::Cloud, false)?.version;
    let dir = place.join("spin");
    let stamp = format!("{version}\n{SOURCE}");
    if !fs::read_to_string(dir.join("stamp")).is_ok_and(|made| made == stamp) {
        need(&[("make", "make"), ("gcc", "gcc"), ("dpkg-deb", "dpkg"), ("strip", "binutils")])?;
        let headers = format!("linux-headers-{version}");
        archive::know(&headers, false)?;
        atomically(&dir, |part| {
            fs::create_dir_all(part)?;
            build(part, &headers)?;
            fs::write(part.join("stamp"), &stamp)?;
            Ok(())
        })?;
    }
    let disk = dir.join("spin.img");
    let len = fs::metadata(dir.join("spin.ko"))?.len();
    Ok(Module { disk, len })
}

/// Builds the module in `part` with the kernel's headers, which expect to lie in `/usr/src`.
fn build(part: &Path, headers: &str) -> Result<()> {
    let step = Step::begin("A kernel module that spins");
    let tree = part.join("tree");
    for package in [
        headers.to_owned(),
        archive::stands_for(headers, "linux-headers-")?,
        archive::stands_for(headers, "linux-kbuild-")?,
    ] {
        let deb = archive::download(&step, &package, &part.join("packages"))?;
        step.run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&tree))?;
    }
    let makefile = tree.join("usr/src").join(headers).join("Makefile");
    let text =
        fs::read_to_string(&makefile).with_context(|| format!("Cannot read {}", makefile.display()))?;
    let moved = text.replace("/usr/src/", &format!("{}/usr/src/", tree.display()));
    fs::write(&makefile, moved)?;
    let source = part.join("module");
    fs::create_dir_all(&source)?;
    fs::write(source.join("spin.c"), SOURCE)?;
    fs::write(source.join("Makefile"), "obj-m := spin.o\n")?;
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(tree.join("usr/src").join(headers))
        .arg(format!("M={}", source.display()))
        .arg("modules");
    step.run(&mut make)?;
    let object = part.join("spin.ko");
    step.run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&object).arg(source.join("spin.ko")))?;
    let mut image = fs::read(&object)?;
    if !image.starts_with(b"\x7fELF") {
        bail!("{} is no module", object.display());
    }
    image.resize(image.len().next_multiple_of(4096), 0);
    fs::write(part.join("spin.img"), image)?;
    for dir in ["tree", "packages", "module"] {
        fs::remove_dir_all(part.join(dir))?;
    }
    step.end();
    Ok(())
}
