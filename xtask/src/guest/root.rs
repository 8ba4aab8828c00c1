//! The root disk: a small Debian in a raw ext4 image.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{archive, atomically, kernel, remove};
use crate::run::{Step, is_root, need, output, which};

/// What the guest has beside the smallest Debian.
const PACKAGES: &[&str] = &[
    "python3",
    "gcc",
    "gcc-multilib",
    "libc6-dev",
    "openssl",
    "sqlite3",
    "perl",
    "nodejs",
    "xz-utils",
    "procps",
    "kmod",
    "busybox-static",
    "less",
];
/// Size of the disk (sparse).
const SIZE: &str = "3G";
/// Process 1.
const INIT: &str = include_str!("init.sh");
/// `poweroff`, `reboot` and `halt`.
const POWEROFF: &str = include_str!("poweroff.sh");
/// A 32-bit program for the guest, linked statically.
const HELLO32: &str = "#include <stdio.h>\nint main(void) { printf(\"hello from %d bits\\n\", (int)sizeof(void *) * 8); \
                       return 0; }\n";

pub fn make(place: &Path, kernel: &kernel::Made, force: bool) -> Result<PathBuf> {
    let disk = place.join("root.img");
    let stamp_file = place.join("root.stamp");
    let stamp = format!("{}\n{}\n{INIT}{POWEROFF}", kernel.version, PACKAGES.join(" "));
    if !force && disk.is_file() && fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp) {
        return Ok(disk);
    }
    if !is_root() {
        bail!("Making the root disk needs root (debootstrap runs programs inside it): run this once as root");
    }
    need(&[("debootstrap", "debootstrap"), ("mke2fs", "e2fsprogs")])?;
    let codename = archive::codename()?;
    archive::know("python3", false)?;
    let mirror = archive::mirror(&codename)?;
    let tree = place.join("root.tree");
    let made = bootstrap(&tree, &codename, &mirror, kernel).and_then(|()| {
        remove(&stamp_file)?;
        atomically(&disk, |part| {
            let step = Step::begin("Root disk");
            step.run(
                Command::new(which("mke2fs").context("mke2fs is missing")?)
                    .args(["-q", "-t", "ext4", "-L", "wardian", "-m", "0", "-d"])
                    .arg(&tree)
                    .arg(part)
                    .arg(SIZE),
            )?;
            step.end();
            Ok(())
        })
    });
    clear(&tree)?;
    made?;
    fs::write(&stamp_file, &stamp)?;
    Ok(disk)
}

fn bootstrap(tree: &Path, codename: &str, mirror: &str, kernel: &kernel::Made) -> Result<()> {
    clear(tree)?;
    let step = Step::begin(format!("Debian {codename} root (some minutes)"));
    step.run(
        Command::new(which("debootstrap").context("debootstrap is missing")?)
            .args(["--variant=minbase", &format!("--include={}", PACKAGES.join(",")), codename])
            .arg(tree)
            .arg(mirror),
    )?;
    step.say("finishing");
    fs::write(tree.join("tmp/hello32.c"), HELLO32)?;
    step.run(Command::new(which("chroot").context("chroot is missing")?).arg(tree).args([
        "gcc",
        "-m32",
        "-O2",
        "-static",
        "-o",
        "/usr/local/bin/hello32",
        "/tmp/hello32.c",
    ]))?;
    fs::remove_file(tree.join("tmp/hello32.c"))?;
    let modules = tree.join("usr/lib/modules");
    fs::create_dir_all(&modules)?;
    step.run(
        Command::new("cp")
            .arg("-a")
            .arg(kernel.dir.join("modules/lib/modules").join(&kernel.version))
            .arg(modules),
    )?;
    program(&tree.join("usr/sbin/wardian-init"), INIT)?;
    for name in ["poweroff", "reboot", "halt"] {
        program(&tree.join("usr/sbin").join(name), POWEROFF)?;
    }
    fs::write(tree.join("etc/hostname"), "wardian\n")?;
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost wardian\n")?;
    for dir in ["var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"] {
        remove(&tree.join(dir))?;
        fs::create_dir_all(tree.join(dir))?;
    }
    step.end();
    Ok(())
}

/// Removes a root tree, after unmounting what a broken-off debootstrap may have left mounted in it.
fn clear(tree: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("Cannot read /proc/self/mounts")?;
    let mut inside: Vec<&Path> = mounts
        .lines()
        .filter_map(|l| l.split(' ').nth(1))
        .map(Path::new)
        .filter(|p| p.starts_with(tree))
        .collect();
    inside.sort();
    for point in inside.iter().rev() {
        output(Command::new("umount").arg(point))?;
    }
    remove(tree)
}

fn program(path: &Path, text: &str) -> Result<()> {
    remove(path)?;
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
