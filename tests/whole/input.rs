//! Bad input, beside what the command line's own tests refuse: stock kernels and the memory they need.

use std::fs;
use std::path::Path;

use wardian_tests::{Debian, Ended, Kernel, Run};

use crate::or_skip;

/// Runs what must be refused: status, one message that contains `want`, nothing else, nothing created.
fn refused(run: &Run, want: &str, place: &Path) {
    let names = || {
        let entries = fs::read_dir(place).expect("a folder");
        let mut names: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let ended = run.run();
    assert_eq!((ended.code(), ended.serial.as_str()), (Some(2), ""));
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "one message: {lines:?}");
    assert!(lines[0].starts_with("wardian: ") && lines[0].contains(want), "{want:?}: {lines:?}");
    assert_eq!(names(), before, "nothing is created");
}

#[test]
fn stock_kernels_that_are_cut_or_do_not_fit() {
    let guest = or_skip!(Debian::shell(Kernel::Cloud));
    let elf = or_skip!(Debian::shell(Kernel::CloudElf)).kernel_image().to_owned();
    let place = tempfile::tempdir().expect("a folder");
    let path = |name: &str| place.path().join(name);
    let out = format!("file:{}", path("serial").display());
    let run = |kernel: &Path, more: &[&str]| {
        Run::default()
            .limit(60)
            .args(["--kernel".as_ref(), kernel.as_os_str()])
            .args(["--serial", &out])
            .args(more)
    };
    let image = fs::read(guest.kernel_image()).expect("the kernel");
    for (name, len) in
        [("head", 600), ("setup", 3000), ("half", image.len() / 2), ("almost", image.len() - 4096)]
    {
        fs::write(path(name), &image[..len]).expect("a file");
        refused(&run(&path(name), &[]), "truncated", place.path());
    }
    let mut arm = fs::read(&elf).expect("the kernel");
    fs::write(path("elf-half"), &arm[..arm.len() / 2]).expect("a file");
    refused(&run(&path("elf-half"), &[]), "truncated", place.path());
    arm[18..20].copy_from_slice(&183u16.to_le_bytes());
    fs::write(path("aarch64"), &arm[..1 << 20]).expect("a file");
    refused(&run(&path("aarch64"), &[]), "aarch64 is a kernel for", place.path());

    for kernel in [guest.kernel_image(), &elf] {
        refused(&run(kernel, &["--memory", "16M"]), "memory", place.path());
    }
    let initrd = path("initrd");
    fs::File::create(&initrd).and_then(|file| file.set_len(200 << 20)).expect("a file");
    let initrd = initrd.to_str().expect("UTF-8");
    for kernel in [guest.kernel_image(), &elf] {
        refused(&run(kernel, &["--memory", "128M", "--initrd", initrd]), "fit", place.path());
    }
    let long = "x".repeat(5000);
    refused(&run(guest.kernel_image(), &["--cmdline", &long]), "ommand line", place.path());
}

#[test]
fn disk_that_may_not_be_read() {
    let guest = or_skip!(Debian::shell(Kernel::Cloud));
    let place = tempfile::tempdir().expect("a folder");
    let run = Run::default().args(["--kernel".as_ref(), guest.kernel_image().as_os_str()]);
    for (disk, want) in [
        ("/proc/self/mem/none", "Could not open"),
        ("/dev/null", "neither a file nor"),
        ("/dev/tty", "neither a file nor"),
    ] {
        refused(&run.clone().args(["--disk", disk]), want, place.path());
    }
}

#[test]
fn kernel_without_its_root_disk_panics_in_the_open() {
    // The machine is good, the guest is not: its own words are on the console and the reset has its status.
    let guest = or_skip!(Debian::shell(Kernel::Cloud));
    let run = Run::default().args(["--kernel".as_ref(), guest.kernel_image().as_os_str()]);
    let run = run.args([
        "--no-reboot",
        "--serial",
        "stdio",
        "--cmdline",
        "console=ttyS0 panic=-1 root=/dev/nowhere",
    ]);
    let ended: Ended = run.run();
    assert!(ended.serial.contains("Kernel panic - not syncing: VFS: Unable to mount root fs"));
    assert_eq!(ended.code(), Some(4));
}
