//! virtio 1.2 devices over PCI: block, console, entropy.
//!
//! *Comes in*: register accesses of the driver through [`bus::pci::Function`], rings in guest memory.
//! *Goes out*: I/O on what [`backend`] holds, message-signalled interrupts.
//!
//! A device is split in three: [`PciTransport`] has the registers and never waits; a worker thread per
//! queue owns that queue's ring and does the I/O; a [`VirtioDevice`] knows what a request means. A driver's
//! notification only wakes the worker. Modern devices only; split rings with indirect descriptors and
//! event index.
//!
//! **Architecture Invariant:** what a ring holds is the guest's word: addresses, lengths, directions and
//! links are checked where they are read, and a ring that makes no sense stops its queue and sets
//! `DEVICE_NEEDS_RESET`; it stops nothing else. **Architecture Invariant:** all writes to guest memory go
//! through `vm-memory`'s tracked slices. **Architecture Invariant:** a reset is done, as the driver sees
//! it, when every worker has let go of the old rings.
//!
//! **API Boundary:** [`block`], [`console`], [`entropy`], each with what was saved of it or without,
//! [`PciTransport`], [`VirtioState`], [`VirtioDevice`].
//!
//! [`bus::pci::Function`]: wardian_bus::pci::Function
//! [`backend`]: wardian_backend

#![forbid(unsafe_code)]

mod block;
mod console;
mod device;
mod entropy;
mod persist;
mod ring;
#[cfg(test)]
mod tests;
mod transport;
mod worker;

use std::sync::Arc;

use wardian_backend::{Disk, Output};
use wardian_irq::IrqChip;
use wardian_memory::GuestMemory;

pub use console::ConsoleInput;
pub use device::VirtioDevice;
pub use persist::{OwnState, QueueState, VirtioState};
pub use ring::{Buffers, Chain};
pub use transport::PciTransport;
pub use worker::Bell;

/// A device that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// Its configuration space is too small for what it has; a mistake of the device's author.
    #[error("Could not lay out {name}")]
    Layout {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: wardian_bus::pci::ConfigError,
    },
    /// It was saved as something else.
    #[error(transparent)]
    State(#[from] wardian_state::Refused),
    /// The host has no threads left.
    #[error("Could not start a worker of {name}")]
    Worker {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn make(
    mem: &GuestMemory,
    chip: Arc<dyn IrqChip>,
    device: Arc<dyn VirtioDevice>,
    saved: Option<&VirtioState>,
) -> Result<Arc<PciTransport>, VirtioError> {
    match saved {
        Some(state) => PciTransport::restore(mem, chip, device, state),
        None => PciTransport::start(mem, chip, device),
    }
}

/// A block device on `disk` with `queues` queues (1 to 16, else clamped), each with a thread; paused, if it was `saved`.
///
/// # Errors
/// [`VirtioError`].
pub fn block(
    mem: &GuestMemory,
    chip: Arc<dyn IrqChip>,
    disk: Disk,
    queues: usize,
    saved: Option<&VirtioState>,
) -> Result<Arc<PciTransport>, VirtioError> {
    let mut device = block::Block::new(disk, queues);
    if let Some(state) = saved {
        device = device.with_id(&state.own);
    }
    make(mem, chip, Arc::new(device), saved)
}

/// A console with one port, which prints to `output` (hvc0 in Linux), and the way to type into it; paused, if it was
/// `saved`.
///
/// # Errors
/// [`VirtioError`].
pub fn console(
    mem: &GuestMemory,
    chip: Arc<dyn IrqChip>,
    output: Output,
    saved: Option<&VirtioState>,
) -> Result<(Arc<PciTransport>, ConsoleInput), VirtioError> {
    let input = saved.map_or_else(ConsoleInput::default, |state| ConsoleInput::of(&state.own));
    let device = console::Console::new(output, input.clone());
    Ok((make(mem, chip, Arc::new(device), saved)?, input))
}

/// A source of random bytes; paused, if it was `saved`.
///
/// # Errors
/// [`VirtioError`].
pub fn entropy(
    mem: &GuestMemory,
    chip: Arc<dyn IrqChip>,
    saved: Option<&VirtioState>,
) -> Result<Arc<PciTransport>, VirtioError> {
    make(mem, chip, Arc::new(entropy::Entropy), saved)
}
