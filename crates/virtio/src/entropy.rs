//! The entropy device (virtio 1.2, 5.4).

use wardian_memory::GuestMemory;

use crate::{Chain, VirtioDevice};

/// Bytes that one request gets at most; a device may give less than asked for (5.4.6.2).
const MAX_BYTES: u64 = 16 * 1024;

pub(crate) struct Entropy;

impl VirtioDevice for Entropy {
    fn name(&self) -> &str {
        "virtio-rng"
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
        0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn handle(&self, _queue: usize, _features: u64, mem: &GuestMemory, chain: Chain) -> u32 {
        let mut bytes = vec![0; chain.writable.len().min(MAX_BYTES) as usize];
        match wardian_backend::entropy(&mut bytes) {
            Ok(()) => chain.writable.write(mem, &bytes) as u32,
            Err(error) => {
                tracing::error!("The host gives no random bytes: {error}");
                0
            }
        }
    }
}
