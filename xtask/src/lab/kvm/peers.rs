//! QEMU, as this machine has it, to be run inside the lab: program, libraries, firmware.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::run::{output, which};

/// What QEMU's `pc` and `microvm` machines load.
const FIRMWARE: [&str; 6] =
    ["bios-256k.bin", "bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin", "qboot.rom"];
const PLACES: [&str; 3] = ["/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu"];

/// Copies all of it to the folder `to`.
///
/// # Errors
/// When the program is not there.
pub fn copy(to: &Path) -> Result<()> {
    fs::create_dir_all(to.join("lib"))?;
    let program = which("qemu-system-x86_64").context("qemu-system-x86_64 is missing")?;
    fs::copy(&program, to.join("qemu"))?;
    // A row: "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x...)", and the loader alone.
    let libraries = output(Command::new("ldd").arg(&program))?;
    for word in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let path = PathBuf::from(word);
        let name = path.file_name().context("A library without a name")?;
        fs::copy(&path, to.join("lib").join(name)).with_context(|| format!("Cannot copy {word}"))?;
    }
    for name in FIRMWARE {
        if let Some(found) =
            PLACES.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file())
        {
            fs::copy(&found, to.join(name)).with_context(|| format!("Cannot copy {}", found.display()))?;
        }
    }
    Ok(())
}
