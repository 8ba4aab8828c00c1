use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use vm_memory::VolatileSlice;

use super::{Disk, DiskError, DiskOptions, Format};

const MIB: u64 = 1 << 20;

fn raw_file(dir: &TempDir, len: u64) -> PathBuf {
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

fn options(path: &Path, format: Option<Format>) -> DiskOptions {
    DiskOptions { path: path.to_owned(), format, read_only: false }
}

fn write(disk: &Disk, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    let mut copy = bytes.to_vec();
    let (front, back) = copy.split_at_mut(bytes.len() / 3);
    disk.write_at(offset, &[VolatileSlice::from(front), VolatileSlice::from(back)])
}

fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    let (front, back) = bytes.split_at_mut(len / 5);
    disk.read_at(offset, &[VolatileSlice::from(front), VolatileSlice::from(back)]).unwrap();
    bytes
}

fn pattern(len: u64, seed: u64) -> Vec<u8> {
    (0..len).map(|n| (n.wrapping_mul(2_654_435_761) >> 7) as u8 ^ seed as u8).collect()
}

/// The same story on any format: what a guest does between boot and power-off.
fn story(disk: &Disk) {
    let data = pattern(3 * MIB, 7);
    write(disk, 5 * 512, &data).unwrap();
    assert_eq!(read(disk, 5 * 512, data.len()), data);
    disk.write_zeroes(MIB, MIB, true).unwrap();
    disk.write_zeroes(2 * MIB + 512, 1024, false).unwrap();
    disk.flush().unwrap();
    let mut expect = vec![0; 4 * MIB as usize];
    expect[5 * 512..][..data.len()].copy_from_slice(&data);
    expect[MIB as usize..2 * MIB as usize].fill(0);
    expect[2 * MIB as usize + 512..][..1024].fill(0);
    assert!(read(disk, 0, expect.len()) == expect);
    let size = disk.size();
    assert!(write(disk, size - 512, &[1; 1024]).is_err());
    assert!(write(disk, u64::MAX - 511, &[1; 1024]).is_err());
    assert!(disk.discard(size - 512, 1024).is_err());
    assert!(disk.write_zeroes(u64::MAX, 2, true).is_err());
    write(disk, size - 1024, &[1; 1024]).unwrap();
    disk.discard(0, MIB).unwrap();
}

#[test]
fn raw_reads_what_was_written_and_discard_punches_holes() {
    let dir = TempDir::new().unwrap();
    let path = raw_file(&dir, 64 * MIB);
    let disk = Disk::open(&options(&path, Some(Format::Raw))).unwrap();
    story(&disk);
    let data = pattern(16 * MIB, 1);
    write(&disk, 16 * MIB, &data).unwrap();
    disk.flush().unwrap();
    let before = std::fs::metadata(&path).unwrap().blocks();
    disk.discard(20 * MIB, 8 * MIB).unwrap();
    let after = std::fs::metadata(&path).unwrap();
    // Up to a block of the file system's own that it may need to say so.
    let freed = (before - after.blocks()) * 512;
    assert!((8 * MIB - 65536..=8 * MIB).contains(&freed), "{freed} bytes came back");
    assert_eq!(after.len(), 64 * MIB);
    assert!(read(&disk, 20 * MIB, 8 * MIB as usize).iter().all(|byte| *byte == 0));
}

#[test]
fn more_slices_than_one_host_call_takes() {
    let dir = TempDir::new().unwrap();
    let path = raw_file(&dir, 4 * MIB);
    let disk = Disk::open(&options(&path, Some(Format::Raw))).unwrap();
    let mut data = pattern(2500 * 512, 3);
    let copy = data.clone();
    let slices: Vec<_> = data.chunks_mut(512).map(VolatileSlice::from).collect();
    disk.write_at(512, &slices).unwrap();
    assert!(read(&disk, 512, copy.len()) == copy);
    let mut back = vec![0; copy.len()];
    let slices: Vec<_> = back.chunks_mut(512).map(VolatileSlice::from).collect();
    disk.read_at(512, &slices).unwrap();
    assert!(back == copy);
}

#[test]
fn a_disk_in_use_is_refused_until_it_is_free() {
    let dir = TempDir::new().unwrap();
    let path = raw_file(&dir, MIB);
    let mut reader = options(&path, None);
    reader.read_only = true;
    let disk = Disk::open(&options(&path, None)).unwrap();
    for second in [&options(&path, None), &reader] {
        let error = Disk::open(second).unwrap_err();
        assert!(matches!(&error, DiskError::InUse(at) if *at == path), "{error}");
        assert!(error.to_string().contains("is in use"), "{error}");
    }
    drop(disk);
    let two_readers = [Disk::open(&reader).unwrap(), Disk::open(&reader).unwrap()];
    assert!(matches!(Disk::open(&options(&path, None)), Err(DiskError::InUse(_))));
    drop(two_readers);
    Disk::open(&options(&path, None)).unwrap();
}

