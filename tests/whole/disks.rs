//! What is written stays; what is discarded is given back; what is read-only or in use is left alone.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use wardian_tests::{Debian, Ended, Kernel, Run, has, output, section};

use crate::or_skip;

/// (Without lazy initialization: its thread would still write when the power-off takes the device away, and Linux would
/// report that.)
const FILL: &str = r#"
set -e
mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 /dev/vdb
mount /dev/vdb /mnt
cd /mnt
cp -r /usr/lib/python3.*/json /usr/lib/python3.*/email .
seq 1 300000 > numbers
head -c 30000000 /dev/urandom > random
dd if=/dev/zero of=holes bs=4k seek=5000 count=3 status=none
for i in $(seq 1 200); do echo "file $i" > "small$i"; done
rm small7 small77
find . -type f ! -name sums -print0 | sort -z | xargs -0 sha256sum > sums
echo "digest=$(sha256sum < sums)"
sync
"#;

const LOOK: &str = r#"
set -e
e2fsck -fn /dev/vdb
mount /dev/vdb /mnt
cd /mnt
sha256sum --quiet -c sums
echo "digest=$(sha256sum < sums)"
rm random numbers
sync
fstrim -v /mnt
cd /
umount /mnt
e2fsck -fn /dev/vdb
"#;

struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().expect("a folder for disks"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A raw file of zeros that takes no space.
    fn raw(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).and_then(|file| file.set_len(size)).expect("a disk");
        path
    }
}

fn run(script: &str, disk: &str) -> Result<Ended, String> {
    let guest = Debian::script(Kernel::Cloud, script)?;
    Ok(guest.args(&["--cpus", "2", "--memory", "512M"]).disk(disk).run())
}

fn bytes(path: &Path) -> u64 {
    fs::metadata(path).expect("the disk is there").blocks() * 512
}

/// Fills the disk in one machine and looks in the next; how many bytes the file gave back by the trim.
fn survives(disk: &str, path: &Path) -> Result<u64, String> {
    let first = run(FILL, disk)?;
    let full = bytes(path);
    assert!(full > 30_000_000, "what was written is in the file: {full}");
    let second = run(LOOK, disk)?;
    assert_eq!(first.value("digest"), second.value("digest"));
    Ok(full.saturating_sub(bytes(path)))
}

fn qemu_img(args: &[&str], path: &Path) -> Result<String, String> {
    output(Command::new("qemu-img").args(args).arg(path))
}

#[test]
fn raw_disk_survives_and_gives_space_back() {
    let place = Place::new();
    let path = place.raw("disk.raw", 256 << 20);
    let freed = or_skip!(survives(&format!("{},format=raw", path.display()), &path));
    assert!(freed > 30_000_000, "trim punches holes: {freed} bytes");
    let script = "blkdiscard -f /dev/vdb && cmp -n 1000000 /dev/vdb /dev/zero && echo \"size=$(blockdev --getsize64 /dev/vdb)\"";
    let ended = or_skip!(run(script, &format!("{},format=raw", path.display())));
    assert_eq!(ended.value("size"), (256 << 20).to_string());
    assert!(bytes(&path) < 100_000, "a whole discarded disk takes no space: {}", bytes(&path));
}

#[test]
fn qcow2_disk_survives_and_stays_clean() {
    if !has("qemu-img") {
        return wardian_tests::skip("qemu-img is not installed");
    }
    let place = Place::new();
    let path = place.path("disk.qcow2");
    output(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("256M"))
        .expect("qemu-img");
    let freed = or_skip!(survives(path.to_str().expect("UTF-8"), &path));
    println!("{freed} bytes were given back by the qcow2 file");
    qemu_img(&["check", "-f", "qcow2"], &path).expect("clean");
    // Another reader sees the same file system.
    let raw = place.path("copy.raw");
    output(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&path).arg(&raw)).expect("qemu-img");
    let script = "set -e\ne2fsck -fn /dev/vdb\nmount -o ro /dev/vdb /mnt\ncd /mnt\ngrep -v -e random -e numbers sums | sha256sum --quiet -c -";
    drop(or_skip!(run(script, &format!("{},readonly", raw.display()))));
}

