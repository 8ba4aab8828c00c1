//! The initial RAM disk: busybox, the drivers of the machine's disk and console, one script.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use cpio::newc::{self, Builder};

use crate::run::output;

/// First program.
const INIT: &str = include_str!("initramfs.sh");
/// Drivers, loaded in this order with what they need before them. Those that the kernel has built in, or
/// does not know, are left out.
const DRIVERS: [&str; 6] =
    ["virtio_pci", "virtio_console", "virtio_blk", "virtio_rng", "crc32c_generic", "ext4"];

/// What an existing initial RAM disk must have been made from to be current.
pub fn recipe() -> String {
    format!("{}\n{INIT}", DRIVERS.join(" "))
}

/// Writes the RAM disk for the modules in `modules` (a `lib/modules/<version>`) with `busybox`.
pub fn write(to: &Path, modules: &Path, busybox: &Path) -> Result<()> {
    let mut out = Archive { out: BufWriter::new(File::create(to)?), inode: 1 };
    for dir in ["bin", "dev", "proc", "sys", "root", "modules"] {
        out.add(dir, 0o040_755, (0, 0), &[])?;
    }
    out.add("dev/console", 0o020_600, (5, 1), &[])?;
    out.add("bin/busybox", 0o100_755, (0, 0), &fs::read(busybox)?)?;
    out.add("init", 0o100_755, (0, 0), INIT.as_bytes())?;
    let mut list = String::new();
    for (name, content) in self::modules(modules, &DRIVERS)? {
        out.add(&format!("modules/{name}"), 0o100_644, (0, 0), &content)?;
        list.push_str(&name);
        list.push('\n');
    }
    out.add("modules.list", 0o100_644, (0, 0), list.as_bytes())?;
    newc::trailer(out.out)?.flush()?;
    Ok(())
}

/// The modules `names` in `folder` (a `lib/modules/<version>`), uncompressed, each after those that it needs.
pub fn modules(folder: &Path, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let deps = fs::read_to_string(folder.join("modules.dep")).context("Cannot read modules.dep")?;
    load_order(&deps, names).iter().map(|path| module(&folder.join(path))).collect()
}

/// Name without compression suffix and uncompressed content of a module.
fn module(path: &Path) -> Result<(String, Vec<u8>)> {
    let name = path.file_name().and_then(|n| n.to_str()).context("A module without a name")?;
    for (suffix, program) in [(".xz", "xz"), (".zst", "zstd"), (".gz", "gzip")] {
        if let Some(plain) = name.strip_suffix(suffix) {
            let copy = path.with_file_name(format!("{plain}.plain"));
            output(
                Command::new("sh")
                    .args(["-c", "\"$1\" -dc <\"$2\" >\"$3\"", "sh", program])
                    .arg(path)
                    .arg(&copy),
            )?;
            let content = fs::read(&copy)?;
            fs::remove_file(copy)?;
            return Ok((plain.to_owned(), content));
        }
    }
    Ok((name.to_owned(), fs::read(path)?))
}

/// Module files for `drivers` by `modules.dep` (`file: needed, last first`), each after those it needs.
fn load_order(deps: &str, drivers: &[&str]) -> Vec<String> {
    let stem = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split(".ko").next().unwrap_or(file).replace('-', "_")
    };
    let mut order = Vec::new();
    let mut had = HashSet::new();
    for driver in drivers {
        let Some((path, needed)) =
            deps.lines().filter_map(|l| l.split_once(':')).find(|(path, _)| stem(path) == *driver)
        else {
            continue;
        };
        for file in needed.split_whitespace().rev().chain([path]) {
            if had.insert(file.to_owned()) {
                order.push(file.to_owned());
            }
        }
    }
    order
}

struct Archive {
    out: BufWriter<File>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        self.inode += 1;
        let mut file = Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .nlink(1)
            .rdev_major(device.0)
            .rdev_minor(device.1)
            .write(&mut self.out, u32::try_from(content.len())?);
        file.write_all(content)?;
        file.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::load_order;

    #[test]
    fn modules_come_after_what_they_need() {
        let deps = "kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko\n\
                    kernel/fs/jbd2/jbd2.ko:\nkernel/lib/crc16.ko:\n\
                    kernel/drivers/char/hw_random/virtio-rng.ko.xz: kernel/lib/crc16.ko\n";
        let order = load_order(deps, &["nowhere", "virtio_rng", "ext4"]);
        assert_eq!(
            order,
            [
                "kernel/lib/crc16.ko",
                "kernel/drivers/char/hw_random/virtio-rng.ko.xz",
                "kernel/fs/jbd2/jbd2.ko",
                "kernel/fs/ext4/ext4.ko"
            ]
        );
    }
}
