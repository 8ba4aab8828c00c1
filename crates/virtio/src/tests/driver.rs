//! A small driver that finds its way by the capability list, as a guest does.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use wardian_bus::pci::Function;
use wardian_irq::{Delivery, Gsi, IrqChip, MsiMessage};
use wardian_memory::{Gpa, GuestMemory};

use crate::PciTransport;

pub const VERSION_1: u64 = 1 << 32;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const NEEDS_RESET: u8 = 64;
/// Where buffers may be.
pub const BUFFERS: u64 = 0x10_0000;
pub const RAM: u64 = 0x80_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// An interrupt chip that remembers the data of what it was sent.
#[derive(Default)]
pub struct Chip {
    seen: Mutex<Vec<u32>>,
    came: Condvar,
}

impl IrqChip for Chip {
    fn set_line(&self, _gsi: Gsi, _level: bool) -> Delivery {
        Delivery::Masked
    }
    fn signal_msi(&self, message: MsiMessage) -> Delivery {
        assert_eq!(message.address, 0xfee0_0000);
        self.seen.lock().unwrap().push(message.data);
        self.came.notify_all();
        Delivery::Accepted
    }
}

impl Chip {
    /// Waits for a message with `data` and takes it.
    pub fn wait(&self, data: u32) {
        let seen = self.seen.lock().unwrap();
        let without = |seen: &mut Vec<u32>| !seen.contains(&data);
        let (mut seen, late) = self.came.wait_timeout_while(seen, PATIENCE, without).unwrap();
        assert!(!late.timed_out(), "no interrupt {data}");
        let at = seen.iter().position(|one| *one == data).unwrap();
        seen.remove(at);
    }

