//! What the tests of several devices share.

use std::sync::{Arc, Mutex};

use wardian_bus::{Access, Device};

use crate::wire::lock;

/// An access by vCPU 0.
pub(crate) fn at(offset: u64) -> Access {
    Access { offset, vcpu: 0 }
}

/// Reads `N` bytes at `offset`.
pub(crate) fn read<const N: usize>(device: &dyn Device, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    device.read(at(offset), &mut data);
    data
}

/// A writer whose bytes the test can look at.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedBuffer(Arc<Mutex<Vec<u8>>>);

impl SharedBuffer {
    pub(crate) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl std::io::Write for SharedBuffer {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
