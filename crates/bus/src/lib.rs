//! Address spaces: which device answers at a port or a physical address.
//!
//! *Comes in*: an address, bytes, the number of the accessing vCPU. *Goes out*: a call to one [`Device`].
//!
//! **Architecture Invariant:** a bus holds no lock while a device runs; a device locks itself.
//! **Architecture Invariant:** what no device answers reads as all ones and swallows writes.
//!
//! **API Boundary:** [`Device`], [`Bus`], [`pci`].

#![forbid(unsafe_code)]

pub mod pci;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Where in a device an access goes, and who makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Offset from the start of the region at which the device was mapped.
    pub offset: u64,
    /// Number of the vCPU.
    pub vcpu: usize,
}

/// Something with registers. Locks itself; must not block on I/O.
pub trait Device: Send + Sync {
    /// A short name for messages and counters, such as `pit`.
    fn name(&self) -> &str;
    /// Reads `data.len()` (1, 2, 4 or 8) bytes.
    fn read(&self, at: Access, data: &mut [u8]);
    /// Writes `data.len()` (1, 2, 4 or 8) bytes.
    fn write(&self, at: Access, data: &[u8]);
    /// A named value tree of the device's state, for `inspect`.
    fn inspect(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

/// A region that cannot be mapped.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Two devices claim the same address.
    #[error("Device {new} at {range:#x?} overlaps device {old}")]
    Overlap {
        /// Name of the device that came second.
        new: String,
        /// Name of the device that is there.
        old: String,
        /// Range that was asked for.
        range: Range<u64>,
    },
}

/// One address space (ports or physical memory). Built once, then read only.
#[derive(Clone, Default)]
pub struct Bus {
    regions: BTreeMap<u64, (u64, Arc<dyn Device>)>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Maps `device` at `range`.
    ///
    /// # Errors
    /// When another device answers at a part of `range`.
    pub fn map(&mut self, range: Range<u64>, device: Arc<dyn Device>) -> Result<(), BusError> {
        if let Some((_, (end, old))) = self.regions.range(..range.end).next_back()
            && *end > range.start
        {
            return Err(BusError::Overlap { new: device.name().into(), old: old.name().into(), range });
        }
        self.regions.insert(range.start, (range.end, device));
        Ok(())
    }

    fn find(&self, address: u64) -> Option<(u64, &Arc<dyn Device>)> {
        let (start, (end, device)) = self.regions.range(..=address).next_back()?;
        (address < *end).then_some((address - start, device))
    }

    /// Reads; all ones if nobody answers. Says whether somebody did.
    pub fn read(&self, vcpu: usize, address: u64, data: &mut [u8]) -> bool {
        if let Some((offset, device)) = self.find(address) {
            device.read(Access { offset, vcpu }, data);
            return true;
        }
        data.fill(0xff);
        false
    }

    /// Writes; says whether somebody answered.
    pub fn write(&self, vcpu: usize, address: u64, data: &[u8]) -> bool {
        if let Some((offset, device)) = self.find(address) {
            device.write(Access { offset, vcpu }, data);
            return true;
        }
        false
    }

    /// Every mapped region: range and device.
    pub fn regions(&self) -> impl Iterator<Item = (Range<u64>, &Arc<dyn Device>)> {
        self.regions.iter().map(|(start, (end, device))| (*start..*end, device))
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.regions().map(|(range, device)| (range, device.name().to_owned())))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{Access, Bus, Device};
    use std::sync::Arc;

    struct Echo;
    impl Device for Echo {
        fn name(&self) -> &str {
            "echo"
        }
        fn read(&self, at: Access, data: &mut [u8]) {
            data.fill(at.offset as u8);
        }
        fn write(&self, _at: Access, _data: &[u8]) {}
    }

    #[test]
    fn finds_by_range_and_refuses_overlap() {
        let mut bus = Bus::new();
        bus.map(0x60..0x65, Arc::new(Echo)).unwrap();
        assert!(bus.map(0x64..0x66, Arc::new(Echo)).is_err());
        assert!(bus.map(0x50..0x61, Arc::new(Echo)).is_err());
        bus.map(0x65..0x66, Arc::new(Echo)).unwrap();
        let mut byte = [0];
        assert!(bus.read(0, 0x64, &mut byte));
        assert_eq!(byte, [4]);
        assert!(!bus.read(0, 0x66, &mut byte));
        assert_eq!(byte, [0xff]);
    }
}