#[test]
fn root_disk_in_an_overlay_keeps_what_is_written() {
    if !has("qemu-img") {
        return wardian_tests::skip("qemu-img is not installed");
    }
    let guest = or_skip!(Debian::script(
        Kernel::Cloud,
        "set -e\nmount | grep ' / '\npython3 -c 'print(open(\"/etc/hostname\").read() * 1000)' > /root/here\nsync"
    ));
    let (place, base) = (Place::new(), guest.root_image());
    let before = fs::metadata(&base).expect("the root disk").mtime();
    let path = place.path("root.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&base).arg(&path);
    output(&mut create).expect("qemu-img");
    let first = guest.root(path.to_str().expect("UTF-8")).run();
    assert!(first.serial.contains("(rw,"), "the root disk is mounted for writing");
    let look = or_skip!(Debian::script(
        Kernel::Cloud,
        "echo \"lines=$(grep -c wardian /root/here)\"\ndmesg | grep EXT4"
    ));
    let second = look.root(path.to_str().expect("UTF-8")).run();
    assert_eq!(second.value("lines"), "1000");
    assert!(!second.serial.contains("recovery"), "the file system was left clean");
    qemu_img(&["check", "-f", "qcow2"], &path).expect("clean");
    assert_eq!(fs::metadata(&base).expect("the root disk").mtime(), before, "the base is not touched");
}

#[test]
fn read_only_disk_refuses_writes() {
    let place = Place::new();
    let path = place.raw("disk", 8 << 20);
    fs::write(&path, vec![0x5a; 8 << 20]).expect("a disk");
    let script = r#"
echo "readonly=$(cat /sys/block/vdb/ro)"
dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync 2>&1 && exit 1
blkdiscard -f /dev/vdb 2>&1 && exit 1
blockdev --setrw /dev/vdb
dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct 2>&1 && exit 1
echo "byte=$(head -c 1 /dev/vdb)"
exit 0
"#;
    let guest = or_skip!(Debian::script(Kernel::Cloud, script));
    let ended = guest.disk(&format!("{},readonly", path.display())).build().run();
    assert_eq!((ended.value("readonly"), ended.value("byte"), ended.code()), ("1", "Z", Some(0)));
    assert_eq!(fs::read(&path).expect("the disk"), vec![0x5a; 8 << 20]);
}

#[test]
fn several_disks_at_once() {
    let place = Place::new();
    let mut guest = or_skip!(Debian::script(
        Kernel::Cloud,
        r#"
set -e
for disk in b c d e; do
    (for n in 1 2 3; do head -c 4000000 /dev/urandom | tee /tmp/$disk$n | dd of=/dev/vd$disk bs=1M seek=$((n * 8)) conv=fsync status=none; done) &
done
wait
echo 3 > /proc/sys/vm/drop_caches
for disk in b c d e; do for n in 1 2 3; do
    dd if=/dev/vd$disk bs=1M skip=$((n * 8)) count=4 status=none | head -c 4000000 | cmp - /tmp/$disk$n
done; done
dd if=/dev/vdb of=/dev/null bs=512 count=2000 iflag=direct status=none
echo "disks=$(ls -d /sys/block/vd* | wc -l)"
echo "@@ interrupts"
grep virtio /proc/interrupts"#
    ));
    for name in ["b", "c", "d", "e"] {
        let path = place.raw(name, 64 << 20);
        guest = guest.disk(&format!("{},format=raw", path.display()));
    }
    let ended = guest.args(&["--cpus", "2"]).run();
    assert_eq!(ended.value("disks"), "5");
    assert!(section(&ended.serial, "interrupts").contains("virtio4-req.1"));
}

#[test]
fn disk_in_use_is_refused() {
    let place = Place::new();
    let path = place.raw("disk", 8 << 20);
    let disk = format!("{},format=raw", path.display());
    let guest =
        or_skip!(Debian::script(Kernel::Cloud, "echo here; read line; head -c 5 /dev/vdb | tr '\\0' 0"));
    let kernel = guest.kernel_image().to_owned();
    let mut first = guest.disk(&disk).build().start();
    first.wait_for("\nhere\n");
    for also in ["", ",readonly"] {
        let second = Run::default()
            .args(["--kernel".as_ref(), kernel.as_os_str()])
            .args(["--disk", &format!("{disk}{also}")])
            .run();
        assert_eq!((second.code(), second.serial.as_str()), (Some(2), ""));
        let lines: Vec<&str> = second.stderr.lines().collect();
        assert!(lines.len() == 1 && lines[0].contains("in use"), "one message: {lines:?}");
    }
    first.type_text("\n");
    let ended = first.end();
    assert!(ended.serial.contains("00000"), "the first machine goes on");
    assert_eq!(ended.code(), Some(0));
}
