//! PCI functions: the contract ([`Function`]) and what every function is made of, its configuration
//! space ([`ConfigSpace`]) and its message-signalled interrupts ([`MsiX`]).
//!
//! *Comes in*: accesses to configuration space and BARs. *Goes out*: messages to the interrupt chip.
//! The numbers are those of the PCI Local Bus Specification 3.0.

mod config;
mod msix;
#[cfg(test)]
mod tests;

pub use config::{CONFIG_SIZE, ConfigError, ConfigRegisterState, ConfigSpace, ConfigState, Identity};
pub use msix::{MAX_VECTORS, MsiX};

/// One base address register as the guest has set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedBar {
    /// Number of the (first) register, 0-5.
    pub bar: usize,
    /// Base address in the memory space.
    pub base: u64,
    /// Length in bytes, a power of two.
    pub len: u64,
}

/// One PCI function with a type 0 header. Locks itself.
pub trait Function: Send + Sync {
    /// A short name, such as `virtio-blk`.
    fn name(&self) -> &str;
    /// Reads configuration space: `offset` + `data.len()` is at most 4096; 1, 2 or 4 bytes, aligned.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// Writes configuration space, same limits.
    fn config_write(&self, offset: usize, data: &[u8]);
    /// Memory BARs that decode now (empty while memory decoding is off in the command register).
    fn mapped_bars(&self) -> Vec<MappedBar>;
    /// Sizes of the memory BARs as (register, bytes), for whoever assigns addresses. Whether a BAR is 64
    /// bits wide stands in bits 2:1 of its register.
    fn bar_sizes(&self) -> Vec<(usize, u64)>;
    /// Reads `data.len()` bytes at `offset` in BAR `bar`.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);
    /// Writes at `offset` in BAR `bar`.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);
    /// A named value tree of the function's state, for `inspect`.
    fn inspect(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}
