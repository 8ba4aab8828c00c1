//! The PCI root: one bus of up to 32 single-function devices behind a host bridge.
//!
//! Configuration space is reached by mechanism #1 (ports CF8h and CFCh; PCI Local Bus Specification 3.0,
//! 3.2.2.3.2) and by ECAM (PCI Express Base Specification 5.0, 7.2.2); memory BARs by two windows. A write
//! to configuration space that may move a BAR makes the map of BARs anew, so that an access to one looks
//! it up under one short shared lock.

mod bridge;
mod intx;
mod persist;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bridge::HostBridge;
use wardian_bus::pci::{Function, MappedBar};
use wardian_bus::{Access, Device};

pub use intx::{IntxLines, intx_gsi};
pub use persist::PciState;

use crate::layout;
use crate::power::{PowerRequest, PowerSink};
use crate::wire::lock;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const BAR0: usize = 0x10;
const BARS_END: usize = 0x28;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
/// BAR bits 2:1: the register and the next one hold a 64-bit address.
const BAR_WIDE: u32 = 0b100;

/// Bits of the address register that keep what is written.
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;
/// Bits of the reset control register that keep what is written.
const RESET_WRITABLE: u8 = 0x0e;

/// Devices on the bus.
const SLOTS: usize = 32;

/// A bus that cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// All device numbers are taken.
    #[error("No free device number on the PCI bus for {name}")]
    BusFull {
        /// Name of the function.
        name: String,
    },
    /// A BAR does not fit.
    #[error("No room in the {window}-bit PCI window for {len:#x} bytes of BAR {bar} of {name}")]
    WindowFull {
        /// Name of the function.
        name: String,
        /// Number of the BAR.
        bar: usize,
        /// Its length in bytes.
        len: u64,
        /// 32 or 64.
        window: u32,
    },
}

struct Mapping {
    slot: usize,
    bar: MappedBar,
    function: Arc<dyn Function>,
}

/// The bus. Lock order: `refresh`, then a function's own; `slots` and `map` are held over nothing.
pub struct PciRoot {
    bridge: Arc<HostBridge>,
    slots: RwLock<Vec<Arc<dyn Function>>>,
    /// BARs that decode, by address.
    map: RwLock<Vec<Mapping>>,
    /// Held while the map is made, so that the newest one stays.
    refresh: Mutex<()>,
    /// The address register of mechanism #1.
    address: AtomicU32,
    reset_control: AtomicU8,
}

impl PciRoot {
    /// A bus with only the host bridge, at device 0.
    #[must_use]
    pub fn new() -> Arc<PciRoot> {
        let bridge = Arc::new(HostBridge::new());
        Arc::new(PciRoot {
            slots: RwLock::new(vec![Arc::clone(&bridge) as _]),
            bridge,
            map: RwLock::default(),
            refresh: Mutex::default(),
            address: AtomicU32::new(0),
            reset_control: AtomicU8::new(0),
        })
    }

    /// Gives `function` the next device number.
    ///
    /// # Errors
    /// [`PciError::BusFull`].
    pub fn add(&self, function: Arc<dyn Function>) -> Result<u8, PciError> {
        let number = {
            let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
            if slots.len() >= SLOTS {
                return Err(PciError::BusFull { name: function.name().to_owned() });
            }
            slots.push(function);
            slots.len() - 1
        };
        self.refresh();
        Ok(number as u8)
    }

