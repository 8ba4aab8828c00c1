//! Devices that are saved and built anew, with requests under way.

use std::fs::File;
use std::path::Path;

use tempfile::TempDir;
use wardian_backend::{Disk, DiskOptions, Format, Output};

use super::driver::{BUFFERS, Driver, EVENT_IDX, memory, vector};
use crate::{OwnState, VirtioState};

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

fn disk(path: &Path, read_only: bool) -> Disk {
    Disk::open(&DiskOptions { path: path.to_owned(), format: Some(Format::Raw), read_only }).unwrap()
}

fn image(dir: &TempDir) -> std::path::PathBuf {
    let path = dir.path().join("one.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    path
}

/// Through the text that is kept.
fn written(state: &VirtioState) -> VirtioState {
    serde_json::from_slice(&serde_json::to_vec(state).unwrap()).unwrap()
}

impl Driver {
    /// The same guest, memory and driver included, on the device that is made from what was saved of this one's.
    fn woken(self, state: &VirtioState, path: &Path) -> Driver {
        let Driver { mem, chip, dev, queues, structures, window, msix, .. } = self;
        drop(dev);
        let queue_count = queues.len();
        let made = crate::block(&mem, chip.clone(), disk(path, false), queue_count, Some(state)).unwrap();
        let mut driver = Driver::new(mem, |_, _| made);
        (driver.chip, driver.queues) = (chip, queues);
        assert_eq!((&driver.structures, driver.window, driver.msix), (&structures, window, msix));
        driver
    }

    fn ask(&mut self, kind: u32, sector: u64, data: (u64, u32, bool)) -> u16 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.put(HEADER, &header);
        self.put(STATUS, &[0xff]);
        self.offer(1, &[(HEADER, 16, false), data, (STATUS, 1, true)])
    }
}

#[test]
fn a_saved_disk_goes_on_and_looks_at_its_rings_unasked() {
    for features in [0, EVENT_IDX] {
        let dir = TempDir::new().unwrap();
        let path = image(&dir);
        let mut driver =
            Driver::new(memory(), |mem, chip| crate::block(mem, chip, disk(&path, false), 2, None).unwrap());
        driver.start(features);
        driver.put(DATA, &[0x5a; 512]);
        driver.ask(1, 3, (DATA, 512, false));
        driver.notify(1);
        driver.finish(1);
        driver.dev.pause();
        // The driver has made a request, and its notification is lost with the machine.
        let head = driver.ask(0, 3, (DATA + 0x1000, 512, true));
        let state = driver.dev.save();
        assert_eq!(state.queues[1].position, Some((1, 1)));
        assert_eq!(written(&state), state);
        let mut driver = driver.woken(&state, &path);
        assert_eq!(driver.status(), 15);
        assert_eq!(driver.dev.save(), state, "a restored device is saved as the same");
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!((driver.used(1), driver.chip.count()), (0, 0), "paused, whatever waits");
        driver.dev.resume();
        assert_eq!(driver.finish(1).0, head);
        assert_eq!(driver.get(DATA + 0x1000, 512), [0x5a; 512]);
        assert_eq!(driver.get(STATUS, 1), [0]);
        // And the other queue is alive, too.
        driver.put(DATA, &4u32.to_le_bytes());
        driver.run(0, &[(DATA, 16, false), (STATUS, 1, true)]);
    }
}

#[test]
fn the_name_that_a_disk_had_stays() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    let driver =
        Driver::new(memory(), |mem, chip| crate::block(mem, chip, disk(&path, false), 1, None).unwrap());
    driver.dev.pause();
    let state = driver.dev.save();
    let other = dir.path().join("another.img");
    drop(driver);
    std::fs::rename(&path, &other).unwrap();
    let mem = memory();
    let chip = std::sync::Arc::new(super::driver::Chip::default());
    let again = crate::block(&mem, chip, disk(&other, false), 1, Some(&state)).unwrap();
    assert!(matches!(again.save().own, OwnState::Block { id, .. } if id.starts_with(b"one.img")));
}

