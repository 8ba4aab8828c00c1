//! Configuration space with a type 0 header (PCI Local Bus Specification 3.0, chapter 6).

mod persist;

use super::MappedBar;

pub use persist::{ConfigRegisterState, ConfigState};

/// Bytes of configuration space of one function, PCI Express extended space included.
pub const CONFIG_SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const CAPABILITIES_END: usize = 0x100;
/// Memory space, bus master, parity response, SERR, interrupt disable (6.2.2). There are no I/O BARs.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Class code: base class, subclass and interface in bits 23:16, 15:8 and 7:0.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
}

/// A configuration space that cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The register does not exist, is taken, or the size is no power of two of at least 16 bytes.
    #[error("BAR {bar} cannot be {len:#x} bytes of {bits}-bit memory space")]
    Bar {
        /// Number of the register.
        bar: usize,
        /// Bytes asked for.
        len: u64,
        /// 32 or 64.
        bits: u32,
    },
    /// No room before offset 0x100.
    #[error("No room for {len} bytes of capability {id:#04x} in PCI configuration space")]
    Capability {
        /// Capability ID.
        id: u8,
        /// Bytes, header included.
        len: usize,
    },
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    index: usize,
    len: u64,
    wide: bool,
}

/// The registers of one function: 4 KiB of bytes, each with a mask of the bits that software may write.
///
/// A BAR needs nothing more than that: its address bits below its size are read-only zeros, which is how
/// software finds the size (6.2.5.1).
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    value: Vec<u8>,
    writable: Vec<u8>,
    bars: Vec<Bar>,
    last_capability: usize,
    free: usize,
}

impl ConfigSpace {
    /// A type 0 header for `identity`, without BARs and capabilities.
    #[must_use]
    pub fn new(identity: &Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            value: vec![0; CONFIG_SIZE],
            writable: vec![0; CONFIG_SIZE],
            bars: Vec::new(),
            last_capability: 0,
            free: FIRST_CAPABILITY,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x09, &identity.class.to_le_bytes()[..3]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.set_writable(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.set_writable(0x0c, &[0xff, 0xff]); // cache line size, latency timer
        space.set_writable(0x3c, &[0xff]); // interrupt line
        space
    }

    /// Sets bytes as the device, whatever software may write. What lies outside is left out.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        for (to, from) in self.value.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }

    /// Sets which bits software may write from `offset` on.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(offset).zip(mask) {
            *to = *from;
        }
    }

    /// Adds a 32-bit, non-prefetchable memory BAR.
    ///
    /// # Errors
    /// [`ConfigError::Bar`].
    pub fn add_bar32(&mut self, bar: usize, len: u64) -> Result<(), ConfigError> {
        self.add_bar(bar, len, false, 0)
    }

    /// Adds a 64-bit memory BAR, which takes registers `bar` and `bar + 1`.
    ///
    /// # Errors
    /// [`ConfigError::Bar`].
    pub fn add_bar64(&mut self, bar: usize, len: u64, prefetchable: bool) -> Result<(), ConfigError> {
        self.add_bar(bar, len, true, 0b0100 | u8::from(prefetchable) << 3)
    }

    fn add_bar(&mut self, index: usize, len: u64, wide: bool, kind: u8) -> Result<(), ConfigError> {
        let registers = |bar: &Bar| bar.index..bar.index + 1 + usize::from(bar.wide);
        let new = Bar { index, len, wide };
        let taken = self.bars.iter().any(|old| registers(old).any(|n| registers(&new).contains(&n)));
        let largest = if wide { 1 << 62 } else { 1 << 31 };
        if index > 5 - usize::from(wide) || taken || !len.is_power_of_two() || !(16..=largest).contains(&len)
        {
            return Err(ConfigError::Bar { bar: index, len, bits: if wide { 64 } else { 32 } });
        }
        let mask = (!(len - 1)).to_le_bytes();
        let at = BAR0 + 4 * index;
        self.set_writable(at, &mask[..if wide { 8 } else { 4 }]);
        self.set(at, &[kind]);
        self.bars.push(new);
        self.bars.sort_by_key(|bar| bar.index);
        Ok(())
    }

    /// Adds a capability to the end of the list: its ID, then `body` (what follows the two header bytes)
    /// of which software may write the bits in `writable`. Returns the offset of its header.
    ///
    /// # Errors
    /// [`ConfigError::Capability`].
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, ConfigError> {
        let (at, len) = (self.free, 2 + body.len());
        let end = (at + len).next_multiple_of(4);
        if end > CAPABILITIES_END {
            return Err(ConfigError::Capability { id, len });
        }
        let link = if self.last_capability == 0 { CAPABILITIES } else { self.last_capability + 1 };
        self.set(link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.set_writable(at + 2, &writable[..writable.len().min(body.len())]);
        self.set(STATUS, &[STATUS_CAPABILITIES]);
        (self.last_capability, self.free) = (at, end);
        Ok(at)
    }

    /// Reads as software; what lies outside reads as all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = self.value.get(offset.saturating_add(n)).copied().unwrap_or(0xff);
        }
    }

    /// Writes as software: only the writable bits change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let old = self.value.iter_mut().zip(&self.writable).skip(offset);
        for ((value, mask), new) in old.zip(data) {
            *value = *value & !mask | new & mask;
        }
    }

    /// The 16-bit register at `offset`.
    #[must_use]
    pub fn word(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The 32-bit register at `offset`.
    #[must_use]
    pub fn dword(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Whether the function decodes memory accesses (command register, bit 1).
    #[must_use]
    pub fn memory_enabled(&self) -> bool {
        self.word(COMMAND) & 1 << 1 != 0
    }

    /// Whether the function may access memory and send messages (command register, bit 2).
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.word(COMMAND) & 1 << 2 != 0
    }

    /// BARs that decode now: none while memory decoding is off; a BAR at address 0 or one that would wrap
    /// around the end of the address space does not decode.
    #[must_use]
    pub fn mapped_bars(&self) -> Vec<MappedBar> {
        if !self.memory_enabled() {
            return Vec::new();
        }
        let base = |bar: &Bar| {
            let at = BAR0 + 4 * bar.index;
            let high = if bar.wide { u64::from(self.dword(at + 4)) << 32 } else { 0 };
            (high | u64::from(self.dword(at))) & !(bar.len - 1)
        };
        let all = self.bars.iter().map(|bar| MappedBar { bar: bar.index, base: base(bar), len: bar.len });
        all.filter(|bar| bar.base != 0 && bar.base.checked_add(bar.len).is_some()).collect()
    }

    /// Register number and size in bytes of every BAR.
    #[must_use]
    pub fn bar_sizes(&self) -> Vec<(usize, u64)> {
        self.bars.iter().map(|bar| (bar.index, bar.len)).collect()
    }
}