#[test]
fn bad_disks_have_one_clear_error_each() {
    let dir = TempDir::new().unwrap();
    let open = |path: &Path, format| Disk::open(&options(path, format)).unwrap_err();
    assert!(matches!(open(&dir.path().join("none"), None), DiskError::Open { .. }));
    assert!(matches!(open(dir.path(), None), DiskError::Kind(_)));
    assert!(matches!(open(Path::new("/dev/null"), None), DiskError::Kind(_)));
    let path = raw_file(&dir, 511);
    assert!(matches!(open(&path, None), DiskError::Empty { size: 511, .. }));
    let path = raw_file(&dir, 4096);
    let error = open(&path, Some(Format::Qcow2));
    assert!(matches!(error, DiskError::Qcow2 { .. }), "{error}");
    std::fs::write(&path, b"QFI\xfb and then nothing that makes sense").unwrap();
    assert!(matches!(open(&path, None), DiskError::Qcow2 { .. }));
    assert!(matches!("vhdx".parse::<Format>(), Err(DiskError::UnknownFormat(_))));
}

#[test]
fn odd_sizes_are_rounded_down() {
    let dir = TempDir::new().unwrap();
    let path = raw_file(&dir, 1000);
    let disk = Disk::open(&options(&path, None)).unwrap();
    assert_eq!((disk.size(), disk.format()), (512, Format::Raw));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let dir = TempDir::new().unwrap();
    let path = raw_file(&dir, MIB);
    let disk = Disk::open(&DiskOptions { path, format: None, read_only: true }).unwrap();
    assert!(write(&disk, 0, &[1; 512]).is_err());
    assert!(disk.discard(0, 512).is_err());
    assert!(disk.write_zeroes(0, 512, true).is_err());
    disk.flush().unwrap();
    assert_eq!(read(&disk, 0, 512), [0; 512]);
}

#[test]
fn a_guest_cannot_turn_a_guessed_raw_disk_into_qcow2() {
    let dir = TempDir::new().unwrap();
    let path = raw_file(&dir, MIB);
    let mut sector = pattern(1024, 9);
    sector[..4].copy_from_slice(b"QFI\xfb");
    let disk = Disk::open(&options(&path, None)).unwrap();
    assert!(write(&disk, 0, &sector).is_err());
    assert_eq!(read(&disk, 0, 1024), [0; 1024]);
    sector[0] = b'q';
    write(&disk, 0, &sector).unwrap();
    assert_eq!(read(&disk, 0, 1024), sector);
    drop(disk);
    sector[0] = b'Q';
    let disk = Disk::open(&options(&path, Some(Format::Raw))).unwrap();
    write(&disk, 0, &sector).unwrap();
    drop(disk);
    let disk = Disk::open(&options(&path, Some(Format::Raw))).unwrap();
    assert_eq!((disk.format(), disk.size()), (Format::Raw, MIB), "declared raw stays raw");
}

/// Runs `qemu-img`; `None` (and a word on why) if it is not installed.
fn qemu_img(arguments: &[&str]) -> Option<String> {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
            Some(text)
        }
        Err(error) => {
            eprintln!("skipped, because qemu-img cannot be run: {error}");
            None
        }
    }
}

fn qcow2_file(dir: &TempDir, more: &[&str]) -> Option<PathBuf> {
    let path = dir.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&[&["create", "-q", "-f", "qcow2"], more, &[name, "64M"]].concat())?;
    Some(path)
}

#[test]
fn qcow2_is_clean_and_equal_after_the_story() {
    for more in [&[][..], &["-o", "compat=0.10"], &["-o", "cluster_size=4096,lazy_refcounts=on"]] {
        let dir = TempDir::new().unwrap();
        let Some(path) = qcow2_file(&dir, more) else { return };
        let disk = Disk::open(&options(&path, None)).unwrap();
        assert_eq!((disk.format(), disk.size()), (Format::Qcow2, 64 * MIB));
        assert!(matches!(Disk::open(&options(&path, None)), Err(DiskError::InUse(_))));
        story(&disk);
        let tail = read(&disk, 2 * MIB, 62 * MIB as usize);
        drop(disk);
        let name = path.to_str().unwrap();
        let report = qemu_img(&["check", name]).unwrap();
        assert!(report.contains("No errors were found"), "{report}");
        assert!(!report.contains("leaked"), "{report}");
        let converted = dir.path().join("back.img");
        qemu_img(&["convert", "-O", "raw", name, converted.to_str().unwrap()]).unwrap();
        let mut other = vec![0; tail.len()];
        File::open(&converted).unwrap().read_exact_at(&mut other, 2 * MIB).unwrap();
        assert!(other == tail, "qemu-img reads what we read");
    }
}