    /// Does what firmware does before boot: gives every memory BAR an address (64-bit ones in
    /// [`layout::PCI_MMIO64`], others in [`layout::PCI_MMIO32`]), turns memory decoding on, and notes the
    /// interrupt input of the function's pin.
    ///
    /// # Errors
    /// [`PciError::WindowFull`].
    pub fn assign(&self) -> Result<(), PciError> {
        struct Want {
            slot: usize,
            bar: usize,
            len: u64,
            wide: bool,
        }
        let slots = self.functions();
        let mut wants = Vec::new();
        for (slot, function) in slots.iter().enumerate() {
            let command = read_word(&**function, COMMAND);
            function.config_write(COMMAND, &(command & !COMMAND_MEMORY).to_le_bytes());
            for (bar, len) in function.bar_sizes() {
                let wide = read_dword(&**function, BAR0 + 4 * bar) & 0b110 == BAR_WIDE;
                wants.push(Want { slot, bar, len, wide });
            }
        }
        // The largest first: no gaps.
        wants.sort_by_key(|want| (std::cmp::Reverse(want.len), want.slot, want.bar));
        let (mut next32, mut next64) = (layout::PCI_MMIO32.start, layout::PCI_MMIO64.start);
        for Want { slot, bar, len, wide } in wants {
            let function = &slots[slot];
            let (next, end, window) = if wide {
                (&mut next64, layout::PCI_MMIO64.end, 64)
            } else {
                (&mut next32, layout::PCI_MMIO32.end, 32)
            };
            let base = next.checked_next_multiple_of(len.max(1));
            let place = base.and_then(|base| Some((base, base.checked_add(len)?)));
            let Some((base, after)) = place.filter(|(_, after)| *after <= end) else {
                return Err(PciError::WindowFull { name: function.name().to_owned(), bar, len, window });
            };
            *next = after;
            function.config_write(BAR0 + 4 * bar, &(base as u32).to_le_bytes());
            if wide {
                function.config_write(BAR0 + 4 * bar + 4, &((base >> 32) as u32).to_le_bytes());
            }
        }
        for (slot, function) in slots.iter().enumerate() {
            if !function.bar_sizes().is_empty() {
                let command = read_word(&**function, COMMAND) | COMMAND_MEMORY;
                function.config_write(COMMAND, &command.to_le_bytes());
            }
            let mut pin = [0];
            function.config_read(INTERRUPT_PIN, &mut pin);
            if (1..=4).contains(&pin[0]) {
                function.config_write(INTERRUPT_LINE, &[intx_gsi(slot as u8, pin[0]).0 as u8]);
            }
        }
        self.refresh();
        Ok(())
    }

    /// Its ports: mechanism #1, and the reset control register CF9h, which reports to `power`.
    #[must_use]
    pub fn ports(self: &Arc<Self>, power: Arc<dyn PowerSink>) -> (Range<u64>, Arc<dyn Device>) {
        (layout::PCI_CONFIG_PORTS, Arc::new(ConfigPorts { root: Arc::clone(self), power }))
    }

    /// Its physical memory: ECAM and the two windows of BARs.
    #[must_use]
    pub fn memory(self: &Arc<Self>) -> Vec<(Range<u64>, Arc<dyn Device>)> {
        let window = |range: Range<u64>| {
            let device: Arc<dyn Device> = Arc::new(Window { root: Arc::clone(self), base: range.start });
            (range, device)
        };
        vec![
            (layout::PCI_ECAM, Arc::new(Ecam { root: Arc::clone(self) })),
            window(layout::PCI_MMIO32),
            window(layout::PCI_MMIO64),
        ]
    }

    fn functions(&self) -> Vec<Arc<dyn Function>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn function(&self, address: ConfigAddress) -> Option<Arc<dyn Function>> {
        if address.bus != 0 || address.function != 0 {
            return None;
        }
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(usize::from(address.device)).cloned()
    }

    fn refresh(&self) {
        let _newest = lock(&self.refresh);
        let mut map: Vec<Mapping> = Vec::new();
        for (slot, function) in self.functions().into_iter().enumerate() {
            let mapping = |bar| Mapping { slot, bar, function: Arc::clone(&function) };
            map.extend(function.mapped_bars().into_iter().map(mapping));
        }
        map.sort_by_key(|mapping| mapping.bar.base);
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = map;
    }

    /// Who answers to `len` bytes at `address`: function, BAR and offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn Function>, usize, u64)> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let after = map.partition_point(|mapping| mapping.bar.base <= address);
        let Mapping { bar, function, .. } = map.get(after.checked_sub(1)?)?;
        let offset = address - bar.base;
        let room = bar.len.checked_sub(offset)?;
        (len as u64 <= room).then(|| (Arc::clone(function), bar.bar, offset))
    }

    fn config_read(&self, address: ConfigAddress, data: &mut [u8]) {
        let Some(function) = self.function(address) else {
            data.fill(0xff);
            return;
        };
        for (offset, range) in pieces(address.register, data.len()) {
            function.config_read(offset, &mut data[range]);
        }
    }

    fn config_write(&self, address: ConfigAddress, data: &[u8]) {
        let Some(function) = self.function(address) else { return };
        let mut moves = false;
        for (offset, range) in pieces(address.register, data.len()) {
            moves |= offset < COMMAND + 2 && offset + range.len() > COMMAND
                || offset < BARS_END && offset + range.len() > BAR0;
            function.config_write(offset, &data[range]);
        }
        if moves {
            self.refresh();
        }
    }

    /// The functions and their BARs, for `inspect`.
    #[must_use]
    pub fn inspect(&self) -> Vec<(String, String)> {
        let mut tree = Vec::new();
        for (slot, function) in self.functions().iter().enumerate() {
            let id = read_dword(&**function, 0);
            let (vendor, device) = (id & 0xffff, id >> 16);
            tree.push((format!("00:{slot:02x}.0/name"), function.name().to_owned()));
            tree.push((format!("00:{slot:02x}.0/id"), format!("{vendor:04x}:{device:04x}")));
        }
        for Mapping { slot, bar, .. } in self.map.read().unwrap_or_else(PoisonError::into_inner).iter() {
            let range = format!("{:#x}+{:#x}", bar.base, bar.len);
            tree.push((format!("00:{slot:02x}.0/bar{}", bar.bar), range));
        }
        tree
    }
}

