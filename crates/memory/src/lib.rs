//! Guest RAM: where it lies, checked access to it, and who is told about writes.
//!
//! *Comes in*: a size. *Goes out*: [`GuestMemory`], a set of regions backed by one memfd, readable and
//! writable through bounds-checked calls, through `vm-memory` (for virtqueues and loaders: [`Ram`]), and,
//! for engines alone, through host pointers.
//!
//! Layout: RAM below [`LOW_RAM_END`] is one region from address 0, the rest starts at [`HIGH_RAM_START`].
//!
//! **Architecture Invariant:** nothing here panics on an address that a guest chose; an address outside
//! RAM is an error value. **Architecture Invariant:** every write that does not come from translated code
//! goes through [`Ram`]'s bitmap hook ([`WriteTracker`]), so code caches learn of device DMA.
//!
//! **API Boundary:** [`GuestMemory`], [`Gpa`], [`Gva`], [`CodeListener`].

mod guest;
mod marks;
#[cfg(test)]
mod tests;

pub use guest::{GuestMemory, MemoryError, Ram};
pub use marks::{CodeListener, WriteTracker};

/// End of low RAM: the 32-bit hole for PCI, ECAM, IOAPIC, HPET and LAPIC begins here.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// Size of a page.
pub const PAGE_SIZE: u64 = 4096;

/// A guest physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A guest linear (virtual) address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gva(pub u64);

impl std::fmt::Display for Gpa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "gpa {:#x}", self.0)
    }
}

impl std::fmt::Display for Gva {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "gva {:#x}", self.0)
    }
}
