//! What a virtio device is beside its transport and its rings.

use wardian_memory::GuestMemory;

use wardian_state::Refused;

use crate::{Bell, Chain, OwnState, VirtioState};

/// `VIRTIO_F_RING_INDIRECT_DESC` (virtio 1.2, chapter 6).
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_RING_EVENT_IDX`.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// One device: what it says about itself, and what it does with a request.
pub trait VirtioDevice: Send + Sync + 'static {
    /// A short name, such as `virtio-blk`.
    fn name(&self) -> &str;
    /// Device type (virtio 1.2, chapter 5); the PCI device ID is 0x1040 more.
    fn device_type(&self) -> u16;
    /// PCI class code, bits 23:0.
    fn class(&self) -> u32;
    /// Largest size of each queue, a power of two.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Feature bits of this device type; the transport adds its own.
    fn features(&self) -> u64;
    /// The device-specific configuration, read-only.
    fn config(&self) -> &[u8];
    /// Gives the device a bell for each queue, for work that does not come from the driver.
    fn attach(&self, _bells: Vec<Bell>) {}
    /// Whether a request of `queue` could be handled now. If not, none is taken until the bell rings.
    fn ready(&self, _queue: usize) -> bool {
        true
    }
    /// Makes durable what the guest wrote; called when the machine stops, on any thread.
    fn flush(&self) {}
    /// What it holds besides what the driver can see, to be saved; it is paused.
    fn save(&self) -> OwnState {
        OwnState::None
    }
    /// Whether it was built from `saved`, or could be what saved it.
    ///
    /// # Errors
    /// When it is another device.
    fn check(&self, saved: &OwnState) -> Result<(), Refused> {
        Refused::unless::<VirtioState>(self.save() == *saved, "it belongs to another device")
    }
    /// Handles one request on the queue's worker thread; may wait for the host. `features` are the ones
    /// that the driver took. Returns the number of bytes written to the writable buffers from their start.
    fn handle(&self, queue: usize, features: u64, mem: &GuestMemory, chain: Chain) -> u32;
}