fn read_word(function: &dyn Function, offset: usize) -> u16 {
    let mut data = [0; 2];
    function.config_read(offset, &mut data);
    u16::from_le_bytes(data)
}

fn read_dword(function: &dyn Function, offset: usize) -> u32 {
    let mut data = [0; 4];
    function.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// Cuts an access into aligned ones of 1, 2 or 4 bytes that stay inside of configuration space.
fn pieces(register: usize, len: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let size = match len {
        2 | 4 if register.is_multiple_of(len) => len,
        8 if register.is_multiple_of(4) => 4,
        _ => 1,
    };
    (0..len)
        .step_by(size)
        .map(move |at| (register + at, at..at + size))
        .filter(|(offset, range)| offset + range.len() <= 4096)
}

#[derive(Clone, Copy, Debug)]
struct ConfigAddress {
    bus: u8,
    device: u8,
    function: u8,
    register: usize,
}

struct ConfigPorts {
    root: Arc<PciRoot>,
    power: Arc<dyn PowerSink>,
}

impl ConfigPorts {
    /// Where the data port leads, if the enable bit is set.
    fn selected(&self, port: u64) -> Option<ConfigAddress> {
        let address = self.root.address.load(Ordering::Relaxed);
        (address >> 31 != 0).then_some(ConfigAddress {
            bus: (address >> 16) as u8,
            device: (address >> 11 & 0x1f) as u8,
            function: (address >> 8 & 7) as u8,
            register: (address & 0xfc) as usize + (port & 3) as usize,
        })
    }
}

impl Device for ConfigPorts {
    fn name(&self) -> &str {
        "pci-config"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        match (at.offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.root.address.load(Ordering::Relaxed).to_le_bytes()),
            (1, 1) => data[0] = self.root.reset_control.load(Ordering::Relaxed),
            (4..8, len) if at.offset + len as u64 <= 8 => match self.selected(at.offset) {
                Some(address) => self.root.config_read(address, data),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        match (at.offset, data) {
            (0, &[a, b, c, d]) => {
                let address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_WRITABLE;
                self.root.address.store(address, Ordering::Relaxed);
            }
            (1, &[value]) => {
                // Bit 2 going up resets the processor; bit 1 says how thoroughly.
                let old = self.root.reset_control.swap(value & RESET_WRITABLE, Ordering::Relaxed);
                if value & !old & 0x04 != 0 {
                    self.power.request(PowerRequest::Reset);
                }
            }
            (4..8, data) if at.offset + data.len() as u64 <= 8 => {
                if let Some(address) = self.selected(at.offset) {
                    self.root.config_write(address, data);
                }
            }
            _ => {}
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let mut tree = self.root.inspect();
        let address = self.root.address.load(Ordering::Relaxed);
        tree.push(("config_address".into(), format!("{address:#010x}")));
        tree
    }
}

struct Ecam {
    root: Arc<PciRoot>,
}

fn ecam_address(offset: u64) -> ConfigAddress {
    ConfigAddress {
        bus: (offset >> 20) as u8,
        device: (offset >> 15 & 0x1f) as u8,
        function: (offset >> 12 & 7) as u8,
        register: (offset & 0xfff) as usize,
    }
}

impl Device for Ecam {
    fn name(&self) -> &str {
        "pci-ecam"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        data.fill(0xff);
        self.root.config_read(ecam_address(at.offset), data);
    }

    fn write(&self, at: Access, data: &[u8]) {
        self.root.config_write(ecam_address(at.offset), data);
    }
}

struct Window {
    root: Arc<PciRoot>,
    base: u64,
}

impl Device for Window {
    fn name(&self) -> &str {
        "pci-window"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        match self.root.find(self.base.wrapping_add(at.offset), data.len()) {
            Some((function, bar, offset)) => function.bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        if let Some((function, bar, offset)) = self.root.find(self.base.wrapping_add(at.offset), data.len()) {
            function.bar_write(bar, offset, data);
        }
    }
}
