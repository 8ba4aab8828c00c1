//! The block device.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use wardian_backend::{Disk, DiskOptions, Format};
use wardian_memory::CodeListener;

use super::driver::{BUFFERS, Driver, EVENT_IDX, INDIRECT, NEEDS_RESET, Piece, RAM, memory, vector};

const MIB: u64 = 1 << 20;
const FLUSH: u64 = 1 << 9;
const IN: u32 = 0;
const OUT: u32 = 1;
const DO_FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// Where the header and the status byte of requests are.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

struct Setup {
    driver: Driver,
    path: PathBuf,
    _dir: TempDir,
}

fn open(path: &Path, format: Format, read_only: bool, queues: usize) -> Driver {
    let disk = Disk::open(&DiskOptions { path: path.to_owned(), format: Some(format), read_only }).unwrap();
    Driver::new(memory(), |mem, chip| crate::block(mem, chip, disk, queues, None).unwrap())
}

fn raw(features: u64) -> Setup {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk image.img");
    File::create(&path).unwrap().set_len(64 * MIB).unwrap();
    let mut driver = open(&path, Format::Raw, false, 2);
    driver.start(features);
    Setup { driver, path, _dir: dir }
}

fn pattern(len: u64, seed: u64) -> Vec<u8> {
    (0..len).map(|n| (n.wrapping_mul(2_654_435_761) >> 9) as u8 ^ seed as u8).collect()
}

impl Driver {
    fn header(&self, kind: u32, sector: u64) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.put(HEADER, &header);
        self.put(STATUS, &[0xaa]);
    }

    fn request_pieces(&self, kind: u32, sector: u64, data: &[Piece]) -> Vec<Piece> {
        self.header(kind, sector);
        let mut pieces = vec![(HEADER, 16, false)];
        pieces.extend(data);
        pieces.push((STATUS, 1, true));
        pieces
    }

    /// A request on queue 0; returns its status byte and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        let pieces = self.request_pieces(kind, sector, data);
        let len = self.run(0, &pieces);
        (self.get(STATUS, 1)[0], len)
    }

    /// Discard or write-zeroes with these segments.
    fn segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, count, flags) in segments {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.put(DATA, &bytes);
        self.request(kind, 0, &[(DATA, bytes.len() as u32, false)]).0
    }
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    let Setup { mut driver, path, _dir } = raw(FLUSH);
    assert_eq!(driver.read(4, 0, 8), 64 * MIB / 512, "capacity");
    assert_eq!(driver.read(4, 20, 4), 512, "blk_size");
    assert_eq!(driver.read(4, 34, 2), 2, "num_queues");
    let data = pattern(10 * 512, 1);
    driver.put(DATA, &data);
    let pieces =
        [(DATA, 3000, false), (DATA + 3000, 8 * 512 - 3000, false), (DATA + 8 * 512, 2 * 512, false)];
    assert_eq!(driver.request(OUT, 7, &pieces), (OK, 1));
    assert_eq!(driver.request(DO_FLUSH, 0, &[]), (OK, 1));
    let mut file = vec![0; data.len()];
    File::open(&path).unwrap().read_exact_at(&mut file, 7 * 512).unwrap();
    assert_eq!(file, data);
    assert_eq!(
        driver.request(IN, 7, &[(DATA + MIB, 512, true), (DATA + 2 * MIB, 9 * 512, true)]),
        (OK, 10 * 512 + 1)
    );
    assert_eq!(driver.get(DATA + MIB, 512), data[..512]);
    assert_eq!(driver.get(DATA + 2 * MIB, 9 * 512), data[512..]);
    assert_eq!(driver.request(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(driver.get(DATA, 20), b"disk_image.img\0\0\0\0\0\0");
}

#[test]
fn queues_work_side_by_side() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH | EVENT_IDX | INDIRECT);
    for queue in [0, 1] {
        let pieces = driver.request_pieces(OUT, 100 + queue as u64, &[(DATA, 512, false)]);
        driver.put(DATA, &pattern(512, queue as u64));
        assert_eq!(driver.run(queue, &pieces), 1);
        assert_eq!(driver.get(STATUS, 1), [OK]);
    }
    assert_eq!(driver.request(IN, 100, &[(DATA, 1024, true)]), (OK, 1025));
    assert_eq!(driver.get(DATA, 1024), [pattern(512, 0), pattern(512, 1)].concat());
}

