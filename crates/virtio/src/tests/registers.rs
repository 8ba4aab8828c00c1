//! Registers, negotiation, resets and pauses, on a device that does as it is told.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use wardian_bus::pci::Function;
use wardian_memory::GuestMemory;

use super::driver::{BUFFERS, Driver, EVENT_IDX, INDIRECT, NEEDS_RESET, VERSION_1, memory, vector};
use crate::worker::NO_VECTOR;
use crate::{Chain, PciTransport, VirtioDevice};

/// Says when it begins a request, and ends it when it may.
struct Slow {
    begun: SyncSender<u64>,
    go: Mutex<Receiver<()>>,
}

impl VirtioDevice for Slow {
    fn name(&self) -> &str {
        "virtio-slow"
    }
    fn device_type(&self) -> u16 {
        4
    }
    fn class(&self) -> u32 {
        0x00_ff_00
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn config(&self) -> &[u8] {
        b"0123456789"
    }
    fn handle(&self, _queue: usize, _features: u64, mem: &GuestMemory, chain: Chain) -> u32 {
        self.begun.send(chain.writable.len()).unwrap();
        let _ = self.go.lock().unwrap().recv();
        chain.writable.write(mem, b"done") as u32
    }
}

fn slow() -> (Driver, Receiver<u64>, SyncSender<()>) {
    let (begun, wait) = sync_channel(16);
    let (go, told) = sync_channel(16);
    let device = Arc::new(Slow { begun, go: Mutex::new(told) });
    let driver = Driver::new(memory(), |mem, chip| PciTransport::start(mem, chip, device).unwrap());
    (driver, wait, go)
}

#[test]
fn identity_and_structures() {
    let (driver, _begun, _go) = slow();
    assert_eq!(driver.config(0, 4), 0x1044_1af4);
    assert_eq!(driver.config(8, 4), 0x00ff_0001);
    assert_eq!(driver.structures.keys().copied().collect::<Vec<u8>>(), [1, 2, 3, 4, 5]);
    assert_eq!(driver.dev.bar_sizes(), [(0, 0x8000)]);
    assert_eq!(driver.read(4, 3, 4), u64::from(u32::from_le_bytes(*b"3456")));
    assert_eq!(driver.read(4, 8, 4), u64::from(u16::from_le_bytes(*b"89")), "zeros behind it");
    driver.write(4, 0, 4, 0);
    assert_eq!(driver.read(4, 0, 1), u64::from(b'0'));
    assert_eq!(driver.offered(), VERSION_1 | EVENT_IDX | INDIRECT | 1 << 5);
    driver.write(1, 0, 4, 2);
    assert_eq!(driver.read(1, 4, 4), 0, "no third half");
}

#[test]
fn features_must_be_offered_and_modern() {
    let (driver, _begun, _go) = slow();
    assert!(!driver.negotiate(1 << 5), "a legacy driver");
    driver.reset();
    assert!(!driver.negotiate(VERSION_1 | 1 << 40), "never offered");
    driver.reset();
    assert!(driver.negotiate(VERSION_1 | 1 << 5));
    driver.write(1, 8, 4, 0);
    driver.write(1, 12, 4, 0);
    assert_eq!(driver.read(1, 12, 4), 1 << 5, "settled features stay");
}

#[test]
fn queue_registers_take_what_makes_sense() {
    let (driver, _begun, _go) = slow();
    assert!(driver.negotiate(VERSION_1));
    for (size, after) in [(0, 64), (128, 64), (48, 64), (16, 16)] {
        driver.write(1, 0x18, 2, size);
        assert_eq!(driver.read(1, 0x18, 2), after, "{size}");
    }
    driver.write(1, 0x1a, 2, 2);
    assert_eq!(driver.read(1, 0x1a, 2), u64::from(NO_VECTOR), "no such vector");
    driver.write(1, 0x20, 8, 0x1_2345_6780);
    driver.write(1, 0x24, 4, 0);
    assert_eq!(driver.read(1, 0x20, 8), 0x2345_6780);
    driver.write(1, 0x16, 2, 1);
    assert_eq!(driver.read(1, 0x18, 2), 0, "no such queue");
    driver.write(1, 0x1c, 2, 1);
    driver.write(1, 0x18, 2, 8);
    driver.write(2, 4, 2, 1);
    driver.write(2, 0xffc, 2, 1);
    assert_eq!(driver.status(), 11);
}

#[test]
fn a_ring_outside_of_memory_asks_for_a_reset() {
    for (at, address) in [(0x20, 1 << 40), (0x28, 0x7f_fffe), (0x30, !3), (0x20, 0x1_0008), (0x28, 0)] {
        let (mut driver, _begun, _go) = slow();
        assert!(driver.negotiate(VERSION_1));
        for (register, good) in [(0x20, 0x1_0000), (0x28, 0x1_1000), (0x30, 0x1_2000)] {
            driver.write(1, register, 8, good);
        }
        driver.write(1, at, 8, address);
        driver.write(1, 0x1c, 2, 1);
        driver.set_status(15);
        if at == 0x28 && address == 0 {
            // Known only when the ring is read.
            driver.notify(0);
            while driver.status() & NEEDS_RESET == 0 {
                std::thread::yield_now();
            }
        }
        assert_eq!(driver.status(), 15 | NEEDS_RESET, "{at:#x} {address:#x}");
        driver.reset();
        driver.start(0);
    }
}

#[test]
fn a_reset_is_done_only_when_the_request_in_flight_is() {
    let (mut driver, begun, go) = slow();
    driver.start(0);
    driver.offer(0, &[(BUFFERS, 8, true)]);
    driver.offer(0, &[(BUFFERS + 8, 8, true)]);
    driver.notify(0);
    assert_eq!(begun.recv(), Ok(8));
    driver.set_status(0);
    for _ in 0..100 {
        assert_ne!(driver.status(), 0, "a request is in flight");
    }
    go.send(()).unwrap();
    while driver.status() != 0 {
        std::thread::yield_now();
    }
    assert_eq!(driver.used(0), 0, "the old ring is not touched any more");
    assert_eq!(driver.chip.count(), 0);
    assert!(begun.try_recv().is_err(), "the second request is forgotten");
    driver.start(0);
    go.send(()).unwrap();
    assert_eq!(driver.run(0, &[(BUFFERS, 8, true)]), 4);
}

#[test]
fn a_driver_that_does_not_wait_for_the_reset_gets_its_new_ring_all_the_same() {
    let (mut driver, begun, go) = slow();
    driver.start(0);
    driver.offer(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    begun.recv().unwrap();
    driver.set_status(0);
    driver.start(0);
    driver.offer(0, &[(BUFFERS, 16, true)]);
    driver.notify(0);
    go.send(()).unwrap();
    assert_eq!(begun.recv(), Ok(16));
    assert_eq!(driver.used(0), 0);
    go.send(()).unwrap();
    assert_eq!(driver.finish(0), (0, 4));
}

#[test]
fn a_pause_waits_for_the_request_and_holds_the_next() {
    let (mut driver, begun, go) = slow();
    driver.start(0);
    for n in 0..2 {
        driver.offer(0, &[(BUFFERS + n * 8, 8, true)]);
    }
    driver.notify(0);
    begun.recv().unwrap();
    driver.dev.begin_pause();
    go.send(()).unwrap();
    driver.dev.pause();
    let done = driver.used(0);
    assert!(done == 1, "the request in flight is finished, the next not begun: {done}");
    driver.offer(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    assert!(begun.try_recv().is_err());
    driver.dev.resume();
    for _ in 0..2 {
        begun.recv().unwrap();
        go.send(()).unwrap();
    }
    for _ in 0..3 {
        driver.finish(0);
    }
    driver.dev.stop();
}

#[test]
fn a_machine_reset_clears_the_pci_side_too() {
    let (mut driver, _begun, _go) = slow();
    driver.dev.config_write(0x10, &0xfe00_0000u32.to_le_bytes());
    driver.start(0);
    assert_eq!(driver.dev.mapped_bars()[0].base, 0xfe00_0000);
    driver.dev.reset();
    assert_eq!((driver.status(), driver.config(4, 2), driver.config(0x10, 4)), (0, 0, 4));
    assert_eq!((driver.config(driver.msix + 2, 2), driver.read(3, 0, 1)), (1, 0));
    driver.dev.config_write(4, &6u16.to_le_bytes());
    driver.start(0);
}

#[test]
fn masked_vectors_wait_in_the_pending_array() {
    let (mut driver, _begun, go) = slow();
    driver.start(0);
    driver.mask_vector(1, true);
    driver.offer(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    go.send(()).unwrap();
    while driver.pending() == 0 {
        std::thread::yield_now();
    }
    assert_eq!((driver.pending(), driver.chip.count(), driver.used(0)), (2, 0, 1));
    driver.mask_vector(1, false);
    assert_eq!(driver.pending(), 0);
    driver.chip.wait(vector(0));
}

#[test]
fn without_msix_the_interrupt_status_tells() {
    let (mut driver, _begun, go) = slow();
    driver.start(0);
    driver.write(1, 0x1a, 2, u64::from(NO_VECTOR));
    driver.offer(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    go.send(()).unwrap();
    while driver.read(3, 0, 1) != 1 {
        std::thread::yield_now();
    }
    assert_eq!(driver.read(3, 0, 1), 0, "reading clears it");
    assert_eq!(driver.used(0), 1);
}

#[test]
fn the_configuration_window_reaches_the_registers() {
    let (mut driver, _begun, go) = slow();
    driver.start(0);
    let window = driver.window;
    let point = |at: u64, size: u32| {
        driver.dev.config_write(window + 4, &[0]);
        driver.dev.config_write(window + 8, &(at as u32).to_le_bytes());
        driver.dev.config_write(window + 12, &size.to_le_bytes());
    };
    point(driver.structures[&1] + 0x12, 2);
    assert_eq!(driver.config(window + 16, 4), 1, "num_queues");
    point(driver.structures[&4], 4);
    assert_eq!(driver.config(window + 16, 4), u64::from(u32::from_le_bytes(*b"0123")));
    for (at, size) in [(1, 4), (0, 3), (0, 0), (0xffff_fffc, 4)] {
        point(at, size);
        driver.config(window + 16, 4);
        driver.dev.config_write(window + 16, &[0xff; 4]);
    }
    assert_eq!(driver.status(), 15);
    point(driver.structures[&2], 2);
    driver.offer(0, &[(BUFFERS, 8, true)]);
    driver.dev.config_write(window + 16, &[0; 4]);
    go.send(()).unwrap();
    assert_eq!(driver.finish(0), (0, 4));
}

#[test]
fn wild_register_accesses_do_no_harm() {
    let (mut driver, _begun, _go) = slow();
    driver.start(0);
    let mut seed = 1u64;
    for _ in 0..20_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (offset, len) = (seed >> 20 & 0x7fff, 1usize << (seed >> 60 & 3));
        let mut bytes = (seed >> 3).to_le_bytes();
        let offset = offset & !(len as u64 - 1);
        driver.dev.bar_write(0, offset, &bytes[..len]);
        driver.dev.bar_read(0, offset, &mut bytes[..len]);
        let len = len.min(4);
        let offset = offset as usize & 0xfff & !(len - 1);
        driver.dev.config_write(offset, &bytes[..len]);
        driver.dev.config_read(offset, &mut bytes[..len]);
    }
    driver.dev.reset();
    driver.dev.config_write(4, &6u16.to_le_bytes());
    driver.start(0);
}