#[test]
fn masked_vectors_stay_pending() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    let mut driver =
        Driver::new(memory(), |mem, chip| crate::block(mem, chip, disk(&path, false), 2, None).unwrap());
    driver.start(0);
    driver.mask_vector(2, true);
    driver.ask(0, 0, (DATA, 512, true));
    driver.notify(1);
    while driver.used(1) == 0 {
        std::thread::yield_now();
    }
    driver.dev.pause();
    let state = driver.dev.save();
    assert_eq!(state.msix_pending, [2]);
    let driver = driver.woken(&state, &path);
    assert_eq!(driver.pending(), 4);
    driver.dev.resume();
    assert_eq!(driver.chip.count(), 0);
    driver.mask_vector(2, false);
    driver.chip.wait(vector(1));
}

#[test]
fn what_was_typed_is_not_lost() {
    let output = Output::new("none", std::io::sink()).unwrap();
    let mem = memory();
    let chip = std::sync::Arc::new(super::driver::Chip::default());
    let (device, input) = crate::console(&mem, chip.clone(), output.clone(), None).unwrap();
    input.push(b"make\r");
    device.pause();
    let state = written(&device.save());
    let mut input = None;
    let mut driver = Driver::new(memory(), |mem, chip| {
        let (device, typed) = crate::console(mem, chip, output.clone(), Some(&state)).unwrap();
        input = Some(typed);
        device
    });
    driver.dev.resume();
    driver.start(EVENT_IDX);
    assert_eq!(driver.run(0, &[(BUFFERS, 64, true)]), 5);
    assert_eq!(driver.get(BUFFERS, 5), b"make\r");
}

#[test]
fn a_state_of_something_else_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    let mut driver =
        Driver::new(memory(), |mem, chip| crate::block(mem, chip, disk(&path, false), 2, None).unwrap());
    driver.start(EVENT_IDX);
    driver.dev.pause();
    let good = driver.dev.save();
    drop(driver);
    let refused = |queues: usize, read_only: bool, change: &dyn Fn(&mut VirtioState)| {
        let mut state = good.clone();
        change(&mut state);
        let chip = std::sync::Arc::new(super::driver::Chip::default());
        let made = crate::block(&memory(), chip, disk(&path, read_only), queues, Some(&state));
        made.unwrap_err().to_string()
    };
    assert!(refused(1, false, &|_| ()).contains("has 2 queues"));
    assert!(refused(2, true, &|_| ()).contains("another device"));
    assert!(refused(2, false, &|s| s.device = "virtio-rng".into()).contains("virtio-rng"));
    assert!(refused(2, false, &|s| s.driver_features |= 1 << 40).contains("features 0x10000000000"));
    assert!(refused(2, false, &|s| s.config_vector = 9).contains("interrupt vector"));
    assert!(refused(2, false, &|s| s.msix_pending = vec![3]).contains("interrupt vector"));
    assert!(refused(2, false, &|s| s.queues[0].size = 3).contains("3 entries"));
    assert!(refused(2, false, &|s| s.queues[0].size = 512).contains("512 entries"));
    assert!(refused(2, false, &|s| s.queues[1].descriptors = u64::MAX - 15).contains("is no ring"));
    assert!(refused(2, false, &|s| s.config[2] ^= 1).contains("configuration space, at 0x2"));
    assert!(refused(2, false, &|s| s.config.truncate(64)).contains("another length"));
    assert!(refused(2, false, &|s| s.msix_table.clear()).contains("another length"));
    assert!(refused(2, false, &|s| s.own = OwnState::None).contains("another device"));
    // Any position is only a place to look at: a ring that makes no sense there breaks its queue, not us.
    let mut odd = good.clone();
    odd.queues[0].position = Some((7, 40_000));
    let chip = std::sync::Arc::new(super::driver::Chip::default());
    let device = crate::block(&memory(), chip, disk(&path, false), 2, Some(&odd)).unwrap();
    device.resume();
    device.stop();
}