#[test]
fn discard_punches_holes_and_zeroes_are_zeroes() {
    let Setup { mut driver, path, _dir } = raw(FLUSH | 1 << 13 | 1 << 14);
    driver.put(DATA, &pattern(4 * MIB, 3));
    for n in 0..4 {
        assert_eq!(driver.request(OUT, n * 4 * MIB / 512, &[(DATA, 4 << 20, false)]).0, OK);
    }
    assert_eq!(driver.request(DO_FLUSH, 0, &[]).0, OK);
    let blocks = || std::fs::metadata(&path).unwrap().blocks();
    let before = blocks();
    let per_mib = (MIB / 512) as u32;
    assert_eq!(driver.segments(DISCARD, &[(0, 4 * per_mib, 0), (8 * MIB / 512, 4 * per_mib, 0)]), OK);
    let freed = (before - blocks()) * 512;
    assert!((8 * MIB - 65536..=8 * MIB).contains(&freed), "{freed} bytes came back");
    assert_eq!(
        driver.segments(WRITE_ZEROES, &[(4 * MIB / 512, per_mib, 0), (5 * MIB / 512, per_mib, 1)]),
        OK
    );
    assert_eq!(driver.request(IN, 4 * MIB / 512, &[(DATA, 4 << 20, true)]).0, OK);
    let back = driver.get(DATA, 4 << 20);
    assert!(back[..2 << 20].iter().all(|byte| *byte == 0));
    assert!(back[2 << 20..] == pattern(4 * MIB, 3)[2 << 20..]);
}

#[test]
fn bad_segments_touch_nothing() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH | 1 << 13 | 1 << 14);
    let data = pattern(512, 9);
    driver.put(DATA + MIB, &data);
    assert_eq!(driver.request(OUT, 0, &[(DATA + MIB, 512, false)]).0, OK);
    assert_eq!((driver.read(4, 36, 4), driver.read(4, 40, 4)), (1 << 21, 32), "limits of a discard");
    type Row = (&'static [(u64, u32, u32)], u8);
    let table: [Row; 7] = [
        (&[], IOERR),
        (&[(0, 1, 0), (64 * MIB / 512 - 1, 2, 0)], IOERR),
        (&[(0, 1, 0), (u64::MAX, 1, 0)], IOERR),
        (&[(0, 1, 0), (u64::MAX / 512, u32::MAX, 0)], IOERR),
        (&[(0, (1 << 21) + 1, 0)], IOERR),
        (&[(0, 1, 0), (1, 1, 2)], UNSUPP),
        (&[(0, 1, 0); 33], IOERR),
    ];
    for (segments, status) in table {
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(driver.segments(kind, segments), status, "{kind} {segments:?}");
        }
    }
    assert_eq!(driver.segments(DISCARD, &[(0, 1, 1)]), UNSUPP, "a discard always unmaps");
    assert_eq!(driver.request(DISCARD, 0, &[(DATA, 17, false)]).0, IOERR);
    assert_eq!(driver.request(IN, 0, &[(DATA, 512, true)]).0, OK);
    assert_eq!(driver.get(DATA, 512), data);
}