    pub fn clear(&self) {
        self.seen.lock().unwrap().clear();
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

/// One descriptor: address, length, whether the device writes it.
pub type Piece = (u64, u32, bool);

#[derive(Clone, Copy)]
pub struct Queue {
    pub base: u64,
    pub size: u16,
    avail: u16,
    used: u16,
    descriptor: u16,
}

impl Queue {
    pub fn avail_at(&self) -> u64 {
        self.base + 0x1000
    }
    pub fn used_at(&self) -> u64 {
        self.base + 0x2000
    }
}

pub struct Driver {
    pub mem: GuestMemory,
    pub chip: Arc<Chip>,
    pub dev: Arc<PciTransport>,
    pub queues: Vec<Queue>,
    /// Structure type to offset in BAR 0.
    pub structures: BTreeMap<u8, u64>,
    /// Offset of the configuration access capability.
    pub window: usize,
    pub msix: usize,
    notify_step: u32,
}

pub fn memory() -> GuestMemory {
    GuestMemory::new(RAM).unwrap()
}

/// Message data of a queue's vector.
pub fn vector(queue: usize) -> u32 {
    100 + queue as u32
}

impl Driver {
    pub fn new(
        mem: GuestMemory,
        make: impl FnOnce(&GuestMemory, Arc<dyn IrqChip>) -> Arc<PciTransport>,
    ) -> Driver {
        let chip = Arc::new(Chip::default());
        let dev = make(&mem, Arc::clone(&chip) as Arc<dyn IrqChip>);
        let mut driver = Driver {
            mem,
            chip,
            dev,
            queues: Vec::new(),
            structures: BTreeMap::new(),
            window: 0,
            msix: 0,
            notify_step: 0,
        };
        assert_eq!(driver.config(0, 2), 0x1af4);
        assert_ne!(driver.config(6, 2) & 0x10, 0, "no capability list");
        let mut at = driver.config(0x34, 1) as usize;
        while at != 0 {
            match driver.config(at, 1) {
                0x11 => driver.msix = at,
                0x09 => {
                    let kind = driver.config(at + 3, 1) as u8;
                    assert_eq!(driver.config(at + 4, 1), 0, "BAR");
                    driver.structures.insert(kind, driver.config(at + 8, 4));
                    match kind {
                        2 => driver.notify_step = driver.config(at + 16, 4) as u32,
                        5 => driver.window = at,
                        _ => {}
                    }
                }
                other => panic!("capability {other:#x}"),
            }
            at = driver.config(at + 1, 1) as usize;
        }
        driver.dev.config_write(4, &6u16.to_le_bytes());
        driver
    }

    pub fn config(&self, offset: usize, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.dev.config_read(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    pub fn read(&self, structure: u8, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.dev.bar_read(0, self.structures[&structure] + offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    pub fn write(&self, structure: u8, offset: u64, len: usize, value: u64) {
        self.dev.bar_write(0, self.structures[&structure] + offset, &value.to_le_bytes()[..len]);
    }

    pub fn status(&self) -> u8 {
        self.read(1, 0x14, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.write(1, 0x14, 1, status.into());
    }

    pub fn offered(&self) -> u64 {
        let half = |select: u64| {
            self.write(1, 0, 4, select);
            self.read(1, 4, 4)
        };
        half(0) | half(1) << 32
    }

    /// Negotiates; says whether the device agreed.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(1);
        self.set_status(3);
        for half in 0..2 {
            self.write(1, 8, 4, half);
            self.write(1, 12, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.set_status(11);
        self.status() & 8 != 0
    }

    /// Resets and waits for it as drivers do.
    pub fn reset(&self) {
        self.set_status(0);
        while self.status() != 0 {
            std::thread::yield_now();
        }
        self.chip.clear();
    }

    /// Enables MSI-X with one vector for each queue and one for configuration changes.
    pub fn enable_msix(&self) {
        let table = self.config(self.msix + 4, 4) & !7;
        for n in 0..=self.config(self.msix + 2, 2) & 0x7ff {
            let data = if n == 0 { 99 } else { vector(n as usize - 1) };
            self.dev.bar_write(0, table + n * 16, &0xfee0_0000u64.to_le_bytes());
            self.dev.bar_write(0, table + n * 16 + 8, &u64::from(data).to_le_bytes());
        }
        self.dev.config_write(self.msix + 2, &0x8000u16.to_le_bytes());
    }

    pub fn mask_vector(&self, number: u64, masked: bool) {
        let table = self.config(self.msix + 4, 4) & !7;
        self.dev.bar_write(0, table + number * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    pub fn pending(&self) -> u64 {
        let mut bytes = [0; 8];
        self.dev.bar_read(0, self.config(self.msix + 8, 4) & !7, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// All that it takes until requests can be made.
    pub fn start(&mut self, features: u64) {
        assert!(self.negotiate(features | VERSION_1));
        self.enable_msix();
        self.write(1, 0x10, 2, 0);
        self.queues.clear();
        for queue in 0..self.read(1, 0x12, 2) {
            self.write(1, 0x16, 2, queue);
            let size = self.read(1, 0x18, 2).min(64) as u16;
            let base = 0x1_0000 + queue * 0x4000;
            self.mem.write(Gpa(base), &[0; 0x4000]).unwrap();
            self.write(1, 0x18, 2, size.into());
            self.write(1, 0x1a, 2, queue + 1);
            assert_eq!(self.read(1, 0x1a, 2), queue + 1);
            for (at, address) in [(0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)] {
                self.write(1, at, 4, address & 0xffff_ffff);
                self.write(1, at + 4, 4, address >> 32);
            }
            self.write(1, 0x1c, 2, 1);
            self.queues.push(Queue { base, size, avail: 0, used: 0, descriptor: 0 });
        }
        self.set_status(15);
        assert_eq!(self.status(), 15);
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write(Gpa(at), bytes).unwrap();
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    pub fn get16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at, 2).try_into().unwrap())
    }

    /// Writes one descriptor as it is.
    pub fn descriptor(&self, table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + u64::from(index) * 16, &bytes);
    }

    fn chain(&self, table: u64, first: u16, size: u16, pieces: &[Piece]) {
        for (n, (at, len, write)) in pieces.iter().enumerate() {
            let index = (first + n as u16) % size;
            let last = n + 1 == pieces.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, index, *at, *len, flags, (index + 1) % size);
        }
    }

    /// Offers a chain without telling the device; returns its head.
    pub fn offer(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let Queue { base, size, descriptor: head, .. } = self.queues[queue];
        self.chain(base, head, size, pieces);
        self.queues[queue].descriptor = (head + pieces.len() as u16) % size;
        self.offer_head(queue, head);
        head
    }

    /// The same through an indirect table at `table`.
    pub fn offer_indirect(&mut self, queue: usize, table: u64, pieces: &[Piece]) -> u16 {
        let Queue { base, size, descriptor: head, .. } = self.queues[queue];
        self.chain(table, 0, 4096, pieces);
        self.descriptor(base, head, table, pieces.len() as u32 * 16, INDIRECT_FLAG, 0);
        self.queues[queue].descriptor = (head + 1) % size;
        self.offer_head(queue, head);
        head
    }

    pub fn offer_head(&mut self, queue: usize, head: u16) {
        let Queue { size, avail, .. } = self.queues[queue];
        let at = self.queues[queue].avail_at();
        self.put(at + 4 + u64::from(avail % size) * 2, &head.to_le_bytes());
        self.put(at + 2, &avail.wrapping_add(1).to_le_bytes());
        self.queues[queue].avail = avail.wrapping_add(1);
    }

    pub fn notify(&self, queue: usize) {
        let at = u64::from(self.notify_step) * queue as u64;
        self.write(2, at, 2, queue as u64);
    }

    /// Entries in the used ring that were not taken yet.
    pub fn used(&self, queue: usize) -> u16 {
        self.get16(self.queues[queue].used_at() + 2).wrapping_sub(self.queues[queue].used)
    }

    /// Takes the next used entry: head and length.
    pub fn take(&mut self, queue: usize) -> (u16, u32) {
        assert_ne!(self.used(queue), 0);
        let Queue { size, used, .. } = self.queues[queue];
        let bytes = self.get(self.queues[queue].used_at() + 4 + u64::from(used % size) * 8, 8);
        let used = used.wrapping_add(1);
        self.queues[queue].used = used;
        // used_event: tell me of the next one.
        self.put(self.queues[queue].avail_at() + 4 + u64::from(size) * 2, &used.to_le_bytes());
        (
            u16::from_le_bytes([bytes[0], bytes[1]]),
            u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        )
    }

    /// Waits for one used entry by its interrupt and takes it.
    pub fn finish(&mut self, queue: usize) -> (u16, u32) {
        self.chip.wait(vector(queue));
        self.take(queue)
    }

    /// Offers, notifies, waits, and returns the length.
    pub fn run(&mut self, queue: usize, pieces: &[Piece]) -> u32 {
        let head = self.offer(queue, pieces);
        self.notify(queue);
        let (done, len) = self.finish(queue);
        assert_eq!(done, head);
        len
    }
}