#[test]
fn qcow2_discard_frees_clusters() {
    let dir = TempDir::new().unwrap();
    let Some(path) = qcow2_file(&dir, &[]) else { return };
    let disk = Disk::open(&options(&path, None)).unwrap();
    write(&disk, 0, &pattern(16 * MIB, 1)).unwrap();
    disk.flush().unwrap();
    let allocated = || {
        let report = qemu_img(&["map", "-U", path.to_str().unwrap()]).unwrap();
        report
            .lines()
            .skip(1)
            .map(|line| {
                let len = line.split_whitespace().nth(1).unwrap_or("0").trim_start_matches("0x");
                u64::from_str_radix(len, 16).unwrap()
            })
            .sum::<u64>()
    };
    assert_eq!(allocated(), 16 * MIB);
    let before = std::fs::metadata(&path).unwrap().len();
    disk.discard(4 * MIB, 8 * MIB).unwrap();
    disk.flush().unwrap();
    assert_eq!(allocated(), 8 * MIB);
    write(&disk, 32 * MIB, &pattern(8 * MIB, 2)).unwrap();
    disk.flush().unwrap();
    assert_eq!(allocated(), 16 * MIB);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), before, "freed clusters are used again");
    drop(disk);
    let report = qemu_img(&["check", path.to_str().unwrap()]).unwrap();
    assert!(report.contains("No errors were found") && !report.contains("leaked"), "{report}");
}

#[test]
fn qcow2_over_a_backing_file_leaves_it_alone() {
    let dir = TempDir::new().unwrap();
    let base = raw_file(&dir, 64 * MIB);
    let data = pattern(MIB, 5);
    File::options().write(true).open(&base).unwrap().write_all_at(&data, 0).unwrap();
    let Some(path) = qcow2_file(&dir, &["-b", "disk.img", "-F", "raw"]) else { return };
    let disk = Disk::open(&options(&path, Some(Format::Qcow2))).unwrap();
    assert!(read(&disk, 0, data.len()) == data);
    write(&disk, 512, &[3; 512]).unwrap();
    disk.write_zeroes(128 << 10, 64 << 10, true).unwrap();
    assert_eq!(read(&disk, 0, 512), data[..512]);
    assert_eq!(read(&disk, 512, 512), [3; 512]);
    assert_eq!(read(&disk, 1024, 512), data[1024..1536]);
    assert!(read(&disk, 128 << 10, 64 << 10).iter().all(|byte| *byte == 0));
    drop(disk);
    assert!(std::fs::read(&base).unwrap()[..data.len()] == data);
    assert!(qemu_img(&["check", path.to_str().unwrap()]).unwrap().contains("No errors"));
}

#[test]
fn four_threads_on_one_qcow2() {
    let dir = TempDir::new().unwrap();
    let Some(path) = qcow2_file(&dir, &[]) else { return };
    let disk = Disk::open(&options(&path, None)).unwrap();
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                for n in 0..40 {
                    let (at, len) = (worker * 16 * MIB + n * 300 * 512, 200 * 512);
                    write(disk, at, &pattern(len, worker + n)).unwrap();
                    assert!(read(disk, at, len as usize) == pattern(len, worker + n));
                    if n % 8 == 3 {
                        disk.discard(at, len).unwrap();
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    drop(disk);
    let report = qemu_img(&["check", path.to_str().unwrap()]).unwrap();
    assert!(report.contains("No errors were found") && !report.contains("leaked"), "{report}");
}

#[test]
fn an_overlay_reads_as_what_is_below_and_leaves_it_alone() {
    let dir = TempDir::new().unwrap();
    let path = raw_file(&dir, 4 * MIB);
    let disk = Disk::open(&options(&path, Some(Format::Raw))).unwrap();
    let data = pattern(MIB, 3);
    write(&disk, MIB, &data).unwrap();
    disk.flush().unwrap();
    let over = dir.path().join("over.qcow2");
    disk.create_overlay(&over).unwrap();
    assert!(disk.create_overlay(&over).is_err(), "it is there already");
    drop(disk);
    let overlay = Disk::open(&options(&over, None)).unwrap();
    assert_eq!((overlay.format(), overlay.size()), (Format::Qcow2, 4 * MIB));
    assert!(read(&overlay, MIB, data.len()) == data);
    write(&overlay, MIB + 4096, &[0xaa; 8192]).unwrap();
    overlay.flush().unwrap();
    // An overlay over an overlay.
    let top = dir.path().join("top.qcow2");
    overlay.create_overlay(&top).unwrap();
    drop(overlay);
    let top = Disk::open(&options(&top, None)).unwrap();
    assert_eq!(read(&top, MIB + 4096, 8192), [0xaa; 8192]);
    assert!(read(&top, MIB, 4096) == data[..4096]);
    let disk = Disk::open(&options(&path, Some(Format::Raw))).unwrap();
    assert!(read(&disk, MIB, data.len()) == data);
}