#[test]
fn indirect_chains() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH | INDIRECT);
    let data = pattern(200 * 512, 4);
    driver.put(DATA, &data);
    let write: Vec<Piece> = (0..200).map(|n| (DATA + n * 512, 512, false)).collect();
    let pieces = driver.request_pieces(OUT, 5, &write);
    let head = driver.offer_indirect(0, BUFFERS + 0x40_0000, &pieces);
    driver.notify(0);
    assert_eq!(driver.finish(0), (head, 1));
    assert_eq!(driver.get(STATUS, 1), [OK]);
    assert_eq!(driver.request(IN, 5, &[(DATA + MIB, 200 * 512, true)]).0, OK);
    assert!(driver.get(DATA + MIB, data.len()) == data);
}

#[test]
fn event_index_keeps_both_sides_quiet() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH | EVENT_IDX);
    let queue = driver.queues[0];
    let pieces = driver.request_pieces(DO_FLUSH, 0, &[]);
    // The driver wants to hear of the tenth completion only.
    driver.put(queue.avail_at() + 4 + u64::from(queue.size) * 2, &9u16.to_le_bytes());
    for _ in 0..10 {
        driver.offer(0, &pieces);
    }
    driver.notify(0);
    driver.chip.wait(vector(0));
    assert_eq!(driver.used(0), 10);
    assert_eq!(driver.chip.count(), 0, "one interrupt for ten");
    // The device wants to hear of the eleventh request.
    let wanted = queue.used_at() + 4 + u64::from(queue.size) * 8;
    while driver.get16(wanted) != 10 {
        std::thread::yield_now();
    }
}

#[test]
fn flags_silence_interrupts_without_event_index() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH);
    let pieces = driver.request_pieces(DO_FLUSH, 0, &[]);
    driver.put(driver.queues[0].avail_at(), &1u16.to_le_bytes());
    driver.offer(0, &pieces);
    driver.notify(0);
    while driver.used(0) != 1 {
        std::thread::yield_now();
    }
    driver.take(0);
    driver.put(driver.queues[0].avail_at(), &0u16.to_le_bytes());
    driver.run(0, &pieces);
    assert_eq!(driver.chip.count(), 0, "the first one came without");
}

#[test]
fn bad_requests_are_answered() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH);
    let end = 64 * MIB / 512;
    let cases: [(u32, u64, &[Piece], u8); 13] = [
        (77, 0, &[], UNSUPP),
        (IN, 0, &[(DATA, 511, true)], IOERR),
        (IN, end, &[(DATA, 512, true)], IOERR),
        (IN, u64::MAX, &[(DATA, 512, true)], IOERR),
        (IN, u64::MAX / 512, &[(DATA, 512, true)], IOERR),
        (OUT, end - 1, &[(DATA, 1024, false)], IOERR),
        (OUT, 0, &[(DATA, 1, false)], IOERR),
        (IN, 0, &[(RAM - 256, 512, true)], IOERR),
        (IN, 0, &[(u64::MAX - 255, 512, true)], IOERR),
        (OUT, 0, &[(1 << 40, 512, false)], IOERR),
        (IN, 0, &[(DATA, 0xffff_fe00, true)], IOERR),
        (GET_ID, 0, &[], IOERR),
        (DISCARD, 0, &[(RAM, 16, false)], IOERR),
    ];
    for (kind, sector, data, status) in cases {
        assert_eq!(driver.request(kind, sector, data), (status, 1), "{kind} {sector:#x} {data:x?}");
    }
    // A short header, a header that is not RAM, something readable behind something writable.
    driver.header(IN, 0);
    for pieces in [
        &[(HEADER, 15, false), (STATUS, 1, true)][..],
        &[(RAM - 8, 16, false), (STATUS, 1, true)],
        &[(STATUS, 1, true)],
        &[(HEADER, 16, false), (STATUS, 1, true), (DATA, 512, false)],
    ] {
        driver.put(STATUS, &[0xaa]);
        assert_eq!(driver.run(0, pieces), 1);
        assert_eq!(driver.get(STATUS, 1), [IOERR], "{pieces:x?}");
    }
    // Nowhere to answer.
    driver.header(DO_FLUSH, 0);
    assert_eq!(driver.run(0, &[(HEADER, 16, false)]), 0);
    assert_eq!(driver.run(0, &[(HEADER, 16, false), (RAM, 1, true)]), 0);
    assert_eq!(driver.run(0, &[(HEADER, 16, false), (STATUS, 0, true)]), 0);
    assert_eq!(driver.status(), 15, "the device is well");
    assert_eq!(driver.request(IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn chains_that_loop_or_lead_nowhere_are_answered() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH | INDIRECT);
    let base = driver.queues[0].base;
    driver.header(DO_FLUSH, 0);
    let (next, write, indirect) = (1, 2, 4);
    let go = |driver: &mut Driver| {
        driver.offer_head(0, 0);
        driver.notify(0);
        driver.finish(0)
    };
    // 0 -> 1 -> 0: the second is writable, so the loop is also out of order; then one that is not.
    driver.descriptor(base, 0, HEADER, 16, next, 1);
    driver.descriptor(base, 1, STATUS, 1, next | write, 0);
    assert_eq!(go(&mut driver), (0, 1));
    assert_eq!(driver.get(STATUS, 1), [IOERR]);
    driver.put(STATUS, &[0xaa]);
    driver.descriptor(base, 1, STATUS, 1, next | write, 1);
    assert_eq!(go(&mut driver), (0, 1));
    assert_eq!(driver.get(STATUS, 1), [IOERR]);
    // A next that is not in the table.
    driver.put(STATUS, &[0xaa]);
    driver.descriptor(base, 1, STATUS, 1, next | write, 60_000);
    assert_eq!(go(&mut driver), (0, 1));
    assert_eq!(driver.get(STATUS, 1), [IOERR]);
    // An indirect table that is not RAM, not a multiple of 16, empty, or holds another indirect one.
    let table = BUFFERS + 0x40_0000;
    for (at, len) in [(RAM, 32), (u64::MAX - 15, 32), (table, 33), (table, 0), (table, 0xffff_fff0)] {
        driver.descriptor(base, 0, at, len, indirect, 0);
        assert_eq!(go(&mut driver), (0, 0), "{at:#x} {len}");
    }
    driver.descriptor(table, 0, HEADER, 16, next, 1);
    driver.descriptor(table, 1, table, 32, indirect | next, 1);
    driver.descriptor(base, 0, table, 32, indirect, 0);
    assert_eq!(go(&mut driver), (0, 0));
    // The longest table there can be, a loop in it, on one byte.
    for n in 0..2000 {
        driver.descriptor(table, n, STATUS, 1, next | write, (n + 1) % 2000);
    }
    driver.descriptor(base, 0, table, 65_535 * 16, indirect, 0);
    assert_eq!(go(&mut driver), (0, 1));
    assert_eq!(driver.status(), 15);
    assert_eq!(driver.request(IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_ring_that_makes_no_sense_needs_a_reset() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH);
    let pieces = driver.request_pieces(DO_FLUSH, 0, &[]);
    driver.offer(1, &pieces);
    // More requests than the ring has entries.
    driver.put(driver.queues[0].avail_at() + 2, &1000u16.to_le_bytes());
    driver.notify(0);
    driver.chip.wait(99);
    assert_eq!(driver.status(), 15 | NEEDS_RESET);
    driver.notify(1);
    driver.finish(1);
    driver.reset();
    driver.start(FLUSH);
    assert_eq!(driver.request(DO_FLUSH, 0, &[]), (OK, 1));
    // A head that is no descriptor.
    driver.offer_head(0, 64);
    driver.notify(0);
    driver.chip.wait(99);
    assert_eq!(driver.status(), 15 | NEEDS_RESET);
}

#[test]
fn random_rings_never_kill_the_device() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH | INDIRECT | EVENT_IDX);
    let mut seed = 7u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 24
    };
    for round in 0..60 {
        for index in 0..64 {
            let at = [DATA, HEADER, STATUS, RAM - 100, next()][(next() % 5) as usize] + next() % 4096;
            let len = [1, 16, 512, 4096, next() as u32][(next() % 5) as usize];
            driver.descriptor(driver.queues[0].base, index, at, len, next() as u16 & 7, next() as u16 % 70);
        }
        driver.header([IN, OUT, DO_FLUSH, GET_ID][round % 4], next() % 1000);
        for _ in 0..8 {
            driver.offer_head(0, next() as u16 % 66);
        }
        driver.notify(0);
        if round % 3 == 0 {
            driver.reset();
            driver.start(FLUSH | INDIRECT | EVENT_IDX);
        }
    }
    driver.reset();
    driver.start(FLUSH);
    assert_eq!(driver.request(IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_read_only_disk_says_so_and_stays_so() {
    let Setup { driver, path, _dir } = raw(FLUSH);
    drop(driver);
    let mut driver = open(&path, Format::Raw, true, 1);
    assert_eq!(driver.offered() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    driver.start(FLUSH | 1 << 5);
    assert_eq!(driver.request(OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(driver.segments(WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
    assert_eq!(driver.request(DO_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(driver.request(IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[derive(Default)]
struct Seen(Mutex<Vec<usize>>);
impl CodeListener for Seen {
    fn code_written(&self, page: usize, _granules: u64) {
        self.0.lock().unwrap().push(page);
    }
}

#[test]
fn code_caches_learn_of_what_the_disk_writes() {
    let Setup { mut driver, _dir, .. } = raw(FLUSH);
    let seen = Arc::new(Seen::default());
    driver.mem.set_code_listener(Arc::clone(&seen) as Arc<dyn CodeListener>);
    for page in [DATA / 4096, DATA / 4096 + 1, DATA / 4096 + 2] {
        driver.mem.mark_code(page as usize, 0x40..0x80);
    }
    assert_eq!(driver.request(OUT, 0, &[(DATA, 512, false)]).0, OK);
    assert_eq!(*seen.0.lock().unwrap(), [0usize; 0], "a disk write only reads memory");
    assert_eq!(driver.request(IN, 0, &[(DATA, 8192, true)]).0, OK);
    assert_eq!(*seen.0.lock().unwrap(), [DATA as usize / 4096, DATA as usize / 4096 + 1]);
}

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

#[test]
fn a_qcow2_disk_is_clean_after_power_off() {
    for leaked in [false, true] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("disk.qcow2");
        let name = path.to_str().unwrap();
        if qemu_img(&["create", "-q", "-f", "qcow2", name, "1G"]).is_none() {
            return;
        }
        let mut driver = open(&path, Format::Qcow2, false, 4);
        driver.start(FLUSH | 1 << 13 | 1 << 14);
        assert_eq!(driver.read(4, 0, 8), (1 << 30) / 512);
        driver.put(DATA, &pattern(MIB, 6));
        for n in 0..20 {
            assert_eq!(driver.request(OUT, n * 50_000, &[(DATA, 1 << 20, false)]).0, OK);
        }
        assert_eq!(driver.segments(DISCARD, &[(0, 2048, 0), (50_000, 1000, 0)]), OK);
        assert_eq!(driver.segments(WRITE_ZEROES, &[(100_000, 100, 0), (150_000, 2048, 1)]), OK);
        assert_eq!(driver.request(IN, 200_000, &[(DATA + 2 * MIB, 1 << 20, true)]).0, OK);
        assert!(driver.get(DATA + 2 * MIB, 1 << 20) == pattern(MIB, 6));
        if leaked {
            // Somebody forgets the device, but it was told to stop.
            driver.dev.stop();
            std::mem::forget(Arc::clone(&driver.dev));
        }
        drop(driver);
        let report = qemu_img(&["check", "-U", name]).unwrap();
        assert!(report.contains("No errors were found") && !report.contains("leaked"), "{report}");
    }
}
